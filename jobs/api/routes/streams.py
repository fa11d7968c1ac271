"""Follow a run, or all runs, as server-sent events."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime

from beatless.api import sse
from beatless.api.access import GuardedRoute, Reader, granted_for
from beatless.api.bodies import tags_of
from beatless.api.gate import granted
from beatless.api.problems import Problem
from beatless.api.responses import refusals
from beatless.api.schemas import STREAM, STREAM_OF_RUNS, STREAM_TOKEN, answers
from beatless.api.services import services_of
from beatless.auth import STREAM_TOKEN_S, Scope
from beatless.client.tails import choice_of
from beatless.cursors import parse_event_id, parse_tail_id
from beatless.errors import BadRequest
from beatless.orchestrator.events import EventType

router = APIRouter(route_class=GuardedRoute)


@router.post(
    "/v1/runs/{run_id}/stream-token",
    status_code=201,
    response_model=None,
    responses=refusals() | answers(STREAM_TOKEN, 201),
)
def stream_token(run_id: str, request: Request) -> dict[str, Any]:
    """A token that may follow this run for some minutes, for EventSource's `?token=`."""
    services = services_of(request)
    grant = granted_for(request, Scope.RUNS_READ)
    run = services.clients.of(grant.namespace).get_run(run_id)
    secret = services.tokens.create_for_stream(
        run.run_id, namespace=grant.namespace, maker=grant.token_id
    )
    return {"token": secret, "seconds": STREAM_TOKEN_S}


@router.get(
    "/v1/runs/{run_id}/stream",
    status_code=200,
    response_class=sse.EventStream,
    responses=refusals(
        {
            409: "the cursor is beyond the last event",
            410: "the events after it are not kept any more",
        }
    )
    | STREAM
    | {204: {"description": "the run has ended there: do not come again"}},
)
def stream_run(
    run_id: str,
    request: Request,
    from_seq: str | None = None,
    fromSeq: str | None = None,  # noqa: N803 - the name that browsers' code uses
) -> Response:
    """Every event after the cursor, in order and once, until RunFinished."""
    services = services_of(request)
    client = services.clients.of(granted(request).namespace)
    grant = granted_for(request, Scope.RUNS_READ, run_id=client.stored_id(run_id))
    header = request.headers.get("last-event-id")
    name, text = ("from_seq", from_seq or fromSeq or "0")
    if header:
        name, text = "Last-Event-ID", header
    try:
        given, seq = parse_event_id(text, name)
    except BadRequest as error:
        raise Problem(HTTPStatus.BAD_REQUEST, str(error), error) from error
    # Reserved before anything is read: a burst of requests passes no limit.
    reservation = services.stream_limits.reserve(grant)
    try:
        # First: of another epoch than the run it names too little rather than too much as seen.
        epoch = client.epoch()
        run = client.get_run(run_id)
        after, reset = sse.start_of(run, epoch, given, seq)
        if after < 0:
            reservation.release()
            return Response(status_code=204)
        run.require_events(after)
    except BaseException:
        reservation.release()
        raise
    stream = sse.EventStream(services.open_streams, reservation)
    stream.chunks = sse.chunks(
        services.streams,
        run,
        services.framing,
        stream.offer,
        epoch=epoch,
        after=after,
        reset=f"{given}.{seq}" if reset else None,
    )
    return stream


@router.get(
    "/v1/stream",
    status_code=200,
    response_class=sse.EventStream,
    responses=refusals() | STREAM_OF_RUNS,
)
def stream_runs(
    client: Reader,
    request: Request,
    plan: Annotated[list[str] | None, Query(description="of runs of one of these")] = None,
    queue: str | None = None,
    tag: Annotated[list[str] | None, Query(description="name=value")] = None,
    event: Annotated[list[EventType] | None, Query(description="of one of these types")] = None,
    since: Annotated[
        AwareDatetime | None, Query(description="begin with the events since this time")
    ] = None,
    after: Annotated[
        str | None, Query(description="the id of a frame to go on after, as Last-Event-ID")
    ] = None,
) -> Response:
    """The events of all runs as one stream, as they come; those of a run in order."""
    services = services_of(request)
    grant = granted(request)
    header = request.headers.get("last-event-id")
    name, text = ("Last-Event-ID", header) if header else ("after", after)
    try:
        place = parse_tail_id(text, name) if text else None
    except BadRequest as error:
        raise Problem(HTTPStatus.BAD_REQUEST, str(error), error) from error
    choice = choice_of(
        grant.namespace,
        plan=plan,
        queue=queue,
        tags=tags_of(tag) if tag else None,
        event=event,
        since=since,
    )
    # Reserved before anything is read: a burst of requests passes no limit.
    reservation = services.stream_limits.reserve(grant, of_all_runs=True)
    try:
        client.epoch()  # answers 503 while Postgres is away
    except BaseException:
        reservation.release()
        raise
    stream = sse.EventStream(services.open_streams, reservation)
    tail = services.streams.tail(
        choice, since=None if place else since, after=place, idle=sse.KEEP_ALIVE_S
    )
    stream.chunks = sse.tail_chunks(tail, services.framing)
    return stream
