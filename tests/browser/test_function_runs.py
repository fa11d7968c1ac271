"""The page of a run whose plan is a function."""

from collections.abc import Callable, Sequence

import pytest
from playwright.sync_api import Page, expect

from beatless import Plan, RunContext, StepContext, days, plan, step
from beatless.testing import Kit

Opener = Callable[..., Page]


@step
def reserve(ctx: StepContext) -> str:
    return "reserved"


@plan("order")
def order(run: RunContext) -> str:
    stock = run.step(reserve)
    run.wait("paid", "refused", timeout=days(3))
    run.sleep(days(1))
    return stock


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [order]


def test_a_run_that_waits_says_for_which_signals_and_until_when(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("order").run_id
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    expect(page.locator("#state")).to_have_text("waiting")
    waits = page.locator("#waits-for")
    expect(waits).to_contain_text("paid or refused, until ")
    (opened,) = beatless.client.waits(run)
    until = "node => Date.parse(node.dateTime)"
    assert waits.locator("time").evaluate(until) == opened.until_ms
    expect(page.locator("#unknown-step")).to_have_count(0)

    beatless.signal(run, "paid")
    beatless.work_until_idle()
    expect(waits).to_contain_text("its time: until ")
    expect(page.locator("#unknown-step")).to_have_count(0)

    beatless.advance(86_401)
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    expect(waits).to_have_count(0)
