"""The event loop of one call of an `async def` plan: tasks and futures, no I/O and no time.

It runs until none of its tasks can go on, and what lets one go on is the answer to a call of `run`.
So a function does the same with the same answers in the same order, however often it is called.
"""

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, copy_context
from itertools import count
from typing import Any
from weakref import WeakSet

from beatless.orchestrator.branches import BRANCH
from beatless.orchestrator.outcomes import PlanError

logger = logging.getLogger("beatless.orchestrator.executor")

ONLY_RUN = (
    "the function of a plan can await only calls of run, as run.step(…) and run.wait(…), and what "
    "asyncio makes of them without a clock, as gather, TaskGroup and create_task; do the rest in a "
    "step"
)

TIMER = (
    "a timer, as that of asyncio.sleep or asyncio.timeout: instead there are run.sleep(…), and "
    "timeout= of waits and of steps"
)

USES = {"call_later": TIMER, "call_at": TIMER, "time": TIMER, "run_in_executor": "a thread"}
"""The uses of methods that the loop does not have."""


class _Task(asyncio.Task[Any]):
    """A task with a number as its hash: the order of a set of tasks is the same in each replay."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], *, number: int, **options: Any) -> None:
        self._number = number
        super().__init__(coroutine, **options)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class PlanLoop:
    """The loop. Of one thread; whoever has that gives it the time that it needs, by `run`."""

    def __init__(self, plan: str) -> None:
        self._plan = plan
        self._ready: deque[tuple[Callable[..., Any], tuple[Any, ...], Context]] = deque()
        self._numbers = count()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    @property
    def is_idle(self) -> bool:
        """Whether nothing can go on but the task that is going on."""
        return not self._ready

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that have not ended, in the order in which they were made."""
        return sorted((task for task in self._tasks if not task.done()), key=hash)

    def begin(self, coroutine: Coroutine[Any, Any, Any], context: Context) -> asyncio.Task[Any]:
        """The task of the function itself."""
        return self._made(coroutine, context=context)

    def run(self, stop: Callable[[], bool]) -> None:
        """Go on until no task can, or until `stop`. Raises what a task raises to end the process.

        A loop that this thread is in, as that of a test, is out of sight meanwhile.
        """
        try:
            outer: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            outer = None
        asyncio._set_running_loop(self)  # type: ignore[arg-type]  # has what tasks need of one
        try:
            while self._ready and not stop():
                callback, args, context = self._ready.popleft()
                context.run(callback, *args)
        finally:
            asyncio._set_running_loop(outer)

    # For tasks and futures

    def call_soon(
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> None:
        self._ready.append((callback, args, copy_context() if context is None else context))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)  # type: ignore[arg-type]  # as above

    def create_task(
        self, awaitable: Awaitable[Any], *, context: Context | None = None, **options: Any
    ) -> asyncio.Task[Any]:
        """A task, in a branch of its own. Also for a call of `run`, as `gather` makes one."""
        coroutine: Coroutine[Any, Any, Any]
        if inspect.iscoroutine(awaitable):
            coroutine = awaitable
        elif inspect.isawaitable(awaitable):
            coroutine = _awaited(awaitable)
        else:
            raise PlanError(f"plan {self._plan} makes a task of {awaitable!r:.200}: {ONLY_RUN}")
        context = copy_context() if context is None else context.copy()
        context.run(_fork)
        return self._made(coroutine, context=context, **options)

    def _made(self, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
        task = _Task(coroutine, number=next(self._numbers), loop=self, **options)
        self._tasks.add(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """A task has failed, and nobody has awaited it."""
        error = context.get("exception")
        logger.warning(
            "a task of a plan's function failed, and the function did not await it",
            extra={
                "action": "plan_task_failed",
                "plan": self._plan,
                "reason": f"{type(error).__name__}: {error}" if error else context.get("message"),
            },
        )

    def __getattr__(self, name: str) -> Any:
        """Raises PlanError: timers, threads, sockets and processes are for steps."""
        if name.startswith("__"):
            raise AttributeError(name)
        what = USES.get(name, f"{name} of the event loop")
        raise PlanError(f"plan {self._plan} asks for {what}; {ONLY_RUN}")


def _fork() -> None:
    BRANCH.set(BRANCH.get().fork())


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
