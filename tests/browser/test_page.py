"""The run page in a real Chromium, on real processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from beatless.auth import Tokens
from beatless.testing import Kit
from tests.browser.conftest import Server
from tests.browser.test_schedules import PHONE, contrast

Opener = Callable[..., Page]

HTML = "<img src=x onerror=console.error('ran')><script>console.error('ran')</script>"


def seqs(page: Page) -> list[int]:
    """The seqs of the events that the page shows, in its order."""
    return page.locator("#events tr").evaluate_all("rows => rows.map(row => +row.dataset.seq)")


def start_in_dialog(page: Page, **input: object) -> str:
    """Start a checkout as a person does; its id."""
    page.get_by_role("button", name="New run").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Plan").select_option("checkout")
    dialog.get_by_label("Input, as JSON").fill(json.dumps(input))
    dialog.get_by_role("button", name="Start").click()
    page.wait_for_url("**/#/run/*")
    return page.url.rpartition("/")[2]


def test_the_dialog_has_a_field_for_each_option_of_a_run(
    beatless: Kit, server: Server, open_page: Opener
) -> None:
    typed = {
        "Run id": "order-1",
        "Key": "order:1",
        "Queue": "mail",
        "Delay": "90",
        "Deadline": "7200.5",
        "Priority": "7",
        "Tags": "shop=berlin team=a=b",
        "Dedupe key": "customer:7",
        "Group": "tenant-7",
    }
    labels = [
        *list(typed)[:4],
        "Not before",
        "Deadline",
        "While unfinished",
        "Debounce",
        "Max wait",
    ]
    labels += list(typed)[5:]
    page = open_page()
    page.goto(server.url)
    page.get_by_role("button", name="New run").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Plan").select_option("checkout")
    dialog.get_by_text("More").click()
    shown = dialog.locator("details label").evaluate_all(
        "all => all.map(one => one.firstChild.data)"
    )
    assert shown == labels
    for name, text in typed.items():
        dialog.get_by_label(name, exact=True).fill(text)
    dialog.get_by_label("While unfinished").select_option("replace")
    dialog.get_by_role("button", name="Start").click()
    page.wait_for_url("**/#/run/order-1")

    run = beatless.client.get_run("order-1")
    assert (run.key, run.queue, run.priority) == ("order:1", "mail", 7)
    assert (run.dedupe_key, run.group) == ("customer:7", "tenant-7")
    assert run.tags == {"shop": "berlin", "team": "a=b"}
    # Of the time of the call, which is a moment after the begin of its transaction.
    assert 89 <= (run.not_before - run.created_at).total_seconds() < 150
    assert 7200 <= (run.deadline_at - run.created_at).total_seconds() < 7260


def test_a_run_from_its_start_to_its_end_while_the_server_is_killed(
    fleet: Kit, server: Server, open_page: Opener, tmp_path: Path
) -> None:
    page = open_page(expected="net::ERR_")
    page.goto(server.url)
    expect(page.get_by_text("No runs yet")).to_be_visible()
    run_id = start_in_dialog(page, gates=str(tmp_path), parcels=20)
    expect(page.locator('[data-step="charge"][data-kind="now"]')).to_be_visible()
    expect(page.locator("#state")).to_have_text("running")

    server.kill()
    expect(page.locator("#status")).to_have_class("lost")
    (tmp_path / "charge").touch()
    for event in fleet.client.stream_run(run_id):
        if (event.data or {}).get("name") == "progress":
            break
    server.start()
    expect(page.locator("#status")).to_have_text("Live")
    expect(page.locator('[data-step="pack"] .took')).to_have_text("40 %")

    (tmp_path / "pack").touch()
    expect(page.locator("#state")).to_have_text("completed")
    expect(page.locator("#outcome")).to_contain_text("BE 1138 4711")
    stored = fleet.client.events(run_id)
    assert len(stored) > 30
    assert seqs(page) == [event.seq for event in stored]
    page.reload()
    expect(page.locator("#status")).to_have_text("Ended")
    assert seqs(page) == [event.seq for event in stored]
    page.goto(f"{server.url}/#/")
    row = page.locator("#runs tr")
    expect(row).to_have_count(1)
    expect(row.locator(".state")).to_have_text("completed")


def test_cancel_and_retry(fleet: Kit, url: str, open_page: Opener, tmp_path: Path) -> None:
    page = open_page()
    page.goto(url)
    run_id = start_in_dialog(page, gates=str(tmp_path))
    expect(page.locator('[data-step="charge"][data-kind="now"]')).to_be_visible()
    page.locator("#cancel").click()
    page.get_by_label("Reason").fill("changed my mind")
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator("#state")).to_have_text("cancelled")
    expect(page.locator("#events")).to_contain_text("changed my mind")
    expect(page.locator("#cancel")).to_be_hidden()

    (tmp_path / "charge").touch()
    (tmp_path / "pack").touch()
    page.locator("#retry").click()
    page.get_by_role("dialog").get_by_role("button", name="Retry").click()
    expect(page.locator(".facts")).to_contain_text(f"Retry of{run_id[-8:]}")
    expect(page.locator("#state")).to_have_text("completed")
    expect(page.locator('[data-step="reserve"]')).to_contain_text("reused")
    assert fleet.client.get_run(page.url.rpartition("/")[2]).retry_of == run_id


def test_a_run_that_waits_is_sent_its_signal(beatless: Kit, url: str, open_page: Opener) -> None:
    run = beatless.start_run("payment")
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/?state=waiting")
    expect(page.locator("#runs")).to_contain_text("waiting")
    page.goto(f"{url}/#/run/{run.run_id}")
    expect(page.locator("#state")).to_have_text("waiting")
    page.locator("#signal").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Name")).to_have_value("paid")
    dialog.get_by_label("Name").fill("payed")
    dialog.get_by_role("button", name="Send").click()
    told = "payed is kept for a later wait: the run waits for paid or refused now."
    expect(page.locator("#said")).to_contain_text(told)
    page.locator("#signal").click()
    dialog.get_by_label("Data (JSON)").fill('{"amount": ')
    dialog.get_by_role("button", name="Send").click()
    expect(dialog).to_contain_text("The data is not JSON")
    dialog.get_by_label("Data (JSON)").fill('{"amount": 12}')
    dialog.get_by_role("button", name="Send").click()
    expect(dialog).to_be_hidden()
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    expect(page.locator("#events")).to_contain_text("SignalReceived")
    assert beatless.client.get_run(run.run_id).result == {"amount": 12}


def test_a_failed_run_tells_why(beatless: Kit, url: str, open_page: Opener) -> None:
    run = beatless.start_run("checkout", {"lost": "no such street", "declined": 1})
    beatless.work_until_idle()
    beatless.advance(1)
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{run.run_id}")
    expect(page.locator("#outcome")).to_contain_text("Failed in ship")
    expect(page.locator("#outcome .message")).to_have_text("Fatal: no such street")
    expect(page.locator("#outcome pre")).to_contain_text("Traceback (most recent call last)")
    expect(page.locator('[data-step="charge"] rect.bad')).to_have_count(1)
    expect(page.locator('[data-step="charge"] rect.ok')).to_have_count(1)
    expect(page.locator('[data-step="charge"] rect.wait')).to_have_count(1)
    page.get_by_role("button", name="charge").click()
    expect(page.locator("#detail")).to_contain_text("ConnectionError: the payment service closed")
    page.goto(f"{url}/#/")
    expect(page.locator("#runs .why")).to_have_text("Fatal: no such street")


def test_the_card_of_a_result_has_its_heading_at_its_top(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("checkout", {})
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/run/{run.run_id}")
    expect(page.locator("#outcome h3")).to_have_text("Result")
    gap = page.locator("#outcome .card").evaluate(
        "card => card.querySelector('h3').getBoundingClientRect().top"
        " - card.getBoundingClientRect().top - parseFloat(getComputedStyle(card).paddingTop)"
    )
    assert gap < 3  # the border of the card


def test_what_people_send_is_shown_as_text(beatless: Kit, url: str, open_page: Opener) -> None:
    for input in ({"label": HTML}, {"label": HTML, "lost": HTML}):
        run = beatless.start_run("checkout", input, tags={"shop": HTML})
        beatless.work_until_idle()
        page = open_page()
        page.goto(f"{url}/#/run/{run.run_id}")
        expect(page.locator("#outcome")).to_contain_text(HTML)
        expect(page.locator(".head .tag")).to_contain_text(HTML)
        expect(page.locator("#events")).to_contain_text("onerror=")
        page.get_by_role("button", name="ship").click()
        for summary in page.locator("summary").all():
            summary.click()
        assert page.locator("main img, main script").count() == 0
        page.goto(f"{url}/#/")
        expect(page.locator("#runs")).to_contain_text(f"shop={HTML}")
        assert page.locator("main img, main script").count() == 0


def test_queues_are_paused_resumed_and_drained(beatless: Kit, url: str, open_page: Opener) -> None:
    beatless.start_run("refund")
    beatless.work_until_idle()
    page = open_page()
    page.goto(f"{url}/#/queues")
    row = page.locator("#queues tr", has_text="payments")
    row.get_by_role("button", name="Pause").click()
    expect(row.locator(".badge")).to_be_visible()
    waiting = beatless.start_run("refund")
    expect(row.locator(".queued")).to_have_text("1")
    beatless.work_until_idle()
    assert beatless.client.get_run(waiting.run_id).state == "queued"
    row.get_by_role("button", name="Resume").click()
    expect(row.locator(".badge")).to_be_hidden()
    beatless.work_until_idle()
    assert beatless.client.get_run(waiting.run_id).state == "completed"
    row.get_by_role("button", name="Pause").click()
    expect(row.locator(".badge")).to_be_visible()
    beatless.start_run("refund")
    expect(row.locator(".queued")).to_have_text("1")
    row.get_by_label("More for payments").click()
    row.get_by_role("button", name="Drain").click()
    page.get_by_role("dialog").get_by_role("button", name="Drain").click()
    expect(row.locator(".queued")).to_have_text("0")
    assert len(beatless.client.list_runs(plan="refund")) == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_ageing_of_a_queue_is_changed_by_the_keyboard(
    beatless: Kit, url: str, open_page: Opener, scheme: str
) -> None:
    beatless.start_run("refund")
    page = open_page(color_scheme=scheme, viewport=PHONE)
    page.goto(f"{url}/#/queues")
    row = page.locator("#queues tr", has_text="payments")
    keys = page.keyboard

    def change(seconds: str) -> None:
        row.get_by_label("More for payments").press("Enter")
        keys.press("Tab")
        expect(row.get_by_role("button", name="Change ageing…")).to_be_focused()
        keys.press("Enter")
        field = page.get_by_role("dialog", name="Ageing in payments").get_by_label("Seconds")
        expect(field).to_be_focused()
        field.fill(seconds)
        keys.press("Enter")

    expect(row.locator(".ageing")).to_be_hidden()
    change("600")
    expect(page.locator("#said")).to_contain_text("runs that wait for 600 s come first")
    expect(row.locator(".ageing")).to_have_text("ages after 600 s")
    expect(row.get_by_label("More for payments")).to_be_focused()
    assert [queue.age_after for queue in beatless.client.queues()] == [600]
    ink = row.locator(".ageing").evaluate("node => getComputedStyle(node).color")
    ground = page.locator(".card").evaluate("node => getComputedStyle(node).backgroundColor")
    assert contrast(ink, ground) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    change("")
    expect(page.locator("#said")).to_contain_text("priority alone decides")
    expect(row.locator(".ageing")).to_be_hidden()
    assert [queue.age_after for queue in beatless.client.queues()] == [None]


def test_dead_letters_are_published_again_or_discarded(
    beatless: Kit, url: str, open_page: Opener, postgres
) -> None:
    for reason in ("too large", HTML):
        postgres.execute(
            "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES ('event', 'r1', %s, "
            """'{"shard": 0, "from_seq": 1, "to_seq": 2}')""",
            (reason,),
        )
    page = open_page()
    page.goto(f"{url}/#/dead-letters")
    rows = page.locator("#letters tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(1)).to_contain_text(HTML)
    rows.nth(0).get_by_role("button", name="Publish again").click()
    expect(rows).to_have_count(1)
    rows.get_by_role("button", name="Discard").click()
    page.get_by_role("dialog").get_by_role("button", name="Discard").click()
    expect(page.get_by_text("No dead letters")).to_be_visible()
    assert postgres.execute("SELECT from_seq, to_seq FROM run_outbox").fetchall() == [(1, 2)]


def test_filters_and_pages(beatless: Kit, url: str, open_page: Opener) -> None:
    ids = [
        beatless.start_run("checkout", {}, tags={"number": str(number)}).run_id
        for number in range(60)
    ]
    beatless.client.cancel_run(ids[7])
    refund = beatless.start_run("refund").run_id
    page = open_page()
    page.goto(url)
    rows = page.locator("#runs tr")

    def expect_only(run_id: str) -> None:
        expect(page.locator(f"#runs tr[data-run='{run_id}']:only-child")).to_be_visible()

    expect(rows).to_have_count(50)
    expect(rows.first).to_have_attribute("data-run", refund)
    expect(rows.first.get_by_role("link")).to_have_text(f"refund{refund}")
    page.get_by_role("button", name="Older").click()
    expect(rows).to_have_count(11)
    expect(rows.last).to_have_attribute("data-run", ids[0])
    page.get_by_role("button", name="Newer").click()
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="cancelled").click()
    expect_only(ids[7])
    page.get_by_role("button", name="cancelled").get_by_text("1").wait_for()
    page.get_by_role("button", name="all").click()
    page.get_by_label("plan").select_option("refund")
    expect_only(refund)
    page.get_by_label("plan").select_option("any plan")
    page.get_by_label("tag").fill("number=3")
    page.get_by_label("tag").press("Enter")
    expect_only(ids[3])
    page.reload()
    expect_only(ids[3])
    page.get_by_label("tag").fill("")
    page.get_by_label("queue").fill("payments")
    page.get_by_label("queue").press("Enter")
    expect_only(refund)


def test_the_keyboard_is_enough(beatless: Kit, url: str, open_page: Opener) -> None:
    page = open_page()
    keys = page.keyboard
    page.goto(url)
    expect(page.get_by_text("No runs yet")).to_be_visible()
    keys.press("Tab")
    expect(page.locator("#skip")).to_be_focused()
    for name in ("beatless", "Runs", "Queues", "Schedules", "Limits", "Dead letters", "System"):
        keys.press("Tab")
        expect(page.get_by_role("link", name=name, exact=True)).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    keys.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("start a run")
    keys.press("Escape")
    keys.press("n")
    expect(page.get_by_role("dialog").get_by_label("Plan")).to_be_focused()
    keys.press("Tab")
    keys.type('{"lost": "at sea"}')
    keys.press("Tab")  # More
    keys.press("Tab")  # Back
    keys.press("Tab")
    keys.press("Enter")
    expect(page.locator("#state")).to_have_text("queued")
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("failed")
    keys.press("j")
    expect(page.get_by_role("button", name="reserve")).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#detail")).to_contain_text("stock.checked")
    keys.press("t")
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    expect(page.locator(".facts")).to_contain_text("Retry of")
    keys.press("r")
    expect(page.locator("#runs tr")).to_have_count(2)
    keys.press("j")
    keys.press("j")
    expect(page.locator("#runs a").nth(1)).to_be_focused()
    keys.press("Enter")
    expect(page.locator("#state")).to_have_text("failed")
    keys.press("q")
    expect(page.locator("#queues tr")).to_have_count(1)
    keys.press("j")
    keys.press("Enter")
    expect(page.locator("#queues .badge")).to_be_visible()
    page.reload()
    expect(page.locator("#queues .badge")).to_be_visible()
    keys.press("j")
    keys.press("Enter")
    expect(page.locator("#queues .badge")).to_be_hidden()


def test_light_dark_and_a_phone(beatless: Kit, url: str, open_page: Opener) -> None:
    run = beatless.start_run("checkout", {"lost": "x" * 300}, tags={"long": "y" * 60})
    beatless.work_until_idle()
    grounds = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme, viewport={"width": 360, "height": 700})
        for place in ("/", f"/#/run/{run.run_id}", "/#/queues", "/#/dead-letters", "/#/system"):
            page.goto(url + place)
            expect(page.locator("#status")).not_to_be_empty()
            assert page.evaluate("document.documentElement.scrollWidth") == 360, place
        for width in (760, 800, 900, 1180):
            page.set_viewport_size({"width": width, "height": 700})
            page.goto(f"{url}/#/queues")
            expect(page.locator("#queues tr")).to_have_count(1)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            cut = "all => all.filter(one => one.scrollWidth > one.clientWidth).length"
            assert page.locator("header button, header nav").evaluate_all(cut) == 0
            assert page.locator(".card").evaluate("card => card.scrollWidth <= card.clientWidth")
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2


def test_a_run_of_thousands_of_events_stays_small(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("checkout", {"parcels": 2500})
    beatless.work_until_idle()
    last = beatless.client.get_run(run.run_id).last_seq
    page = open_page()
    page.goto(f"{url}/#/run/{run.run_id}")
    expect(page.locator("#seq")).to_have_text(str(last))
    expect(page.locator("#status")).to_have_text("Ended")
    assert seqs(page) == list(range(last - 399, last + 1))
    assert page.evaluate("document.querySelectorAll('*').length") < 4000
    page.get_by_role("button", name="earlier events").click()
    assert seqs(page) == list(range(last - 799, last + 1))
    page.get_by_label("Find in events").fill('"number":77}')
    expect(page.locator("#events tr")).to_have_count(1)
    page.get_by_label("Find in events").fill('"number": 77}')
    expect(page.locator("#events tr")).to_have_count(1)
    page.get_by_label("Find in events").fill("")
    page.get_by_label("Type of event").select_option("StepStarted")
    expect(page.locator("#events tr")).to_have_count(4)


def test_a_token_is_asked_for_and_kept_for_the_tab(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, secret = tokens.create(["runs:write", "queues"])
    page = open_page(expected="401 (Unauthorized)")
    page.goto(url)
    page.get_by_role("textbox", name="Token").fill(secret)
    page.get_by_role("button", name="Use it").click()
    run_id = start_in_dialog(page)
    expect(page.locator("#events tr")).to_have_count(1)
    beatless.work_until_idle()
    expect(page.locator("#state")).to_have_text("completed")
    assert seqs(page) == [event.seq for event in beatless.client.events(run_id)]


def test_the_filters_of_runs_stand_in_one_line(url: str, open_page: Opener) -> None:
    page = open_page(viewport={"width": 1000, "height": 700})
    page.goto(url)
    expect(page.locator("#tag")).to_be_visible()
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("plan", "queue", "tag")]
    middles = [round(box["y"] + box["height"] / 2) for box in boxes]
    assert max(middles) - min(middles) <= 2
