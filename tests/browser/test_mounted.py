"""The run page below a path, with and without the slash at its end."""

import re
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse
from playwright.sync_api import Page, Response, expect
from starlette.types import ASGIApp, Receive, Scope, Send

from beatless import App
from beatless.api import Grant, create_api, open_streams, sse
from beatless.api import Scope as Right
from beatless.testing import Kit
from tests.serving import hosting

Opener = Callable[..., Page]

AT = "/sub/path"


def in_fastapi(app: App) -> ASGIApp:
    host = FastAPI()
    host.mount(AT, create_api(app))
    return host


def behind_a_proxy(app: App) -> ASGIApp:
    """One that takes the path away and does not say so."""
    api = create_api(app)

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            below = scope["path"].startswith(AT)
            scope = {**scope, "path": (scope["path"].removeprefix(AT) or "/") if below else "/404"}
        await api(scope, receive, send)

    return proxy


@pytest.mark.parametrize("host", [in_fastapi, behind_a_proxy])
def test_the_page_works_below_a_path(
    beatless: Kit, open_page: Opener, host: Callable[[App], ASGIApp]
) -> None:
    run = beatless.start_run("checkout", {"lost": "at sea"}).run_id
    with hosting(host(beatless.app)) as api:
        page = open_page(expected="404 (Not Found)")
        loaded: list[str] = []
        page.on("response", lambda answer: loaded.append(answer.url) if answer.ok else None)
        page.goto(f"{api.url}{AT}/#/run/{run}")
        expect(page.locator("#status")).to_have_text("Live")
        page.goto(f"{api.url}{AT}#/run/{run}")
        page.wait_for_url(f"{api.url}{AT}/#/run/{run}")
        expect(page.locator("#status")).to_have_text("Live")
        beatless.work_until_idle()
        expect(page.locator("#state")).to_have_text("failed")
        for link in ("Runs", "Queues", "Dead letters", "System"):
            page.get_by_role("link", name=link, exact=True).click()
            expect(page.locator("#status")).to_have_text("Live")
        page.get_by_role("link", name="beatless").click()
        page.locator("#runs tr").click()
        expect(page.locator("#status")).to_have_text("Ended")
        page.get_by_role("button", name="Retry").click()
        page.get_by_role("dialog").get_by_role("button", name="Retry").click()
        expect(page.locator(".facts")).to_contain_text("Retry of")
        assert page.url.startswith(f"{api.url}{AT}/#/run/")
        page.close()
        assert all(url.startswith(f"{api.url}{AT}") for url in loaded)


def test_who_is_signed_out_of_the_host_is_told_so_and_goes_on_when_back(
    beatless: Kit, open_page: Opener
) -> None:
    def by_cookie(request: Request) -> Grant | None:
        return Grant(scopes=[Right.ADMIN]) if "who" in request.cookies else None

    host = FastAPI()
    host.mount(AT, create_api(beatless.app, authenticate=by_cookie))
    with hosting(host) as api:
        page = open_page(expected="401 (Unauthorized)")
        ticket = {"name": "who", "value": "ann", "url": api.url}
        page.context.add_cookies([ticket])
        page.goto(f"{api.url}{AT}/")
        expect(page.locator("#status")).to_have_text("Live")
        page.context.clear_cookies()
        page.get_by_role("link", name="System").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("the app in which this API is mounted")
        page.context.add_cookies([ticket])
        dialog.get_by_role("button", name="Back").click()
        expect(page.locator("main")).to_contain_text("Relays")
        page.close()


def test_the_list_of_runs_asks_for_nothing_that_its_grant_lacks(
    beatless: Kit, open_page: Opener
) -> None:
    beatless.start_run("checkout", {"order": 1})
    host = FastAPI()
    reader = Grant(scopes=[Right.RUNS_READ])
    host.mount(AT, create_api(beatless.app, authenticate=lambda _: reader))
    with hosting(host) as api:
        page = open_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{api.url}{AT}/")
        expect(page.locator("#runs tr")).to_have_count(1)  # counts are asked for with the rows
        page.close()
    assert not [url for url in asked if "/v1/queues" in url]


CLIENT = "".join(
    re.findall(
        r"```js\n(.*?)```",
        (Path(__file__).parents[2] / "docs" / "http.md").read_text(),
        re.DOTALL,
    )
)
"""The client in a browser of docs/http.md."""


def test_the_client_of_the_page_about_http_says_that_a_run_is_refused(
    beatless: Kit, open_page: Opener
) -> None:
    host = FastAPI()
    host.mount(AT, create_api(beatless.app))
    host.get("/", response_class=HTMLResponse)(lambda: '<link rel="icon" href="data:,">')
    with hosting(host) as api:
        page = open_page(expected="404")
        page.goto(f"{api.url}/")
        with page.expect_console_message(lambda said: "not yet is not followed" in said.text):
            page.evaluate("(base) => {" + CLIENT + "follow(base, 'not yet', show, forget); }", AT)
        page.close()


