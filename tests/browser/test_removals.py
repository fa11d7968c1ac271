"""What takes runs away, in a real Chromium: it says what it will do, and then what it has done."""

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from beatless import RunNotFound
from beatless.auth import Tokens
from beatless.testing import Kit

Opener = Callable[..., Page]


def begin(beatless: Kit, run_id: str) -> None:
    """A worker takes the run, and dies before its first step."""
    with beatless.crash(at="step.before"):
        beatless.step(run_id)
    assert beatless.client.get_run(run_id).state == "running"


def test_one_of_two_queues_is_obliterated(beatless: Kit, url: str, open_page: Opener) -> None:
    beatless.start_run("refund")
    beatless.work_until_idle()
    running, _ = beatless.start_run("refund"), beatless.start_run("refund", delay=3600)
    kept = beatless.start_run("checkout").run_id
    begin(beatless, running.run_id)
    page = open_page(expected="409 (Conflict)")
    page.goto(f"{url}/#/queues")
    rows = page.locator("#queues tr")
    rows.filter(has_text="payments").get_by_label("More for payments").click()
    rows.get_by_role("button", name="Obliterate").click()
    dialog = page.get_by_role("dialog", name="Obliterate payments?")
    expect(dialog.locator("#extent")).to_contain_text("1 run waits, 1 is running, 1 ended.")
    beatless.start_run("refund")
    expect(dialog.locator("#extent")).to_contain_text("2 runs wait, 1 is running, 1 ended.")

    name, confirm = dialog.get_by_label("Type payments"), dialog.get_by_role("button").last
    for wrong in ("", "payment", "checkout"):
        name.fill(wrong)
        confirm.click()
        expect(name).to_be_focused()
        assert not name.evaluate("input => input.checkValidity()")
    name.fill("payments")
    confirm.click()
    expect(dialog.get_by_role("alert")).to_contain_text("payments has 1 of its runs running")
    assert len(beatless.client.list_runs(queue="payments")) == 4

    dialog.get_by_label("Force").check()
    name.press("Enter")
    expect(page.locator("#said")).to_contain_text("Queue payments obliterated: 4 runs removed.")
    expect(rows).to_have_count(1)
    expect(rows).not_to_contain_text("payments")
    expect(page.locator("#main")).to_be_focused()
    assert beatless.client.list_runs(queue="payments") == []
    assert [queue.name for queue in beatless.client.queues()] == ["default"]
    beatless.work_until_idle()
    assert beatless.client.get_run(kept).state == "completed"


def test_draining_says_what_it_takes_and_what_it_leaves(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    running = beatless.start_run("refund").run_id
    for _ in range(2):
        beatless.start_run("refund")
    beatless.start_run("refund", delay=3600)
    begin(beatless, running)
    page = open_page()
    page.goto(f"{url}/#/queues")
    more = page.get_by_label("More for payments")
    expect(page.get_by_role("button", name="Drain")).to_be_hidden()
    more.focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # to the ageing
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#extent")).to_contain_text("2 runs are queued, 1 delayed and 0 waiting")
    expect(page.locator("#extent")).to_contain_text("1 run is running and goes on.")
    page.get_by_role("button", name="Drain", exact=True).click()
    expect(page.locator("#said")).to_contain_text("3 runs of queue payments removed.")
    expect(more).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Obliterate")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Obliterate")).to_be_hidden()
    assert [run.run_id for run in beatless.client.list_runs()] == [running]
    page.get_by_role("button", name="Dismiss").click()
    expect(page.locator("#said")).to_be_empty()


def test_runs_that_completed_are_cleaned(beatless: Kit, url: str, open_page: Opener) -> None:
    done = [beatless.start_run("refund").run_id for _ in range(3)]
    failed = beatless.start_run("checkout", {"lost": "at sea"}).run_id
    beatless.work_until_idle()
    waits = beatless.start_run("checkout").run_id
    page = open_page()
    page.goto(f"{url}/#/?state=completed")
    expect(page.locator("#runs tr")).to_have_count(3)
    page.get_by_role("button", name="Clean up").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("State")).to_have_value("completed")
    extent = dialog.get_by_role("status")
    expect(extent).to_have_text(
        "No completed run ended 7 days ago or earlier: nothing is taken away."
    )
    dialog.get_by_label("Ended so long ago").fill("0")
    expect(extent).to_contain_text("3 completed runs with 12 events ended 0 days ago or earlier")
    expect(extent).to_contain_text("All of this is taken away for good")
    dialog.get_by_label("At most").fill("2")
    expect(extent).to_contain_text("The 2 oldest runs are taken away")
    dialog.get_by_role("button", name="Clean up").click()
    told = "2 completed runs removed, 1 that ended as long ago left."
    expect(page.locator("#said")).to_contain_text(told)
    expect(page.locator(f"#runs tr[data-run='{done[2]}']:only-child")).to_be_visible()
    left = {run.run_id for run in beatless.client.list_runs()}
    assert left == {done[2], failed, waits}


