"""The EventSource of a real browser, through proxies that cut the stream anywhere."""

import json
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
from playwright.sync_api import Page

from beatless import App, Plan
from beatless.api import create_api
from beatless.testing import Kit
from tests.http_proxy import Proxy
from tests.integration.test_readers_of_others import TEXTS, tell
from tests.serving import hosting

PAGES = 4
CUTS = 2
"""Of the stream of each page, and each costs the pause that the stream asks for: some seconds."""

READ = """
([path, types, most]) => {
  const source = new EventSource(path), found = [];
  window.found = new Promise(done => {
    const add = message => {
      found.push([message.lastEventId, message.type, message.data]);
      if (found.length > most) source.close(), done(found);
    };
    for (const type of ["message", ...types]) source.addEventListener(type, add);
    // The browser closes it when it is told that there is nothing more.
    source.onerror = () => source.readyState === EventSource.CLOSED && done(found);
  });
}
"""


@pytest.fixture
def beatless_plans() -> Sequence[Plan]:
    return [Plan("tell", [tell])]


def test_the_events_are_those_of_the_journal_wherever_the_connection_is_cut(
    beatless: Kit, beatless_app: App, open_page: Callable[..., Page]
) -> None:
    run_id = beatless.start_run("tell").run_id
    beatless.work_until_idle()
    events = beatless.client.events(run_id)
    types = sorted({str(event.type) for event in events})
    path = f"/v1/runs/{run_id}/stream"

    with ExitStack() as stack:
        api = stack.enter_context(hosting(create_api(beatless_app, is_open=True)))
        answer = api("GET", path)
        # A browser gives up an answer whose head is cut, for it takes the rest for all of it.
        head = len("HTTP/1.1 200 OK\r\n\r\n") + sum(
            len(f"{name}: {value}\r\n") for name, value in answer.headers.items()
        )
        most = len(answer.text) // CUTS  # so that there is enough left for each cut
        chance = random.Random(1)
        places = [[head + chance.randint(1, most) for _ in range(CUTS)] for _ in range(PAGES)]
        proxies, pages = [], []
        for each in places:
            proxy = Proxy(api.port, cut=lambda _, each=each: each.pop() if each else None)
            proxies.append(stack.enter_context(proxy))
            page = open_page("net::ERR")
            page.route("**/page", lambda route: route.fulfill(body="", content_type="text/html"))
            page.goto(f"{proxy.url}/page")
            page.evaluate(READ, [path, types, len(events)])
            pages.append(page)
        found = [page.evaluate("window.found") for page in pages]

    epoch = beatless.client.epoch()
    expected = [[f"{epoch}.{event.seq}", str(event.type), event.to_dict()] for event in events]
    for each in found:
        assert [[id, kind, json.loads(data)] for id, kind, data in each] == expected
    assert [proxy.cuts for proxy in proxies] == [CUTS] * PAGES
    texts = [data["data"]["text"] for _, kind, data in expected if kind == "DebugTrace"]
    assert texts == TEXTS
