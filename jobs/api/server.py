"""The routes under /v1, the health checks and the run page."""

import contextlib
import json
import logging
import re
import socket
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import asdict
from datetime import datetime
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy
import uvicorn
from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client.exposition import choose_encoder
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from beatless import loopback
from beatless.api import problems, sse
from beatless.api.body_limit import BodyLimit
from beatless.api.connections import Connections, raise_descriptor_limit, share
from beatless.api.gate import Authenticate, Gate, GuardedRoute, granted
from beatless.api.lanes import LanesOfLoops
from beatless.api.problems import Problem
from beatless.api.readiness import Readiness
from beatless.api.stream_limits import Places
from beatless.app import App
from beatless.auth import STREAM_SECONDS, Tokens
from beatless.auth import Scope as Permission
from beatless.client import Client
from beatless.client.pages import RunPage
from beatless.client.requests import new_run_id
from beatless.cursors import decode_page, encode_page, parse_event_id
from beatless.errors import BadRequest
from beatless.namespaces import DEFAULT_NAMESPACE
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.events import storable
from beatless.orchestrator.journal import GivenUp, Place, Run
from beatless.orchestrator.state import RunState
from beatless.stream import Pager
from beatless.supervision import Supervisor
from beatless.system import look
from beatless.transactions import reaching_postgres

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
PAGE_FILES = frozenset(path.name for path in STATIC.iterdir())
EVENTS_BYTES = 4 * 1024 * 1024
"""After so many bytes of events an answer ends, and more must be asked for."""
RUNS_BYTES = 1024 * 1024
"""The same for lists of runs, which have each run's input, result and error."""
STUCK_MILLISECONDS = 60_000
LOCK_TIMEOUT_S = 2.0
"""How long a statement waits for a row that somebody else holds."""
STATEMENT_TIMEOUT_S = 20.0
POOL_TIMEOUT_S = 5.0
INLINE_SCRIPT = re.findall(r"<script>(.*?)</script>", (STATIC / "index.html").read_text())[0]
"""Adds the slash that an address below a proxy's path may lack: all that the page loads is relative
to it."""
INLINE_HASH = b64encode(sha256(INLINE_SCRIPT.encode()).digest()).decode()
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; "
        f"script-src 'self' 'sha256-{INLINE_HASH}'; "
        "style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

bearer = HTTPBearer(auto_error=False, description="`beatless token create`")
Letter = Annotated[int, PathParameter(ge=1, le=2**63 - 1, description="id of a dead letter")]


class StartRequest(BaseModel):
    """A run to start."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    input: Any = None
    run_id: str | None = None
    key: str | None = None
    queue: str | None = None
    delay: float | None = None
    """Seconds from now."""
    not_before: datetime | None = None
    deadline: float | None = None
    """Seconds from now."""
    priority: int = Field(default=0, ge=0, le=9)
    tags: dict[str, str] | None = None


class CancelRequest(BaseModel):
    """Why a run is cancelled."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(default=None, max_length=1000)


class RetryRequest(BaseModel):
    """Where a retry begins; default: where the run failed."""

    model_config = ConfigDict(extra="forbid")

    from_step: str | None = Field(default=None, max_length=200)


class FailedRuns(BaseModel):
    """Which failed runs."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = None
    queue: str | None = None
    tag: list[str] = []
    """name=value"""
    error: str | None = Field(default=None, max_length=1000)
    """In "type: message" of the error, whatever its case."""
    within: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)
    """Failed so many seconds ago or less."""
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = None
    """The `next` of the answer before."""

    def checked(self) -> GivenUp:
        """As the client takes it. Raises Problem."""
        return GivenUp(
            plan=_text(self.plan),
            queue=_text(self.queue),
            tags=dict(_pair(text) for text in self.tag),
            error=_text(self.error),
            seconds=self.within,
            after=_place(self.cursor),
        )


class CountRequest(FailedRuns):
    """Which of them to count, and how far."""

    limit: int = Field(default=100_000, ge=1, le=100_000)


def _known(state: RunState) -> RunState:
    """RunState takes what a newer version has written; who asks shall ask for what there is."""
    if state not in set(RunState):
        raise ValueError(f"is none of {', '.join(RunState)}")
    return state


KnownState = Annotated[RunState, AfterValidator(_known)]


class FinishedRuns(BaseModel):
    """Which runs that have ended."""

    model_config = ConfigDict(extra="forbid")

    state: KnownState
    """One in which runs end."""
    older_than: float = Field(ge=0, le=1e9, allow_inf_nan=False)
    """Ended so many seconds ago or more."""


class CleanRequest(FinishedRuns):
    """Which of them to take away, and how many at most, oldest first."""

    limit: int = Field(default=1000, ge=1, le=100_000)


class Letters(BaseModel):
    """Which messages."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(default="", max_length=1000)
    """In their reason, whatever its case."""
    limit: int = Field(default=1000, ge=1, le=100_000)


