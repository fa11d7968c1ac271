"""The test of docs/limits.md is executed as it is printed, with the plan of the page."""

import re
from pathlib import Path
from typing import Any

import pytest

from beatless import Plan
from beatless.testing import Kit

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"


@pytest.fixture
def page() -> dict[str, Any]:
    """What the first example and the test define."""
    text = PAGE.read_text()
    found: dict[str, Any] = {}
    for begin in ("from beatless import Limit", "# tests/test_billing.py"):
        (block,) = re.findall(rf"```python\n({begin}.*?)```", text, re.DOTALL)
        exec(block, found)
    return found


@pytest.fixture
def beatless_plans(page: dict[str, Any]) -> list[Plan]:
    return [page["billing"]]


def test_the_test_of_the_page_passes(beatless: Kit, page: dict[str, Any]) -> None:
    page["test_an_account_has_three_charges_at_once"](beatless)
