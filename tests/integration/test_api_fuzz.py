"""Whatever is sent: an answer that the document knows, no 5xx, nothing of another tenant."""

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from beatless import App
from beatless.api import create_api
from beatless.auth import Scope, Tokens
from beatless.testing import Kit

CONFORMS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SECRET = "only-acme-knows"


@pytest.mark.slow
@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.long(minutes=3))])
def test_answers_are_those_of_the_document(beatless: Kit, examples: int) -> None:
    beatless.start_run("two_steps", run_id="0")
    document = schemathesis.openapi.from_asgi(
        "/openapi.json", create_api(beatless.app, is_open=True)
    )
    tried = 0
    # Streams do not end: they are tried below.
    for found in document.exclude(path_regex="/stream$").get_all_operations():

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            found.ok().as_strategy()
            | found.ok().as_strategy(generation_mode=GenerationMode.NEGATIVE)
        )
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CONFORMS)

        check()
        tried += 1
    assert tried >= 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    method: str
    path: str
    query: str = ""
    token: str | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    status: int
    headers: dict[bytes, bytes]
    body: bytes


async def tell(api: Any, ask: Ask) -> Told:
    """The answer, of a stream its first bytes. What the app raises is raised."""
    told: dict[str, Any] = {"status": 0, "headers": {}, "body": b""}
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": ask.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            told.update(status=message["status"], headers=dict(message["headers"]))
        else:
            told["body"] += message["body"]
            if b"event-stream" in told["headers"].get(b"content-type", b""):
                gone.set()

    headers = [(b"host", b"127.0.0.1"), (b"content-length", str(len(ask.body)).encode())]
    headers += ask.headers
    if ask.token is not None:
        headers.append((b"authorization", b"Bearer " + ask.token.encode("utf-8", "replace")))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": ask.method,
        "scheme": "http",
        "path": ask.path,
        "raw_path": quote(ask.path).encode(),
        "query_string": ask.query.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    await asyncio.wait_for(api(scope, receive, send), 60)
    return Told(**told)


text = st.text(max_size=40)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
run_ids = (
    st.sampled_from(["x", "acme~x", "acme-2~x", "mine", "acme~", "~x", "nobody", "..", "%2e%2e"])
    | text
    | st.text("abcxyz~.:-_%/", max_size=12)
)
event_ids = (
    st.integers().map(str)
    | text
    | st.builds(lambda epoch, seq: f"{epoch}.{seq}", text, st.integers(-2, 10**10))
    | st.tuples(text | st.just("e"), st.integers(-2, 10**17), st.integers(-2, 10**17)).map(
        lambda parts: ".".join(map(str, parts))
    )
)
page_cursors = text | junk.map(
    lambda value: base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")
)
bodies = (
    st.fixed_dictionaries(
        {"plan": st.sampled_from(["two_steps", "nothing"]) | text},
        optional={
            "input": junk,
            "run_id": run_ids | junk,
            "key": st.just("k") | text | junk,
            "queue": st.just("q") | text | junk,
            "delay": st.floats() | junk,
            "not_before": st.datetimes().map(str) | junk,
            "deadline": st.floats() | junk,
            "priority": st.integers() | junk,
            "tags": st.dictionaries(text, text, max_size=2) | junk,
            "reason": junk,
            "from_step": junk,
        },
    ).map(lambda value: json.dumps(value).encode())
    | junk.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=60)
)


def queries(*names: str) -> st.SearchStrategy[str]:
    values = event_ids | page_cursors | text
    return st.lists(st.tuples(st.sampled_from(names) | text, values), max_size=3).map(
        lambda pairs: urlencode(pairs, errors="replace")
    )