class Namespaces:
    """The clients of an app, one for each namespace that somebody has asked for."""

    def __init__(self, app: App, engine: sqlalchemy.Engine) -> None:
        self._app = app
        self._engine = engine
        self._clients: dict[str, Client] = {}
        self._mutex = threading.Lock()

    def client(self, namespace: str) -> Client:
        with self._mutex:
            if namespace not in self._clients:
                self._clients[namespace] = self._app.client_for(
                    namespace, shown=True, engine=self._engine
                )
            return self._clients[namespace]


def create_api(
    app: App,
    *,
    authenticate: Authenticate | None = None,
    flower_url: str | None = None,
    is_open: bool = False,
) -> FastAPI:
    """The API of an app, to be served or mounted. Opens nothing before the first request.

    `authenticate` says what whoever sends a request may do, by what your own app knows of them:
    called with each Request, it returns a `Grant`, or None to refuse; it may be a coroutine
    function. Tokens are good all the same.

    Without it, and as long as there is no token, a person on this machine may do everything: the
    connection comes from loopback, no header tells of a proxy, and `Host` is a name of this machine
    with the port. With `is_open` everybody may. With `flower_url` the run page links to Flower.
    """
    engine = app.bounded_engine(
        lock_s=LOCK_TIMEOUT_S, statement_s=STATEMENT_TIMEOUT_S, pool_timeout=POOL_TIMEOUT_S
    )
    streams = app.streams_on(engine)
    tokens = Tokens(engine, app.settings.schema)
    places = Places(tokens)
    namespaces = Namespaces(app, engine)
    readiness = Readiness(
        app, app.bounded_engine(lock_s=1, statement_s=2, pool_size=1, max_overflow=0)
    )
    app.metrics.streams.active = True
    # From every server of the API, because it is the relays that may be gone: take the maximum.
    app.metrics.postgres.wanted = lambda: True

    @contextlib.asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        yield
        await streams.aclose()

    api = FastAPI(
        title="beatless",
        version="1",
        description="Durable, transactional, live-streamed runs for Celery.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # a route of ours: FastAPI's keeps the first path it was asked at
        dependencies=[Depends(bearer)],
        redirect_slashes=False,  # a name that is missing is no other request
    )
    api.state.gate = Gate(tokens, app.settings.schema, authenticate=authenticate, is_open=is_open)
    api.state.places = places
    api.state.streams = streams
    api.state.lanes = LanesOfLoops()
    api.router.route_class = GuardedRoute
    api.add_middleware(BodyLimit)
    problems.install(api)

    def permitted(scope: Permission) -> Callable[[Request], Awaitable[Client]]:
        async def check(request: Request) -> Client:
            grant = granted(request)
            if not grant.allows(scope) or grant.run_id is not None:
                raise _lacks(scope)
            return namespaces.client(grant.namespace)

        return check

    Reader = Annotated[Client, Depends(permitted(Permission.RUNS_READ))]  # noqa: N806 - a type
    Writer = Annotated[Client, Depends(permitted(Permission.RUNS_WRITE))]  # noqa: N806 - a type
    # Queues are the whole fleet's, whatever a token's namespace.
    Operator = Annotated[Client, Depends(permitted(Permission.QUEUES))]  # noqa: N806 - a type
    refused: dict[str, Any] = {
        "content": {
            "application/problem+json": {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "detail"],
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "error": {"type": "string"},
                        "arguments": {"type": "array"},
                    },
                }
            }
        }
    }

    def answers(**others: str) -> dict[int | str, dict[str, Any]]:
        """What a call may answer beside what it is for; `others` are as `s409="…"`."""
        common = {
            "s400": "the request or the cursor cannot be read",
            "s401": "no valid token",
            "s403": "the token lacks the scope",
            "s404": "there is no such run, plan or queue, or not for this token",
            "s413": "the request is too large",
            "s422": "the request is invalid",
            "s503": "Postgres cannot be reached, or a limit is reached; see Retry-After",
        }
        return {
            int(status[1:]): {"description": text, **refused}
            for status, text in (common | others).items()
        }

    @api.post(
        "/v1/runs",
        status_code=201,
        responses=answers(s409="key or run_id was used with other content")
        | {200: {"description": "it was started before"}},
    )
    def start_run(
        body: StartRequest,
        client: Writer,
        request: Request,
        response: Response,
        traceparent: Annotated[
            str | None, Header(description="W3C Trace Context: the trace that the run joins")
        ] = None,
    ) -> dict[str, Any]:
        """Start a run; the same `key` or `run_id` with the same content gives the first run."""
        existed = False
        if body.run_id is not None:
            with contextlib.suppress(RunNotFound):
                existed = bool(client.get_run(_text(body.run_id)))
        # An id of our own tells whether the run that comes back is the one we asked for.
        wanted = body.model_copy(update={"run_id": body.run_id or new_run_id()})
        started = client.start_run(**wanted.model_dump(), traceparent=traceparent)
        if existed or started.run_id != client.stored_id(wanted.run_id or ""):
            response.status_code = 200
        response.headers["Location"] = _place_of(request, started)
        return started.to_dict()

    @api.get("/v1/runs", responses=answers())
    def list_runs(
        client: Reader,
        state: KnownState | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tag: Annotated[list[str] | None, Query(description="name=value")] = None,
        retried: Annotated[bool | None, Query(description="whether somebody has")] = None,
        step: Annotated[
            str | None, Query(description="unfinished runs that are in it, or go on with it")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=500)] = 50,
        cursor: str | None = None,
    ) -> Response:
        """Runs, newest first, as many as fit into some MiB; `cursor` is the `next` before."""
        found = client.page_of_runs(
            state=None if state is None else state.value,
            plan=_text(plan),
            queue=_text(queue),
            tags=dict(_pair(text) for text in tag) if tag else None,
            retried=retried,
            step=_text(step),
            before=_place(cursor),
            limit=limit,
            max_bytes=RUNS_BYTES,
        )
        return _runs(found)

    @api.get("/v1/runs/{run_id}", responses=answers())
    def get_run(run_id: str, client: Reader) -> dict[str, Any]:
        """One run."""
        return client.get_run(_text(run_id)).to_dict()

    @api.get(
        "/v1/runs/{run_id}/events",
        responses=answers(s410="the events are not kept any more"),
    )
    def get_events(
        run_id: str,
        client: Reader,
        from_seq: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
    ) -> Response:
        """Stored events after `from_seq`: as many as fit into some MiB, and at least one."""
        epoch = client.epoch()  # first, as for a stream
        run = client.get_run(_text(run_id))
        lines: list[bytes] = []
        size, more, pager = 0, True, Pager()
        while more and len(lines) < limit and size < EVENTS_BYTES:
            wanted = min(limit - len(lines), pager.limit)
            page, more = client.event_page(run, from_seq + len(lines), wanted)
            pager.learn(page)
            for event in page:
                lines.append(event.text)
                size += len(event.text)
                if size >= EVENTS_BYTES:
                    break
        head = json.dumps({"epoch": epoch, "last_seq": run.last_seq})[:-1]
        content = b'%b, "events": [%b]}' % (head.encode(), b",".join(lines))
        return Response(content, media_type="application/json")

    @api.post("/v1/runs/{run_id}/cancel", status_code=202, responses=answers(s409="it had ended"))
    def cancel_run(
        run_id: str, client: Writer, body: CancelRequest | None = None
    ) -> dict[str, Any]:
        """Ask a run to stop; 409 if it has ended as something else."""
        run = client.cancel_run(_text(run_id), reason=body.reason if body else None)
        if run.cancel_requested_at is None:
            raise Problem(HTTPStatus.CONFLICT, f"run {run_id} had ended before: it is {run.state}")
        return run.to_dict()

    @api.post(
        "/v1/runs/{run_id}/retry", status_code=201, responses=answers(s409="it cannot be retried")
    )
    def retry_run(
        run_id: str,
        client: Writer,
        request: Request,
        response: Response,
        body: RetryRequest | None = None,
    ) -> dict[str, Any]:
        """Start a new run that reuses what this one has finished; 409 if it cannot be retried."""
        new = client.retry_run(_text(run_id), _text(body.from_step) if body else None)
        response.headers["Location"] = _place_of(request, new)
        return new.to_dict()

    @api.post("/v1/runs/{run_id}/stream-token", status_code=201, responses=answers())
    def stream_token(run_id: str, request: Request) -> dict[str, Any]:
        """A token that may follow this run for some minutes, for EventSource's `?token=`."""
        grant = granted(request)
        if not grant.allows(Permission.RUNS_READ) or grant.run_id is not None:
            raise _lacks(Permission.RUNS_READ)
        run = namespaces.client(grant.namespace).get_run(_text(run_id))
        secret = tokens.create_for_stream(
            run.run_id, namespace=grant.namespace, maker=grant.token_id
        )
        return {"token": secret, "seconds": STREAM_SECONDS}

    @api.get(
        "/v1/runs/{run_id}/stream",
        status_code=200,
        response_class=sse.EventStream,
        responses=answers(
            s409="the cursor is beyond the last event",
            s410="the events after it are not kept any more",
        )
        | {204: {"description": "the run has ended there: do not come again"}},
    )
    def stream_run(
        run_id: str,
        request: Request,
        from_seq: str | None = None,
        fromSeq: str | None = None,  # noqa: N803 - the name that browsers' code uses
    ) -> Response:
        """Every event after the cursor, in order and once, until RunFinished."""
        grant = granted(request)
        client = namespaces.client(grant.namespace)
        if not grant.allows(Permission.RUNS_READ) or (
            grant.run_id not in (None, client.stored_id(run_id))
        ):
            raise _lacks(Permission.RUNS_READ)
        header = request.headers.get("last-event-id")
        name, text = ("from_seq", from_seq or fromSeq or "0")
        if header:
            name, text = "Last-Event-ID", header
        try:
            given, seq = parse_event_id(text, name)
        except BadRequest as error:
            raise Problem(HTTPStatus.BAD_REQUEST, str(error), error) from error
        place = places.take(grant)
        try:
            # First: of another epoch than the run it names too little rather than too much as seen.
            epoch = client.epoch()
            run = client.get_run(_text(run_id))
            after, reset = sse.start_of(run, epoch, given, seq)
            if after < 0:
                place.release()
                return Response(status_code=204)
            run.require_events(after)
        except BaseException:
            place.release()
            raise
        chunks = sse.chunks(streams, run, app.redaction.text, epoch=epoch, after=after, reset=reset)
        return sse.EventStream(chunks, places, place)

    @api.delete(
        "/v1/runs/{run_id}",
        status_code=204,
        responses=answers(s409="a worker has it"),
    )
    def remove_run(run_id: str, client: Writer) -> Response:
        """Take a run away with all of its events."""
        client.remove_run(_text(run_id))
        return Response(status_code=204)

    @api.get("/v1/failed-runs", responses=answers())
    def list_failed_runs(client: Reader, chosen: Annotated[FailedRuns, Query()]) -> Response:
        """Runs that failed and that nobody has retried, oldest end first, some MiB of them."""
        return _runs(
            client.page_of_failed_runs(chosen.checked(), limit=chosen.limit, max_bytes=RUNS_BYTES)
        )

    @api.get("/v1/failed-runs/count", responses=answers())
    def count_failed_runs(
        client: Reader, chosen: Annotated[CountRequest, Query()]
    ) -> dict[str, int]:
        """How many of them there are, counted no further than `limit`."""
        return {"runs": client.count_failed_runs(chosen.checked(), limit=chosen.limit)}

    @api.post("/v1/failed-runs/retry", status_code=202, responses=answers())
    def retry_failed_runs(client: Writer, body: FailedRuns) -> Response:
        """Retry many of them: the new runs, and why others cannot be retried."""
        found = client.retry_page(body.checked(), limit=body.limit, max_bytes=RUNS_BYTES)
        refused = [{"detail": str(reason)} | problems.named(reason) for reason in found.refused]
        return _runs(found, status=HTTPStatus.ACCEPTED, refused=refused)

    @api.get("/v1/finished-runs", responses=answers())
    def count_finished_runs(
        client: Reader, chosen: Annotated[FinishedRuns, Query()]
    ) -> dict[str, int]:
        """How many runs, with how many events, ended in this state so long ago."""
        runs, events = client.count_finished(chosen.state.value, chosen.older_than)
        return {"runs": runs, "events": events}

    @api.post("/v1/finished-runs/clean", status_code=202, responses=answers())
    def clean_finished_runs(client: Writer, body: CleanRequest) -> dict[str, int]:
        """Take them away with all of their events; how many runs they were."""
        return {"removed": client.clean(body.state.value, body.older_than, body.limit)}

    @api.get("/v1/queues", responses=answers())
    def list_queues(client: Operator) -> dict[str, Any]:
        """Every queue with its counts."""
        return {"queues": [asdict(state) for state in client.queues()]}

    @api.post("/v1/queues/{queue}/pause", status_code=202, responses=answers())
    def pause_queue(queue: str, client: Operator) -> dict[str, Any]:
        """After the answer no run of the queue starts anywhere."""
        client.pause_queue(queue)
        return {"queue": queue, "paused": True}

    @api.post("/v1/queues/{queue}/resume", status_code=202, responses=answers())
    def resume_queue(queue: str, client: Operator) -> dict[str, Any]:
        """Let its runs start again."""
        client.resume_queue(queue)
        return {"queue": queue, "paused": False}

    @api.post("/v1/queues/{queue}/drain", status_code=202, responses=answers())
    def drain_queue(queue: str, client: Operator) -> dict[str, Any]:
        """Take away the runs that wait."""
        return {"queue": queue, "removed": client.drain_queue(queue)}

    @api.delete(
        "/v1/queues/{queue}",
        responses=answers(s409="runs of it are running"),
    )
    def obliterate_queue(queue: str, client: Operator, force: bool = False) -> dict[str, Any]:
        """Take the queue away with all of its runs."""
        return {"queue": queue, "removed": client.obliterate_queue(queue, force=force)}

    @api.get("/v1/dead-letters", responses=answers())
    def list_dead_letters(
        client: Operator,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        after: Annotated[int, Query(ge=0, le=2**63 - 1)] = 0,
    ) -> dict[str, Any]:
        """Messages that could not be published, oldest first; `after` is the `next` before."""
        found = client.dead_letters(limit, after)
        following = found[-1].id if len(found) == limit else None
        return {"dead_letters": [asdict(letter) for letter in found], "next": following}

    @api.get("/v1/dead-letters/{letter_id}", responses=answers())
    def get_dead_letter(letter_id: Letter, client: Operator) -> dict[str, Any]:
        """One of them."""
        with _no_such_letter():
            return asdict(client.dead_letter(letter_id))

    @api.post("/v1/dead-letters/requeue", status_code=202, responses=answers())
    def requeue_dead_letters(client: Operator, body: Letters) -> dict[str, Any]:
        """Publish many messages again, oldest first."""
        again = client.requeue_dead_letters(reason=_text(body.reason), limit=body.limit)
        return {"requeued": again}

    @api.post("/v1/dead-letters/{letter_id}/requeue", status_code=202, responses=answers())
    def requeue_dead_letter(letter_id: Letter, client: Operator) -> dict[str, Any]:
        """Publish the message again."""
        with _no_such_letter():
            client.requeue_dead_letter(letter_id)
        return {"id": letter_id}

    @api.delete("/v1/dead-letters/{letter_id}", status_code=204, responses=answers())
    def discard_dead_letter(letter_id: Letter, client: Operator) -> Response:
        """Forget the message; its events stay in the journal."""
        with _no_such_letter():
            client.discard_dead_letter(letter_id)
        return Response(status_code=204)

    @api.get("/v1/plans", responses=answers())
    def list_plans(client: Reader) -> dict[str, Any]:
        """The plans that can be started, with their steps."""
        del client
        return {
            "plans": [
                {
                    "name": plan.name,
                    "queue": plan.queue,
                    "steps": [s.name for s in plan.steps],
                    "on_cancel": None if plan.on_cancel is None else plan.on_cancel.name,
                    "renamed": plan.renamed,
                }
                for plan in app.plans.values()
            ]
        }

    @api.get("/v1/system", responses=answers())
    def show_system(client: Reader, request: Request) -> dict[str, Any]:
        """Relays, workers, versions and lag; the fleet is seen by the namespace `default` only."""
        del client
        if granted(request).namespace != DEFAULT_NAMESPACE:
            raise Problem(
                HTTPStatus.FORBIDDEN, f"a token of the namespace {DEFAULT_NAMESPACE} is needed"
            )
        with reaching_postgres(app.settings.schema):
            return asdict(look(app, engine))

    @api.get("/v1/token", responses=answers())
    def describe_token(request: Request) -> dict[str, Any]:
        """What the token may do, with what its scopes include."""
        grant = granted(request)
        if grant.run_id is not None:
            raise _lacks(Permission.RUNS_READ)
        allowed = [scope.value for scope in Permission if grant.allows(scope)]
        return {"namespace": grant.namespace, "scopes": allowed}

    @api.get("/livez", include_in_schema=False)
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/readyz", include_in_schema=False)
    async def readyz() -> JSONResponse:
        return await readiness.answer()

    @api.get("/metrics", include_in_schema=False)
    def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(app.metrics.registry), headers={"Content-Type": content_type})

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> JSONResponse:
        return JSONResponse(api.openapi() | {"servers": [{"url": _root_of(request) or "/"}]})

    @api.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @api.get("/links", include_in_schema=False)
    async def links() -> dict[str, str | None]:
        return {"flower": flower_url}

    @api.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> FileResponse:
        if name not in PAGE_FILES:
            raise Problem(HTTPStatus.NOT_FOUND, f"there is no {name}")
        return FileResponse(STATIC / name, headers=PAGE_HEADERS)

    return api


