"""A body that blocks the event loop of its process is named, and at last the process ends."""

import asyncio
import logging
import threading
from collections.abc import Iterator

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


def watch_of(loop: LoopThread, blamed: list[str], ends_after_s: float) -> LoopWatch:
    task = loop.begin(here, name="r s", leave_copy=leave_copy)
    return LoopWatch(*task.done.result(60), ends_after_s=ends_after_s, end=blamed.append)


def test_a_body_that_blocks_the_loop_is_named(
    loop: LoopThread, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_watch, "BLOCKED_S", 0.0)
    watch = watch_of(loop, [], 3600)
    loop.begin(blocks, name="run-7 charge", leave_copy=leave_copy)
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
