"""The places of open streams: how many there may be, and which of them must end."""

import asyncio
import logging
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus

from beatless.api.problems import Problem
from beatless.auth import Grant, Tokens
from beatless.outbox.clock import monotonic

logger = logging.getLogger(__name__)

MAX_STREAMS = 5000
MAX_STREAMS_PER_TOKEN = 1000
"""Those of the stream tokens that a token has made are its own."""
MAX_STREAMS_PER_NAMESPACE = 4000

STOP_CHECK_S = 0.5
TOKEN_CHECK_S = 10.0


class Place:
    """Room for one stream: taken before anything is read, and given back once."""

    def __init__(self, grant: Grant, give_back: Callable[["Place"], None]) -> None:
        self.grant = grant
        self.end: Callable[[], None] | None = None
        """Ends the stream in order; None before it begins."""
        self._give_back = give_back

    def release(self) -> None:
        self._give_back(self)


class Places:
    """All places of one API.

    While streams are open it looks whether their tokens are still good, and whether the server
    stops: uvicorn waits for every answer to end and tells an app without a lifespan nothing.
    """

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._taken: set[Place] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._mutex = threading.Lock()
        self._watch: asyncio.Task[None] | None = None

    def take(self, grant: Grant) -> Place:
        """Raises Problem (503) when all are taken."""
        place = Place(grant, self._give_back)
        with self._mutex:
            if len(self._taken) >= MAX_STREAMS or (
                grant.token_id
                and any(self._counts[key] >= most for key, most in _limits(grant).items())
            ):
                raise Problem(
                    HTTPStatus.SERVICE_UNAVAILABLE, "too many streams are open: come again later"
                ).with_headers(Retry_After="5")
            self._taken.add(place)
            self._counts.update(_limits(grant).keys())
        return place

    def _give_back(self, place: Place) -> None:
        with self._mutex:
            if place not in self._taken:
                return
            self._taken.remove(place)
            for key in _limits(place.grant):
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]

    @contextmanager
    def streaming(self, place: Place, end: Callable[[], None]) -> Iterator[None]:
        """In this block, in a loop, the place is looked after; afterwards it is free."""
        place.end = end
        loop = asyncio.get_running_loop()
        if self._watch is None or self._watch.done() or self._watch.get_loop() is not loop:
            self._watch = loop.create_task(self._look_after(), name="beatless-places")
        try:
            yield
        finally:
            place.release()

    def end_all(self) -> None:
        """End every stream of this loop in order."""
        for place in list(self._taken):
            if place.end is not None:
                place.end()

    async def _look_after(self) -> None:
        look_at = monotonic() + TOKEN_CHECK_S
        while self._taken:
            await asyncio.sleep(STOP_CHECK_S)
            if _server_stops():
                self.end_all()
            elif monotonic() >= look_at:
                try:
                    await self._check_tokens()
                except Exception:
                    # Whatever it is: without this task no stream would end when the server stops.
                    logger.exception(
                        "open streams cannot be looked after, will retry",
                        extra={"action": "look_after_failed"},
                    )
                look_at = monotonic() + TOKEN_CHECK_S

    async def _check_tokens(self) -> None:
        open_places = [place for place in list(self._taken) if place.grant.token_id is not None]
        asked = {place.grant.token_id for place in open_places if place.grant.token_id is not None}
        try:
            good = await asyncio.to_thread(self._tokens.good, asked) if asked else frozenset()
        except Exception as error:
            # Whatever it is: they end with their rotation at the latest.
            logger.warning(
                "tokens of open streams cannot be looked at, will retry",
                extra={"action": "token_check_failed", "reason": str(error)},
            )
            return
        for place in open_places:
            if place.grant.token_id not in good and place.end is not None:
                place.end()


def kept_by(place: Place, holder: object) -> None:
    """Give the place back with the holder, should that never come to stream."""
    weakref.finalize(holder, place.release)


def _limits(grant: Grant) -> dict[tuple[str, str], int]:
    return {
        ("token", grant.maker or grant.token_id or ""): MAX_STREAMS_PER_TOKEN,
        ("namespace", grant.namespace): MAX_STREAMS_PER_NAMESPACE,
    }


def _server_stops() -> bool:
    # Its handler of signals is a method of the server, which knows.
    handler = signal.getsignal(signal.SIGTERM)
    return bool(getattr(getattr(handler, "__self__", None), "should_exit", False))