def serve(
    app: App,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
    reuse_port: bool = False,
    **options: Any,
) -> None:
    """Serve the API until told to stop; `ready` gets the URL once it answers.

    The options are those of `make_server`. With `reuse_port` several processes may serve the same
    address. Raises BadRequest for an address that cannot be listened on.
    """
    sockets = bind(host, port, reuse_port=reuse_port)
    url = loopback.url(host, sockets[0].getsockname()[1])
    make_server(app, ready=lambda: ready(url), **options).run(sockets=sockets)


def make_server(
    app: App,
    *,
    ready: Callable[[], None],
    root_path: str = "",
    descriptors: int | None = None,
    **options: Any,
) -> uvicorn.Server:
    """A server of the app's API, to be run with sockets; `ready` is called once it answers.

    `descriptors` is how many files it may have open: by default the process's limit, raised.
    `root_path` is what a proxy takes away from the paths; the options are those of `create_api`.
    """
    api = create_api(app, **options)
    supervisor = Supervisor()
    connections, backlog = share(descriptors or raise_descriptor_limit())

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            supervisor.alive()
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Their viewers come again, at another process or at our successor.
            api.state.places.end_all()
            await super().shutdown(sockets)

    return Server(
        uvicorn.Config(
            api,
            http=Connections(connections).protocol(),
            backlog=backlog,
            ws="none",
            root_path=root_path,
            log_level="warning",
            log_config=None,
            proxy_headers=False,  # who is at the other end is not for the other end to say
            access_log=False,  # it would hold the tokens of streams
            server_header=False,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 * 1024,
        )
    )