def test_the_client_of_the_page_about_http_needs_no_token_where_a_cookie_is_enough(
    beatless: Kit, open_page: Opener
) -> None:
    run = beatless.start_run("checkout", {"order": 1}).run_id
    beatless.work_until_idle()
    host = FastAPI()
    host.mount(AT, create_api(beatless.app, authenticate=of_a_visitor))
    host.get("/", response_class=HTMLResponse)(lambda: '<link rel="icon" href="data:,">')
    follow = "follow(base, run, (event) => window.seen.push(event), forget, { cookies: true });"
    with hosting(host) as api:
        page = open_page(expected="40")
        page.goto(f"{api.url}/")
        with page.expect_console_message(lambda said: "not followed: HTTP 401" in said.text):
            page.evaluate("([base, run]) => {" + CLIENT + follow + "}", [AT, run])
        page.evaluate("document.cookie = 'visitor=ann'")
        page.evaluate("([base, run]) => { window.seen = [];" + CLIENT + follow + "}", [AT, run])
        page.wait_for_function("window.seen.at(-1)?.type === 'RunFinished'")
        page.close()


def host_that_ends_streams(beatless: Kit, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """An app with ours, whose visitors may read. It ends each stream when it has given what there
    was."""
    monkeypatch.setattr(sse, "ROTATION_S", 0.0)
    monkeypatch.setattr(sse, "RETRY_MS", 20)
    host = FastAPI()
    host.mount(AT, create_api(beatless.app, authenticate=lambda _: Grant(scopes=[Right.RUNS_READ])))
    host.get("/", response_class=HTMLResponse)(lambda: '<link rel="icon" href="data:,">')
    return host


def test_the_client_of_the_page_about_http_follows_all_runs_and_shows_each_event_once(
    beatless: Kit, open_page: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection ends when it has given what there was, and the next one gives it again."""
    host = host_that_ends_streams(beatless, monkeypatch)
    with hosting(host) as api:
        page = open_page()
        page.goto(f"{api.url}/")
        with page.expect_event("requestfinished", lambda asked: "/v1/stream" in asked.url):
            page.evaluate(
                "(base) => { window.seen = [];"
                + CLIENT
                + "window.stop = followAll(base, (event) => window.seen.push(event), forget); }",
                AT,
            )
        runs = []
        for order in (1, 2):
            runs.append(beatless.start_run("checkout", {"order": order}).run_id)
            beatless.work_until_idle()
            page.wait_for_function(
                "(run) => window.seen.some((e) => e.run_id === run && e.type === 'RunFinished')",
                arg=runs[-1],
            )
        seen = page.evaluate("() => { window.stop(); return window.seen; }")
        page.close()
    assert [(each["plan"], each["run_id"], each["seq"]) for each in seen] == [
        ("checkout", run, event.seq) for run in runs for event in beatless.client.events(run)
    ]


class Restarted:
    """A host that answers a stream with this status, as long as it is `away`."""

    def __init__(self, host: ASGIApp, status: int = 503) -> None:
        self.host = host
        self.status = status
        self.away = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.away and scope.get("path", "").endswith("/stream"):
            await PlainTextResponse("restarting", status_code=self.status)(scope, receive, send)
        else:
            await self.host(scope, receive, send)


SOON = "(act, _, ...given) => window.later(act, 20, ...given)"
"""The setTimeout of a page: the test does not wait for its pauses."""

FOLLOWS_ALL = (
    "(base) => { window.seen = []; window.forgotten = 0; window.later = window.setTimeout;"
    f"const setTimeout = {SOON};"
    + CLIENT
    + "window.stop = followAll(base, (event) => window.seen.push(event), "
    "() => { window.forgotten += 1; }); }"
)


@pytest.mark.parametrize("status", [503, 429])
def test_the_client_of_all_runs_comes_again_after_its_host_was_away(
    beatless: Kit, open_page: Opener, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """An EventSource is closed for good by any answer but 200."""
    host = Restarted(host_that_ends_streams(beatless, monkeypatch), status)
    ended = "(run) => window.seen.some((e) => e.run_id === run && e.type === 'RunFinished')"

    def refused(answer: Response) -> bool:
        """The question for the reason, too."""
        return answer.status == status and answer.request.resource_type == "fetch"

    with hosting(host) as api:
        page = open_page(expected=f"a status of {status} (")
        page.goto(f"{api.url}/")
        with page.expect_event("requestfinished", lambda asked: "/v1/stream" in asked.url):
            page.evaluate(FOLLOWS_ALL, AT)
        runs = [beatless.start_run("checkout", {"order": 1}).run_id]
        beatless.work_until_idle()
        page.wait_for_function(ended, arg=runs[0])
        with page.expect_response(refused):
            host.away = True
        runs.append(beatless.start_run("checkout", {"order": 2}).run_id)
        beatless.work_until_idle()
        host.away = False
        page.wait_for_function(ended, arg=runs[1])
        seen = page.evaluate("() => { window.stop(); return window.seen; }")
        assert page.evaluate("window.forgotten") == 0

        host.away = True  # before there was an event: nothing says where to go on
        with page.expect_response(refused):
            page.evaluate(FOLLOWS_ALL, AT)
        host.away = False
        page.wait_for_function("window.forgotten === 1")
        page.evaluate("window.stop()")
        page.close()
    assert [(each["run_id"], each["seq"]) for each in seen] == [
        (run, event.seq) for run in runs for event in beatless.client.events(run)
    ]


def test_the_client_of_all_runs_ends_when_it_is_refused(beatless: Kit, open_page: Opener) -> None:
    host = FastAPI()
    host.mount(AT, create_api(beatless.app, authenticate=of_a_visitor))
    host.get("/", response_class=HTMLResponse)(lambda: '<link rel="icon" href="data:,">')
    with hosting(host) as api:
        page = open_page(expected="401")
        page.goto(f"{api.url}/")
        with page.expect_console_message(lambda said: "are not followed: HTTP 401" in said.text):
            page.evaluate(FOLLOWS_ALL, AT)
        page.close()


TEMPLATE = Path(__file__).parents[2] / "jobs/templates/fastapi/shop/page.html.template"


def test_the_page_of_the_template_comes_again_and_shows_what_its_run_waits_for(
    beatless: Kit, open_page: Opener
) -> None:
    app = FastAPI()
    app.mount("/jobs", create_api(beatless.app, authenticate=of_a_visitor))
    app.get("/", response_class=HTMLResponse)(TEMPLATE.read_text)
    app.post("/orders")(lambda: {"run_id": beatless.start_run("payment").run_id})
    host = Restarted(app)
    with hosting(host) as api:
        page = open_page(expected="the server responded with a status of")
        page.add_init_script(f"window.later = window.setTimeout; window.setTimeout = {SOON};")
        page.goto(f"{api.url}/")
        page.evaluate("document.cookie = 'visitor=ann'")
        host.away = True
        with page.expect_response(lambda answer: answer.status == 503):
            page.get_by_role("button", name="Order").click()
        beatless.work_until_idle()
        host.away = False
        shown = page.locator("#events li")
        expect(shown).to_have_text(["RunStarted", "WaitStarted paid"])

        page.evaluate("document.cookie = 'visitor=nobody'")
        page.get_by_role("button", name="Order").click()
        expect(page.locator("#state")).to_have_text("not followed: HTTP 401")
        page.close()


def of_a_visitor(request: Request) -> Grant | None:
    """The authentication of the app in which the API is mounted."""
    return Grant(scopes=[Right.RUNS_READ]) if request.cookies.get("visitor") == "ann" else None


def test_the_client_of_the_page_about_http_goes_on_when_its_token_has_ended(
    beatless: Kit,
    open_page: Opener,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(open_streams, "TOKEN_CHECK_S", 0.1)
    run = beatless.start_run("checkout", {"order": 1}).run_id
    host = FastAPI()
    host.mount(AT, create_api(beatless.app))
    host.get("/", response_class=HTMLResponse)(lambda: '<link rel="icon" href="data:,">')
    with hosting(host) as api:
        page = open_page(expected="401 (Unauthorized)")
        page.goto(f"{api.url}/")
        page.evaluate(
            "([base, run]) => {"
            + CLIENT
            + """
            window.seen = [];
            window.texts = texts;
            window.show = show;
            follow(base, run, (event) => window.seen.push(event), () => { window.seen = []; });
            }""",
            [AT, run],
        )
        page.wait_for_function("window.seen.length === 1")
        beatless.step(run)
        page.wait_for_function("window.seen.length > 2")
        with page.expect_event("response", lambda answer: answer.status == 401):
            postgres.execute("DELETE FROM api_tokens")  # its stream ends, its token is refused
        beatless.work_until_idle()
        page.wait_for_function("window.seen.at(-1).type === 'RunFinished'")
        last = beatless.client.get_run(run).last_seq
        assert page.evaluate("window.seen.map((event) => event.seq)") == list(range(1, last + 1))
        for first, pieces in ((0, ["a", "b"]), (0, ["a"]), (1, ["b", "c"])):  # tried twice
            output = {"first": first, "pieces": pieces}
            page.evaluate("show", {"type": "StepOutput", "step": "answer", "data": output})
        assert page.evaluate("texts.get('answer')") == "abc"
        page.close()
