"""A run, or all of a namespace, as server-sent events. The contract is in docs/http.md."""

import asyncio
import contextlib
import json
import logging
import random
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from beatless.api.open_streams import OpenStreams
from beatless.api.problems import Problem
from beatless.api.stream_limits import Reservation
from beatless.client.streams import beyond_the_head
from beatless.cursors import encode_tail
from beatless.errors import HistoryChanged, WaitTimeout
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import EventText
from beatless.orchestrator.records import Run
from beatless.outbox.clock import monotonic
from beatless.streams.streams import Streams
from beatless.streams.tail import Tail, TailedText

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

    Made for thousands of viewers: one task beside the request's own, no timers, and chunks that
    are handed to the server without waking a task while it takes them.
    """

    media_type = "text/event-stream"

    def __init__(self, open_streams: OpenStreams, reservation: Reservation) -> None:
        """Releases the reservation when it ends, or is dropped before it begins."""
        self.chunks: AsyncIterator[bytes] | None = None
        """To be set before it is sent."""
        self._open_streams = open_streams
        self._reservation = reservation
        self._send: Send | None = None
        self._started = False
        self._ended = False
        self._sending: asyncio.Task[None] | None = None
        self._late: asyncio.Task[None] | None = None
        """Hands over a chunk that the server did not take at once."""
        self.status_code = 200
        self.background = None
        self.init_headers(HEADERS)
        weakref.finalize(self, reservation.release)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        assert self.chunks is not None  # noqa: S101 - set by the route
        self._send = send
        sending = self._sending = asyncio.current_task()
        assert sending is not None  # noqa: S101 - a server runs each request as a task
        listening = asyncio.create_task(self._listen(receive, sending))
        try:
            with (
                self._reservation,
                self._open_streams.watching(self._reservation.grant, self.end),
            ):
                async with aclosing(self.chunks):  # type: ignore[type-var]  # it is a generator
                    await self._send_all(self.chunks, send)
        except asyncio.CancelledError:
            # By the listener or by us, and not by a server that stops?
            if not (listening.done() or self._ended) or sending.uncancel() > 0:
                raise
            self._leave_late()  # a viewer that does not read it comes again
            if not listening.done():
                await self._finish(send)
        finally:
            self._leave_late()
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

    async def _send_all(self, chunks: AsyncIterator[bytes], send: Send) -> None:
        await self._start(send)
        async for chunk in chunks:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    if self._late is not None:
                        await self._late
                    await send(_body(chunk))
            except TimeoutError:
                self._drop()
                break
        self._ended = True  # a second last chunk would be an error
        await self._finish(send)

    def offer(self, chunk: bytes) -> bool:
        """Hand a chunk to the server without waiting; False if it still has one to take.

        A server's `send` that has nothing to wait for is done when it is called. One that waits
        for its viewer is awaited in a task, until which `offer` takes no other chunk.
        """
        if self._ended or self._send is None or (self._late and not self._late.done()):
            return False
        sending = self._send(_body(chunk)).__await__()
        try:
            awaited = next(sending)
        except StopIteration:
            return True
        except Exception:
            self.end()  # the viewer is gone; its task hears why
            return False
        self._late = asyncio.create_task(self._send_late(_Rest(awaited, sending)))
        return True

    async def _send_late(self, rest: "_Rest") -> None:
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await rest
        except TimeoutError:
            self._drop()
            self.end()

    def _leave_late(self) -> None:
        if self._late is not None:
            self._late.cancel()

    def _drop(self) -> None:
        logger.info("viewer reads too slowly and is dropped", extra={"action": "dropped"})

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


def _body(chunk: bytes) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": True}


class _Rest:
    """Awaits what an awaitable has not done, after its first step was made outside of a task."""

    def __init__(self, awaited: Any, steps: Generator[Any, Any, None]) -> None:
        self._awaited = awaited
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, None]:
        awaited = self._awaited
        while True:
            try:
                sent = yield awaited
            except BaseException as error:  # passed on, as `yield from` does
                step = partial(self._steps.throw, error)
            else:
                step = partial(self._steps.send, sent)
            try:
                awaited = step()
            except StopIteration:
                return


async def chunks(
    streams: Streams,
    run: Run,
    framing: "Framing",
    offer: Callable[[bytes], bool],
    *,
    epoch: str,
    after: int,
    reset: str | None,
) -> AsyncIterator[bytes]:
    """The stream of a run, after a seq, but for what `offer` takes meanwhile.

    First comes a frame without data, which no viewer takes for a message, so that even an idle
    stream can be resumed. If the viewer came with a place in another history, it has that one,
    `reset`: a viewer that is cut off before it hears of the reset comes with it again.
    """
    first = f"id: {reset or f'{epoch}.{after}'}\n{_retry()}\n"
    if reset:
        first += f'id: {epoch}.0\nevent: reset\ndata: {{"epoch":"{epoch}"}}\n\n'
    yield first.encode()
    watched = streams.watch(
        run,
        after,
        epoch=epoch,
        timeout=_rotation(),
        idle=KEEP_ALIVE_S,
        accept=lambda events: offer(framing.whole(events, epoch)),
    )
    try:
        async with aclosing(watched):
            async for batch in watched:
                if not batch:
                    yield ALIVE
                for chunk in framing.chunks(batch, epoch):
                    yield chunk
    except (HistoryChanged, WaitTimeout, EventsPruned, RunNotFound):
        return  # the viewer comes again, at this server or another, and hears why


async def tail_chunks(tail: Tail, framing: "Framing") -> AsyncIterator[bytes]:
    """The stream of a tail. Each frame has the place from which another one may go on.

    The first frame is for idle streams, as that of a run is: who has it has missed nothing since.
    """
    ends_at, began, told = monotonic() + _rotation(), False, ""
    resets: list[bool] = []
    async with aclosing(tail.afollow(lambda: resets.append(True))) as batches:
        async for batch in batches:
            place = tail.place
            assert place is not None  # noqa: S101 - it has one with its first batch
            last, told = told, encode_tail(place)
            if not began:
                # A viewer that has another history's place keeps it until it has heard of that.
                began, head = True, "" if resets else f"id: {told}\n"
                yield f"{head}{_retry()}\n".encode()
            elif not batch:
                yield ALIVE if told == last else f"id: {told}\n\n".encode()
            if resets:
                resets.clear()
                yield f'id: {told}\nevent: reset\ndata: {{"epoch":"{place.epoch}"}}\n\n'.encode()
            for chunk in framing.of_runs(batch, told):
                yield chunk
            if tail.caught_up and not batch and monotonic() >= ends_at:
                return  # not in the middle of what is to be caught up with, which would begin anew


def _retry() -> str:
    """The line that says when a viewer comes again."""
    spread = round(RETRY_MS * random.random())  # noqa: S311 - spread, not secrecy
    return f"retry: {RETRY_MS + spread}\n"


def _rotation() -> float:
    return ROTATION_S * random.uniform(0.8, 1.2)  # noqa: S311 - spread, not secrecy


class Framing:
    """Events as frames. Those that all viewers of a run are given at once are made once."""

    def __init__(self, shown: Callable[[EventText], EventText]) -> None:
        self._shown = shown
        self._last: tuple[Sequence[EventText], str, bytes] = ((), "", b"")

    def whole(self, events: Sequence[EventText], epoch: str) -> bytes:
        """The frames of the events of one message, which is small."""
        last, of, found = self._last
        if last is not events or of != epoch:
            found = b"".join(self._frame(event, epoch) for event in events)
            self._last = (events, epoch, found)
        return found

    def chunks(self, events: Iterable[EventText], epoch: str) -> Iterator[bytes]:
        """The frames, many to a chunk."""
        return _joined(self._frame(event, epoch) for event in events)

    def of_runs(self, batch: Iterable[TailedText], place: str) -> Iterator[bytes]:
        """The frames of a tail, whose events have the plans of their runs."""
        return _joined(self._frame_of_run(each, place) for each in batch)

    def _frame(self, event: EventText, epoch: str) -> bytes:
        shown = self._shown(event)
        head = f"id: {epoch}.{shown.seq}\nevent: {shown.type}\ndata: "
        return b"%b%b\n\n" % (head.encode(), shown.text)

    def _frame_of_run(self, tailed: TailedText, place: str) -> bytes:
        shown = self._shown(tailed.text)
        head = f'id: {place}\nevent: {shown.type}\ndata: {{"plan":{json.dumps(tailed.plan)},'
        return b"%b%b\n\n" % (head.encode(), shown.text.lstrip()[1:])


def _joined(frames: Iterable[bytes]) -> Iterator[bytes]:
    """Many frames to a chunk."""
    waiting: list[bytes] = []
    size = 0
    for frame in frames:
        if size + len(frame) > CHUNK and waiting:
            yield b"".join(waiting)
            waiting, size = [], 0
        waiting.append(frame)
        size += len(frame)
    if waiting:
        yield b"".join(waiting)
