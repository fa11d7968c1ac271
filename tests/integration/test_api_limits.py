"""Bounds of the API, and what it keeps to itself."""

import asyncio
import http.client
import logging
import socket
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import replace

import psycopg
import pytest

from beatless import App, RunState
from beatless.api import responses, server, sse, stream_limits
from beatless.auth import Scope, Tokens
from beatless.client import RunRequest
from beatless.http import AsyncClient, Client
from beatless.testing import Kit
from tests.serving import Api, serving


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


def body(response: http.client.HTTPResponse) -> bytes:
    with response.connection:
        return response.read()


def test_a_process_has_only_so_many_streams(beatless: Kit, api: Api, monkeypatch) -> None:
    monkeypatch.setattr(stream_limits, "MAX_STREAMS", 2)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    with ExitStack() as stack:
        open_streams = [stack.enter_context(api.stream(path)) for _ in range(2)]
        for stream in open_streams:
            next(stream), next(stream)
        refused = api("GET", path)
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert refused.headers["content-type"] == "application/problem+json"
        assert beatless.work_until_idle() == 1
        assert [list(stream)[-1]["event"] for stream in open_streams] == ["RunFinished"] * 2
    with api.stream(path) as stream:
        assert len(list(stream)) == 7


def test_a_burst_of_streams_passes_no_limit(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, monkeypatch
) -> None:
    monkeypatch.setattr(stream_limits, "MAX_STREAMS", 3)
    monkeypatch.setattr(server, "LOCK_TIMEOUT_S", 60)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    beatless.work_until_idle()  # so that each stream of it ends by itself
    with serving(beatless_app) as api, ThreadPoolExecutor(12) as crowd:
        with postgres.transaction():
            postgres.execute("LOCK TABLE runs")  # no stream is open before all have been asked for
            asked = as_completed([crowd.submit(api, "GET", path) for _ in range(12)], timeout=60)
            assert [next(asked).result().status for _ in range(9)] == [503] * 9
        assert [each.result().status for each in asked] == [200] * 3
        assert api("GET", path).status == 200


