"""A run as server-sent events. The contract is in docs/http.md."""

import asyncio
import contextlib
import logging
import random
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from beatless.api.open_streams import OpenStreams
from beatless.api.problems import Problem
from beatless.api.stream_limits import Reservation
from beatless.client.streams import beyond_the_head
from beatless.errors import HistoryChanged, WaitTimeout
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import EventText
from beatless.orchestrator.records import Run
from beatless.streams.streams import Streams

logger = logging.getLogger(__name__)

ROTATION_S = 240.0
"""Seconds after which a stream asks its viewer to come again, more or less a fifth.

Before the token of one stream ends, or all that were opened with one at a time would end at once.
"""

RETRY_MS = 2000
"""Milliseconds that a viewer waits before it comes again, up to twice as many."""

KEEP_ALIVE_S = 15.0
SEND_TIMEOUT_S = 30.0
ALIVE = b": alive\n\n"

CHUNK = 64 * 1024
"""Bytes that are handed to the server at once, if no frame alone is larger."""

HEADERS = {
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",
    "X-Content-Type-Options": "nosniff",
}


def start_of(run: Run, epoch: str, given: str | None, seq: int) -> tuple[int, bool]:
    """(the seq to go on after, whether the viewer must forget its events).

    The seq is -1 when there is nothing to come: the run has ended there. Raises Problem (409) for
    a cursor beyond the head that names no epoch; with one it is of events that are gone.
    """
    if given is not None and (given != epoch or seq > run.last_seq):
        return 0, True
    if run.state.final and seq >= run.last_seq:
        return -1, False
    if seq > run.last_seq:
        beyond = beyond_the_head(run, seq)
        raise Problem(HTTPStatus.CONFLICT, str(beyond), beyond, last_seq=run.last_seq)
    return seq, False


class EventStream(Response):
    """Sends chunks as they come, and ends when they do, or when the reader is gone.

    Made for thousands of idle viewers: one task beside the request's own, no timers.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[bytes], open_streams: OpenStreams, reservation: Reservation
    ) -> None:
        """Releases the reservation when it ends, or is dropped before it begins."""
        self._chunks = chunks
        self._open_streams = open_streams
        self._reservation = reservation
        self._started = False
        self._ended = False
        self._sending: asyncio.Task[None] | None = None
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        weakref.finalize(self, reservation.release)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        sending = self._sending = asyncio.current_task()
        assert sending is not None  # noqa: S101 - a server runs each request as a task
        listening = asyncio.create_task(self._listen(receive, sending))
        try:
            with (
                self._reservation,
                self._open_streams.watching(self._reservation.grant, self.end),
            ):
                async with aclosing(self._chunks):  # type: ignore[type-var]  # it is a generator
                    await self._send(send)
        except asyncio.CancelledError:
            # By the listener or by us, and not by a server that stops?
            if not (listening.done() or self._ended) or sending.uncancel() > 0:
                raise
            if not listening.done():
                await self._finish(send)
        finally:
            listening.cancel()

    def end(self) -> None:
        """End in order, between two chunks: the viewer comes again."""
        if self._sending is not None and not self._ended:
            self._ended = True
            self._sending.cancel()

    async def _start(self, send: Send) -> None:
        self._started = True
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )

    async def _send(self, send: Send) -> None:
        await self._start(send)
        async for chunk in self._chunks:
            message = {"type": "http.response.body", "body": chunk, "more_body": True}
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                logger.info("viewer reads too slowly and is dropped", extra={"action": "dropped"})
                break
        self._ended = True  # a second last chunk would be an error
        await self._finish(send)

    async def _finish(self, send: Send) -> None:
        if not self._started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _listen(self, receive: Receive, sending: "asyncio.Task[None]") -> None:
        # A body that never ends is as good as a viewer that is gone.
        with contextlib.suppress(HTTPException):
            while (await receive())["type"] != "http.disconnect":
                pass
        sending.cancel()


async def chunks(
    streams: Streams,
    run: Run,
    shown: Callable[[EventText], EventText],
    *,
    epoch: str,
    after: int,
    reset: bool,
) -> AsyncIterator[bytes]:
    """The stream of a run, after a seq.

    First comes a frame without data, which no viewer takes for a message, so that even an idle
    stream can be resumed.
    """
    retry = RETRY_MS + round(RETRY_MS * random.random())  # noqa: S311 - spread, not secrecy
    first = f"id: {epoch}.{after}\nretry: {retry}\n\n"
    if reset:
        first += f'id: {epoch}.0\nevent: reset\ndata: {{"epoch":"{epoch}"}}\n\n'
    yield first.encode()
    rotation = ROTATION_S * random.uniform(0.8, 1.2)  # noqa: S311 - spread, not secrecy
    watched = streams.watch(run, after, epoch=epoch, timeout=rotation, idle=KEEP_ALIVE_S)
    try:
        async with aclosing(watched):
            async for batch in watched:
                if not batch:
                    yield ALIVE
                for chunk in frames([shown(event) for event in batch], epoch):
                    yield chunk
    except (HistoryChanged, WaitTimeout, EventsPruned, RunNotFound):
        return  # the viewer comes again, at this server or another, and hears why


def frames(batch: Sequence[EventText], epoch: str) -> Iterator[bytes]:
    """The events as frames, many to a chunk."""
    waiting: list[bytes] = []
    size = 0
    for event in batch:
        head = f"id: {epoch}.{event.seq}\nevent: {event.type}\ndata: "
        frame = b"%b%b\n\n" % (head.encode(), event.text)
        if size + len(frame) > CHUNK and waiting:
            yield b"".join(waiting)
            waiting, size = [], 0
        waiting.append(frame)
        size += len(frame)
    if waiting:
        yield b"".join(waiting)
