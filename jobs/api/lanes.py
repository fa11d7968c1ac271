"""Limits of concurrent requests: those that wait for a row leave room for others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from weakref import WeakKeyDictionary, WeakValueDictionary

from fastapi import Request

from beatless.api.problems import Problem

READS = 10
WRITES = 4
METRICS = 1
PLACES = READS + WRITES + METRICS
"""Requests at work at once: fewer than the connections of the API and the threads of its server."""
WAIT_S = 5.0


class Lanes:
    """The lanes of one loop: reads, writes, metrics, and one write for each run."""

    def __init__(self) -> None:
        self._reads = asyncio.Semaphore(READS)
        self._writes = asyncio.Semaphore(WRITES)
        self._metrics = asyncio.Semaphore(METRICS)
        self._runs: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    @asynccontextmanager
    async def lane(self, request: Request, path: str) -> AsyncIterator[None]:
        """In this block the request is at work. Raises Problem (503) if that takes too long."""
        wanted = [self._reads if request.method in ("GET", "HEAD") else self._writes]
        if path == "/metrics":
            wanted = [self._metrics]
        elif wanted == [self._writes] and "run_id" in request.path_params:
            # First: who waits for another's write to the run takes no place from other runs.
            run_id = request.path_params["run_id"]
            wanted.insert(0, self._runs.setdefault(run_id, asyncio.Semaphore(1)))
        async with AsyncExitStack() as taken:
            try:
                async with asyncio.timeout(WAIT_S):
                    for each in wanted:
                        await taken.enter_async_context(each)
            except TimeoutError as error:
                raise Problem(
                    HTTPStatus.SERVICE_UNAVAILABLE,
                    "as many requests as can be are at work, or others change this run: try again",
                ).with_headers(Retry_After="2") from error
            yield


class LanesOfLoops:
    """The lanes of the running loop: waiters of one loop cannot be woken from another."""

    def __init__(self) -> None:
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, Lanes] = WeakKeyDictionary()

    def here(self) -> Lanes:
        loop = asyncio.get_running_loop()
        if loop not in self._lanes:
            self._lanes[loop] = Lanes()
        return self._lanes[loop]
