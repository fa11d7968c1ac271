"""The page of limits and groups, in a real Chromium."""

import re
from collections.abc import Callable, Sequence

import pytest
from playwright.sync_api import Locator, Page, expect

from beatless import Limit, Plan, StepContext, step
from beatless.auth import Tokens
from beatless.testing import Kit
from tests.browser.test_schedules import PHONE, contrast

Opener = Callable[..., Page]

NONE = "\N{EN DASH}"
HTML = "<img src=x onerror=alert(1)>"


@step
def charge(ctx: StepContext) -> None: ...


@step
def complete(ctx: StepContext) -> None: ...


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    stripe = Limit("stripe", key=lambda order: order["account"], at_once=1)
    return [
        Plan("charge", [charge], limits=[stripe]),
        Plan("complete", [complete], limits=[Limit("llm", rate="2/h")]),
    ]


def limit(page: Page, name: str, key: str = "") -> Locator:
    return page.locator(f'[data-limit="{name}"][data-key="{key}"]')


def group(page: Page, name: str) -> Locator:
    return page.locator(f'[data-group="{name}"]')


def cells(row: Locator) -> dict[str, str]:
    labelled = row.locator("[data-label]").all()
    return {str(cell.get_attribute("data-label")): cell.inner_text() for cell in labelled}


def is_old(text: str) -> bool:
    return text == "now" or re.fullmatch(r"\d+ (s|m)( \d+ s)?", text) is not None


def start(beatless: Kit, runs: int, account: str = "a", **options: str) -> list[str]:
    starts = [beatless.start_run("charge", {"account": account}, **options) for _ in range(runs)]
    return [run.run_id for run in starts]


