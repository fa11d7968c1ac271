"""What somebody needs who watches over runs: which are open, which run where, and on a phone."""

from collections.abc import Callable

from playwright.sync_api import Page, expect

from beatless import Plan, StepContext, retry, step
from beatless.auth import Tokens
from beatless.orchestrator.records import FailedRunFilter, new_run_id
from beatless.testing import Kit
from tests.browser.plans import checkout

Opener = Callable[..., Page]

PHONE = {"width": 360, "height": 700}


def fail(beatless: Kit, reason: str = "at sea", **options: object) -> str:
    run = beatless.start_run("checkout", {"lost": reason}, **options)
    beatless.work_until_idle()
    return run.run_id


def test_a_run_is_named_by_plan_tags_and_its_last_digits(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("checkout", tags={"order": "7"}, run_id=new_run_id()).run_id
    chosen = beatless.start_run("refund", run_id="refund-of-order-7").run_id
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.goto(f"{url}/#/run/{run}")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"checkout {run[-8:]}")
    expect(page.locator(".head .tag")).to_have_text("order=7")
    expect(page).to_have_title(f"checkout {run[-8:]} · queued · beatless")
    page.get_by_role("button", name="Copy the id").click()
    assert page.evaluate("navigator.clipboard.readText()") == run
    size = "node => parseFloat(getComputedStyle(node).fontSize)"
    assert page.locator("h1").evaluate(size) > page.locator("#run-id").evaluate(size)
    page.goto(f"{url}/#/run/{chosen}")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"refund {chosen}")
    page.goto(f"{url}/#/")
    expect(page.locator("#runs tr").last.get_by_role("link")).to_have_text(f"checkout{run[-8:]}")


