"""The collaborators of one API: made by `create_api`, found by each of its requests."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy
from fastapi import Request

from beatless.api.gate import Gate
from beatless.api.lanes import LanesOfLoops
from beatless.api.open_streams import OpenStreams
from beatless.api.readiness import Readiness
from beatless.api.sse import Framing
from beatless.api.stream_limits import StreamLimits
from beatless.app import App
from beatless.auth import Tokens
from beatless.client import Client
from beatless.streams.streams import Streams


class Clients:
    """The clients of an app, one for each namespace that a request has asked for."""

    def __init__(self, app: App, engine: sqlalchemy.Engine) -> None:
        self._app = app
        self._engine = engine
        self._clients: dict[str, Client] = {}
        self._mutex = threading.Lock()

    def of(self, namespace: str) -> Client:
        """The client of a namespace. Raises BadRequest for a name that cannot be one."""
        with self._mutex:
            if namespace not in self._clients:
                self._clients[namespace] = self._app.client_for(
                    namespace, shown=True, engine=self._engine
                )
            return self._clients[namespace]


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """The collaborators of all routes, which outlive a request."""

    app: App
    engine: sqlalchemy.Engine
    """Bounded: no statement of a request waits for a lock, or works, for long."""
    clients: Clients
    tokens: Tokens
    streams: Streams
    framing: Framing
    stream_limits: StreamLimits
    open_streams: OpenStreams
    gate: Gate
    lanes: LanesOfLoops
    readiness: Readiness
    flower_url: str | None


class ServicesOfApp:
    """The services of an App as it is now.

    They are made once, but for tests: an App that acts as a test's own (ADR 0023) has other engines
    meanwhile, and an API that was made when its module was imported goes with it.
    """

    def __init__(self, app: App, make: Callable[[], Services]) -> None:
        self._app = app
        self._make = make
        self._mutex = threading.Lock()
        self._made = (app.engine, make())

    def now(self) -> Services:
        """Those with the engines that the App has now."""
        engine, services = self._made
        if engine is self._app.engine:
            return services
        with self._mutex:
            if self._made[0] is not self._app.engine:
                self._made = (self._app.engine, self._make())
            return self._made[1]


def services_of(request: Request) -> Services:
    """Those of the API that answers the request, which may be mounted in another app."""
    of_app: ServicesOfApp = request.app.state.services
    return of_app.now()