def test_whoever_has_a_run_open_learns_that_it_was_removed(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    done = beatless.start_run("refund").run_id
    beatless.work_until_idle()
    waits, kept = beatless.start_run("refund").run_id, beatless.start_run("checkout").run_id
    viewers = [open_page(expected="404 (Not Found)") for _ in range(2)]
    for viewer, run_id in zip(viewers, (done, waits), strict=True):
        viewer.goto(f"{url}/#/run/{run_id}")
        expect(viewer.locator("#status")).not_to_be_empty()
    other = open_page()
    other.goto(f"{url}/#/run/{kept}")
    expect(other.locator("#status")).to_have_text("Live")

    page = open_page(expected="404 (Not Found)")
    for run_id, events, said in ((done, 4, "It is completed."), (waits, 1, "It waits")):
        page.goto(f"{url}/#/run/{run_id}")
        expect(page.locator("#seq")).to_have_text(str(events))
        page.keyboard.press("x")
        expect(page.get_by_role("dialog")).to_contain_text(said)
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        assert beatless.client.get_run(run_id).run_id == run_id
        page.keyboard.press("x")
        expect(page.get_by_role("button", name="Back")).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        told = f"Run {run_id} and its {events} event"
        expect(page.locator("#said")).to_contain_text(told)
        with pytest.raises(RunNotFound):
            beatless.client.get_run(run_id)

    for viewer, run_id in zip(viewers, (done, waits), strict=True):
        expect(viewer.locator("#state")).to_have_text("removed")
        expect(viewer.locator("#said")).to_contain_text(f"Run {run_id} was removed.")
        expect(viewer.locator("#status")).to_have_text("Removed")
        expect(viewer.locator("#events tr").first).to_be_visible()
        for name in ("#cancel", "#retry", "#remove"):
            expect(viewer.locator(name)).to_be_hidden()
    expect(other.locator("#state")).to_have_text("queued")


def test_a_run_that_a_worker_has_is_not_removed(beatless: Kit, url: str, open_page: Opener) -> None:
    run_id = beatless.start_run("checkout").run_id
    page = open_page(expected="409 (Conflict)")
    page.goto(f"{url}/#/run/{run_id}")
    expect(page.locator("#status")).to_have_text("Live")
    remove = page.get_by_role("button", name="Remove", exact=True)
    remove.click()
    begin(beatless, run_id)
    page.get_by_role("button", name="Remove the run").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text(run_id)
    page.keyboard.press("Escape")
    expect(page.locator("#state")).to_have_text("running")
    expect(remove).to_be_disabled()
    expect(remove).to_have_attribute("title", "A worker has it: cancel it first")
    page.keyboard.press("x")
    expect(dialog).to_have_count(0)
    assert beatless.client.get_run(run_id).state == "running"


def test_what_a_token_may_not_do_is_disabled_and_says_why(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    done = beatless.start_run("refund").run_id
    beatless.work_until_idle()
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, reader = tokens.create(["runs:read"])
    page = open_page(expected="the server responded with a status of 40")
    page.add_init_script(f"sessionStorage.setItem('beatless-token', '{reader}')")
    page.goto(url)
    for name in ("Clean up", "New run"):
        button = page.get_by_role("button", name=name)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", "This token lacks the scope runs:write")
    page.goto(f"{url}/#/run/{done}")
    for name in ("Retry", "Remove"):
        button = page.get_by_role("button", name=name)
        expect(button).to_be_disabled()
        expect(button).to_have_attribute("title", "This token lacks the scope runs:write")
    for key in ("x", "t", "n"):
        page.keyboard.press(key)
    page.goto(f"{url}/#/queues")
    expect(page.get_by_role("alert")).to_have_text("this caller lacks the scope queues")
    expect(page.get_by_role("dialog")).to_have_count(0)

    _, writer = tokens.create(["runs:write"])
    page.add_init_script(f"sessionStorage.setItem('beatless-token', '{writer}')")
    page.goto(f"{url}/#/run/{done}")
    page.reload()
    expect(page.get_by_role("button", name="Remove")).to_be_enabled()
    expect(page.get_by_role("button", name="New run")).to_be_enabled()
