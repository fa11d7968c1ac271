"""Notices that a body blocks the event loop, and names it."""

import asyncio
import logging
import sys
import threading
import traceback
from collections.abc import Callable

from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

logger = logging.getLogger("beatless.orchestrator.executor")

TICK_INTERVAL_S = 0.25

BLOCKED_S = 1.0
"""Seconds without a tick after which the loop is blocked; told again when they have doubled."""

FROZEN_S = 2.0
"""Seconds between two looks after which it was not the loop alone that stood still."""


class LoopWatch:
    """A thread that has a loop tick. Begun by whoever executes many runs in it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        thread: int,
        *,
        ends_after_s: float,
        end: Callable[[str], None],
        observer: Observer = ignore,
    ) -> None:
        """`end` ends the process when its loop has not ticked for `ends_after_s`.

        It gets the name of the task that blocks.
        """
        self._loop = loop
        self._loop_thread = thread
        self._ends_after_s = ends_after_s
        self._end_process = end
        self._ticked_at = self._looked_at = monotonic()
        self._told_s = 0.0
        self._asked = False
        self._stopping = threading.Event()
        self._thread = LastingThread("loop-watch", self._run, observer=observer)

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
        """Tell of a loop that does not tick, and end a process that has not for too long."""
        now, before = monotonic(), self._looked_at
        self._looked_at = now
        if not self._asked:
            self._asked, self._ticked_at = True, now
            self._loop.call_soon_threadsafe(self._tick)
            return
        if now - before >= FROZEN_S:  # the whole process stood still, and this thread is the first
            self._ticked_at = now
        blocked_s = now - self._ticked_at
        if blocked_s >= max(BLOCKED_S, 2 * self._told_s):
            self._told_s = blocked_s
            self._tell(blocked_s)
        if blocked_s >= self._ends_after_s:
            self._end(blocked_s)

    def _tick(self) -> None:
        self._asked, self._told_s = False, 0.0

    def _blocking(self) -> str:
        """The name of the task that has the loop: the run and the step of a body."""
        task = asyncio.current_task(self._loop)
        return "" if task is None else task.get_name()

    def _tell(self, blocked_s: float) -> None:
        run_id, _, step = self._blocking().partition(" ")
        frame = sys._current_frames().get(self._loop_thread)
        lines = [] if frame is None else traceback.format_stack(frame)[-3:]
        logger.warning(
            "a step blocks the event loop: the others of its process stand still",
            extra={
                "action": "loop_blocked",
                "run_id": run_id,
                "step": step,
                "seconds": round(blocked_s, 1),
                "reason": "call it in asyncio.to_thread(…). It is here:\n" + "".join(lines),
            },
        )

    def _end(self, blocked_s: float) -> None:
        name = self._blocking()
        logger.critical(
            "the event loop was blocked for too long, this process ends",
            extra={"action": "loop_ends", "task": name, "seconds": round(blocked_s, 1)},
        )
        self._end_process(name)
