"""Many windows of one browser, which opens six connections to a host and no more."""

from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from beatless.testing import Kit

Opener = Callable[..., Page]

STREAMS = """async (wanted) => {
  const text = await (await fetch("metrics")).text();
  return new RegExp(`^beatless_streams_open ${wanted}(\\.0)?$`, "m").test(text);
}"""
HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
LEAVE = "name => dispatchEvent(new PageTransitionEvent(name, { persisted: true }))"


def expect_streams(page: Page, wanted: str) -> None:
    """Waits until the server has so many."""
    page.wait_for_function(STREAMS, arg=wanted)


def window(context: BrowserContext, address: str) -> Page:
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#status")).to_have_text("Live")
    return page


def test_seven_windows_that_are_seen_follow_seven_runs(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    runs = [beatless.start_run("refund").run_id for _ in range(7)]
    context = open_page().context
    pages = [window(context, f"{url}/#/run/{run}") for run in runs]
    others = [window(context, f"{url}/#/"), window(context, f"{url}/#/queues")]
    expect(others[0].locator("#runs tr")).to_have_count(7)
    expect_streams(others[0], "[1-4]")
    beatless.work_until_idle()
    for page in pages:
        expect(page.locator("#state")).to_have_text("completed")
        expect(page.locator("#events tr")).to_have_count(4)
    expect_streams(others[0], "0")


def test_a_window_takes_the_stream_that_another_one_leaves(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    runs = [beatless.start_run("refund").run_id for _ in range(4)]
    context = open_page().context
    pages = [window(context, f"{url}/#/run/{run}") for run in runs]
    expect_streams(pages[0], "3")
    for page in pages[:3]:
        page.close()
    expect_streams(pages[3], "1")


@pytest.mark.parametrize(
    ("script", "away", "back"),
    [(HIDE, True, False), (LEAVE, "pagehide", "pageshow")],
    ids=["hidden", "left"],
)
def test_a_window_that_nobody_sees_holds_no_stream(
    beatless: Kit, url: str, open_page: Opener, script: str, away: object, back: object
) -> None:
    run = beatless.start_run("refund").run_id
    context = open_page().context
    page, other = window(context, f"{url}/#/run/{run}"), window(context, f"{url}/#/")
    expect_streams(other, "1")
    page.evaluate(script, away)
    expect_streams(other, "0")
    beatless.work_until_idle()
    assert page.locator("#events tr").count() == 1
    page.evaluate(script, back)
    expect(page.locator("#state")).to_have_text("completed")
    expect(page.locator("#events tr")).to_have_count(4)


def test_without_locks_the_window_that_has_the_focus_streams(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    """As over plain http from another machine, where browsers have no Web Locks."""
    runs = [beatless.start_run("refund").run_id for _ in range(2)]
    context = open_page().context
    context.add_init_script("delete Navigator.prototype.locks")
    page = window(context, f"{url}/#/run/{runs[0]}")
    expect_streams(page, "1")
    context.add_init_script("document.hasFocus = () => false")
    other = window(context, f"{url}/#/run/{runs[1]}")
    beatless.work_until_idle()
    for one in (page, other):
        expect(one.locator("#state")).to_have_text("completed")
