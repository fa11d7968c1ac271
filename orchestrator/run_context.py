"""The argument of a plan's function: the run's input, its steps, and values that are stored."""

import asyncio
import inspect
import random
import sys
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import wraps
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from beatless.orchestrator.child_calls import (
    ChildCall,
    Children,
    ChildResults,
    child_call,
    first_call,
    plain,
)
from beatless.orchestrator.child_options import check_map, options_of_call
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Plan, PlanContext, Step
from beatless.orchestrator.records import Run
from beatless.orchestrator.replay import Call, Mismatch, Outcome, Replay
from beatless.orchestrator.waits import approve, sleep_of, wait

Input = TypeVar("Input")
Method = TypeVar("Method", bound=Callable[..., Any])

ALL_ARE_AWAITED = (
    "also for run.step(…), run.wait(…), run.approve(…), run.sleep(…), run.child(…), run.map(…) and "
    "the result() of a child, or give the calls to asyncio.gather"
)

NO_PARALLEL = (
    "run.parallel is for plans that are not async: in this one give the calls to asyncio.gather, "
    "or make tasks of them in an asyncio.TaskGroup"
)

Asked = Call | Mismatch
"""What the execution is asked for by a function that is suspended meanwhile."""


def _as_it_is(value: Any) -> Any:
    return value


def _options_by_name(method: Method) -> Method:
    """The method, with a TypeError that says what to write when an option is given by its place."""
    known = inspect.signature(method).parameters.values()
    placed = [each.name for each in known if each.kind is each.POSITIONAL_OR_KEYWORD]
    options = [each.name for each in known if each.kind is each.KEYWORD_ONLY]

    def called(*given: Any, **named: Any) -> Any:
        if len(given) > len(placed):
            shown = [*placed[1:], *(f"{each}=…" for each in options[: len(given) - len(placed)])]
            raise TypeError(
                f"run.{method.__name__} takes its options by name: "
                f"run.{method.__name__}({', '.join(shown)}); it has: {', '.join(options)}"
            )
        return method(*given, **named)

    # By it a call that is not awaited is named, and a line of a traceback.
    called.__code__ = called.__code__.replace(co_name=method.__name__)
    return wraps(method)(called)  # type: ignore[return-value]  # it keeps the signature