def asks(tokens: list[str | None]) -> st.SearchStrategy[Ask]:
    token = st.sampled_from(tokens) | st.text(st.characters(codec="latin-1"), max_size=30)
    one = {"token": token, "headers": st.just(())}
    json_type = ((b"content-type", b"application/json"),)
    run = run_ids.map(lambda run_id: f"/v1/runs/{run_id}")
    parts = st.sampled_from(["", "/events", "/stream", "/cancel", "/retry", "/stream-token"])
    reading_headers = st.just(()) | event_ids.map(
        lambda value: ((b"last-event-id", value.encode("utf-8", "replace")),)
    )
    with_body = st.builds(
        Ask,
        method=st.sampled_from(["POST", "DELETE", "PUT", "PATCH"]),
        path=st.just("/v1/runs") | st.builds(lambda path, part: path + part, run, parts),
        token=token,
        headers=st.just(json_type) | st.just(()),
        body=bodies,
    )
    reading = st.builds(
        Ask,
        method=st.sampled_from(["GET", "GET", "HEAD"]),
        path=st.builds(lambda path, part: path + part, run, parts),
        query=queries("from_seq", "fromSeq", "limit", "token"),
        token=token,
        headers=reading_headers,
    )
    listing = st.builds(
        Ask,
        method=st.just("GET"),
        path=st.just("/v1/runs"),
        query=queries("state", "plan", "queue", "tag", "limit", "cursor"),
        **one,
    )
    queue = st.builds(
        Ask,
        method=st.sampled_from(["POST", "DELETE", "GET"]),
        path=st.builds(
            lambda name, part: f"/v1/queues/{name}{part}",
            text | st.just("q"),
            st.sampled_from(["", "/pause", "/resume", "/drain"]),
        ),
        query=queries("force"),
        **one,
    )
    tailing = st.builds(
        Ask,
        method=st.just("GET"),
        path=st.just("/v1/stream"),
        query=queries("plan", "queue", "tag", "event", "since", "after", "token"),
        token=token,
        headers=reading_headers,
    )
    return with_body | reading | listing | queue | tailing


KNOWN = frozenset({200, 201, 202, 204, 400, 401, 403, 404, 405, 409, 410, 413, 422})


@pytest.fixture
def tenants(beatless: Kit, beatless_app: App) -> Iterator[list[str]]:
    """Tokens of everybody but acme, whose runs hold a secret in everything that is theirs."""
    acme = beatless_app.client_for("acme")
    for number in range(3):
        acme.start_run(
            "two_steps",
            {"text": SECRET},
            run_id=["x", SECRET, "mine"][number],
            key=["k", SECRET, None][number],
            tags={"tag": SECRET},
            queue="q",
        )
    assert beatless.executor().execute(beatless_app.plans["two_steps"], "acme~x", 0, max_steps=1)
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    made = [
        tokens.create([Scope.ADMIN], namespace="acme-2")[1],
        tokens.create([Scope.ADMIN], namespace="other")[1],
        tokens.create([Scope.RUNS_READ, Scope.RUNS_WRITE])[1],
        tokens.create([Scope.RUNS_READ], seconds=0)[1],
    ]
    yield made
    stored = acme.list_runs()
    assert {run.run_id for run in stored} == {"acme~x", f"acme~{SECRET}", "acme~mine"}
    assert not any(run.cancel_requested_at for run in stored)


@pytest.mark.slow
@pytest.mark.parametrize("examples", [30, pytest.param(600, marks=pytest.mark.long(minutes=5))])
def test_no_input_breaks_it_or_shows_what_is_anothers(
    beatless: Kit, beatless_app: App, tenants: list[str], examples: int
) -> None:
    """20 requests each: 12,000 in the long run."""
    api = create_api(beatless_app)
    asked = 0
    with asyncio.Runner() as runner:

        @settings(
            max_examples=examples,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(asks([*tenants, None]), min_size=20, max_size=20))
        def check(batch: list[Ask]) -> None:
            nonlocal asked
            for ask in batch:
                told = runner.run(tell(api, ask))
                asked += 1
                assert told.status in KNOWN, (ask, told)
                if told.status >= 400:
                    assert told.headers[b"content-type"] == b"application/problem+json"
                    assert b"Traceback" not in told.body
                if SECRET not in ask.path and SECRET.encode() not in ask.body:
                    assert SECRET.encode() not in told.body, (ask, told)

        check()
        runner.run(api.state.services.now().streams.aclose())
    assert asked >= 20 * examples
    beatless.verify()
