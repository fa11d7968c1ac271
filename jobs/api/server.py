"""The API of an app: its routes, and their collaborators."""

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer

from beatless.api import problems
from beatless.api.access import GuardedRoute, OverridesOfRequest
from beatless.api.body_limit import BodyLimit
from beatless.api.gate import Authenticate, Gate
from beatless.api.lanes import PLACES, LanesOfLoops
from beatless.api.open_streams import OpenStreams
from beatless.api.readiness import Readiness
from beatless.api.routes import (
    approvals,
    dead_letters,
    failed_runs,
    finished_runs,
    groups,
    health,
    limits,
    page,
    queues,
    runs,
    schedules,
    streams,
    system,
)
from beatless.api.schemas import COMPONENTS
from beatless.api.services import Clients, Services, ServicesOfApp
from beatless.api.sse import Framing
from beatless.api.stream_limits import StreamLimits
from beatless.app import App
from beatless.auth import Tokens

NOUNS = {
    module.__name__.rpartition(".")[2].replace("_", " "): module
    for module in (
        runs,
        approvals,
        streams,
        failed_runs,
        finished_runs,
        queues,
        groups,
        limits,
        schedules,
        dead_letters,
        system,
        health,
        page,
    )
}
"""The tags of the OpenAPI document, and what each is about."""

bearer = HTTPBearer(auto_error=False, description="`beatless token create`")

ROUTES = APIRouter(
    route_class=GuardedRoute,
    dependencies=[Depends(bearer)],
    dependency_overrides_provider=OverridesOfRequest(),
)
"""The routes of every API of this process. FastAPI takes 40 ms of processor time to make them."""
for noun, module in NOUNS.items():
    ROUTES.include_router(module.router, tags=[noun])

LOCK_TIMEOUT_S = 2.0
"""Seconds that a statement waits for a row lock."""
STATEMENT_TIMEOUT_S = 20.0
POOL_TIMEOUT_S = 5.0

KEPT_CONNECTIONS = 5
CONNECTIONS = PLACES + 2
"""At most: of each request in a lane, and of streams, which are in none while they read."""
GATE_CONNECTIONS = 2
"""Of their own: who a caller is must be known before it waits for its turn in a lane."""


class DocumentedApi(FastAPI):
    """With the schemas of our answers in its OpenAPI document."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"] |= COMPONENTS
        return document


def create_api(
    app: App,
    *,
    authenticate: Authenticate | None = None,
    flower_url: str | None = None,
    is_open: bool = False,
) -> FastAPI:
    """The API of an app, to be served or mounted. Opens nothing before the first request.

    `authenticate` gives the grant of a request's caller, by your own app's authentication:
    called with each Request, it returns a `Grant`, or None to refuse; it may be a coroutine
    function. Tokens are good all the same.

    Without it, and as long as there is no token, a person on this machine may do everything: the
    connection comes from loopback, no header marks a proxy, and `Host` is a name of this machine
    with the port. With `is_open` every caller may. With `flower_url` the run page links to Flower.

    Raises TypeError for anything but an App, and for an `authenticate` that takes no request.
    """
    if not isinstance(app, App):
        raise TypeError(
            f"create_api({app!r:.200}): give it the App itself, as in create_api(app), and neither "
            "app.celery nor its client"
        )
    services = ServicesOfApp(
        app,
        partial(_services, app, authenticate=authenticate, flower_url=flower_url, is_open=is_open),
    )

    @contextlib.asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        yield
        await services.now().streams.aclose()

    api = DocumentedApi(
        title="beatless",
        version="1",
        description="Durable, transactional, live-streamed runs for Celery.",
        contact={"name": "beatless"},
        openapi_tags=[
            {"name": noun, "description": module.__doc__}
            for noun, module in NOUNS.items()
            if module not in (health, page)  # they are for probes and people
        ],
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # a route of ours: FastAPI's keeps the first path it was asked at
        dependencies=[Depends(bearer)],
        redirect_slashes=False,  # a name that is missing is no other request
    )
    api.state.services = services
    api.router.route_class = GuardedRoute  # also for routes that others add
    api.router.routes.extend(ROUTES.routes)
    api.add_middleware(BodyLimit)
    problems.install(api)
    return api


def _services(
    app: App, *, authenticate: Authenticate | None, flower_url: str | None, is_open: bool
) -> Services:
    app.metrics.streams.active = True
    # From every server of the API, because it is the relays that may be gone: take the maximum.
    app.metrics.postgres.wanted = lambda: True
    bounded = partial(
        app.bounded_engine,
        lock_s=LOCK_TIMEOUT_S,
        statement_s=STATEMENT_TIMEOUT_S,
        pool_timeout=POOL_TIMEOUT_S,
    )
    engine = bounded(pool_size=KEPT_CONNECTIONS, max_overflow=CONNECTIONS - KEPT_CONNECTIONS)
    at_the_gate = bounded(pool_size=1, max_overflow=GATE_CONNECTIONS - 1)
    tokens = Tokens(at_the_gate, app.settings.schema)
    return Services(
        app=app,
        engine=engine,
        clients=Clients(app, engine),
        tokens=tokens,
        streams=app.streams_on(engine),
        framing=Framing(app.redaction.text),
        stream_limits=StreamLimits(),
        open_streams=OpenStreams(tokens),
        gate=Gate(tokens, app.settings.schema, authenticate=authenticate, is_open=is_open),
        lanes=LanesOfLoops(),
        readiness=Readiness(
            app, app.bounded_engine(lock_s=1, statement_s=2, pool_size=1, max_overflow=0)
        ),
        flower_url=flower_url,
    )
