"""The page of a run whose step emits: text that grows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from beatless import Plan
from beatless.testing import Kit
from tests.browser.plans import answers

Opener = Callable[..., Page]

HALF = '<b>Hello</b> {"tool": 12345678901234567890}\n'


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [answers]


def test_output_grows_as_text_and_begins_anew_with_the_next_attempt(
    fleet: Kit, url: str, open_page: Opener, tmp_path: Path
) -> None:
    run = fleet.client.start_run("answers", {"gates": str(tmp_path)}).run_id
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    text, title = page.locator("#output"), page.locator("section.output h2")
    for attempt, called in ((1, "Output of answer"), (2, "Output of answer (attempt 2)")):
        expect(title).to_have_text(called)
        expect(text).to_have_text(HALF)
        (tmp_path / f"half {attempt}").touch()
    expect(text).to_have_text(f"{HALF}the end")
    expect(page.locator("#state")).to_have_text("completed")
    page.reload()
    expect(text).to_have_text(f"{HALF}the end")
