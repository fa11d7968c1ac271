"""The page of a run that is undone before it ends."""

from collections.abc import Callable, Sequence

import pytest
from playwright.sync_api import Page, expect

from beatless import Fatal, Plan, StepContext, Undone, retry, step
from beatless.testing import Kit

Opener = Callable[..., Page]


@step(retry=retry(max_attempts=2, initial=3600, cap=3600))
def refund(ctx: StepContext, undone: Undone) -> None:
    if ctx.attempt == 1:
        raise ConnectionError("the bank is closed")


@step(undo=refund)
def charge(ctx: StepContext) -> None: ...


@step
def deliver(ctx: StepContext) -> None:
    raise Fatal("nobody is at home")


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [Plan("bought", [charge, deliver])]


def test_a_run_that_is_undone_says_after_which_error(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("bought").run_id
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    expect(page.locator("#undone")).to_have_text("after Fatal: nobody is at home")
    expect(page.locator("#unknown-step")).to_have_count(0)

    beatless.advance(3601)
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("failed")
    expect(page.locator("#undone")).to_have_count(0)
