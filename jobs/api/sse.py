"""A run as server-sent events. The contract is in docs/http.md."""

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from http import HTTPStatus

from sse_starlette import EventSourceResponse, ServerSentEvent

from jobs.api.problems import Problem
from jobs.client import Client, beyond_the_head
from jobs.errors import WaitTimeout
from orchestrator.errors import EventsPruned, RunNotFound
from orchestrator.events import Event
from orchestrator.journal import Run

ROTATION = 300.0
"""Seconds after which a stream asks its viewer to come again, more or less a fifth."""

RETRY = 2000
"""Milliseconds that a viewer waits before it comes again, up to twice as many."""

KEEP_ALIVE = 15
SEND_TIMEOUT = 30
HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


def start_of(run: Run, epoch: str, given: str | None, seq: int) -> tuple[int, bool]:
    """(the seq to go on after, whether the viewer must forget what it has).

    The seq is -1 when there is nothing to come: the run has ended there. Raises Problem (409) for
    a cursor beyond the head.
    """
    if given is not None and given != epoch:
        return 0, True
    if run.state.final and seq >= run.last_seq:
        return -1, False
    if seq > run.last_seq:
        beyond = beyond_the_head(run, seq)
        raise Problem(HTTPStatus.CONFLICT, str(beyond), beyond, last_seq=run.last_seq)
    return seq, False


def response(
    client: Client,
    run: Run,
    *,
    epoch: str,
    after: int,
    reset: bool,
    counted: Callable[[], AbstractContextManager[None]],
) -> EventSourceResponse:
    """The stream of a run, after a seq. `counted` is entered for as long as it is open."""
    return EventSourceResponse(
        frames(client, run, epoch=epoch, after=after, reset=reset, counted=counted),
        headers=HEADERS,
        ping=KEEP_ALIVE,
        ping_message_factory=lambda: ServerSentEvent(comment="alive", sep="\n"),
        send_timeout=SEND_TIMEOUT,
        sep="\n",
    )


async def frames(
    client: Client,
    run: Run,
    *,
    epoch: str,
    after: int,
    reset: bool,
    counted: Callable[[], AbstractContextManager[None]],
) -> AsyncIterator[ServerSentEvent]:
    """The frames of a stream: first the priming one, so that even an idle stream can resume."""
    retry = RETRY + round(RETRY * random.random())  # noqa: S311 - spread, not secrecy
    yield ServerSentEvent(id=f"{epoch}.{after}", data="", retry=retry, sep="\n")
    if reset:
        yield ServerSentEvent(event="reset", data=json.dumps({"epoch": epoch}), sep="\n")
    rotation = ROTATION * random.uniform(0.8, 1.2)  # noqa: S311 - spread, not secrecy
    try:
        with counted():
            async for event in client.astream_run(run.run_id, after, timeout=rotation):
                yield frame(event, epoch)
    except (WaitTimeout, EventsPruned, RunNotFound):
        return  # the viewer comes again, at this server or another, and hears why


def frame(event: Event, epoch: str) -> ServerSentEvent:
    """One event as one frame."""
    return ServerSentEvent(
        id=f"{epoch}.{event.seq}",
        event=event.type,
        data=json.dumps(event.to_dict(), ensure_ascii=False, separators=(",", ":")),
        sep="\n",
    )
