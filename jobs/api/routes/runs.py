"""Start, read, cancel, retry and remove runs."""

import json
from contextlib import suppress
from dataclasses import asdict, replace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from beatless.api import responses
from beatless.api.access import GuardedRoute, Reader, Writer
from beatless.api.bodies import (
    CancelRequest,
    KnownState,
    RetryRequest,
    SignalBody,
    StartRequest,
    place_of,
    tags_of,
)
from beatless.api.problems import Problem
from beatless.api.responses import location, numbered_run_page, refusals, run_page
from beatless.api.schemas import EVENTS, RUN, RUNS, SIGNAL, answers
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.records import new_run_id
from beatless.streams.pager import Pager

router = APIRouter(route_class=GuardedRoute)


@router.post(
    "/v1/runs",
    status_code=201,
    response_model=None,
    responses=refusals({409: "key or run_id was used with other content"})
    | answers(RUN, 201)
    | {200: {"description": "it was started before"} | answers(RUN, 200)[200]},
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
    asked = body.request(traceparent=traceparent)
    existed = False
    if asked.run_id is not None:
        with suppress(RunNotFound):
            existed = bool(client.get_run(asked.run_id))
    # With an id of our own it is known whether the returned run is a new one.
    run_id = new_run_id() if asked.run_id is None else asked.run_id
    (started,) = client.start_runs([replace(asked, run_id=run_id)])
    if existed or started.run_id != client.stored_id(run_id):
        response.status_code = 200
    response.headers["Location"] = location(request, started)
    return started.to_dict()


@router.get("/v1/runs", responses=refusals() | answers(RUNS, 200))
def list_runs(
    client: Reader,
    state: KnownState | None = None,
    plan: str | None = None,
    queue: str | None = None,
    tag: Annotated[list[str] | None, Query(description="name=value")] = None,
    retried: Annotated[bool | None, Query(description="whether it has a retry")] = None,
    step: Annotated[
        str | None, Query(description="unfinished runs that are in it, or go on with it")
    ] = None,
    dedupe_key: Annotated[str | None, Query(description="runs that were started with it")] = None,
    group: Annotated[str | None, Query(description="runs that were started with it")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: str | None = None,
) -> Response:
    """Runs, newest first, as many as fit into some MiB; `cursor` is the `next` before."""
    found = client.page_of_runs(
        state=None if state is None else state.value,
        plan=plan,
        queue=queue,
        tags=tags_of(tag) if tag else None,
        retried=retried,
        step=step,
        dedupe_key=dedupe_key,
        group=group,
        before=place_of(cursor),
        limit=limit,
        max_bytes=responses.RUNS_BYTES,
    )
    return run_page(found)


@router.get("/v1/runs/{run_id}", response_model=None, responses=refusals() | answers(RUN, 200))
def get_run(run_id: str, client: Reader) -> dict[str, Any]:
    """One run."""
    return client.get_run(run_id).to_dict()


@router.get(
    "/v1/runs/{run_id}/events",
    responses=refusals({410: "the events are not kept any more"}) | answers(EVENTS, 200),
)
def get_events(
    run_id: str,
    client: Reader,
    from_seq: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Response:
    """Stored events after `from_seq`: as many as fit into some MiB, and at least one."""
    epoch = client.epoch()  # first, as for a stream
    run = client.get_run(run_id)
    lines: list[bytes] = []
    size, more, pager = 0, True, Pager()
    while more and len(lines) < limit and size < responses.EVENTS_BYTES:
        wanted = min(limit - len(lines), pager.limit)
        page, more = client.event_page(run, from_seq + len(lines), wanted)
        pager.learn(page)
        for event in page:
            lines.append(event.text)
            size += len(event.text)
            if size >= responses.EVENTS_BYTES:
                break
    head = json.dumps({"epoch": epoch, "last_seq": run.last_seq})[:-1]
    content = b'%b, "events": [%b]}' % (head.encode(), b",".join(lines))
    return Response(content, media_type="application/json")


@router.post(
    "/v1/runs/{run_id}/cancel",
    status_code=202,
    response_model=None,
    responses=refusals({409: "it had ended"}) | answers(RUN, 202),
)
def cancel_run(run_id: str, client: Writer, body: CancelRequest | None = None) -> dict[str, Any]:
    """Ask a run to stop; 409 if it has ended as something else."""
    run = client.cancel_run(run_id, reason=body.reason if body else None)
    if run.cancel_requested_at is None:
        raise Problem(HTTPStatus.CONFLICT, f"run {run_id} had ended before: it is {run.state}")
    return run.to_dict()


@router.post(
    "/v1/runs/{run_id}/signals",
    status_code=202,
    response_model=None,
    responses=refusals({409: "it has ended, or the key was used with other content"})
    | answers(SIGNAL, 202)
    | {200: {"description": "it was sent before"} | answers(SIGNAL, 200)[200]},
)
def signal_run(run_id: str, body: SignalBody, client: Writer, response: Response) -> dict[str, Any]:
    """Send a signal to a run; the same `key` with the same content sends it once."""
    sent = client.signal_run(run_id, body.name, body.data, key=body.key)
    if not sent.new:
        response.status_code = 200
    return asdict(sent)


@router.get("/v1/runs/{run_id}/waits", responses=refusals())
def get_waits(run_id: str, client: Reader) -> dict[str, Any]:
    """The waits of a run that have begun and not ended."""
    return {"waits": [wait.to_dict() for wait in client.waits(run_id)]}


@router.get("/v1/runs/{run_id}/children", responses=refusals() | answers(RUNS, 200))
def get_children(
    run_id: str,
    client: Reader,
    state: KnownState | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
) -> Response:
    """The runs that a run has started, by number; `cursor` is the `next` before."""
    page = client.page_of_children(
        run_id,
        state=None if state is None else state.value,
        after=cursor,
        limit=limit,
        max_bytes=responses.RUNS_BYTES,
    )
    return numbered_run_page(page)


@router.post(
    "/v1/runs/{run_id}/retry",
    status_code=201,
    response_model=None,
    responses=refusals({409: "it cannot be retried"}) | answers(RUN, 201),
)
def retry_run(
    run_id: str,
    client: Writer,
    request: Request,
    response: Response,
    body: RetryRequest | None = None,
) -> dict[str, Any]:
    """Start a new run that reuses the finished steps of this one; 409 if it cannot be retried."""
    new = client.retry_run(run_id, body.from_step if body else None)
    response.headers["Location"] = location(request, new)
    return new.to_dict()


@router.delete(
    "/v1/runs/{run_id}",
    status_code=204,
    responses=refusals({409: "a worker has it"}),
)
def remove_run(run_id: str, client: Writer) -> Response:
    """Take a run away with all of its events."""
    client.remove_run(run_id)
    return Response(status_code=204)
