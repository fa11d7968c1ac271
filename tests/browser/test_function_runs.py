"""The page of a run whose plan is a function."""

import re
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_UP, Decimal

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


parcel = Plan("parcel", [reserve])


@step
def publish(ctx: StepContext) -> None:
    """Never called."""


@plan("parcels")
def parcels(run: RunContext) -> None:
    run.map(parcel, [1, 2])
    if run.wait("reviewed", timeout=days(3)) is None:
        run.step(publish)


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [order, parcel, parcels]


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


def test_the_timeline_of_a_function_promises_no_step_and_shows_how_long_it_waited(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("parcels").run_id
    beatless.step(run)
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    took = {
        name: page.locator(f'[data-step="{name}"] .took')
        for name in ("parcel", "reviewed", "publish")
    }
    expect(page.locator("#waits-for")).to_have_text("its children")
    expect(took["publish"]).to_have_text("may come")
    expect(took["parcel"]).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    expect(page.get_by_text("Not before")).to_have_count(0)

    beatless.work_until_idle()
    expect(page.locator("#waits-for")).to_contain_text("reviewed, until ")
    expect(took["publish"]).to_have_text("may come")
    expect(page.get_by_text("Not before")).to_have_count(0)
    ts = {event.type: event.ts for event in beatless.client.events(run)}
    expect(took["parcel"]).to_have_text(in_words(ts["ChildrenFinished"] - ts["ChildrenStarted"]))

    beatless.signal(run, "reviewed")
    beatless.work_until_idle()
    ts = {event.type: event.ts for event in beatless.client.events(run)}
    expect(took["reviewed"]).to_have_text(in_words(ts["WaitFinished"] - ts["WaitStarted"]))
    expect(took["publish"]).to_have_text("not reached")


def in_words(ms: int) -> str:
    """A duration as the page shows it."""
    if ms < 1000:
        return f"{ms} ms"
    places = Decimal("0.01" if ms < 10_000 else "0.1")
    return f"{Decimal(ms / 1000).quantize(places, ROUND_HALF_UP)} s"  # of halves, as JavaScript
