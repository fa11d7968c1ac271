"""The event loop of a process, in a thread of its own, for the bodies of `async def` steps.

One loop for all threads and runs, for as long as the process lives: a client that a step has made
is of use to the next one. A child that is forked makes its own.
"""

import asyncio
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from types import FrameType
from typing import Any, TypeVar

from beatless.orchestrator.held_rows import RowHeld, giving_way
from beatless.orchestrator.loop_watch import LoopWatch
from beatless.outbox import forks
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread, submitted

T = TypeVar("T")

WRITERS = 4
"""Threads, each with one write of a step in hand."""

RETRY_INTERVAL_S = 0.1
"""Seconds until a write is made again whose row another transaction holds."""

END_S = 1.0
"""Seconds for which the end of the loop is waited for: a body may block it."""


Together = Callable[[Callable[[bool], None]], None]
"""Has a write made in a statement with those of others; tells once whether it was."""

BODY: ContextVar[str] = ContextVar("beatless_body", default="")
"""The name of the task of a body, in all that it begins."""


class BodyTask:
    """One call of a coroutine function, as a task of the loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        body: Callable[[], Coroutine[Any, Any, Any]],
        *,
        name: str,
        leave_copy: Callable[[BaseException | None], None],
    ) -> None:
        self.done: Future[Any] = Future()
        """Its result or its exception, of any kind."""
        self._loop = loop
        self._body = body
        self._name = name
        self._leave_copy = leave_copy
        self._task: asyncio.Task[None] | None = None
        self._thread = 0
        loop.call_soon_threadsafe(self._begin)  # in the context of this thread

    def cancel(self) -> None:
        """Cancel the task, from any thread."""
        self._loop.call_soon_threadsafe(self._cancel)

    def stack(self) -> list[str]:
        """The lines of code at which it stands, the outermost first."""
        found: list[tuple[FrameType, int]] = []
        inner: Any = None if self._task is None else self._task.get_coro()
        while (frame := getattr(inner, "cr_frame", None)) is not None:
            found.append((frame, frame.f_lineno))
            if inner.cr_running and inner.cr_await is None:  # it blocks the loop
                running = sys._current_frames().get(self._thread)
                found = list(traceback.walk_stack(running))[::-1]
            inner = inner.cr_await
        return traceback.StackSummary.extract(iter(found)).format()

    def _begin(self) -> None:
        self._thread = threading.get_ident()
        BODY.set(self._name)
        self._task = self._loop.create_task(self._run(), name=self._name)
        self._task.add_done_callback(self._ended)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        pid = os.getpid()
        error: BaseException | None = None
        value: Any = None
        try:
            value = await self._body()
        except BaseException as raised:  # a SystemExit that left the task would end the loop
            error = raised
        if os.getpid() != pid:
            self._leave_copy(error)
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(value)

    def _ended(self, _task: asyncio.Task[None]) -> None:
        if not self.done.done():  # cancelled before its first turn
            self.done.set_exception(asyncio.CancelledError())


class LoopThread:
    """The loop and its thread, begun with the first body; and threads for the writes of bodies."""

    def __init__(self, *, observer: Observer = ignore) -> None:
        self._observer = observer
        self._reset()
        forks.watch(self)

    def _reset(self) -> None:
        self._mutex = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: LastingThread | None = None
        self._writers: ThreadPoolExecutor | None = None
        self._watch: LoopWatch | None = None

    after_fork = _reset

    def begin(
        self,
        body: Callable[[], Coroutine[Any, Any, Any]],
        *,
        name: str,
        leave_copy: Callable[[BaseException | None], None],
    ) -> BodyTask:
        """Call a coroutine function in the loop, in a copy of the context of this thread.

        `leave_copy` ends a copy of the process in which the body returns a second time.
        """
        return BodyTask(self._running(), body, name=name, leave_copy=leave_copy)

    def submit(self, act: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Call one of ours in the loop, in a copy of the context of this thread."""
        return asyncio.run_coroutine_threadsafe(act(), self._running())

    def lane(self) -> "WriteLane":
        """A lane for the writes of one body."""
        loop = self._running()
        with self._mutex:
            if self._writers is None:
                self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="beatless-writes")
            return WriteLane(self._writers, loop)

    def watch(self, *, ends_after_s: float, end: Callable[[str], None]) -> None:
        """Begin to watch the loop: see `LoopWatch`."""
        loop = self._running()
        assert self._thread is not None and self._thread.ident is not None  # noqa: S101, PT018 - it runs
        self._watch = LoopWatch(
            loop,
            self._thread.ident,
            ends_after_s=ends_after_s,
            end=end,
            observer=self._observer,
        )
        self._watch.start()

    def stop(self) -> None:
        """End the thread; what runs in the loop is cancelled."""
        if self._watch is not None:
            self._watch.stop()
        with self._mutex:
            loop, thread, writers = self._loop, self._thread, self._writers
            self._loop = self._thread = self._writers = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.end(END_S)
        if writers is not None:
            writers.shutdown(wait=False)

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._mutex:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                loop.set_task_factory(_task)
                thread = LastingThread("loop", lambda _: _turn(loop), observer=self._observer)
                thread.start()
                self._loop, self._thread = loop, thread
            return self._loop


