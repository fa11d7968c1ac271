"""One call of a plan's function, which is suspended at a step while others do the I/O.

A function that is not async is suspended as a greenlet, in the thread of its execution: no
hand-over between threads, and no second call from the top for each step. An `async def` function is
a coroutine that is resumed by hand: it has no event loop, and only calls of `run` can be awaited.
"""

import logging
from collections.abc import Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

from beatless.orchestrator.child_calls import plain
from beatless.orchestrator.failure import raise_if_leaving
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Again, Call, Mismatch, Outcome, PlanLeft, Replay
from beatless.orchestrator.run_context import ONE_AT_A_TIME, Asked, AsyncRunContext, RunContext

logger = logging.getLogger("beatless.orchestrator.executor")

MAX_SWALLOWED = 100
"""Calls of a function that is being left, after which it is abandoned where it stands."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The function has returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Broken:
    """The function has raised."""

    error: BaseException


Said = Call | Mismatch | Ended | Broken
"""What a function says when it is called, or resumed."""


class FunctionCall(Protocol):
    """A function that is suspended. Of one thread."""

    def resume(self, outcome: Outcome | None) -> Said:
        """Go on with the answer to its last call; None at first.

        Raises what ends this process: an exception that is no Exception, if it is `leaving`.
        """

    def close(self) -> None:
        """Leave the function where it stands, with its `finally` blocks."""


Leaving = Callable[[], bool]
"""Whether an exception that is no Exception is there to end this process; else it is the user's."""


def call_function(
    run: Run, input: Any, replay: Replay, *, leaving: Leaving = lambda: False
) -> FunctionCall:
    """The call of the function of a run's plan, not begun yet."""
    kind = CoroutineCall if replay.plan.is_async else GreenletCall
    return kind(run, input, replay, leaving)


class GreenletCall:
    """A function that is not async."""

    def __init__(self, run: Run, input: Any, replay: Replay, leaving: Leaving) -> None:
        self._replay, self._leaving = replay, leaving
        self._left = False
        self._swallowed = 0
        context = RunContext(
            run=run,
            input=input,
            version=replay.plan.started_with(run.plan_version),
            replay=replay,
            ask=self._ask,
        )
        self._greenlet = greenlet(lambda _: self._call(context))
        self._greenlet.gr_context = copy_context()

    def _call(self, context: RunContext[Any]) -> Said:
        try:
            return _ended(self._replay.plan.function(context), self._replay)
        except (PlanLeft, GreenletExit):
            raise
        except BaseException as error:
            raise_if_leaving(error, self._leaving)
            return self._replay.end(error) or Broken(error)

    def _ask(self, asked: Asked) -> Outcome:
        if self._left:
            self._swallowed += 1
            if self._swallowed >= MAX_SWALLOWED:
                self._greenlet.parent.switch(None)
            raise PlanLeft
        outcome: Outcome = self._greenlet.parent.switch(asked)
        return outcome

    def resume(self, outcome: Outcome | None) -> Said:
        self._greenlet.parent = getcurrent()
        said: Said = self._greenlet.switch(outcome)
        return said

    def close(self) -> None:
        if not self._greenlet:
            return
        self._left = True
        self._greenlet.parent = getcurrent()
        try:
            self._greenlet.throw(PlanLeft)
        except PlanLeft:
            return
        _swallowed(self._replay)


class CoroutineCall:
    """A function that is `async def`."""

    def __init__(self, run: Run, input: Any, replay: Replay, leaving: Leaving) -> None:
        self._replay, self._leaving = replay, leaving
        self._context = context = AsyncRunContext(
            run=run,
            input=input,
            version=replay.plan.started_with(run.plan_version),
            replay=replay,
            ask=_not_awaited,
        )
        self._coroutine: Coroutine[Any, Any, Any] = replay.plan.function(context)

    def resume(self, outcome: Outcome | None) -> Said:
        try:
            asked = self._coroutine.send(outcome)
        except StopIteration as end:
            return self._ended(end.value)
        except PlanLeft:
            raise
        except BaseException as error:
            raise_if_leaving(error, self._leaving)
            if isinstance(error, RuntimeError) and "event loop" in str(error):
                return Broken(self._refused("a task or timer of asyncio", error))
            return self._broken(error)
        if isinstance(asked, Call | Mismatch):
            return asked
        self.close()
        return Broken(self._refused(repr(asked)[:200]))

    def _ended(self, value: Any) -> Said:
        try:
            self._context.check_awaited()
            return _ended(value, self._replay)
        except Exception as error:  # also of a child whose result is read only now
            return self._replay.end(error) or Broken(error)

    def _broken(self, error: BaseException) -> Said:
        """It has raised: perhaps because it took a call that it did not await for the result."""
        if not isinstance(error, PlanError):
            try:
                self._context.check_awaited()
            except PlanError as forgotten:
                forgotten.__cause__ = error
                error = forgotten.with_traceback(error.__traceback__)
        return self._replay.end(error) or Broken(error)

    def _refused(self, awaited: str, cause: Exception | None = None) -> PlanError:
        error = PlanError(f"plan {self._replay.plan.name} awaits {awaited}: {ONE_AT_A_TIME}")
        error.__cause__ = cause
        return error

    def close(self) -> None:
        try:
            self._coroutine.close()
        except BaseException as error:  # RuntimeError if it has ignored GeneratorExit
            raise_if_leaving(error, self._leaving)
            _swallowed(self._replay)


def _ended(value: Any, replay: Replay) -> Said:
    try:
        replay.check_end(value)
    except PlanError as error:
        return Broken(error)
    return replay.end() or Ended(value if isinstance(value, Again) else plain(value))


def _not_awaited(asked: Asked) -> Outcome:
    raise TypeError(f"{asked!r:.200} is awaited in an async plan")


def _swallowed(replay: Replay) -> None:
    logger.error(
        "the function of a plan kept the exception by which its run leaves a worker",
        extra={
            "action": "plan_left",
            "plan": replay.plan.name,
            "reason": "a bare `except:` or `except BaseException:`; catch Exception instead",
        },
    )
