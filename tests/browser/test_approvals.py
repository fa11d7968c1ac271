"""A person decides: on the card of the run page, and on the page behind a link."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from beatless import Plan, RunContext, days, plan
from beatless.api import create_api
from beatless.testing import Kit
from tests.browser.test_mounted import AT, in_fastapi
from tests.serving import hosting

Opener = Callable[..., Page]

ANN = "ann@example.com"
PHONE = {"width": 360, "height": 700}


@dataclass
class Refund:
    amount: int
    way: Literal["bank", "voucher"]
    again: bool = False
    reason: str | None = None


@plan("complaint")
def complaint(run: RunContext) -> dict:
    found = run.approve("Refund <b>order 7</b>?", form=Refund, timeout=days(3), name="refund")
    return {"amount": found.data.amount, "way": found.data.way, "by": found.by}


@plan("release")
def release(run: RunContext) -> list:
    found = run.approve("Release it?")
    return [found.data.approved, found.data.comment, found.by]


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [complaint, release]


def waiting(beatless: Kit, name: str) -> str:
    run = beatless.start_run(name).run_id
    beatless.work_until_idle()
    return run


def test_the_card_shows_the_form_and_what_it_refuses_and_decides(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = waiting(beatless, "complaint")
    page = open_page(expected="422 (Unprocessable")
    page.goto(f"{url}/#/run/{run}")
    card = page.get_by_role("form", name="Approval")
    expect(card.get_by_role("heading")).to_have_text("Refund <b>order 7</b>?")
    expect(page.locator("#waits-for")).to_contain_text("a person, until ")
    expect(page.get_by_role("button", name="Signal", exact=True)).to_be_hidden()
    page.keyboard.press("a")
    expect(card.get_by_label("Amount")).to_be_focused()
    card.get_by_label("Amount").fill("7")
    card.get_by_label("Way").select_option("voucher")
    card.get_by_label("Yes").check()
    card.get_by_label("Reason").fill("late")
    card.get_by_label("You are").fill(" ")
    card.get_by_role("button", name="Send the decision").click()
    expect(card.get_by_role("alert")).to_contain_text("by")
    card.get_by_label("You are").fill(ANN)
    with page.expect_request("**/approvals/refund%231"):  # this question, and no later one
        card.get_by_role("button", name="Send the decision").click()
    expect(page.locator("#said")).to_contain_text("Decided")
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    expect(card).to_have_count(0)
    found = {"amount": 7, "way": "voucher", "by": ANN}
    assert beatless.client.get_run(run).result == found


def test_a_verdict_has_two_buttons_and_the_second_person_is_told(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = waiting(beatless, "release")
    page = open_page(expected="409 (Conflict")
    page.goto(f"{url}/#/run/{run}")
    card = page.get_by_role("form", name="Approval")
    expect(card.get_by_label("Comment")).to_be_visible()
    page.keyboard.press("a")
    expect(card.get_by_label("Comment")).to_be_focused()
    card.get_by_label("Comment").fill("not today")
    card.get_by_label("You are").fill(ANN)
    card.get_by_label("You are").press("Enter")  # decides nothing
    beatless.drain_outbox_once()
    card.get_by_role("button", name="Reject").click()
    expect(page.locator("#said")).to_contain_text("Decided")
    card.get_by_role("button", name="Approve").click()
    expect(card.get_by_role("alert")).to_contain_text(f"was decided by {ANN}")
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    assert beatless.client.get_run(run).result == [False, "not today", ANN]


def test_the_list_says_which_runs_wait_for_a_person(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = waiting(beatless, "release")
    page = open_page()
    page.goto(f"{url}/#/?state=waiting")
    row = page.locator(f"[data-run='{run}']")
    expect(row.locator(".state")).to_have_text("waiting for a person")
    beatless.approve(run, "Release_it")
    beatless.work_until_idle()
    page.get_by_role("button", name="all", exact=True).click()
    expect(row.locator(".state")).to_have_text("completed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_card_and_the_page_of_a_link_fit_a_phone(
    beatless: Kit, url: str, open_page: Opener, scheme: str
) -> None:
    run = waiting(beatless, "complaint")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    page = open_page(viewport=PHONE, color_scheme=scheme)
    for address in (f"{url}/#/run/{run}", link.url(url)):
        page.goto(address)
        button = page.get_by_role("button", name="Send the decision")
        expect(button).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        button.scroll_into_view_if_needed()
        expect(button).to_be_in_viewport(ratio=1)
        ground = button.evaluate("node => getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(14, 18, 24)") is (scheme == "dark")


def test_the_page_of_a_link_works_below_a_path_without_javascript(
    beatless: Kit, open_page: Opener
) -> None:
    run = waiting(beatless, "complaint")
    link = beatless.client.approval_link(run, "refund", by=ANN)
    with hosting(in_fastapi(beatless.app)) as api:
        page = open_page(java_script_enabled=False, expected="status of 4")
        page.goto(link.url(f"{api.url}{AT}"))
        expect(page.get_by_role("heading")).to_have_text("Refund <b>order 7</b>?")
        expect(page.get_by_text(f"You decide as {ANN}")).to_be_visible()
        page.get_by_label("Amount").fill("9")
        page.get_by_label("Way").select_option("bank")
        page.get_by_role("button", name="Send the decision").click()
        expect(page.get_by_role("heading")).to_have_text("Your decision is stored")
        page.goto(link.url(f"{api.url}{AT}"))
        expect(page.get_by_role("heading")).to_have_text("You have decided")
    beatless.work_until_idle()
    found = {"amount": 9, "way": "bank", "by": ANN}
    assert beatless.client.get_run(run).result == found


def test_a_person_without_a_session_of_the_host_decides_by_a_link(
    beatless: Kit, open_page: Opener
) -> None:
    run = waiting(beatless, "release")
    link = beatless.client.approval_link(run, "Release_it", by=ANN)
    with hosting(create_api(beatless.app, authenticate=lambda request: None)) as api:
        page = open_page()
        page.goto(link.url(api.url))
        page.get_by_role("button", name="Approve").press("Enter")
        expect(page.get_by_role("heading")).to_have_text("Your decision is stored")
    beatless.work_until_idle()
    assert beatless.client.get_run(run).result == [True, "", ANN]
