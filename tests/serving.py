"""The API of a test's app on a real server, and a client of it in the plainest way."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from beatless import App
from beatless.api.serving import bind, make_server


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Api:
    """A client of the server, in the plainest way."""

    def __init__(self, port: int, state: Any = None) -> None:
        self.port = port
        self.state = state
        self.token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            given.setdefault("Content-Type", "application/json")
        if self.token:
            given.setdefault("Authorization", f"Bearer {self.token}")
        connection.request(method, path, data, given)
        response = connection.getresponse()
        response.connection = connection
        return response

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        response = self.open(method, path, body, **headers)
        with response.connection:
            text = response.read().decode()
            return Answer(response.status, dict(response.headers.items()), text)

    @contextmanager
    def stream(self, path: str, **headers: str) -> Iterator[Iterator[dict[str, str]]]:
        response = self.open("GET", path, **headers)
        try:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            yield frames(response)
        finally:
            response.close()
            response.connection.close()


# http.client's connections are no context managers by themselves.
http.client.HTTPConnection.__enter__ = lambda self: self
http.client.HTTPConnection.__exit__ = lambda self, *_: self.close()


def frames(response: http.client.HTTPResponse) -> Iterator[dict[str, str]]:
    """Server-sent events as dicts; comments are left out."""
    frame: dict[str, str] = {}
    while line := response.readline():
        text = line.decode().rstrip("\r\n")
        if text.startswith(":"):
            continue
        if not text:
            if frame:
                yield frame
            frame = {}
            continue
        name, _, value = text.partition(":")
        frame[name] = value.removeprefix(" ")


@contextmanager
def serving(app: App, port: int = 0, *, reuse_port: bool = False, **options: Any) -> Iterator[Api]:
    """The app's API in a thread of this process; options are those of `make_server`."""

    ready = threading.Event()
    sockets = bind("127.0.0.1", port, reuse_port=reuse_port)
    server = make_server(app, ready=ready.set, **options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    assert ready.wait(60)
    try:
        yield Api(sockets[0].getsockname()[1], server.config.app.state)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def hosting(host: ASGIApp, **options: Any) -> Iterator[Api]:
    """An app of somebody's on a plain uvicorn, as its users run it."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            ready.set()

    sockets = bind("127.0.0.1", 0)
    # A server in a thread gets no signal: a stream that a failed test left open would hang it.
    server = Server(
        uvicorn.Config(host, **{"log_config": None, "timeout_graceful_shutdown": 1} | options)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    assert ready.wait(60)
    try:
        yield Api(sockets[0].getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
