"""The page of schedules, in a real Chromium."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from playwright.sync_api import Locator, Page, expect

from beatless import App, Schedule
from beatless.auth import Tokens
from beatless.orchestrator.schedule import ScheduleState
from beatless.testing import Kit
from tests.browser.plans import checkout, payment, refund

Opener = Callable[..., Page]

NIGHTLY = Schedule(
    "nightly", checkout, cron="0 2 * * *", tz="Europe/Brussels", overlap="skip", jitter=60
)
NONE = "\N{EN DASH}"
PHONE = {"width": 360, "height": 700}


def row_of(page: Page, name: str) -> Locator:
    return page.locator(f"[data-schedule='{name}']")


def cell(page: Page, name: str, label: str) -> Locator:
    return row_of(page, name).locator(f"[data-label='{label}']")


def test_a_schedule_has_its_plan_rule_ticks_last_run_and_lateness(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    made = beatless.client.create_schedule(NIGHTLY)
    page = open_page(locale="en-GB", timezone_id="America/New_York")
    page.goto(f"{url}/#/schedules")
    row = row_of(page, "nightly")
    expect(cell(page, "nightly", "at")).to_have_text(
        "0 2 * * * Europe/Brussels overlap skip jitter 60 s"
    )
    expect(cell(page, "nightly", "last run")).to_have_text(NONE)
    expect(row.locator(".state")).to_have_text("active")
    row.get_by_label("The next ticks").click()
    ticks = row.locator(".ticks time")
    expect(ticks).to_have_count(5)
    for shown, tick in zip(ticks.all(), made.next_ticks(), strict=True):
        expect(shown).to_have_attribute("datetime", tick.isoformat())
        expect(shown).to_contain_text("02:00:00")

    beatless.advance(25 * 3600)
    [run] = beatless.client.list_runs()
    expect(cell(page, "nightly", "last run")).to_contain_text(f"{run.run_id[-8:]} ")
    expect(cell(page, "nightly", "late")).to_have_text(re.compile(r"\d m?s$"))
    expect(ticks).to_have_count(5)
    row.get_by_role("link", name="checkout").click()
    expect(page.locator("#runs tr")).to_have_attribute("data-run", run.run_id)
    page.goto(f"{url}/#/run/{run.run_id}")
    page.locator(".facts").get_by_role("link", name="nightly").click()
    expect(row).to_be_visible()
    assert page.url.endswith("#/schedules?from=nightly")


def test_a_schedule_is_paused_and_resumed_and_run_now(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    beatless.client.create_schedule(NIGHTLY)
    page = open_page()
    page.goto(f"{url}/#/schedules")
    row = row_of(page, "nightly")
    row.get_by_role("button", name="Pause nightly").click()
    expect(row.locator(".state")).to_have_text("paused")
    expect(cell(page, "nightly", "next tick").locator("summary")).to_have_text(NONE)
    assert beatless.schedules["nightly"].state is ScheduleState.PAUSED
    row.get_by_role("button", name="Resume nightly").click()
    expect(row.locator(".state")).to_have_text("active")
    row.get_by_role("button", name="Run nightly now").click()
    started = page.locator("#said").get_by_role("link", name="checkout")
    expect(started).to_be_visible()
    [run] = beatless.client.list_runs()
    assert run.schedule == "nightly"
    started.click()
    expect(page.locator("#run-id")).to_have_text(run.run_id)


def test_a_time_is_backfilled_and_that_cancelled(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    beatless.client.create_schedule(Schedule("daily", payment, cron="0 2 * * *"))
    page = open_page(expected="422 (Unprocessable", timezone_id="Asia/Tokyo")
    page.goto(f"{url}/#/schedules")
    row = row_of(page, "daily")

    def fill(start: str, end: str) -> Locator:
        row.get_by_label("More for daily").click()
        row.get_by_role("button", name="Backfill…", exact=True).click()
        dialog = page.get_by_role("dialog", name="Backfill daily")
        expect(dialog).to_contain_text("Asia/Tokyo")
        dialog.get_by_label("From").fill(start)
        dialog.get_by_label("To, exclusive").fill(end)
        dialog.get_by_role("button", name="Start the runs").click()
        return dialog

    dialog = fill("2096-01-01T00:00:00", "2096-01-02T00:00:00")
    expect(dialog.get_by_role("alert")).to_contain_text("is in the future")
    dialog.get_by_role("button", name="Back").click()
    fill("2026-05-01T11:00:00", "2026-05-04T11:00:00")
    said = page.locator("#said")
    expect(said).to_contain_text("3 runs of daily started.")
    first = datetime(2026, 5, 1, 2, tzinfo=UTC)
    ticks = sorted(run.tick for run in beatless.client.list_runs())
    assert ticks == [first + timedelta(days=number) for number in range(3)]
    said.get_by_role("button", name="Cancel them").click()
    expect(said).to_contain_text("3 runs of the backfill cancelled.")

    fill("2026-05-10T11:00:00", "2026-05-12T11:00:00")
    said.get_by_role("link", name="2 runs").click()
    expect(page.locator("#runs tr")).to_have_count(2)
    [(tag, id)] = beatless.client.list_runs()[0].tags.items()
    assert tag == "backfill"
    page.goto(f"{url}/#/schedules")
    row.get_by_label("More for daily").click()
    row.get_by_role("button", name="Cancel a backfill").click()
    page.get_by_role("dialog").get_by_label("Backfill").fill(id)
    page.get_by_role("dialog").get_by_role("button", name="Cancel its runs").click()
    expect(said).to_contain_text("2 runs of the backfill cancelled.")
    assert {run.state.value for run in beatless.client.list_runs()} == {"cancelled"}


def test_a_schedule_that_does_not_fire_says_why(
    beatless: Kit, beatless_app: App, url: str, open_page: Opener, postgres: psycopg.Connection
) -> None:
    app = App(beatless_app.settings, [checkout, payment, refund], schedules=[NIGHTLY])
    app.client.apply_schedules(app.schedules)
    app.client.apply_schedules([])
    app.close()
    for name in ("stopped", "newer"):
        beatless.client.create_schedule(Schedule(name, refund, cron="0 2 * * *"))
    key = f"schedule/stopped/{beatless.schedules['stopped'].next_tick:%Y-%m-%dT%H:%MZ}"
    beatless.start_run("refund", key=key)
    postgres.execute("UPDATE schedules SET cron = NULL, state = 'resting' WHERE name = 'newer'")
    beatless.advance(25 * 3600)
    page = open_page()
    page.goto(f"{url}/#/schedules")
    expect(row_of(page, "stopped").locator(".state")).to_have_text("stopped")
    expect(row_of(page, "stopped").locator(".why")).to_contain_text(f"the key {key} is used")
    expect(row_of(page, "nightly").locator(".state")).to_have_text("undeclared")
    resume = row_of(page, "nightly").get_by_role("button", name="Resume nightly")
    expect(resume).to_be_disabled()
    expect(resume).to_have_attribute(
        "title", "The app default declares it no more: declare it and migrate, or delete it"
    )
    expect(row_of(page, "newer").locator(".state")).to_have_text("resting")
    expect(cell(page, "newer", "at")).to_contain_text("by another rule")

    row_of(page, "nightly").get_by_label("More for nightly").click()
    row_of(page, "nightly").get_by_role("button", name="Delete…").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(row_of(page, "nightly")).to_have_count(0)
    expect(page.locator("#main")).to_be_focused()
    assert "nightly" not in beatless.schedules


def test_a_tick_that_nobody_fires_is_told(
    beatless: Kit, url: str, open_page: Opener, postgres: psycopg.Connection
) -> None:
    for name, jitter in (("late", 0), ("spread", 3600)):
        beatless.client.create_schedule(Schedule(name, refund, every=3600, jitter=jitter))
    postgres.execute("UPDATE schedules SET tick = clock_timestamp() - interval '90 s'")
    page = open_page()
    page.goto(f"{url}/#/schedules")
    expect(cell(page, "late", "late")).to_have_text(re.compile(r"due for \d+ m( \d+ s)?$"))
    expect(cell(page, "late", "next tick").locator("summary")).to_have_text("now")
    expect(cell(page, "spread", "late")).to_have_text(NONE)


def test_schedules_are_found_by_name_and_turned_in_pages(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    names = [f"sync-{number:03}" for number in range(60)]
    for name in names:
        beatless.client.create_schedule(Schedule(name, refund, cron="0 2 * * *"))
    page = open_page()
    page.goto(f"{url}/#/schedules")
    rows = page.locator("#schedules tr")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="After").click()
    expect(rows).to_have_count(10)
    expect(rows.first).to_have_attribute("data-schedule", names[50])
    page.get_by_role("button", name="Before").click()
    expect(rows).to_have_count(50)
    page.get_by_label("from the name").fill("sync-05")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(10)
    page.reload()
    expect(rows).to_have_count(10)
    expect(rows.first).to_have_attribute("data-schedule", "sync-050")
    page.get_by_label("from the name").fill("sync-059")
    page.keyboard.press("Enter")
    expect(rows).to_have_count(1)
    page.get_by_label("from the name").fill("t")
    page.keyboard.press("Enter")
    expect(page.get_by_text("No schedule has a name from there on")).to_be_visible()


def test_schedules_are_worked_with_by_the_keyboard(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    beatless.client.create_schedule(NIGHTLY)
    page = open_page()
    page.goto(f"{url}/#/")
    keys = page.keyboard
    keys.press("h")
    row = row_of(page, "nightly")
    expect(row).to_be_visible()
    keys.press("j")
    expect(row.get_by_role("button", name="Pause nightly")).to_be_focused()
    keys.press("Enter")
    expect(row.get_by_role("button", name="Resume nightly")).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    keys.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("schedules")
    keys.press("Escape")
    row.get_by_role("button", name="Resume nightly").focus()
    keys.press("Enter")
    expect(row.get_by_role("button", name="Pause nightly")).to_be_focused()
    keys.press("Shift+Tab")
    expect(row.get_by_label("The next ticks")).to_be_focused()
    keys.press("Enter")
    expect(row.locator(".ticks time")).to_have_count(5)
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    expect(page.locator("#said")).to_contain_text("Started checkout")
    keys.press("Tab")
    keys.press("Enter")
    row.get_by_role("button", name="Backfill…", exact=True).press("Escape")
    expect(row.get_by_label("More for nightly")).to_be_focused()
    keys.press("/")
    expect(page.get_by_label("from the name")).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_schedules_fit_every_screen(
    beatless: Kit, url: str, open_page: Opener, postgres: psycopg.Connection, scheme: str
) -> None:
    beatless.client.create_schedule(NIGHTLY)
    beatless.client.create_schedule(Schedule("y" * 60, refund, every=3600))
    beatless.advance(25 * 3600)
    postgres.execute(
        "UPDATE schedules SET state = 'stopped', reason = repeat('x', 300) WHERE name = 'nightly'"
    )
    page = open_page(color_scheme=scheme, viewport=PHONE)
    page.goto(f"{url}/#/schedules")
    expect(page.locator("#schedules tr")).to_have_count(2)
    page.get_by_label(f"The next ticks of {'y' * 60}").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for button in row_of(page, "nightly").locator("td > button").all():
        button.scroll_into_view_if_needed()
        expect(button).to_be_in_viewport(ratio=1)
    for width in (800, 1180):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.locator(".card").evaluate("card => card.scrollWidth <= card.clientWidth")
    ink, ground = (
        page.locator(".state").first.evaluate("node => getComputedStyle(node).color"),
        page.locator(".card").evaluate("node => getComputedStyle(node).backgroundColor"),
    )
    assert contrast(ink, ground) >= 4.5


def contrast(one: str, other: str) -> float:
    """Of two CSS colours, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(", ")]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_who_may_only_read_schedules_changes_none(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    beatless.client.create_schedule(NIGHTLY)
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, reader = tokens.create(["runs:read"])
    page = open_page()
    page.add_init_script(f"sessionStorage.setItem('beatless-token', '{reader}')")
    page.goto(f"{url}/#/schedules")
    for name in ("Pause nightly", "Run nightly now"):
        button = row_of(page, "nightly").get_by_role("button", name=name)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", "This token lacks the scope runs:write")


def test_names_and_reasons_are_text(
    beatless: Kit, url: str, open_page: Opener, postgres: psycopg.Connection
) -> None:
    beatless.client.create_schedule(NIGHTLY)
    html = "<img src=x onerror=alert(1)>"
    postgres.execute("UPDATE schedules SET state = 'stopped', reason = %s, tz = %s", (html, html))
    page = open_page()
    page.goto(f"{url}/#/schedules")
    expect(row_of(page, "nightly").locator(".why")).to_have_text(html)
    expect(cell(page, "nightly", "at")).to_contain_text(html)
    assert page.locator("main img").count() == 0
