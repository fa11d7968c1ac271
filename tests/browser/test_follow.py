"""examples/follow.js in a real browser, with a token of the host's own."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Mount, Route

from beatless import App, Plan, StepContext, step
from beatless.api import create_api
from beatless.testing import Kit
from tests.serving import hosting

SCRIPT = (Path(__file__).parents[2] / "examples" / "follow.js").read_text()
HTML = f"""<!doctype html><link rel="icon" href="data:,"><ol id="seen"></ol><script>{SCRIPT}
const say = (text) => {{
  const line = document.createElement("li");
  line.textContent = text;
  document.getElementById("seen").append(line);
}};
const tokenUrl = "/token", refused = (run, status) => say(`refused ${{status}}`);
follow("/jobs", "THE_RUN", ({{ type }}) => say(type), () => {{}}, {{ tokenUrl, refused }});
</script>"""


@step
def greet(ctx: StepContext) -> None: ...


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [Plan("greeting", [greet])]


def test_a_customer_follows_a_run_by_tokens_of_the_host_and_asks_for_another_one_that_ended(
    beatless: Kit, beatless_app: App, open_page: Callable[..., Page]
) -> None:
    run_id = beatless.start_run("greeting").run_id
    beatless.work_until_idle()
    given: list[str] = []
    foreign = threading.Event()

    def token(_: Request) -> JSONResponse:
        if foreign.is_set():
            return JSONResponse({}, 404)
        given.append("an-ended-one" if not given else beatless.client.stream_token(run_id))
        return JSONResponse({"token": given[-1]})

    def page(_: Request) -> HTMLResponse:
        return HTMLResponse(HTML.replace("THE_RUN", run_id))

    api = create_api(beatless_app, authenticate=lambda _: None)
    host = Starlette(routes=[Mount("/jobs", api), Route("/token", token), Route("/", page)])
    with hosting(host) as served:
        open_customer = open_page("Failed to load resource")
        open_customer.goto(served.url)
        expected = beatless.event_types(run_id)
        seen = open_customer.locator("#seen li")
        expect(seen).to_have_text(expected)
        assert len(given) > 1
        foreign.set()
        open_customer.goto(served.url)
        expect(seen).to_have_text(["refused 404"])
