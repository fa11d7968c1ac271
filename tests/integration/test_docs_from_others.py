"""docs/from-bullmq.md and docs/from-dbos.md: their projects work as they are printed."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from beatless import Plan
from beatless.testing import Kit

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n# (\S+)\.py\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {
    page: {name.replace("/", "."): code for name, code in BLOCK.findall((DOCS / page).read_text())}
    for page in ("from-bullmq.md", "from-dbos.md")
}
TESTS = [
    pytest.param(page, name, id=name)
    for page, modules in PAGES.items()
    for name in re.findall(r"^def (test_\w+)", next(reversed(modules.values())), re.MULTILINE)
]


@pytest.fixture
def project(page: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The names of each module of a page, which may import one another."""
    names = {}
    for module, code in PAGES[page].items():
        if module.endswith(".before"):
            continue  # what somebody has, in whose environment there is a DBOS
        made = ModuleType(module)
        if not module.startswith("tests."):
            package = module.partition(".")[0]
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
            monkeypatch.setitem(sys.modules, module, made)
        names[module] = vars(made)
        exec(code, names[module])
    return names


@pytest.fixture
def beatless_plans(project: dict[str, dict[str, Any]]) -> list[Plan]:
    (plans,) = [names["PLANS"] for names in project.values() if "PLANS" in names]
    return plans


@pytest.mark.parametrize(("page", "name"), TESTS)
def test_the_tests_of_the_page_pass(
    beatless: Kit, project: dict[str, dict[str, Any]], page: str, name: str
) -> None:
    (names,) = [each for module, each in project.items() if module.startswith("tests.")]
    names[name](beatless)


def test_each_page_has_its_tests() -> None:
    assert {page for page, *_ in (each.values for each in TESTS)} == PAGES.keys()
