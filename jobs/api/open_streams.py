"""The open streams of one API: which of them must end, and when."""

import asyncio
import inspect
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from beatless.auth import Grant, Tokens
from beatless.outbox.clock import monotonic
from beatless.transactions import first_line

logger = logging.getLogger(__name__)

STOP_CHECK_S = 0.5
TOKEN_CHECK_S = 10.0


@dataclass(frozen=True, eq=False, slots=True)
class OpenStream:
    """One of them. `end` ends it in order, between two chunks."""

    grant: Grant
    end: Callable[[], None]


class OpenStreams:
    """Ends the streams whose token is no longer good, and all of them when the server stops.

    It looks at the server itself: uvicorn waits for every answer to end and does not
    notify an app without a lifespan.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._open: set[OpenStream] = set()
        self._watch: asyncio.Task[None] | None = None

    @contextmanager
    def watching(self, grant: Grant, end: Callable[[], None]) -> Iterator[None]:
        """In this block, in a loop, the stream is watched."""
        stream = OpenStream(grant, end)
        self._open.add(stream)
        try:
            loop = asyncio.get_running_loop()
            if self._watch is None or self._watch.done() or self._watch.get_loop() is not loop:
                self._watch = loop.create_task(self._end_in_time(), name="beatless-open-streams")
            yield
        finally:
            self._open.discard(stream)

    def end_all(self) -> None:
        """End every stream in order: its viewer comes again."""
        for stream in list(self._open):
            stream.end()

    async def _end_in_time(self) -> None:
        check_at = monotonic() + TOKEN_CHECK_S
        servers = _servers_of(asyncio.all_tasks())
        while self._open:
            await asyncio.sleep(STOP_CHECK_S)
            if _stops(servers):
                self.end_all()
                # One of several may be gone by then, and these streams are another's.
                servers = _servers_of(asyncio.all_tasks())
            elif monotonic() >= check_at:
                try:
                    await self._check_tokens()
                except Exception:
                    # Any error: without this task no stream would end when the server stops.
                    logger.exception(
                        "open streams cannot be supervised, will retry",
                        extra={"action": "look_after_failed"},
                    )
                check_at = monotonic() + TOKEN_CHECK_S

    async def _check_tokens(self) -> None:
        streams = [stream for stream in list(self._open) if stream.grant.token_id is not None]
        asked = {stream.grant.token_id for stream in streams if stream.grant.token_id is not None}
        try:
            good = await asyncio.to_thread(self._tokens.good, asked) if asked else frozenset()
        except Exception as error:
            # Any error: they end with their rotation at the latest.
            logger.warning(
                "tokens of open streams cannot be read, will retry",
                extra={"action": "token_check_failed", "reason": first_line(error)},
            )
            return
        for stream in streams:
            if stream.grant.token_id not in good:
                stream.end()


def _servers_of(tasks: set[asyncio.Task[Any]]) -> list[uvicorn.Server]:
    """Each uvicorn that runs in one of the tasks of a loop, by itself or within other code."""
    found = []
    for task in tasks:
        awaited: Any = task.get_coro()
        while inspect.iscoroutine(awaited):
            owner = inspect.getcoroutinelocals(awaited).get("self")
            if isinstance(owner, uvicorn.Server):
                found.append(owner)
                break
            awaited = awaited.cr_await
    return found


def _stops(servers: list[uvicorn.Server]) -> bool:
    """Whether one closes its sockets; without any, what the handler of SIGTERM says."""
    if not servers:
        # In another thread. Its handler of signals is a method of the server, which knows.
        handler = signal.getsignal(signal.SIGTERM)
        return bool(getattr(getattr(handler, "__self__", None), "should_exit", False))
    # After `limit_max_requests` it stops without that it should exit.
    return any(
        # One that has not started has no sockets yet.
        server.should_exit or not all(each.is_serving() for each in getattr(server, "servers", ()))
        for server in servers
    )