class _Task(asyncio.Task[Any]):
    """A task of the loop; one that a body begins without a name has that of the body."""

    def __init__(self, coroutine: Any, **options: Any) -> None:
        options["name"] = options.get("name") or BODY.get() or None
        super().__init__(coroutine, **options)

    def set_name(self, value: object) -> None:
        """Python 3.13.0 to 3.13.2 name a task "None" that is begun without a name."""
        if value is not None:
            super().set_name(value)


def _task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    return _Task(coroutine, loop=loop, **options)


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped, and close it."""
    asyncio.set_event_loop(loop)
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    with suppress(Exception):
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=END_S))
        loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


class WriteLane:
    """Performs the writes of one body in other threads: one after the other, in their order.

    One that would wait for a row is made again a little later: others need the threads.
    """

    def __init__(self, writers: ThreadPoolExecutor, loop: asyncio.AbstractEventLoop) -> None:
        self._writers = writers
        self._loop = loop
        self._mutex = threading.Lock()
        self._ahead: deque[tuple[Future[Any], Callable[[], Any], Together | None]] = deque()
        self._working = False

    def put(self, write: Callable[[], Any], together: Together | None = None) -> Future[Any]:
        """Have this written; the future has its outcome.

        It is tried `together` with the writes of others first, if that is given.
        """
        future: Future[Any] = Future()
        with self._mutex:
            self._ahead.append((future, write, together))
            if self._working:
                return future
            self._working = True
        self._begin(together)
        return future

    async def drained(self) -> None:
        """Return once all that was put is written, or has failed."""
        if self._working:
            await asyncio.wrap_future(self.put(lambda: None))

    def _work(self) -> None:
        while True:
            with self._mutex:
                if not self._ahead:
                    self._working = False
                    return
                future, write, together = self._ahead[0]
            if together is not None:
                together(self._told)
                return
            if future.running() or future.set_running_or_notify_cancel():
                try:
                    future.set_result(copy_context().run(giving_way, write))
                except RowHeld:
                    self._loop.call_soon_threadsafe(
                        self._loop.call_later, RETRY_INTERVAL_S, self._go_on
                    )
                    return
                except BaseException as error:  # its caller's, as if it had written by itself
                    future.set_exception(error)
            with self._mutex:
                self._ahead.popleft()

    def _go_on(self) -> None:
        self._begin(None)

    def _begin(self, together: Together | None) -> None:
        """Have the first one made, together with others or in a thread."""
        if together is not None:
            together(self._told)
            return
        try:
            submitted(self._writers, self._work)
        except RuntimeError as error:  # a thread cannot be started: nobody would make any of them
            self._fail(error)
            raise

    def _fail(self, error: RuntimeError) -> None:
        with self._mutex:
            left, self._working = list(self._ahead), False
            self._ahead.clear()
        for future, _, _ in left:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _told(self, written: bool) -> None:
        """The first one was written together with others; if not, it is written by itself."""
        with self._mutex:
            future, write, _ = self._ahead[0]
            if written:
                self._ahead.popleft()
            else:
                self._ahead[0] = (future, write, None)
            self._working = goes_on = bool(self._ahead)
            together = self._ahead[0][2] if goes_on else None
        if written and future.set_running_or_notify_cancel():
            future.set_result(None)
        if goes_on:
            self._begin(together)