def bind(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Sockets on every address of a host, all on one port; 0 takes a free one."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((info[0], info[4]) for info in found):
            chosen = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
            listener = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family is socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if reuse_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            # Inherited by connections: what a dead or stuck viewer was sent is not kept for ever.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_MILLISECONDS)
            listener.bind(chosen)
    except OSError as error:
        for listener in sockets:
            listener.close()
        raise BadRequest("--host", f"{host} port {port} cannot be used: {error}") from error
    return sockets


@contextlib.contextmanager
def _no_such_letter() -> Iterator[None]:
    try:
        yield
    except BadRequest as error:
        raise Problem(HTTPStatus.NOT_FOUND, str(error), error) from error


def _place(cursor: str | None) -> Place | None:
    try:
        return None if cursor is None else decode_page(cursor)
    except BadRequest as error:
        raise Problem(HTTPStatus.BAD_REQUEST, str(error), error) from error


def _runs(page: RunPage, status: HTTPStatus = HTTPStatus.OK, **others: Any) -> Response:
    """They are JSON already: as objects many would take a multiple of the memory."""
    following = None if page.next is None else encode_page(*page.next)
    tail = json.dumps({"next": following} | others)[1:]
    content = f'{{"runs":[{",".join(page.lines)}],{tail}'
    return Response(content, status, media_type="application/json")


def _place_of(request: Request, run: Run) -> str:
    """Where the run is, below whatever the API is mounted at."""
    return f"{_root_of(request)}/v1/runs/{run.run_id}"


def _root_of(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


def _lacks(scope: Permission) -> Problem:
    return Problem(HTTPStatus.FORBIDDEN, f"this token lacks the scope {scope}")


def _text(value: str | None) -> Any:
    if value is not None and not storable(value):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "NUL characters and halves of surrogate pairs are in no name of ours",
        )
    return value


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"tag is {text!r}; write it like name=value")
    return name, value
