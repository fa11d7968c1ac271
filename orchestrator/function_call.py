"""One call of a plan's function, which is suspended at steps while others do the I/O.

A function that is not async is suspended as a greenlet, in the thread of its execution: no
hand-over between threads, and no second call from the top for each step. Each of its branches is
another greenlet. An `async def` function is a task of a loop of its own, in which only calls of
`run` can be awaited.

Branches and tasks go on until each of them is at a call. Then the function is told the outcome of
one: those that are stored in the order of the journal, which is that in which it was told before.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

from greenlet import GreenletExit, getcurrent, greenlet

from beatless.orchestrator.branches import BRANCH
from beatless.orchestrator.child_calls import plain
from beatless.orchestrator.failure import is_a, raise_if_leaving, text_of
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan_loop import ONLY_RUN, PlanLoop
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Again, Call, Mismatch, Outcome, PlanLeft, Replay, Several
from beatless.orchestrator.run_context import (
    Answered,
    Asked,
    AsyncRunContext,
    RunContext,
)

logger = logging.getLogger("beatless.orchestrator.executor")

MAX_SWALLOWED = 100
"""Calls of a function that is being left, after which it is abandoned where it stands."""

FOREIGN = ("bad yield", "different loop", "different future")
"""In the errors of asyncio for what it cannot await: it is of another loop, or of none."""

Waiting = TypeVar("Waiting", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Ended:
    """The function has returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Broken:
    """The function has raised."""

    error: BaseException


Said = Call | Several | Mismatch | Ended | Broken
"""What a function says when it is called, or resumed."""


