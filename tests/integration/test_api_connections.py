"""What strangers may send, for how long, and over how many connections."""

import resource
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from beatless import App
from beatless.api import body_limit, connections
from beatless.api.body_limit import BODY_BYTES
from beatless.auth import Scope, Tokens
from beatless.testing import Kit
from tests.serving import Api, serving

MIB = b" " * (1 << 20)


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


@contextmanager
def connected(api: Api) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", api.port), timeout=60) as connection:
        yield connection


def head(api: Api, *headers: str, method: str = "POST", path: str = "/v1/runs") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{api.port}", *headers, "", "")
    return "\r\n".join(lines).encode()


def status_of(connection: socket.socket) -> int:
    return int(connection.makefile("rb").readline().split()[1])


def ended(connection: socket.socket) -> bool:
    """Wait for its end, be it in order or by a reset."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


JSON = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([CHUNKED], 413),
        ([CHUNKED, "Content-Length: 10"], 400),
        (["Content-Length: 10", CHUNKED], 400),
        (["Content-Length: 10", "Content-Length: 11"], 400),
        ([f"Content-Length: {BODY_BYTES + 1}"], 413),
        (["Content-Length: 99999999999999999999999999"], 400),
        (["Content-Length: -1"], 400),
        (["Content-Length: 1e3"], 400),
        ([CHUNKED, "Content-Encoding: gzip"], 415),
        ([CHUNKED, "Content-Encoding: identity"], 413),
    ],
    ids=str,
)
def test_a_body_is_counted_whatever_its_headers_say(
    api: Api, headers: list[str], status: int
) -> None:
    tracemalloc.start()
    try:
        with connected(api) as connection:
            connection.sendall(head(api, JSON, *headers))
            with_chunks = any("chunked" in header for header in headers)
            # It reads on, and keeps nothing, so that a client gets to its answer.
            for _ in range(64 if with_chunks else 0):
                connection.sendall(chunk(MIB))
            assert status_of(connection) == status
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * len(MIB)


def test_nothing_of_a_body_is_read_before_it_is_known_who_sends_it(
    beatless_app: App, api: Api
) -> None:
    Tokens(beatless_app.engine, beatless_app.settings.schema).create([Scope.ADMIN])
    with connected(api) as connection:
        connection.sendall(head(api, JSON, f"Content-Length: {BODY_BYTES}"))
        assert status_of(connection) == 401


def test_a_body_that_comes_too_slowly_is_not_waited_for(api: Api, monkeypatch) -> None:
    monkeypatch.setattr(body_limit, "BODY_TIMEOUT_S", 0.2)
    for headers in ([CHUNKED], ["Content-Length: 10"]):
        with connected(api) as connection:
            connection.sendall(head(api, JSON, *headers))
            assert status_of(connection) == 408


def test_a_stream_whose_request_never_ends_is_ended(beatless: Kit, api: Api, monkeypatch) -> None:
    monkeypatch.setattr(body_limit, "BODY_TIMEOUT_S", 0.2)
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    with connected(api) as connection:
        connection.sendall(head(api, "Content-Length: 10", method="GET", path=path))
        assert status_of(connection) == 200
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("depth", [101, 1000, 5000, 100_000])
def test_deep_json_is_refused(api: Api, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    answer = api("POST", "/v1/runs", b'{"plan": "two_steps", "input": %b}' % nested)
    assert answer.status in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/failed-runs", "/nothing"])
def test_many_parameters_and_large_headers_are_answered(api: Api, path: str) -> None:
    assert api("GET", f"{path}?{'&'.join(['tag=a=b'] * 4000)}").status in (200, 404, 422)
    with connected(api) as connection:
        # All at once, or what is not whole yet is cut off earlier.
        connection.sendall(head(api, "X: " + "x" * 100_000, method="GET", path=path))
        assert status_of(connection) in (400, 431)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX: y\r\n"])
def test_a_connection_that_sends_no_whole_request_is_dropped(
    api: Api, monkeypatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 0.2)
    with connected(api) as connection:
        connection.sendall(sent)
        assert ended(connection)


def test_a_connection_is_dropped_too_when_its_second_request_is_not_whole(
    api: Api, monkeypatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 2.0)
    with connected(api) as connection:
        connection.sendall(head(api, method="GET", path="/livez"))
        assert status_of(connection) == 200
        connection.sendall(b"GET / HT")
        assert ended(connection)


def test_silent_connections_give_way_and_those_at_work_do_not(
    beatless: Kit, beatless_app: App, monkeypatch
) -> None:
    monkeypatch.setattr("beatless.api.serving.share", lambda _descriptors: (3, 64))
    path = f"/v1/runs/{beatless.start_run('two_steps').run_id}/stream"
    with serving(beatless_app) as api, ExitStack() as stack:
        streams = [stack.enter_context(api.stream(path)) for _ in range(2)]
        for stream in streams:
            next(stream), next(stream)
        for _ in range(20):
            stack.enter_context(connected(api))
        assert api("GET", "/livez").status == 200

        last = stack.enter_context(api.stream(path))
        next(last), next(last)
        refused = api("GET", "/livez")
        assert refused.status == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.headers["content-type"] == "application/problem+json"
        assert "connections" in refused.json["detail"]

        beatless.work_until_idle()
        for stream in (*streams, last):
            assert list(stream)[-1]["event"] == "RunFinished"
        assert api("GET", "/livez").status == 200


def test_a_server_may_open_as_many_files_as_its_process_is_allowed(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _what, limits: asked.append(limits))
    for limits, found in (
        ((1024, 4096), 4096),
        ((1024, 1024), 1024),
        ((1024, resource.RLIM_INFINITY), connections.MAX_DESCRIPTORS),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), connections.MAX_DESCRIPTORS),
        ((100_000, 1_000_000), 100_000),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _what, limits=limits: limits)
        assert connections.raise_descriptor_limit() == found
    assert asked == [(4096, 4096), (connections.MAX_DESCRIPTORS, resource.RLIM_INFINITY)]
    for descriptors in (8, 256, 1024, 65_536):
        most, backlog = connections.share(descriptors)
        assert 1 <= most <= max(1, descriptors - 3 * backlog)