def test_each_key_of_a_limit_and_each_group_has_its_runs_and_their_age(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    start(beatless, 3, group="tenant-7")
    for _ in range(3):
        beatless.start_run("complete")
    with beatless.crash("step.effect_done"):
        beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/limits")
    expect(page.locator("#limits tr")).to_have_count(2)
    found = cells(limit(page, "stripe", "a"))
    assert is_old(found.pop("oldest"))
    assert found == {"key": "a", "lets in": "1 at once", "running": "1", "waiting": "2"}
    found = cells(limit(page, "llm"))
    assert is_old(found.pop("oldest"))
    assert found == {"key": NONE, "lets in": "2/h", "running": NONE, "waiting": "1"}
    found = cells(group(page, "tenant-7"))
    assert found == {
        "queue": "default",
        "weight": "1",
        "running": "1",
        "waiting": "0",
        "oldest": NONE,
    }


def test_a_limit_is_changed_and_released_by_the_keyboard(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    start(beatless, 3)
    beatless.drain_outbox_once()
    page = open_page()
    page.goto(f"{url}/#/")
    keys = page.keyboard
    expect(page.locator("#plan")).to_be_visible()
    keys.press("l")
    row = limit(page, "stripe", "a")
    change = row.get_by_role("button", name="Change stripe (a)")
    release = row.get_by_role("button", name="Release stripe (a)")
    expect(row.locator("[data-label=waiting]")).to_have_text("2")
    expect(release).to_be_disabled()
    expect(release).to_have_attribute("title", "It is that of its plans: nobody has set another")
    keys.press("j")
    expect(change).to_be_focused()
    keys.press("Enter")
    dialog = page.get_by_role("dialog", name="Change stripe")
    expect(dialog.get_by_label("Runs of one key at once")).to_be_focused()
    keys.press("Control+a")
    keys.type("3")
    keys.press("Enter")
    expect(page.locator("#said")).to_contain_text("Limit stripe lets 3 at once.")
    expect(row.locator("[data-label='lets in']")).to_have_text("3 at once set")
    expect(change).to_be_focused()
    beatless.drain_outbox_once()
    expect(row).to_have_count(0)
    [state] = beatless.client.limits()
    assert (state.key, state.at_once, state.waiting) == (None, 3, 0)

    unused = limit(page, "stripe")
    unused.get_by_role("button", name="Release stripe").focus()
    keys.press("Enter")
    page.get_by_role("dialog", name="Release stripe?").get_by_role("button", name="Release").click()
    expect(page.locator("#said")).to_contain_text("Limit stripe is that of its plans again.")
    expect(unused).to_have_count(0)
    expect(page.locator("#main")).to_be_focused()
    assert beatless.client.limits() == []
    keys.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("limits and groups")


def test_a_limit_that_is_released_while_runs_wait_keeps_the_focus_in_its_row(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    beatless.client.set_limit("stripe", 1)
    start(beatless, 2)
    page = open_page()
    page.goto(f"{url}/#/limits")
    row = limit(page, "stripe", "a")
    row.get_by_role("button", name="Release stripe (a)").click()
    page.get_by_role("dialog").get_by_role("button", name="Release").press("Enter")
    expect(row.locator("[data-label='lets in']")).to_have_text("1 at once")
    expect(row.get_by_role("button", name="Change stripe (a)")).to_be_focused()


def test_a_rate_is_changed_and_a_bad_one_is_refused_in_the_dialog(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    for _ in range(3):
        beatless.start_run("complete")
    page = open_page(expected="422 (Unprocessable")
    page.goto(f"{url}/#/limits")
    row = limit(page, "llm")
    row.get_by_role("button", name="Change llm").click()
    dialog = page.get_by_role("dialog", name="Change llm")
    rate = dialog.get_by_label("Runs of one key that begin in a time")
    expect(rate).to_have_value("2/h")
    rate.fill("often")
    dialog.get_by_role("button", name="Set").click()
    expect(dialog.get_by_role("alert")).to_contain_text('as in rate="100/min"')
    rate.fill(" 500/min ")
    dialog.get_by_role("button", name="Set").click()
    expect(page.locator("#said")).to_contain_text("Limit llm lets 500/min.")
    expect(row.locator("[data-label='lets in']")).to_have_text("500/min set")


def test_a_group_is_weighed(beatless: Kit, url: str, open_page: Opener) -> None:
    start(beatless, 2, group="tenant-7")
    page = open_page()
    page.goto(f"{url}/#/limits")
    row = group(page, "tenant-7")
    row.get_by_role("button", name="Weigh tenant-7 in default").click()
    dialog = page.get_by_role("dialog", name="Weigh tenant-7")
    dialog.get_by_label("Weight, 1 to 100").fill("3")
    dialog.get_by_role("button", name="Set").click()
    expect(page.locator("#said")).to_contain_text("Group tenant-7 has 3 turns for one of the")
    expect(row.locator("[data-label=weight]")).to_have_text("3")
    expect(row.get_by_role("button", name="Weigh tenant-7 in default")).to_be_focused()
    [state] = beatless.client.groups()
    assert (state.group, state.weight) == ("tenant-7", 3)


def test_limits_and_groups_are_found_by_a_part_of_their_names(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    for account in ("acct_1", "acct_2"):
        start(beatless, 2, account=account, group=f"of {account}")
    page = open_page()
    page.goto(f"{url}/#/limits")
    expect(page.locator("#limits tr")).to_have_count(2)
    page.keyboard.press("/")
    page.keyboard.type("CT_2")
    expect(page.locator("#limits tr")).to_have_count(1)
    expect(group(page, "of acct_2")).to_be_visible()
    expect(page.locator("#groups tr")).to_have_count(1)
    page.reload()
    expect(page.locator("#limits tr")).to_have_count(1)
    page.get_by_label("find").fill("nobody")
    expect(page.get_by_text("None of the 2 listed has this in its name.")).to_have_count(2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_limits_and_groups_fit_every_screen_and_names_are_text(
    beatless: Kit, url: str, open_page: Opener, scheme: str
) -> None:
    start(beatless, 2, account="k" * 250, group="g" * 250)
    start(beatless, 2, account=HTML, group=HTML)
    page = open_page(color_scheme=scheme, viewport=PHONE)
    page.goto(f"{url}/#/limits")
    expect(page.locator("#limits tr")).to_have_count(2)
    expect(page.locator("#groups tr").get_by_text(HTML)).to_be_visible()
    expect(page.locator("#limits tr").get_by_text(HTML)).to_be_visible()
    assert page.locator("main img").count() == 0
    for width in (360, 800, 1180):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for card in page.locator(".card").all():
            assert card.evaluate("card => card.scrollWidth <= card.clientWidth")
    beatless.client.set_limit("stripe", 1)
    badge, card = page.locator(".badge").first, page.locator(".card").first
    ink = badge.evaluate("node => getComputedStyle(node).color")
    ground = card.evaluate("node => getComputedStyle(node).backgroundColor")
    assert contrast(ink, ground) >= 4.5


def test_a_token_without_the_scope_is_told_which(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, reader = tokens.create(["runs:read"])
    page = open_page(expected="403 (Forbidden)")
    page.add_init_script(f"sessionStorage.setItem('beatless-token', '{reader}')")
    page.goto(f"{url}/#/limits")
    expect(page.get_by_role("alert")).to_contain_text("queues")
