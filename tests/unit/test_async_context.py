"""Writes that an async step has handed over happen, whoever awaits them."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import pytest

from beatless.orchestrator.async_context import Write
from beatless.orchestrator.loop_thread import WriteLane
from beatless.orchestrator.shared_traces import SharedTraces


async def awaits(write: Write) -> str:
    await write
    return "written"


def test_a_write_happens_if_one_who_awaits_it_is_cancelled_and_the_others_go_on() -> None:
    before, written = threading.Event(), []

    async def body(writers: ThreadPoolExecutor) -> str:
        lane = WriteLane(writers, asyncio.get_running_loop())
        lane.put(lambda: before.wait(60))
        write = Write(lane.put(lambda: written.append("trace")))
        tasks = [asyncio.ensure_future(awaits(write)) for _ in range(2)]
        await asyncio.wait(tasks, timeout=0)
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        before.set()
        return await tasks[1]

    with ThreadPoolExecutor(1) as writers:
        assert asyncio.run(body(writers)) == "written"
    assert written == ["trace"]


def test_writes_that_no_thread_can_be_started_for_fail_and_keep_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one that others have not written with theirs, and the one behind it."""
    written: list[str] = []

    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def body(writers: ThreadPoolExecutor) -> None:
        lane = WriteLane(writers, asyncio.get_running_loop())
        told: list[Callable[[bool], None]] = []
        traces = [lane.put(lambda: written.append("trace"), told.append) for _ in range(2)]
        with monkeypatch.context() as context:
            context.setattr(threading.Thread, "start", full)
            with pytest.raises(RuntimeError, match="thread"):
                told[0](False)
        async with asyncio.timeout(60):
            for trace in traces:
                with pytest.raises(RuntimeError, match="thread"):
                    await Write(trace)
            await Write(lane.put(lambda: written.append("next")))
            await lane.drained()

    with ThreadPoolExecutor(1) as writers:
        asyncio.run(body(writers))
    assert written == ["next"]


def test_traces_that_no_thread_can_be_started_for_are_all_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two that have come by then the first cannot be written by itself either."""
    given: Any = None
    traces, told = SharedTraces(given, given, given, given), list[bool]()

    def full(*_: Any) -> NoReturn:
        traces.put(given, told.append)
        raise RuntimeError("can't start new thread")

    def fail(_written: bool) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(traces._pool, "submit", full)
    traces.put(given, fail)
    assert told == [False]