def test_on_a_phone_the_list_has_plan_queue_tags_and_the_chosen_filter(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    run = beatless.start_run("refund", tags={"order": "7"}, run_id=new_run_id()).run_id
    beatless.client.cancel_run(run)
    page = open_page(viewport=PHONE)
    page.goto(f"{url}/#/?state=cancelled")
    row = page.locator("#runs tr")
    for words in ("refund", "payments", "order=7", run[-8:], "cancelled"):
        expect(row.get_by_text(words, exact=True)).to_be_in_viewport(ratio=1)
    expect(page.get_by_role("button", name="cancelled", pressed=True)).to_be_in_viewport(ratio=1)
    for name in ("Runs", "Queues", "Schedules", "Limits", "Dead letters", "System"):
        expect(page.get_by_role("link", name=name)).to_be_in_viewport(ratio=1)


def test_failed_runs_that_were_retried_say_so_and_can_be_left_out(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    done, left = fail(beatless), fail(beatless)
    again = beatless.client.retry_run(done).run_id
    page = open_page()
    page.goto(f"{url}/#/?state=failed")
    rows = page.locator("#runs tr")
    expect(rows).to_have_count(2)
    badge = page.locator(f"[data-run='{done}'] .badge")
    expect(badge).to_have_text(f"retried by {again[-8:]}")
    page.get_by_label("not retried").check()
    expect(page.locator(f"tr[data-run='{left}']:only-child")).to_be_visible()
    page.reload()
    expect(page.get_by_label("not retried")).to_be_checked()
    expect(rows).to_have_attribute("data-run", left)
    page.get_by_role("button", name="all", exact=True).click()
    expect(rows).to_have_count(3)
    expect(page.get_by_label("not retried")).to_be_hidden()
    badge.click()
    expect(page.locator("#run-id")).to_have_text(again)
    page.goto(f"{url}/#/run/{done}")
    expect(page.locator(".facts")).to_contain_text(f"Retried by{again[-8:]}")
    page.goto(f"{url}/#/run/{left}")
    expect(page.locator("#status")).to_have_text("Ended")
    newest = beatless.client.retry_run(left).run_id
    expect(page.locator(".facts")).to_contain_text(f"Retried by{newest[-8:]}")


def test_all_failed_runs_that_match_are_retried(beatless: Kit, url: str, open_page: Opener) -> None:
    for number in range(3):
        fail(beatless, "no such street", tags={"shop": "ghent"})
        fail(beatless, f"at sea {number}", tags={"shop": "ghent"})
    other = fail(beatless, tags={"shop": "bruges"})
    page = open_page()
    page.goto(f"{url}/#/?state=failed&tag=shop%3Dghent")
    page.get_by_role("button", name="Retry all that match").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("#extent")).to_contain_text("6 failed runs, with tag shop=ghent")
    dialog.get_by_label("Only with this").fill("AT SEA")
    expect(dialog.locator("#extent")).to_contain_text("3 failed runs, with tag shop=ghent")
    dialog.get_by_label("At most").fill("2")
    dialog.get_by_role("button", name="Retry them").click()
    expect(page.locator("#said")).to_contain_text("2 runs retried.")
    expect(page.locator("#runs .badge")).to_have_count(2)
    assert beatless.client.get_run(other).retried_by is None
    retried = beatless.client.list_runs(retried=True)
    assert {run.error["message"] for run in retried} == {"at sea 0", "at sea 1"}
    page.get_by_role("button", name="completed").click()
    expect(page.get_by_role("button", name="Retry all that match")).to_be_hidden()


def test_a_retry_of_many_goes_on_behind_one_that_is_refused(
    beatless: Kit, url: str, open_page: Opener, postgres
) -> None:
    runs = [fail(beatless) for _ in range(3)]
    postgres.execute("UPDATE runs SET plan = 'gone' WHERE run_id = %s", [runs[0]])
    first = beatless.client.retry_page(FailedRunFilter(), limit=1, max_bytes=1_000_000)
    assert (len(first.lines), len(first.refused), first.next is None) == (0, 1, False)
    page = open_page()
    page.goto(f"{url}/#/?state=failed")
    page.get_by_role("button", name="Retry all that match").click()
    expect(page.get_by_role("dialog").locator("#extent")).to_contain_text("3 failed runs, not")
    page.get_by_role("button", name="Retry them").click()
    expect(page.locator("#said")).to_contain_text("2 runs retried. 1 run could not be: ")


def test_an_address_that_leads_nowhere_says_so(beatless: Kit, url: str, open_page: Opener) -> None:
    page = open_page()
    for place in ("#/nonsense", "#/run/", "#/run/%E0%A4%A", "#/queues/payments", "#nothing"):
        page.goto(f"{url}/{place}")
        expect(page.get_by_role("heading", level=1)).to_have_text("There is no such page")
        expect(page.locator("nav [aria-current]")).to_have_count(0)
    page.get_by_role("link", name="All runs").click()
    expect(page.get_by_text("No runs yet")).to_be_visible()
    assert page.title() == "Runs · beatless"


def test_the_system_shows_relays_workers_versions_and_lag(
    fleet: Kit, url: str, open_page: Opener
) -> None:
    page = open_page()
    page.goto(f"{url}/#/")
    page.keyboard.press("s")
    expect(page.locator("#relays tr")).to_have_count(1)
    expect(page.locator("#relays tr")).to_contain_text("16 of 16")
    worker = page.locator("#workers tr")
    expect(worker).to_contain_text("default, payments")
    expect(page.locator("#system-not-published")).to_have_text("0 appends")
    expect(page.locator("#system-postgresql")).not_to_be_empty()


def test_what_of_the_system_is_missing_is_said(
    beatless: Kit, url: str, open_page: Opener, postgres
) -> None:
    beatless.start_run("refund")
    page = open_page(viewport=PHONE)
    page.goto(f"{url}/#/system")
    expect(page.get_by_text("No relay runs")).to_be_visible()
    expect(page.get_by_text("No worker tells")).to_be_visible()
    expect(page.locator("#system-not-published")).to_contain_text("1 append, oldest ")
    page.close()
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, foreign = tokens.create(["admin"], namespace="acme")
    other = open_page(expected="403 (Forbidden)")
    other.add_init_script(f"sessionStorage.setItem('beatless-token', '{foreign}')")
    other.goto(f"{url}/#/system")
    expect(other.get_by_role("alert")).to_contain_text("the namespace default is needed")


def test_a_run_in_a_step_that_the_plan_does_not_have_says_what_it_waits_for(
    beatless: Kit, url: str, open_page: Opener
) -> None:
    @step(retry=retry(max_attempts=2, initial=1000))
    def weigh(ctx: StepContext) -> None:
        raise ValueError("no scales")

    before = Plan("checkout", [*checkout.steps[:1], weigh])
    run = beatless.start_run("checkout").run_id
    beatless.executor().execute(before, run, 0)
    page = open_page()
    page.goto(f"{url}/#/run/{run}")
    expect(page.locator("#unknown-step")).to_have_text(
        "weigh, which this version of the plan does not have"
    )

    renamed = Plan("checkout", checkout.steps[:2], renamed={"weigh": checkout.steps[1].name})
    beatless.advance(1001)
    beatless.executor().execute(renamed, run, 0)
    expect(page.locator("#state")).to_have_text("completed")
    expect(page.locator("#unknown-step")).to_have_count(0)
    kinds = page.locator('[data-step="weigh"]').first
    expect(kinds).to_have_attribute("data-kind", "bad")