class FunctionCall(Protocol):
    """A function that is suspended. Of one thread."""

    def resume(self, outcome: Outcome | None, named: str | None = None) -> Said:
        """Go on with the answer to a call; None at first.

        `named` is its occurrence; None: it is the only one. Raises PlanLeft if children cannot be
        read, and what ends this process: an exception that is no Exception, if it is `leaving`.
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


def _next(
    asked: Mapping[Waiting, Asked | Outcome], replay: Replay
) -> tuple[Waiting, Outcome] | Said:
    """The next outcome that is stored, with who waits for it; or what the function says.

    Not empty: each part of the function waits for the answer to one of these.
    """
    calls: list[Call] = []
    first: tuple[Waiting, Outcome] | None = None
    for who, found in asked.items():
        if isinstance(found, Mismatch):
            return found
        if isinstance(found, Call):
            calls.append(found)
        elif first is None or found.seq < first[1].seq:
            first = who, found
    if first is not None:
        return first
    if passed := replay.passed_over(asked=calls[0].named):
        return passed
    if len(calls) == 1:
        return calls[0]
    return Several(step=calls[0].step, inbox=calls[0].inbox, results=replay.results, calls=calls)


def _who(asked: Mapping[Waiting, Asked | Outcome], named: str | None) -> Waiting:
    """The part of the function that waits for the answer to this call."""
    return next(
        who
        for who, found in asked.items()
        if isinstance(found, Call) and named in (None, found.named)
    )


@dataclass(slots=True, eq=False)
class _Fork:
    """The branches of one `run.parallel`."""

    waits: greenlet
    """The one that has called it."""
    results: list[Any]
    left: int
    """Branches that have not ended."""
    branches: list[greenlet] = field(default_factory=list)
    error: BaseException | None = None
    """Of the first that has failed."""


class GreenletCall:
    """A function that is not async."""

    def __init__(self, run: Run, input: Any, replay: Replay, leaving: Leaving) -> None:
        self._replay, self._leaving = replay, leaving
        self._left: set[greenlet] = set()
        """The branches that are being left, or were."""
        self._swallowed = 0
        context = RunContext(
            run=run,
            input=input,
            version=replay.plan.started_with(run.plan_version),
            replay=replay,
            ask=self._ask,
            fork=self._fork,
        )
        self._hub = getcurrent()
        self._main = greenlet(lambda _: self._call(context))
        self._main.gr_context = copy_context()
        self._main.gr_context.run(BRANCH.set, replay.branch)
        self._ready: deque[tuple[greenlet, Outcome | None]] = deque([(self._main, None)])
        self._asked: dict[greenlet, Asked | Outcome] = {}
        self._forks = 0

    def _call(self, context: RunContext[Any]) -> Said:
        try:
            return _ended(self._replay.plan.function(context), self._replay)
        except (PlanLeft, GreenletExit):
            raise
        except BaseException as error:
            raise_if_leaving(error, self._leaving)
            return self._replay.end(error) or Broken(error)

    def _ask(self, asked: Asked | Outcome) -> Outcome:
        if isinstance(asked, Outcome) and not self._forks:
            return asked
        current = getcurrent()
        if current in self._left:
            self._swallow()
        self._asked[current] = asked
        try:
            outcome: Outcome = self._hub.switch(None)
        finally:
            self._asked.pop(current, None)
        return outcome

    def _swallow(self) -> None:
        """The function has asked for something while it is left. Raises PlanLeft."""
        self._swallowed += 1
        if self._swallowed >= MAX_SWALLOWED:
            self._hub.switch(None)
        raise PlanLeft

    def _fork(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Have each called in a branch of its own; their results, once all have ended."""
        current = getcurrent()
        if current in self._left:
            self._swallow()
        fork = _Fork(waits=current, results=[None] * len(calls), left=len(calls))
        for place, call in enumerate(calls):
            branch = greenlet(partial(self._branch, fork, place, call))
            branch.gr_context = copy_context()
            branch.gr_context.run(BRANCH.set, BRANCH.get().fork())
            fork.branches.append(branch)
            self._ready.append((branch, None))
        self._forks += 1
        try:
            if calls:
                self._hub.switch(None)
        finally:
            self._forks -= 1
            for branch in fork.branches:
                self._leave(branch)
        if fork.error is not None:
            raise fork.error
        return fork.results

    def _branch(
        self, fork: _Fork, place: int, call: Callable[[], Any], _outcome: Outcome | None
    ) -> None:
        try:
            fork.results[place] = call()
        except (PlanLeft, GreenletExit):
            raise
        except BaseException as error:
            raise_if_leaving(error, self._leaving)
            if fork.error is None:
                fork.error = error
                self._ready.append((fork.waits, None))
            return
        fork.left -= 1
        if fork.left == 0:
            self._ready.append((fork.waits, None))

    def resume(self, outcome: Outcome | None, named: str | None = None) -> Said:
        self._hub = getcurrent()
        if outcome is not None:
            self._ready.append((_who(self._asked, named), outcome))
        while True:
            while self._ready:
                branch, answer = self._ready.popleft()
                if branch.dead:  # it was left before it had begun
                    continue
                branch.parent = self._hub
                said: Said | None = branch.switch(answer)
                if said is not None:
                    return said
            found = _next(self._asked, self._replay)
            if not isinstance(found, tuple):
                return found
            self._ready.append(found)

    def close(self) -> None:
        if self._main:
            self._leave(self._main)

    def _leave(self, branch: greenlet) -> None:
        """Leave a branch where it stands, with those that it waits for."""
        if branch.dead:
            return
        self._left.add(branch)
        branch.parent = hub = getcurrent()
        before, self._hub = self._hub, hub
        try:
            branch.throw(PlanLeft)
        except PlanLeft:
            return
        finally:
            self._hub = before
        _swallowed(self._replay)