class RunContext(PlanContext, Generic[Input]):
    """One run, in the function of its plan.

    The executor makes it. A unit test of a function gives anything that has the methods.

    >>> from beatless import RunContext, plan, step
    >>> @step
    ... def ask_model(ctx, prompt): ...
    >>> @plan("research")
    ... def research(run: RunContext) -> dict:
    ...     began = run.now()
    ...     answers = [run.step(ask_model, question) for question in run.input["questions"]]
    ...     return {"answers": answers, "seconds": (run.now() - began).total_seconds()}
    """

    def __init__(
        self,
        *,
        run: Run,
        input: Input,
        version: int,
        replay: Replay,
        ask: Callable[[Asked | Outcome], Outcome],
        fork: Callable[[Sequence[Callable[[], Any]]], list[Any]],
    ) -> None:
        self.id = run.run_id
        """The run's id."""
        self.input = input
        """The run's input: of the type that the plan declares, else JSON."""
        self.tags = run.tags
        self.tick = run.tick
        """The tick of the schedule that has started the run, in UTC; None if none has."""
        self.version = version
        """The version of the plan that the run was started with: `if run.version >= 2: …`."""
        self._replay = replay
        self._ask = ask
        self._fork = fork
        self._gave_results = False

    def step(self, step: Step, /, *args: Any, id: str | None = None, **kwargs: Any) -> Any:
        """The result of a step, as JSON; it is executed unless it has finished before.

        Other arguments follow the context in the call of the step. The occurrences of one step are
        named in the order of the calls: `name`, `name#2`. `id` names this one `name#id` instead,
        and its arguments are not compared with those of an earlier call. In an `async def` plan
        this is awaited.

        Raises StepFailed when the step has failed for good, PlanError for a second step of one
        name, TypeError for arguments that the step does not take, and BadPayload for arguments that
        are not JSON.
        """
        return self._answer(self._replay.step(step, plain(args), plain(kwargs), id))

    def wait(
        self,
        *names: str,
        timeout: float | timedelta | None = None,
        name: str | None = None,
        id: str | None = None,
    ) -> Any:
        """Wait for the oldest unconsumed signal of one of these names: the `Signal`.

        None only after a time-out, which comes `timeout` (seconds or a timedelta) after the wait
        has begun. Meanwhile the run holds no worker. The wait is called like its first signal
        unless it is given a `name`; its occurrences are named in the order of the calls, as those
        of steps, or by `id`. One that has begun ends with the signals and at the time that it began
        with. In an `async def` plan this is awaited.

        Raises PlanError for a bad name or timeout, and for a name that a step of the plan has.

        >>> from beatless import RunContext, days, plan, step
        >>> @step
        ... def ship(ctx): ...
        >>> @plan("paid_order")
        ... def paid_order(run: RunContext):
        ...     paid = run.wait("paid", "refused", timeout=days(3))
        ...     if paid is None or paid.name == "refused":
        ...         return {"shipped": False}
        ...     run.step(ship)
        ...     return {"shipped": True, "amount": paid.data["amount"]}
        """
        return self._answer(self._replay.wait(wait(*names, timeout=timeout, name=name), id))

    @_options_by_name
    def approve(
        self,
        title: str,
        *,
        form: Any = None,
        timeout: float | timedelta | None = None,
        name: str | None = None,
        id: str | None = None,
    ) -> Any:
        """Wait until a person has decided: the `Approval`, with `data`, `by` and `at`.

        `title` is the question. `form` is the type of the decision, which is checked when it is
        sent and then is `data`: a dataclass, a TypedDict or a model of pydantic; without one it is
        a `Verdict`. An Approval is always true, also if its decision is no; None comes only after
        a time-out. The wait is called like the title, with an underscore for what a name cannot
        have, unless it is given a `name`; `timeout` and `id` are as those of `wait`. In an
        `async def` plan this is awaited.

        Raises PlanError for a bad title, name, form or timeout, and for a name that a step of the
        plan has.

        >>> from beatless import RunContext, days, plan, step
        >>> @step
        ... def pay_back(ctx, comment): ...
        >>> @plan("complaint")
        ... def complaint(run: RunContext):
        ...     decision = run.approve("Refund?", timeout=days(3))
        ...     if decision is None or not decision.data.approved:
        ...         return {"refunded": False}
        ...     run.step(pay_back, decision.data.comment)
        ...     return {"refunded": True, "by": decision.by}
        """
        asked = approve(title, form=form, timeout=timeout, name=name)
        return self._answer(self._replay.wait(asked, id))

    @_options_by_name
    def sleep(
        self, duration: float | timedelta, *, name: str = "sleep", id: str | None = None
    ) -> Any:
        """Let so many seconds, or a timedelta, pass without a worker: None.

        Its end is counted by Postgres from its beginning. Named as waits are. In an `async def`
        plan this is awaited. Raises PlanError for a bad name or duration.

        >>> from beatless import RunContext, days, plan, step
        >>> @step
        ... def ask_review(ctx): ...
        >>> @plan("review")
        ... def review(run: RunContext):
        ...     run.sleep(days(14))
        ...     return run.step(ask_review)
        """
        return self._answer(self._replay.wait(sleep_of(duration, name), id))

    @_options_by_name
    def child(
        self,
        plan: Plan,
        input: Any = None,
        *,
        id: str | None = None,
        detach: bool = False,
        deadline: float | timedelta | None = None,
        group: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> Any:
        """Start a run of another plan, and go on: a `Child`, whose `.result()` waits for its end.

        It has the namespace, priority and trace of this run, its group without `group`, and its
        tags; `tags` come beside them, or in place of one of the same name. It ends by its deadline;
        `deadline` (seconds or a timedelta) may be earlier. A run that ends cancels its unfinished
        children, apart from those with `detach=True`. The calls are named like the plan, and
        counted as those of steps. In an `async def` plan this is awaited.

        Raises PlanError for anything but a plan and for a bad duration, group or tags, and
        BadPayload for an input that the plan does not take.

        >>> from beatless import Plan, RunContext, plan, step
        >>> @step
        ... def render(ctx): ...
        >>> invoice = Plan("invoice", [render])
        >>> @plan("monthly_close")
        ... def monthly_close(run: RunContext):
        ...     first = run.child(invoice, {"customer": 1})
        ...     second = run.child(invoice, {"customer": 2})
        ...     return [first.result(), second.result()]
        """
        options = options_of_call("run.child", self.tags, group=group, tags=tags, deadline=deadline)
        call = child_call(plan, [plain(input)], alone=True, detached=detach, **options)
        found = self._replay.children(call, id)
        occurrence = self._replay.last_name

        def started(children: Children) -> Child:
            waits = replace(call, inputs=(), children=children, started_by=occurrence)
            return Child(str(children.run_id), waits, self._result)

        return self._answer(found, started)

    @_options_by_name
    def map(
        self,
        plan: Plan,
        inputs: Iterable[Any],
        *,
        at_once: int | None = None,
        failure: str = "fail",
        group: str | None = None,
        tags: Mapping[str, str] | None = None,
        id: str | None = None,
    ) -> Any:
        """Start a run of a plan for each input, and wait until all have ended: their results.

        In the order of the inputs; they are read in pages when they are asked for, so many of them
        need little memory. At most `at_once` are unfinished at a time. With `failure="fail"` the
        first child that fails has the others cancelled, and once these have ended its error is
        raised as a ChildFailed; with "collect" the results have a ChildFailed in its place. The
        children are as those of `child`. In an `async def` plan this is awaited.

        Raises PlanError for anything but a plan and for bad options, BadPayload for an input that
        the plan does not take, and ChildFailed.

        >>> from beatless import Plan, RunContext, plan, step
        >>> @step
        ... def resize(ctx): ...
        >>> thumbnail = Plan("thumbnail", [resize])
        >>> @plan("gallery")
        ... def gallery(run: RunContext):
        ...     return {"files": run.map(thumbnail, run.input["photos"], at_once=20)}
        """
        check_map("run.map", at_once, failure)
        options = options_of_call("run.map", self.tags, group=group, tags=tags)
        # Walked through each time it starts further ones: only if it can have such results in it.
        given = plain(list(inputs)) if self._gave_results else list(inputs)
        call = child_call(plan, given, at_once=at_once, collects=failure == "collect", **options)
        return self._answer(self._replay.children(call, id), self._results)

    @_options_by_name
    def first(
        self, children: "Iterable[Child]", *, name: str = "first", id: str | None = None
    ) -> Any:
        """Wait for the first of these children that ends well, and cancel the others: the `Child`.

        It returns when all have ended, so no other one has an effect afterwards; also one that was
        started with `detach=True` is cancelled. `result()` of each then answers at once. Children
        that fail are waited for no longer; when all have failed, ChildFailed is raised with the
        error of the first in the list. Named as waits are, in the order of the calls or by `id`.
        In an `async def` plan this is awaited.

        Raises PlanError for anything but children of this run, for none and for more than a
        thousand, and ChildFailed.

        >>> from beatless import Plan, RunContext, plan, step
        >>> @step
        ... def ask(ctx): ...
        >>> asked = Plan("asked", [ask])
        >>> @plan("hedged")
        ... def hedged(run: RunContext):
        ...     models = [run.child(asked, {"model": name}) for name in ("small", "large")]
        ...     return run.first(models).result()
        """
        rivals = list(children)
        for each in rivals:
            if not isinstance(each, Child):
                raise PlanError(
                    f"run.first waits for children, and {each!r:.200} is none: give it what "
                    "run.child has returned (in an async def plan, what `await run.child(…)` has)"
                )
        call = first_call([each.call for each in rivals], name)

        return self._answer(
            self._replay.children(call, id),
            lambda ended: next(each for each in rivals if each.number == ended.won),
        )

    def _results(self, children: Children) -> ChildResults:
        self._gave_results = True
        return ChildResults(children, self._replay.ends)

    def _result(self, call: ChildCall) -> Any:
        children = call.children
        if children is not None and children.first in self._replay.ended_children:
            found: Outcome | Asked = Outcome(result=children)
        else:
            found = self._replay.result(call, call.started_by)
        return self._answer(found, lambda ended: ChildResults(ended, self._replay.ends)[0])

    def again(self, input: Any) -> Any:
        """Begin again with another input: `return run.again(…)`. The run stays the same.

        The function is called with this `run.input`, and of the journal only what follows is read
        from then on. So a loop may take thousands of turns: results, values and open waits are left
        behind, signals that no wait has taken stay. Occurrences are counted on: after `step#7`
        comes `step#8`, with a `ctx.key` of its own; with `id=`, the number of the generation
        follows the id.

        Raises BadPayload for an input that the plan does not take.

        >>> from beatless import RunContext, plan, step
        >>> @step
        ... def poll(ctx, cursor): ...
        >>> @plan("poller")
        ... def poller(run: RunContext):
        ...     cursor = run.input["cursor"]
        ...     for _ in range(100):
        ...         run.sleep(60)
        ...         cursor = run.step(poll, cursor)
        ...     return run.again({"cursor": cursor})
        """
        return self._replay.again(plain(input))

    def now(self) -> datetime:
        """The time in UTC, stored: the same whenever the function is called again."""
        text = self._replay.value("now", lambda: datetime.now(UTC).isoformat())
        return datetime.fromisoformat(text)

    def random(self) -> float:
        """A random number from 0 up to 1, stored."""
        return float(self._replay.value("random", random.random))  # no secret

    def uuid(self) -> uuid.UUID:
        """A random UUID, stored."""
        return uuid.UUID(self._replay.value("uuid", lambda: str(uuid.uuid4())))

    def parallel(self, branches: Iterable[Callable[[], Any]], /) -> list[Any]:
        """Call functions at the same time, and wait for all: their results, in order.

        Each is called without arguments, and asks this RunContext for steps, waits and children of
        its own. The steps of different branches are executed at the same time: those that are not
        async in threads of the worker. A branch that raises ends the others: they ask for nothing
        more, steps that are in flight end, and the exception is raised here. Occurrences are
        counted within each branch: `ask#2:1` is the first call of `ask` in the second one.

        Not in an `async def` plan, which has `asyncio.gather` and `asyncio.TaskGroup` for it.
        Raises PlanError for a branch that is no function.

        >>> from beatless import RunContext, plan, step
        >>> @step
        ... def quote(ctx, carrier): ...
        >>> @plan("quotes")
        ... def quotes(run: RunContext):
        ...     return run.parallel([
        ...         lambda: run.step(quote, "road"),
        ...         lambda: run.step(quote, "rail"),
        ...     ])
        """
        calls = list(branches)
        for each in calls:
            if not callable(each):
                raise PlanError(
                    f"run.parallel calls functions, and {each!r:.200} is none: give it a list as "
                    "[lambda: run.step(…), lambda: run.step(…)]"
                )
        return self._fork(calls)

    def _answer(self, found: Outcome | Asked, made: Callable[[Any], Any] = _as_it_is) -> Any:
        outcome = self._ask(found)
        return made(outcome.give())


class Child:
    """A run that the function of a plan has started with `run.child`.

    >>> from beatless import Child, Plan, RunContext, plan, step
    >>> @step
    ... def deliver(ctx): ...
    >>> delivery = Plan("delivery", [deliver])
    >>> @plan("sale")
    ... def sale(run: RunContext):
    ...     child: Child = run.child(delivery, run.input)
    ...     return {"delivery": child.run_id, "delivered": child.result()}
    """

    def __init__(self, run_id: str, call: ChildCall, result: Callable[[ChildCall], Any]) -> None:
        """`result` answers the call that waits for it."""
        self.run_id = run_id
        self.call = call
        """The call that waits for its end."""
        self._result = result

    @property
    def number(self) -> int:
        """Its number among the children of the run."""
        return 0 if self.call.children is None else self.call.children.first

    def result(self) -> Any:
        """Wait until it has ended: its result. Meanwhile the run holds no worker.

        In an `async def` plan this is awaited. Raises ChildFailed.
        """
        return self._result(self.call)

    def __repr__(self) -> str:
        return f"<child {self.run_id}>"


class AsyncRunContext(RunContext[Input]):
    """The RunContext of a function that is `async def`: its steps and waits are awaited."""

    def __init__(
        self, *, answered: "Callable[[Outcome | Asked], Answered]", **options: Any
    ) -> None:
        super().__init__(ask=_not_awaited, fork=_not_awaited, **options)
        self._answered = answered
        self._unawaited: dict[int, Place] = {}
        self._made = 0
        self._forgotten: Place | None = None

    def parallel(self, branches: Iterable[Callable[[], Any]], /) -> NoReturn:
        """Raises PlanError: this is for plans that are not async."""
        del branches
        raise PlanError(NO_PARALLEL)

    def _answer(self, found: Outcome | Asked, made: Callable[[Any], Any] = _as_it_is) -> Any:
        made_by = caller = sys._getframe(1)
        while caller.f_back is not None and caller.f_code.co_filename == __file__:
            made_by, caller = caller, caller.f_back
        self._made += 1
        self._unawaited[self._made] = (
            made_by.f_code.co_name,
            self._replay.last_name,
            caller.f_code.co_filename,
            caller.f_lineno,
        )
        return Awaited(self, self._made, found, made)

    def begin(self, number: int, found: Outcome | Asked) -> "Answered":
        """A call is awaited: its answer, or the future that will have it."""
        self._unawaited.pop(number, None)
        return self._answered(found)

    def forget(self, number: int) -> None:
        """A call is gone that was not awaited."""
        self._forgotten = self._forgotten or self._unawaited.get(number)

    def check_awaited(self) -> None:
        """Raises PlanError if a call was not awaited: it has done nothing."""
        if self._unawaited:
            raise self._not_awaited(self._forgotten or next(iter(self._unawaited.values())))

    def check_forgotten(self) -> None:
        """Raises PlanError if a call is gone that was not awaited."""
        if self._forgotten is not None:
            raise self._not_awaited(self._forgotten)

    def _not_awaited(self, place: "Place") -> PlanError:
        call, occurrence, file, line = place
        written = "the result() of a child" if call == "result" else f"run.{call}(…)"
        called = "" if call == "result" else f", called {occurrence},"
        return PlanError(
            f"plan {self._replay.plan.name}: {written}{called} in line {line} of {Path(file).name} "
            "was not awaited, or not before the use of its result: write await "
            f"{'child.result()' if call == 'result' else written}, {ALL_ARE_AWAITED}"
        )


Place = tuple[str, str, str, int]
"""The method that was called, the occurrence that it was given, and the call's file and line."""


Answered = Outcome | asyncio.Future[Outcome]
"""The answer to a call, at once or later."""


class Awaited:
    """A call that an `async def` plan awaits, or hands to `asyncio.gather` and the like."""

    def __init__(
        self,
        context: AsyncRunContext[Any],
        number: int,
        found: Outcome | Asked,
        made: Callable[[Any], Any],
    ) -> None:
        self._context = context
        self._number = number
        self._found = found
        self._made = made
        self._answer: Answered | None = None

    def __await__(self) -> Generator[Any, Any, Any]:
        if self._answer is None:
            self._answer = self._context.begin(self._number, self._found)
        answer = self._answer
        outcome = answer if isinstance(answer, Outcome) else (yield from answer)
        return self._made(outcome.give())

    def __del__(self) -> None:
        if self._answer is None:
            self._context.forget(self._number)


def _not_awaited(asked: object) -> NoReturn:
    raise TypeError(f"{asked!r:.200} is awaited in an async plan")
