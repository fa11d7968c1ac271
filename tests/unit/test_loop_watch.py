"""A body that blocks the event loop of its process is named, and at last the process ends."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from beatless.orchestrator import loop_watch
from beatless.orchestrator.body import leave_copy
from beatless.orchestrator.loop_thread import LoopThread
from beatless.orchestrator.loop_watch import LoopWatch

INSIDE, LET_GO = threading.Event(), threading.Event()


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    INSIDE.clear(), LET_GO.clear()
    made = LoopThread()
    yield made
    LET_GO.set()
    made.stop()


async def here() -> tuple[asyncio.AbstractEventLoop, int]:
    return asyncio.get_running_loop(), threading.get_ident()


async def blocks() -> None:
    INSIDE.set()
    LET_GO.wait(60)


async def blocks_in_a_task() -> None:
    await asyncio.gather(blocks(), asyncio.to_thread(threading.get_ident))


def watch_of(loop: LoopThread, blamed: list[str], ends_after_s: float) -> LoopWatch:
    task = loop.begin(here, name="r s", leave_copy=leave_copy)
    return LoopWatch(*task.done.result(60), ends_after_s=ends_after_s, end=blamed.append)


@pytest.mark.parametrize("body", [blocks, blocks_in_a_task])
def test_a_body_that_blocks_the_loop_is_named(
    loop: LoopThread,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    body: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    monkeypatch.setattr(loop_watch, "BLOCKED_S", 0.0)
    monkeypatch.setattr(loop_watch, "FROZEN_S", 3600.0)  # nor if this test stands still
    watch = watch_of(loop, [], 3600)
    loop.begin(body, name="run-7 charge", leave_copy=leave_copy)
    assert INSIDE.wait(60)
    watch.look()
    watch.look()

    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    facts = vars(record)
    assert (facts["action"], facts["run_id"], facts["step"]) == ("loop_blocked", "run-7", "charge")
    assert "in blocks" in facts["reason"] or "in wait" in facts["reason"]


def test_a_loop_that_ticks_is_told_of_by_nobody(
    loop: LoopThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_watch, "BLOCKED_S", 0.0)
    watch = watch_of(loop, [], 0.0)
    for _ in range(3):
        watch.look()
        # The tick comes before it.
        loop.begin(here, name="r s", leave_copy=leave_copy).done.result(60)

    assert caplog.records == []


def test_a_loop_that_stands_still_for_too_long_ends_its_process_and_blames_the_body(
    loop: LoopThread,
) -> None:
    blamed: list[str] = []
    watch = watch_of(loop, blamed, 0.0)
    loop.begin(blocks, name="run-7 charge", leave_copy=leave_copy)
    assert INSIDE.wait(60)
    watch.look()
    watch.look()

    assert blamed == ["run-7 charge"]


def test_a_process_that_stood_still_itself_is_not_ended_for_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a frozen container: the thread that watches may be the first to go on."""
    now, blamed = [0.0], []
    monkeypatch.setattr(loop_watch, "monotonic", lambda: now[0])
    silent = asyncio.new_event_loop()  # nobody runs it
    watch = LoopWatch(silent, 0, ends_after_s=30, end=blamed.append)
    watch.look()
    now[0] = 100.0
    watch.look()
    assert blamed == []
    while not blamed and now[0] < 200:
        now[0] += loop_watch.TICK_INTERVAL_S
        watch.look()
    silent.close()

    assert (blamed, now[0]) == ([""], 130.0)
