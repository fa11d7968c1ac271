"""Notices what keeps a thread that many runs share from going on, and names it.

Of the event loop it is a body, of the thread of the runs the function of a plan.
"""

import asyncio
import logging
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import FrameType
from typing import Any

from beatless.orchestrator.switch_thread import SwitchThread
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.orchestrator.executor")

TICK_INTERVAL_S = 0.25

BLOCKED_S = 1.0
"""Seconds without a tick after which the thread is blocked; told again when they have doubled."""

FROZEN_S = 2.0
"""Seconds between two looks after which it was not that thread alone that stood still."""

FUNCTION_CALLS = "beatless.orchestrator.function_call"
"""The module that calls the functions of plans."""

OURS = ("beatless.orchestrator.", "beatless.outbox.")
"""Modules of which one that has the thread has it for itself, and not for a function."""


class ThreadWatch(ABC):
    """A thread that has another one tick. See the subclasses."""

    thread_name: str

    def __init__(
        self, *, ends_after_s: float, end: Callable[[str], None], observer: Observer = ignore
    ) -> None:
        """`end` ends the process when there was no tick for `ends_after_s`.

        It gets the name of what blocks.
        """
        self._ends_after_s = ends_after_s
        self._end_process = end
        self._ticked_at = self._looked_at = monotonic()
        self._told_s = 0.0
        self._asked = False
        self._stopping = threading.Event()
        self._thread = LastingThread(self.thread_name, self._run, observer=observer)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.end()

    def _run(self, thread: LastingThread) -> None:
        while not self._stopping.wait(TICK_INTERVAL_S):
            self.look()
            thread.works()

    def look(self) -> None:
        """Tell of a thread that does not tick; end the process if it has not for too long."""
        now, before = monotonic(), self._looked_at
        self._looked_at = now
        if not self._asked:
            self._asked, self._ticked_at = True, now
            self._ask()
            return
        # The whole process stood still, and this thread is the first; or nobody is to blame.
        if now - before >= FROZEN_S or not self._is_blocked():
            self._ticked_at = now
        blocked_s = now - self._ticked_at
        if blocked_s >= max(BLOCKED_S, 2 * self._told_s):
            self._told_s = blocked_s
            self._tell(blocked_s)
        if blocked_s >= self._ends_after_s:
            self._end(blocked_s)

    def _tick(self) -> None:
        self._asked, self._told_s = False, 0.0

    @abstractmethod
    def _ask(self) -> None:
        """Have the thread call `_tick`."""

    def _is_blocked(self) -> bool:
        """Whether somebody is to blame if it does not tick."""
        return True

    @abstractmethod
    def _blocking(self) -> str:
        """The name of what has the thread: the id of a run, and what it is in."""

    @abstractmethod
    def _frame(self) -> FrameType | None:
        """The innermost frame of the thread."""

    @abstractmethod
    def _tell(self, blocked_s: float) -> None:
        """Log that it is blocked."""

    def _lines(self) -> str:
        frame = self._frame()
        return "" if frame is None else "".join(traceback.format_stack(frame)[-3:])

    def _end(self, blocked_s: float) -> None:
        name = self._blocking()
        logger.critical(
            "the event loop or the thread of the runs was blocked for too long, this process ends",
            extra={"action": "loop_ends", "task": name, "seconds": round(blocked_s, 1)},
        )
        self._end_process(name)


class LoopWatch(ThreadWatch):
    """Of an event loop in which many bodies run. Begun by whoever executes many runs in it."""

    thread_name = "loop-watch"

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int, **options: Any) -> None:
        super().__init__(**options)
        self._loop = loop
        self._loop_thread = thread

    def _ask(self) -> None:
        self._loop.call_soon_threadsafe(self._tick)

    def _blocking(self) -> str:
        task = asyncio.current_task(self._loop)
        return "" if task is None else task.get_name()

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._loop_thread)

    def _tell(self, blocked_s: float) -> None:
        run_id, _, step = self._blocking().partition(" ")
        logger.warning(
            "a step blocks the event loop: the others of its process stand still",
            extra={
                "action": "loop_blocked",
                "run_id": run_id,
                "step": step,
                "seconds": round(blocked_s, 1),
                "reason": "call it in asyncio.to_thread(…). It is here:\n" + self._lines(),
            },
        )


class PlanWatch(ThreadWatch):
    """Of the thread that calls the functions of the plans of many runs.

    It blames nobody but a function: the thread may wait for Postgres as well.
    """

    thread_name = "plan-watch"

    def __init__(self, runs: SwitchThread, **options: Any) -> None:
        super().__init__(**options)
        self._runs = runs

    def _ask(self) -> None:
        self._runs.soon(self._tick)

    def _is_blocked(self) -> bool:
        frame = self._frame()
        while frame is not None:
            module = str(frame.f_globals.get("__name__"))
            if module.startswith(OURS):
                return module == FUNCTION_CALLS
            frame = frame.f_back
        return False

    def _blocking(self) -> str:
        return self._runs.acting

    def _frame(self) -> FrameType | None:
        return sys._current_frames().get(self._runs.thread or 0)

    def _tell(self, blocked_s: float) -> None:
        run_id, _, plan = self._blocking().partition(" ")
        logger.warning(
            "the function of a plan blocks its worker: the other runs of its process stand still",
            extra={
                "action": "plan_blocks",
                "run_id": run_id,
                "plan": plan,
                "seconds": round(blocked_s, 1),
                "reason": "what takes time belongs into a step. It is here:\n" + self._lines(),
            },
        )