def test_a_token_has_only_so_many_streams(
    beatless: Kit, beatless_app: App, api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(stream_limits, "MAX_STREAMS_PER_TOKEN", 1)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    one, other = (tokens.create([Scope.RUNS_READ])[1] for _ in range(2))
    with ExitStack() as stack:
        for token in (one, other):
            api.token = token
            stream = stack.enter_context(api.stream(path))
            next(stream), next(stream)
            assert api("GET", path).status == 503


def test_stream_tokens_together_have_no_more_streams_than_their_namespace(
    beatless: Kit, beatless_app: App, api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(stream_limits, "MAX_STREAMS_PER_NAMESPACE", 2)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    theirs = beatless_app.client_for("theirs").start_run("two_steps").run_id
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    reader = tokens.create([Scope.RUNS_READ])[1]
    other = tokens.create([Scope.RUNS_READ], namespace="theirs")[1]

    def stream_token() -> str:
        api.token = reader
        return api("POST", path + "-token").json["token"]

    with ExitStack() as stack:
        for token in (stream_token(), stream_token()):
            api.token = token
            stream = stack.enter_context(api.stream(path))
            next(stream), next(stream)
        api.token = stream_token()
        assert api("GET", path).status == 503
        api.token = other
        stream = stack.enter_context(api.stream(f"/v1/runs/{theirs}/stream"))
        next(stream), next(stream)


def test_a_stream_without_news_has_heartbeats(beatless: Kit, api: Api, monkeypatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.02)
    run = beatless.start_run("two_steps")
    answer = api.open("GET", f"/v1/runs/{run.run_id}/stream")
    with closing(answer.connection), closing(answer):
        alive = 0
        while alive < 3:
            alive += answer.readline() == b": alive\n"


def test_a_stream_ends_after_its_time_and_goes_on_where_it_was(
    beatless: Kit, api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(sse, "ROTATION_S", 0.2)
    run = beatless.start_run("two_steps")
    raw = body(api.open("GET", f"/v1/runs/{run.run_id}/stream")).decode()
    last = raw.split("id: ")[-1].splitlines()[0]
    seen = int(last.rpartition(".")[2])
    assert raw.count("event: ") == seen <= 1  # 0 if its time was over before its first look
    monkeypatch.undo()
    beatless.work_until_idle()
    with api.stream(f"/v1/runs/{run.run_id}/stream", Last_Event_ID=last) as stream:
        seqs = [int(frame["id"].rpartition(".")[2]) for frame in stream]
    assert seqs == list(range(seen, 7))


def test_nothing_is_compressed_and_no_other_site_may_read(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    for path in ("/v1/runs", f"/v1/runs/{run.run_id}/stream", "/"):
        for method in ("GET", "OPTIONS"):
            answer = api.open(
                method,
                path,
                Accept_Encoding="gzip, br",
                Origin="https://evil.example",
                Access_Control_Request_Method="GET",
            )
            body(answer)
            assert answer.headers["content-encoding"] is None
            assert not [name for name in answer.headers if name.lower().startswith("access-")]
    stream = api.open("GET", f"/v1/runs/{run.run_id}/stream")
    body(stream)
    assert stream.headers["cache-control"] == "no-store, no-transform"
    assert stream.headers["x-accel-buffering"] == "no"


def test_no_token_gets_into_a_log(beatless: Kit, beatless_app: App, api: Api, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    _, secret = Tokens(beatless_app.engine, beatless_app.settings.schema).create([Scope.ADMIN])
    api.token = secret
    made = api("POST", f"/v1/runs/{run.run_id}/stream-token").json["token"]
    api.token = None
    for token in (made, secret, "bl_wrong"):
        path = f"/v1/runs/{run.run_id}/stream?token={token}"
        assert api("GET", path).status in (200, 401)
        api("GET", path + "&from_seq=x")
        api("GET", path, Last_Event_ID="99999")
    assert "bl_" not in caplog.text
    assert secret not in caplog.text


def test_where_the_servers_are_is_not_told(beatless_app: App, shut_port: int) -> None:
    port = shut_port
    away = replace(
        beatless_app.settings,
        database_url=f"postgresql://somebody:hidden@127.0.0.1:{port}/db",
        listen_url="",
    )
    app = App(away, list(beatless_app.plans.values()))
    with serving(app) as api:
        for path in ("/v1/runs", "/v1/runs/x/stream", "/readyz"):
            answer = api("GET", path)
            assert answer.status == 503
            assert not [word for word in (str(port), "somebody", "hidden") if word in answer.text]
        assert api("GET", "/v1/runs").headers["retry-after"]
        assert api("GET", "/livez").status == 200
    app.close()


def test_large_events_come_in_answers_that_are_not(beatless: Kit, api: Api, monkeypatch) -> None:
    monkeypatch.setattr(responses, "EVENTS_BYTES", 1000)
    run = beatless.start_run("traces", {"traces": 60})
    beatless.work_until_idle()
    answer = api("GET", f"/v1/runs/{run.run_id}/events?limit=10000")
    assert len(answer.text) < 2000
    assert 1 <= len(answer.json["events"]) < 20
    assert answer.json["last_seq"] == 64
    with Client(api.url) as client:
        assert client.events(run.run_id) == beatless.client.events(run.run_id)


@pytest.mark.slow
def test_large_runs_come_in_answers_that_are_not(beatless: Kit, api: Api, monkeypatch) -> None:
    monkeypatch.setattr(responses, "RUNS_BYTES", 5000)
    requests = [RunRequest(plan="fatally", input="x" * 1000) for _ in range(12)]
    requests[4] = RunRequest(plan="fatally", input="x" * 9000)
    beatless.client.start_runs(requests)
    beatless.work_until_idle()
    runs, failed = beatless.client.list_runs(), beatless.client.failed_runs()
    assert (len(runs), len(failed)) == (12, 12)
    for path in ("/v1/runs", "/v1/failed-runs"):
        answer = api("GET", f"{path}?limit=100")
        assert len(answer.text) < 16_000
        assert 1 <= len(answer.json["runs"]) < 5
        # The page goes on by the cursor, as it does after a full page.
        more = api("GET", f"{path}?limit=100&cursor={answer.json['next']}").json["runs"]
        assert more[0]["run_id"] not in {run["run_id"] for run in answer.json["runs"]}
        assert api("GET", f"{path}?cursor=x").status == 400
    with Client(api.url) as client:
        assert client.list_runs(limit=100) == runs
        assert client.list_runs(limit=7) == runs[:7]
        assert client.failed_runs(limit=100) == failed
        assert client.failed_runs(limit=7) == failed[:7]
        started, refused = client.retry_failed(limit=7)
        assert ([run.retry_of for run in started], refused) == (
            [run.run_id for run in failed[:7]],
            [],
        )
        started, refused = client.retry_failed()
        assert [run.retry_of for run in started] == [run.run_id for run in failed[7:]]
        assert client.failed_runs() == []


def test_a_page_of_runs_counts_bytes_and_not_characters(
    beatless: Kit, api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(responses, "RUNS_BYTES", 5000)
    beatless.client.start_runs([RunRequest(plan="fatally", input="漢" * 1000) for _ in range(6)])
    assert len(api("GET", "/v1/runs?limit=100").json["runs"]) == 2


def test_the_async_client_reads_large_runs_page_by_page(
    beatless: Kit, api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(responses, "RUNS_BYTES", 1)
    beatless.client.start_runs([RunRequest(plan="fatally") for _ in range(4)])
    beatless.work_until_idle()
    runs, failed = beatless.client.list_runs(), beatless.client.failed_runs()

    async def read() -> None:
        async with AsyncClient(api.url) as client:
            assert await client.list_runs() == runs
            assert await client.failed_runs() == failed
            started, refused = await client.retry_failed()
            assert [run.retry_of for run in started] == [run.run_id for run in failed]
            assert refused == []

    asyncio.run(read())


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/runs", "/v1/failed-runs"])
def test_a_list_has_few_large_runs_in_memory_at_once(
    beatless: Kit, api: Api, monkeypatch, path: str
) -> None:
    """As objects an input of 20 kB can take 24 times that."""
    monkeypatch.setattr(responses, "RUNS_BYTES", 20_000)
    beatless.client.start_runs([RunRequest(plan="fatally", input=[{}] * 7000) for _ in range(20)])
    beatless.work_until_idle()
    tracemalloc.start()
    try:
        answer = api.open("GET", f"{path}?limit=500")
        assert len(body(answer)) < 40_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


SENT_BY_BROWSERS = [
    ({"Origin": "https://evil.example"}, 401),
    ({"Origin": "null"}, 401),
    ({"Origin": "http://[evil"}, 401),
    ({"Origin": "http://127.0.0.1.evil.example"}, 401),
    ({"Sec-Fetch-Site": "cross-site"}, 401),
    ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 401),
    # A server of somebody's page in development, on this machine.
    ({"Origin": "http://localhost:5173"}, 202),
    ({"Origin": "http://[::1]:5173"}, 202),
    ({"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:5173"}, 202),
    ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, 202),
    ({"Sec-Fetch-Site": "same-site"}, 202),
    ({"Sec-Fetch-Site": "none"}, 202),
]


def test_without_tokens_no_other_sites_page_may_have_a_browser_act(
    beatless: Kit, api: Api, subtests: pytest.Subtests
) -> None:
    """A form of text/plain asks no server beforehand."""
    for headers, status in SENT_BY_BROWSERS:
        with subtests.test(str(headers)):
            beatless.client.resume_queue("other")
            run = beatless.start_run("two_steps")
            for path in ("/v1/queues/other/pause", f"/v1/runs/{run.run_id}/cancel"):
                assert api("POST", path, Content_Type="text/plain", **headers).status == status
            assert beatless.client.get_run(run.run_id).state == (
                RunState.QUEUED if status == 401 else RunState.CANCELLED
            )
            assert [state.name for state in beatless.client.queues() if state.paused_at] == (
                [] if status == 401 else ["other"]
            )


def test_a_token_is_good_whatever_page_sends_it(beatless: Kit, beatless_app: App, api: Api) -> None:
    api.token = Tokens(beatless_app.engine, beatless_app.settings.schema).create([Scope.ADMIN])[1]
    path = "/v1/queues/other/pause"
    answer = api("POST", path, Origin="https://ours.example", Sec_Fetch_Site="cross-site")
    assert answer.status == 202


def traces_of_many_objects(postgres: psycopg.Connection, run_id: str, count: int) -> None:
    """Events that take as objects 25 times what they take as JSON."""
    postgres.execute(
        "INSERT INTO run_events (run_id, seq, type, source, step, attempt, data)"
        " SELECT %s, n, 'DebugTrace', 'worker', 's', 1, jsonb_build_object('d', %s::jsonb)"
        " FROM generate_series(2, %s) n",
        [run_id, "[" + ",".join(["{}"] * 80_000) + "]", count + 1],
    )
    postgres.execute("UPDATE runs SET last_seq = %s WHERE run_id = %s", [count + 1, run_id])


@pytest.mark.slow
def test_stored_events_are_passed_on_as_text(
    beatless: Kit, api: Api, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    traces_of_many_objects(postgres, run_id, 24)
    tracemalloc.start()
    try:
        answer = body(api.open("GET", f"/v1/runs/{run_id}/events"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(answer) > responses.EVENTS_BYTES
    assert peak < 6 * responses.EVENTS_BYTES


@pytest.mark.slow
def test_viewers_that_do_not_read_take_little_memory(
    beatless: Kit, api: Api, postgres: psycopg.Connection
) -> None:
    count = 10
    run_id = beatless.start_run("two_steps").run_id
    traces_of_many_objects(postgres, run_id, 8)
    request = f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nHost: 127.0.0.1:{api.port}\r\n\r\n"
    tracemalloc.start()
    try:
        with ExitStack() as stack:
            for _ in range(count):
                viewer = stack.enter_context(socket.socket())
                viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                viewer.connect(("127.0.0.1", api.port))
                viewer.sendall(request.encode())
                assert viewer.recv(1000, socket.MSG_PEEK)
            # One that reads, after them all: what they are sent now is as much as ever.
            with api.stream(f"/v1/runs/{run_id}/stream") as stream:
                for _ in range(9):
                    next(stream)
            now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now < count * 1024 * 1024 * 1.5