class CoroutineCall:
    """A function that is `async def`."""

    def __init__(self, run: Run, input: Any, replay: Replay, leaving: Leaving) -> None:
        self._replay, self._leaving = replay, leaving
        self._left = False
        self._swallowed = 0
        self._loop = PlanLoop(replay.plan.name)
        self._asked: dict[asyncio.Future[Outcome], Asked | Outcome] = {}
        self._run_context: AsyncRunContext[Any] = AsyncRunContext(
            run=run,
            input=input,
            version=replay.plan.started_with(run.plan_version),
            replay=replay,
            answered=self._answered,
        )
        context = copy_context()
        context.run(BRANCH.set, replay.branch)
        self._main = self._loop.begin(replay.plan.function(self._run_context), context)

    def _answered(self, found: Outcome | Asked) -> Answered:
        if self._left:
            self._swallowed += 1
            raise asyncio.CancelledError
        if isinstance(found, Outcome) and self._loop.is_idle and not self._asked:
            return found  # nothing else could be told before
        future = self._loop.create_future()
        self._asked[future] = found
        return future

    def resume(self, outcome: Outcome | None, named: str | None = None) -> Said:
        if outcome is not None:
            self._tell(_who(self._asked, named), outcome)
        while True:
            self._run(lambda: self._replay.unread is not None)
            if self._replay.unread is not None:
                raise PlanLeft
            for future in [each for each in self._asked if each.done()]:
                del self._asked[future]  # its task was cancelled
            if self._main.done():
                return self._end()
            try:
                self._run_context.check_forgotten()
            except PlanError as forgotten:
                return Broken(forgotten)
            if not self._asked:
                return Broken(self._refused())
            found = _next(self._asked, self._replay)
            if not isinstance(found, tuple):
                return found
            self._tell(*found)

    def _run(self, stop: Callable[[], bool]) -> None:
        """Run the loop dry. A task has what it raises, also where asyncio would end the process."""
        while True:
            try:
                self._loop.run(stop)
            except BaseException as error:
                raise_if_leaving(error, self._leaving)
            else:
                return

    def _tell(self, future: asyncio.Future[Outcome], outcome: Outcome) -> None:
        del self._asked[future]
        future.set_result(outcome)

    def _end(self) -> Said:
        try:
            error = self._main.exception()
        except asyncio.CancelledError as cancelled:
            if cancelled.args:
                return self._broken(cancelled)
            told = asyncio.CancelledError("the function has cancelled itself")
            told.__cause__ = cancelled
            return self._broken(told)
        if error is not None and is_a(error, RuntimeError) and _is_foreign(text_of(error)):
            refused = self._refused()
            refused.__cause__ = error
            return self._broken(refused)
        if error is not None:
            raise_if_leaving(error, self._leaving)
            return self._broken(error)
        try:
            self._run_context.check_awaited()
            return _ended(self._main.result(), self._replay)
        except Exception as late:  # also of a child whose result is read only now
            return self._replay.end(late) or Broken(late)

    def _broken(self, error: BaseException) -> Said:
        """It has raised: perhaps because it took a call that it did not await for the result."""
        if not is_a(error, PlanError):
            try:
                self._run_context.check_awaited()
            except PlanError as forgotten:
                forgotten.__cause__ = error
                error = forgotten.with_traceback(error.__traceback__)
        return self._replay.end(error) or Broken(error)

    def _refused(self) -> PlanError:
        name = self._replay.plan.name
        return PlanError(f"plan {name} awaits something that nothing will end: {ONLY_RUN}")

    def close(self) -> None:
        self._left = True
        for task in self._loop.tasks:
            task.cancel()
        self._run(lambda: self._swallowed >= MAX_SWALLOWED)
        if not self._main.done():
            _swallowed(self._replay)


def _is_foreign(text: str) -> bool:
    return any(each in text for each in FOREIGN)


def _ended(value: Any, replay: Replay) -> Said:
    try:
        replay.check_end(value)
    except PlanError as error:
        return Broken(error)
    return replay.end() or Ended(value if isinstance(value, Again) else plain(value))


def _swallowed(replay: Replay) -> None:
    logger.error(
        "the function of a plan kept the exception by which its run leaves a worker",
        extra={
            "action": "plan_left",
            "plan": replay.plan.name,
            "reason": "a bare `except:` or `except BaseException:`; catch Exception instead",
        },
    )
