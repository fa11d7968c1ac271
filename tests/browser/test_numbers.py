"""Values as they are stored: a browser's numbers have 53 bits, JSON's have any number."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from playwright.sync_api import Page, expect

from beatless import Fatal, Plan, RunContext, StepContext, plan, step
from beatless.testing import Kit

Opener = Callable[..., Page]

BIG = 1970670598291982290
VALUE = {"id": BIG, "list": [2**64 + 1, -(2**53) - 1, 1.0, 0.1, 1e22], "9": 1, "1": 2, "o": {}}
PARTS = ("1970670598291982290", "18446744073709551617", "-9007199254740993", "1.0", "0.1")


@step
def echo(ctx: StepContext) -> object:
    ctx.trace("seen", id=BIG, half=2.0)
    if (ctx.input or {}).get("fail"):
        raise Fatal(f"nobody has the number {BIG}")
    return ctx.input


@step
def last(ctx: StepContext) -> int:
    return BIG


@dataclass
class Choice:
    account: int = BIG
    other: int = 0
    way: Literal[1970670598291982290, 3] = 3
    lines: Any = BIG


@plan("asks")
def asks(run: RunContext) -> Any:
    found = run.approve("Which?", form=Choice, name="which").data
    return [found.account, found.other, found.way, found.lines, run.wait("paid").data]


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [Plan("echo", [echo, last]), asks]


def test_what_is_stored_is_shown(beatless: Kit, url: str, open_page: Opener) -> None:
    run = beatless.start_run("echo", VALUE)
    page = open_page()
    page.goto(f"{url}/#/run/{run.run_id}")
    expect(page.locator("#status")).to_have_text("Live")
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    for _ in ("by the stream", "by the past"):
        expect(page.locator("#outcome pre")).to_have_text(str(BIG))
        page.locator(".input > summary").click()
        for part in PARTS:
            expect(page.locator(".input pre")).to_contain_text(part)
        page.get_by_role("button", name="echo").click()
        expect(page.locator("#detail .traces")).to_contain_text(f'"id":{BIG}')
        expect(page.locator("#detail .traces")).to_contain_text('"half":2.0')
        for part in PARTS:
            expect(page.locator("#detail pre").last).to_contain_text(part)
        row = page.locator('#events tr[class="StepFinished"]').first
        row.locator("summary").click()
        for part in PARTS:
            expect(row.locator("pre")).to_contain_text(part)
        page.get_by_label("Find in events").fill(str(BIG))
        expect(page.locator("#events tr")).not_to_have_count(0)
        text = page.locator("body").text_content() or ""
        assert "19706705982919823" not in text
        assert "9007199254740992" not in text
        page.reload()
        expect(page.locator("#status")).to_have_text("Ended")


def test_an_error_and_what_a_retry_takes_over_are_shown_as_they_are(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    failed = beatless.start_run("echo", {"fail": True})
    done = beatless.start_run("echo", VALUE)
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{failed.run_id}")
    expect(page.locator("#outcome .message")).to_contain_text(str(BIG))
    again = beatless.client.retry_run(done.run_id, "last")
    page.goto(f"{url}/#/run/{again.run_id}")
    # The page before has a step of that name, too.
    expect(page.get_by_role("heading", level=1)).to_contain_text(again.run_id[-8:])
    page.get_by_role("button", name="echo").click()
    for part in PARTS:
        expect(page.locator("#detail pre")).to_contain_text(part)


TYPED = (
    f'{{"id": {BIG}}}',
    str(2**70),
    "-9007199254740993",
    '[1.0, 0.30000000000000004, -0.50, 0.0, -0, 1e3, 1E-7, 120e-1, {"2": 1, "1": 2}]',
    '"\\u00e9 \\" \\\\ {1970670598291982290,}"',
    " [ ] ",
    "false",
)


def test_what_is_typed_is_stored(beatless: Kit, url: str, open_page: Opener) -> None:
    page = open_page()
    page.goto(url)
    dialog = page.get_by_role("dialog")
    for typed in TYPED:
        page.get_by_role("button", name="New run").click()
        dialog.get_by_label("Input, as JSON").fill(typed)
        dialog.get_by_role("button", name="Start").click()
        expect(dialog).to_have_count(0)
        (stored,) = beatless.client.list_runs(limit=1)
        expected = json.loads(typed)
        assert json.dumps(stored.input, sort_keys=True) == json.dumps(expected, sort_keys=True)


def test_what_is_typed_into_a_decision_and_a_signal_is_stored(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("asks").run_id
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    card = page.get_by_role("form", name="Approval")
    expect(card.get_by_label("Account")).to_have_value(str(BIG))
    expect(card.get_by_label("Lines")).to_have_value(str(BIG))
    card.get_by_label("Other").fill(str(BIG + 1))
    card.get_by_label("Way").select_option(label=str(BIG))
    card.get_by_label("Lines").fill("[1.10]")
    card.get_by_label("You are").fill("ann@example.com")
    card.get_by_role("button", name="Send the decision").click()
    expect(page.locator("#said")).to_contain_text("Decided")
    beatless.work_until_idle()

    page.get_by_role("button", name="Signal", exact=True).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Data (JSON)").fill("[0.12345678901234567890]")
    dialog.get_by_role("button", name="Send").click()
    expect(dialog.get_by_role("alert")).to_contain_text("The data cannot be stored as it is")
    dialog.get_by_label("Data (JSON)").fill(TYPED[0])
    dialog.get_by_role("button", name="Send").click()
    expect(dialog).to_have_count(0)
    beatless.work_until_idle()
    expected = [BIG, BIG + 1, BIG, [1.1], {"id": BIG}]
    assert beatless.client.get_run(run).result == expected


REFUSED = (
    ('{"a": 1', "not JSON"),
    ("01", "not JSON"),
    ('1}, "plan": "other", {', "not JSON"),
    ("NaN", "not JSON"),
    ('{"a": {"b": 1, "c": 2, "b": 3}}', '"b" stands twice'),
    ('{"a": 1, "\\u0061": 2}', '"a" stands twice'),
    ("[0.12345678901234567890]", "0.12345678901234567890 has more digits"),
    ("9007199254740993.0", "9007199254740993.0 has more digits"),
    ("1e400", "1e400 has more digits"),
    ("9" * 5000, "more than 4300 digits"),
)


def test_what_cannot_be_stored_is_refused(beatless: Kit, url: str, open_page: Opener) -> None:
    page = open_page(expected="the server responded with a status of 4")
    page.goto(url)
    page.get_by_role("button", name="New run").click()
    dialog = page.get_by_role("dialog")
    for typed, told in REFUSED:
        dialog.get_by_label("Input, as JSON").fill(typed)
        dialog.get_by_role("button", name="Start").click()
        expect(dialog.get_by_role("alert")).to_contain_text(told)
    assert beatless.client.list_runs() == []
