"""Whoever cancels a task that waits for a stream is not ignored, on any Python."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from beatless.http.aio import within
from beatless.http.follower import Follower
from beatless.outbox.backoff import Backoff
from beatless.streams.cancellation import kept_cancellation


class Awaited(asyncio.Future[str]):
    """A future that knows when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()

    def add_done_callback(self, *arguments: Any, **options: Any) -> None:
        super().add_done_callback(*arguments, **options)
        self.begun.set()


async def swallow(awaited: Awaited) -> None:
    with suppress(asyncio.CancelledError):
        await awaited


async def swallow_by_an_error(awaited: Awaited) -> None:
    await swallow(awaited)
    raise ConnectionResetError


@pytest.mark.parametrize("library", [swallow, swallow_by_an_error])
def test_a_cancellation_that_a_library_swallows_is_raised(
    library: Callable[[Awaited], Awaitable[None]],
) -> None:
    async def main() -> bool:
        awaited = Awaited()

        async def work() -> None:
            with suppress(OSError), kept_cancellation():
                await library(awaited)

        task = asyncio.create_task(work())
        await awaited.begun.wait()
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())


@pytest.mark.parametrize("library", [swallow, swallow_by_an_error])
def test_a_timeout_around_the_block_is_still_a_timeout(
    library: Callable[[Awaited], Awaitable[None]],
) -> None:
    async def main() -> None:
        async with asyncio.timeout(0):
            with kept_cancellation():
                await library(Awaited())

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_an_error_of_a_task_that_nobody_cancels_is_raised() -> None:
    async def main() -> None:
        with kept_cancellation():
            async with asyncio.timeout(0):
                await Awaited()

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_a_reader_over_http_that_is_cancelled_as_a_frame_comes_is_cancelled() -> None:
    async def main() -> bool:
        frame = Awaited()
        viewer = Follower("run", 0, timeout=60, on_reset=None, backoff=Backoff(initial=1, cap=1))
        task = asyncio.create_task(within(viewer, frame))
        await frame.begun.wait()
        frame.set_result("frame")
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())
