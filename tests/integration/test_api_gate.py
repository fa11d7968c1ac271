"""Who may come in: from where, by which token, by whose word, and for how long."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from fastapi import FastAPI, Request

from beatless import App
from beatless.api import Grant, Scope, create_api, open_streams
from beatless.auth import STREAM_TOKEN_S, Tokens
from beatless.errors import BadRequest
from beatless.testing import Kit
from tests.serving import Api, serving

BEHIND_A_TOKEN = (
    "/v1/runs",
    "/v1/token",
    "/v1/queues",
    "/v1/runs/r/stream",
    "/",
    "/static/page.js",
    "/links",
    "/openapi.json",
    "/metrics",
)


@pytest.fixture
def tokens(beatless_app: App) -> Tokens:
    return Tokens(beatless_app.engine, beatless_app.settings.schema)


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


def ask(api: FastAPI, *paths: str, client=("127.0.0.1", 5000), url="http://127.0.0.1:8400", **sent):
    """The statuses of requests from a client at an address."""
    return [answer.status_code for answer in answers(api, *paths, client=client, url=url, **sent)]


def answers(
    api: FastAPI, *paths: str, client=("127.0.0.1", 5000), url="http://127.0.0.1:8400", **sent
):
    async def get() -> list[httpx2.Response]:
        door = httpx2.ASGITransport(api, client=client)
        async with httpx2.AsyncClient(transport=door, base_url=url) as asked:
            return [await asked.get(path, **sent) for path in paths]

    return asyncio.run(get())


FROM_HERE = [
    {},
    {"url": "http://localhost:8400"},
    {"url": "http://[::1]:8400", "client": ("::1", 5000)},
    {"client": ("127.0.0.9", 5000)},
    {"client": ("::ffff:127.0.0.1", 5000)},
    {"url": "http://localhost"},
    {"headers": {"Host": "LOCALHOST:8400"}},
    {"headers": {"Origin": "http://localhost:5173"}},
]

FROM_ELSEWHERE = [
    {"client": ("192.0.2.7", 5000)},
    {"client": ("::ffff:192.0.2.7", 5000)},
    {"client": ("fe80::1%eth0", 5000)},
    {"client": None},  # a proxy's connection to a Unix socket
    {"url": "http://192.0.2.7:8400", "headers": {"Host": "localhost:8400"}},
    {"url": "http://testserver"},
    {"headers": {"Host": "beatless.example"}},
    {"headers": {"Host": "rebound.example:8400"}},
    {"headers": {"Host": "localhost.rebound.example:8400"}},
    {"headers": {"Host": "localhost"}},  # what a proxy makes of it: not our port
    {"headers": {"Host": "localhost:80"}},
    {"headers": {"Host": "localhost:8400@rebound.example"}},
    {"headers": {"Host": "localhost:x"}},
    {"headers": {"Host": "[::1]rebound.example:8400"}},
    {"headers": {"Host": "[::1%25rebound.example]:8400"}},
    {"headers": {"Host": ""}},
    {"headers": [("Host", "localhost:8400"), ("Host", "rebound.example")]},
    {"headers": {"Origin": "https://evil.example"}},
    {"headers": {"Sec-Fetch-Site": "cross-site"}},
    *(
        {"headers": {name: "203.0.113.9"}}
        for name in (
            "X-Forwarded-For",
            "X_Forwarded_For",
            "X-Forwarded-Host",
            "X-Forwarded-Proto",
            "X-Forwarded-Prefix",
            "X-Forwarded",
            "Forwarded",
            "Via",
            "X-Real-IP",
            "X-Client-IP",
            "X-Cluster-Client-IP",
            "X-Original-Forwarded-For",
            "X-Envoy-External-Address",
            "True-Client-IP",
            "CF-Connecting-IP",
            "Fastly-Client-IP",
            "X-Amzn-Trace-Id",
        )
    ),
]


@pytest.mark.slow
def test_every_route_asks_the_gate_before_it_reads_a_body(api: Api, tokens: Tokens) -> None:
    tokens.create([Scope.ADMIN])
    calls = [
        (method.upper(), re.sub(r"{.*?}", "1", path))
        for path, methods in api("GET", "/openapi.json").json["paths"].items()
        for method in methods
    ]
    assert len(calls) > 20
    assert {call: api(*call, b"{").status for call in calls} == dict.fromkeys(calls, 401)


def test_without_tokens_a_person_on_this_machine_may_do_everything(
    beatless: Kit, beatless_app: App, subtests: pytest.Subtests
) -> None:
    run = beatless.start_run("two_steps", run_id="r")
    beatless.client.cancel_run(run.run_id)
    api = create_api(beatless_app)
    for sent in FROM_HERE:
        with subtests.test(str(sent)):
            assert set(ask(api, *BEHIND_A_TOKEN, **sent)) == {200}


def test_without_tokens_nothing_comes_from_elsewhere(
    beatless_app: App, subtests: pytest.Subtests
) -> None:
    """As after the last token of a public server was revoked."""
    api = create_api(beatless_app)
    for sent in FROM_ELSEWHERE:
        with subtests.test(str(sent)):
            assert set(ask(api, *BEHIND_A_TOKEN, **sent)) == {401}
            assert ask(api, "/livez", "/readyz", **sent) == [200, 200]


def test_without_tokens_an_older_protocol_is_a_proxys(api: Api) -> None:
    """What nginx makes of a request by its defaults: our address as Host, and no other header."""
    for version, status in (("1.0", 401), ("1.1", 200)):
        with socket.create_connection(("127.0.0.1", api.port)) as connection:
            head = f"GET /v1/token HTTP/{version}\r\nHost: 127.0.0.1:{api.port}\r\n"
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
            assert connection.makefile("rb").readline().split()[1] == str(status).encode()


@pytest.mark.parametrize("named", ["localhost", "127.0.0.1", "[::1]", "beatless.example"])
def test_without_tokens_our_nginx_lets_nobody_in_whatever_host_they_name(
    api: Api, named: str
) -> None:
    conf = (Path(__file__).parents[2] / "deploy/nginx.conf").read_text()
    values = {"$host": named, "$proxy_add_x_forwarded_for": "203.0.113.9", "$scheme": "https"}
    sent = {
        name.replace("-", "_"): values[value]
        for name, value in re.findall(r"proxy_set_header (\S+) ([^;]+);", conf)
        if value != '""'
    }
    assert api("GET", "/v1/token", **sent).status == 401
    assert api("GET", "/v1/token", Host=named).status == 401, "a conf of others that says less"


def test_without_tokens_no_websocket_opens(beatless_app: App, api: Api) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec_WebSocket_Key": "x" * 24,
        "Sec_WebSocket_Version": "13",
    }
    for path in ("/", "/v1/runs", "/v1/runs/x/stream"):
        assert api("GET", path, **upgrade, Host="rebound.example").status == 401
        assert api("GET", path, **upgrade).status in (200, 404)
        sent: list[str] = []

        async def handshake(path: str = path, sent: list[str] = sent) -> None:
            async def receive() -> dict[str, str]:
                return {"type": "websocket.connect"}

            async def send(message) -> None:
                sent.append(message["type"])

            scope = {"type": "websocket", "path": path, "headers": [], "query_string": b""}
            await create_api(beatless_app)(scope | {"root_path": ""}, receive, send)

        asyncio.run(handshake())
        assert sent == ["websocket.close"]


def test_an_open_api_lets_everybody_in_until_there_is_a_token(
    beatless_app: App, tokens: Tokens
) -> None:
    api = create_api(beatless_app, is_open=True)
    afar = {"client": ("192.0.2.7", 5000), "url": "http://beatless.example"}
    assert set(ask(api, "/v1/runs", "/v1/queues", "/metrics", "/", **afar)) == {200}
    own = {"Origin": "http://beatless.example"}
    assert ask(api, "/v1/runs", **afar, headers=own) == [200]
    for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert ask(api, "/v1/runs", **afar, headers=foreign) == [401]
    tokens.create([Scope.RUNS_READ])
    assert ask(api, "/v1/runs", "/v1/queues", **afar) == [401, 401]


def test_once_there_is_a_token_page_and_metrics_are_there_for_all(
    beatless_app: App, tokens: Tokens, shut_port: int
) -> None:
    tokens.create([Scope.RUNS_READ])
    afar = {"client": ("192.0.2.7", 5000), "url": "http://beatless.example"}
    api = create_api(beatless_app)
    assert ask(api, "/", "/metrics", "/openapi.json", "/v1/runs", **afar) == [200, 200, 200, 401]


# Tokens


def expire(postgres: psycopg.Connection, token_id: str) -> None:
    postgres.execute(
        "UPDATE api_tokens SET expires_at = clock_timestamp() - interval '1 s' WHERE id = %s",
        [token_id],
    )


def test_a_token_is_good_until_it_expires(
    api: Api, tokens: Tokens, postgres: psycopg.Connection
) -> None:
    token_id, api.token = tokens.create([Scope.ADMIN], seconds=60)
    assert api("GET", "/v1/runs").status == 200
    expire(postgres, token_id)
    assert api("GET", "/v1/runs").status == 401
    api.token = None
    assert api("GET", "/v1/runs").status == 401, "one that expired is still one"


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan"), 3e11])
def test_how_long_a_token_is_good_has_the_bounds_of_all_times(
    tokens: Tokens, seconds: float
) -> None:
    with pytest.raises(BadRequest, match=r"expires.*ten years"):
        tokens.create([Scope.RUNS_READ], seconds=seconds)
    assert tokens.list() == []


def test_a_token_is_good_for_its_namespace_only(
    beatless: Kit, api: Api, tokens: Tokens, beatless_app: App
) -> None:
    ours = beatless.start_run("two_steps").run_id
    theirs = beatless_app.client_for("theirs").start_run("two_steps").run_id
    api.token = tokens.create([Scope.ADMIN], namespace="theirs")[1]
    assert api("GET", f"/v1/runs/{theirs}").status == 200
    assert api("GET", f"/v1/runs/{ours}").status == 404
    stream = api("POST", f"/v1/runs/{theirs}/stream-token").json["token"]
    api.token = None
    assert api("GET", f"/v1/runs/{ours}/stream?token={stream}").status == 403
    with api.stream(f"/v1/runs/{theirs}/stream?token={stream}") as frames:
        next(frames)


def test_an_id_of_a_token_is_never_drawn_twice(tokens: Tokens) -> None:
    token_id, _ = tokens.create([Scope.RUNS_READ])
    assert len(bytes.fromhex(token_id)) >= 16


@pytest.fixture
def stream_token(beatless: Kit, api: Api, tokens: Tokens) -> tuple[str, str]:
    """(the id of its maker, the path of a stream with it)"""
    tokens.create([Scope.ADMIN])
    run = beatless.start_run("two_steps").run_id
    beatless.work_until_idle()  # so that each stream of it ends by itself
    maker, api.token = tokens.create([Scope.RUNS_READ], seconds=60)
    made = api("POST", f"/v1/runs/{run}/stream-token").json
    assert made["seconds"] == STREAM_TOKEN_S
    api.token = None
    return maker, f"/v1/runs/{run}/stream?token={made['token']}"


def test_a_stream_token_ends_by_itself(
    api: Api, stream_token: tuple[str, str], postgres: psycopg.Connection
) -> None:
    with api.stream(stream_token[1]) as frames:
        next(frames)
    (token_id,) = postgres.execute("SELECT id FROM api_tokens WHERE run_id <> ''").fetchone()
    expire(postgres, token_id)
    assert api("GET", stream_token[1]).status == 401


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_token_ends_with_its_maker(
    api: Api, stream_token: tuple[str, str], tokens: Tokens, postgres: psycopg.Connection, how: str
) -> None:
    maker, path = stream_token
    tokens.revoke(maker) if how == "revoked" else expire(postgres, maker)
    assert api("GET", path).status == 401


def test_a_stream_token_made_without_a_token_ends_when_there_is_one(
    beatless: Kit, api: Api, tokens: Tokens
) -> None:
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    beatless.work_until_idle()
    made = api("POST", f"{path}-token").json["token"]
    with api.stream(f"{path}?token={made}") as frames:
        next(frames)
    tokens.create([Scope.ADMIN])
    assert api("GET", f"{path}?token={made}").status == 401


@pytest.mark.parametrize("who", ["token", "stream token", "maker", "nobody"])
def test_an_open_stream_ends_in_order_soon_after_what_it_was_opened_with(
    beatless: Kit,
    beatless_app: App,
    tokens: Tokens,
    postgres: psycopg.Connection,
    monkeypatch,
    who: str,
) -> None:
    monkeypatch.setattr(open_streams, "TOKEN_CHECK_S", 0.0)
    monkeypatch.setattr(open_streams, "STOP_CHECK_S", 0.05)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    with serving(beatless_app) as api:
        if who != "nobody":
            token_id, api.token = tokens.create([Scope.RUNS_READ])
            if who != "token":
                path += f"?token={api('POST', path + '-token').json['token']}"
                api.token = None
        with api.stream(path) as frames:
            assert next(frames).keys() == {"id", "retry"}
            assert next(frames)["event"] == "RunStarted"
            if who == "nobody":
                tokens.create([Scope.ADMIN])
            elif who == "stream token":
                postgres.execute(
                    "UPDATE api_tokens SET expires_at = clock_timestamp() WHERE run_id <> ''"
                )
            else:
                tokens.revoke(token_id)
            assert list(frames) == []  # whole: an answer that breaks off raises IncompleteRead
        assert api("GET", path).status == 401


def test_open_streams_outlive_a_look_at_their_tokens_that_fails(
    beatless: Kit, beatless_app: App, tokens: Tokens, postgres: psycopg.Connection, monkeypatch
) -> None:
    monkeypatch.setattr(open_streams, "TOKEN_CHECK_S", 0.0)
    monkeypatch.setattr(open_streams, "STOP_CHECK_S", 0.01)
    looked = threading.Semaphore(0)
    good = Tokens.good

    def look(self: Tokens, ids):
        looked.release()
        return good(self, ids)

    monkeypatch.setattr(Tokens, "good", look)
    run = beatless.start_run("two_steps").run_id
    with serving(beatless_app) as api:
        _, api.token = tokens.create([Scope.RUNS_READ])
        with api.stream(f"/v1/runs/{run}/stream") as frames:
            next(frames), next(frames)
            postgres.execute("ALTER TABLE api_tokens RENAME TO away")
            for _ in range(3):
                assert looked.acquire(timeout=60)
            postgres.execute("ALTER TABLE away RENAME TO api_tokens")
            for _ in range(3):
                assert looked.acquire(timeout=60)
            beatless.work_until_idle()
            assert [frame["event"] for frame in frames][-1] == "RunFinished"


# The host app's own authentication


def by_header(request: Request) -> Grant | None:
    person = request.headers.get("x-person")
    return Grant(scopes=[Scope.RUNS_WRITE], namespace=person) if person else None


async def by_header_in_a_while(request: Request) -> Grant | None:
    return await asyncio.to_thread(by_header, request)


@pytest.mark.parametrize("authenticate", [by_header, by_header_in_a_while])
def test_the_host_says_what_a_request_may_do(
    beatless_app: App, tokens: Tokens, authenticate
) -> None:
    beatless_app.client_for("ann").start_run("two_steps", run_id="hers")
    api = create_api(beatless_app, authenticate=authenticate)
    ann, bob = ({"headers": {"X-Person": name}} for name in ("ann", "bob"))
    assert ask(api, "/v1/runs/hers", "/v1/queues", "/", "/metrics", **ann) == [200, 403, 200, 200]
    assert ask(api, "/v1/runs/hers", **bob) == [404]
    # Nobody is let in for being on this machine.
    assert ask(api, "/v1/runs", "/", "/metrics", "/livez") == [401, 401, 401, 200]
    _, secret = tokens.create([Scope.RUNS_READ])
    assert ask(api, "/v1/runs", headers={"Authorization": f"Bearer {secret}"}) == [200]
    assert ask(api, "/v1/runs", headers={"Authorization": "Bearer bl_wrong"}) == [401]
    foreign = {"X-Person": "ann", "Origin": "https://evil.example"}
    assert ask(api, "/v1/runs", headers=foreign) == [401]
    # Each refusal says what the host's own people can do about it: a token is not all there is.
    for answer in answers(api, "/v1/runs", "/"):
        assert "the app in which this API is mounted" in answer.json()["detail"]
    (answer,) = answers(api, "/v1/runs", headers=foreign)
    assert "another site's page" in answer.json()["detail"]


def test_a_stream_token_of_the_host_is_good_for_its_run(beatless_app: App) -> None:
    api = create_api(beatless_app, authenticate=by_header)
    client = beatless_app.client_for("ann")
    run = client.start_run("two_steps")
    other = client.start_run("two_steps")
    for started in (run, other):
        client.cancel_run(started.run_id)
    token = client.stream_token(run.run_id)
    paths = [f"/v1/runs/{each.run_id}/stream?token={token}" for each in (run, other)]
    assert ask(api, *paths) == [200, 403]
    token_of_run = {"headers": {"Authorization": f"Bearer {token}"}}
    for refused in (*answers(api, paths[1]), *answers(api, "/v1/runs", **token_of_run)):
        assert f"good for the stream of {run.run_id} and nothing else" in refused.json()["detail"]


def test_what_a_host_grants_must_be_a_grant(
    beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "must return a Grant or None, not True"
    api = create_api(beatless_app, authenticate=lambda _request: True)
    (answer,) = answers(api, "/v1/runs")
    assert answer.status_code == 500
    assert "the app in which this API is mounted" in answer.json()["detail"]
    (record,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert reason in record.reason
    assert reason in str(record.exc_info[1])  # of a host that prints no facts


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"scopes": ["everything"]}, "unknown scopes: everything; choose from runs:read, "),
        ({"scopes": Scope.ADMIN}, r"give a list, as in scopes=\["),
        ({"scopes": None}, r"give a list, as in scopes=\["),
        ({"scopes": [Scope.ADMIN], "namespace": "a b"}, r"does not match \^\[a-z0-9_\]"),
        ({"scopes": [Scope.ADMIN], "namespace": None}, r"does not match \^\[a-z0-9_\]"),
    ],
)
def test_a_grant_that_gives_nothing_is_refused_when_it_is_made(
    wrong: dict[str, Any], reason: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=reason):
        Grant(**wrong)


@pytest.mark.parametrize("wrong", ["x", lambda: None, lambda _request, _second: None])
def test_what_cannot_authenticate_a_request_is_refused_when_the_api_is_made(
    beatless_app: App, wrong: object
) -> None:
    with pytest.raises(TypeError, match=r"def authenticate\(request\)"):
        create_api(beatless_app, authenticate=wrong)


def test_a_length_of_thousands_of_digits_is_too_large(beatless_app: App) -> None:
    """Other servers than ours pass it on to an API that is mounted."""
    length = {"Content-Length": "9" * 5000}
    assert ask(create_api(beatless_app), "/v1/runs", headers=length) == [413]
