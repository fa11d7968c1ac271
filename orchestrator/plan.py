"""Plans: named steps and the routes between them. No registry, no I/O."""

import hashlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from beatless.orchestrator.celery_task import CeleryTask, call_task, is_celery_task
from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import encode
from beatless.orchestrator.forms import Form, find_form
from beatless.orchestrator.limit import Limit, check_unlimited, checked_limits, limits_of_step
from beatless.orchestrator.outcomes import STEP_NAME, Goto, PlanError
from beatless.orchestrator.plan_options import checked_moved, checked_routes
from beatless.orchestrator.retry import Retry
from beatless.orchestrator.step_body import body_of, check_body, outcomes_of, short_name, step_name
from beatless.orchestrator.waits import Wait
from beatless.outbox.times import MOST_S, problem_with_seconds

PLAN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

INPUT_BYTES = 262_144
"""The largest default input of a plan: that of a run with the default settings."""


def occurrence(name: str, visit: int) -> str:
    """The name of a visit to a step: `name`, then `name#2`."""
    return name if visit == 1 else f"{name}#{visit}"


def step_of(occurrence: str) -> str:
    """The name of the step that an occurrence is a visit to."""
    return occurrence.partition("#")[0]


class PlanContext:
    """A base of RunContext: it asks for steps, and is no context of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A function that is checkpointed: once it has returned it never runs again."""

    name: str
    function: Callable[..., Any]
    is_async: bool = False
    """Whether the function is `async def`: it is called in the event loop of the process."""
    timeout: float | None = None
    retry: Retry = field(default_factory=Retry)
    transactional: bool = False
    terminate_on_cancel: bool = False
    undo: "Step | None" = None
    """The step that undoes this one when its run fails or is cancelled."""
    outcomes: frozenset[type] = frozenset()
    """Goto, Finish or Snooze, if the function is annotated to return nothing else."""
    limits: tuple[Limit, ...] = ()

    @property
    def falls_through(self) -> bool:
        """Whether the next step of the list may follow."""
        return not self.outcomes

    def __call__(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the function itself, as a unit test would. Raises PlanError in a plan's function."""
        if isinstance(context, PlanContext):
            raise PlanError(
                f"{self.name}(run, …) would be no step, and would run at each replay: write "
                f"run.step({self.name}, …)"
            )
        return self.function(context, *args, **kwargs)

    def check_arguments(self, where: str) -> None:
        """Raises PlanError unless the context is all that the function needs."""
        try:
            inspect.signature(self.function).bind(None)
        except TypeError as error:
            raise PlanError(
                f"{where}: step {self.name} must take exactly one argument, the context; only a "
                "plan that is a function (@plan) gives its steps more"
            ) from error


@overload
def step(function: Callable[..., Any], /) -> Step: ...
@overload
def step(
    *,
    name: str | None = None,
    timeout: float | None = None,
    retry: Retry | None = None,
    transactional: bool = False,
    terminate_on_cancel: bool = False,
    undo: Step | None = None,
    limits: Iterable[Limit] | None = None,
) -> Callable[[Callable[..., Any]], Step]: ...


def step(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float | None = None,
    retry: Retry | None = None,
    transactional: bool = False,
    terminate_on_cancel: bool = False,
    undo: Step | None = None,
    limits: Iterable[Limit] | None = None,
    **others: Any,
) -> Step | Callable[[Callable[..., Any]], Step]:
    """Make a function a step of plans. Its first argument is the StepContext.

    In a list of steps it is the only one; a plan that is a function may give others (`run.step`).

    `timeout` is seconds per attempt; then the attempt has failed, even if the function continues. A
    `transactional` step gets `ctx.connection`, whose work is committed together with its
    StepFinished. `terminate_on_cancel` ends a step that does not look for a cancel by itself.
    `undo` is a step that is called, with the context and an `Undone`, if this one was begun and
    the run then fails or is cancelled; those of a run are called one by one, the last step first.
    A function that is `async def` gets an AsyncStepContext; it runs in an event loop that the
    process keeps, and is ended by a cancel of its task; if it is transactional, `ctx.connection` is
    an AsyncConnection. A step with `limits` begins with a slot or token of each, or its run waits.
    Raises PlanError for a bad name, timeout, signature or limit, and TypeError for another option.

    >>> from beatless import retry, step
    >>> @step
    ... def reserve(ctx):
    ...     return {"reserved": ctx.input["order"]}
    >>> @step(timeout=30, retry=retry(max_attempts=5))
    ... def charge(ctx):
    ...     return {"charged": ctx.results["reserve"]["reserved"]}
    >>> charge.name, charge.timeout
    ('charge', 30)
    """
    if others:
        raise TypeError(
            f"step has no option {', '.join(others)}: retry=retry(max_attempts=3) tries it again, "
            "the first attempt counts; it has: name, timeout, retry, transactional, "
            "terminate_on_cancel, undo, limits"
        )

    def decorate(function: Callable[..., Any]) -> Step:
        label = step_name(function) if name is None else name
        if not isinstance(label, str) or not STEP_NAME.fullmatch(label):
            raise PlanError(
                f"step name {label!r} must match {STEP_NAME.pattern}; "
                'give one: step(name="…")(function)'
            )
        if timeout is not None and (problem_with_seconds(timeout) or timeout == 0):
            raise PlanError(
                f"step {label}: timeout must be more than 0 seconds, and at most {MOST_S:.0f}, "
                f"not {timeout!r}"
            )
        if retry is not None and not isinstance(retry, Retry):
            raise PlanError(
                f"step {label}: retry is {retry!r}; give it a policy: retry=retry(max_attempts=3)"
            )
        check_body(label, function)
        if undo is not None:
            _check_undo(label, undo)
        is_async = inspect.iscoroutinefunction(body_of(function))
        return Step(
            name=label,
            function=function,
            is_async=is_async,
            timeout=timeout,
            retry=retry or Retry(),
            transactional=transactional,
            terminate_on_cancel=terminate_on_cancel,
            undo=undo,
            outcomes=outcomes_of(function),
            limits=limits_of_step(label, limits),
        )

    return decorate if function is None else decorate(function)


def _check_undo(label: str, undo: Any) -> None:
    """Raises PlanError for a step that cannot undo another one."""
    if not isinstance(undo, Step):
        raise PlanError(f"step {label}: undo is {undo!r:.200}; decorate it with @step")
    if undo.undo is not None or undo.terminate_on_cancel:
        raise PlanError(
            f"step {label}: its undo {undo.name} is called after the end of the others: it has no "
            "undo of its own, and no cancel ends it (terminate_on_cancel)"
        )
    check_unlimited(f"step {label}: its undo {undo.name}", undo.limits)
    try:
        inspect.signature(undo.function).bind(None, None)
    except TypeError as error:
        raise PlanError(
            f"step {label}: its undo {undo.name} must take two arguments, the context and an "
            f"Undone: def {undo.name}(ctx, undone)"
        ) from error


def not_a_step(given: object) -> str:
    """The problem with what is given in place of a step, to follow its name."""
    if is_celery_task(given):
        task: Any = given
        return f"is a task of Celery's; put Plan.task({short_name(task)}) in its place"
    if isinstance(given, Plan):
        return (
            f'is a plan; its runs are started by child("{given.name}", …) and map_ in a list, and '
            "by run.child and run.map in a function"
        )
    if callable(given):
        return "is not a step; decorate it with @step"
    return "is not a step; give it a function that is decorated with @step"


def on_cancel_steps(plans: Iterable["Plan"]) -> dict[str, str | None]:
    """The names of the `on_cancel` steps of plans; None if there is none."""
    return {plan.name: plan.on_cancel.name if plan.on_cancel else None for plan in plans}


Element = Step | Wait
"""An element of the list of a plan."""


def _elements(plan: str, steps: object) -> tuple[Element, ...]:
    """The steps and waits of a list. Raises PlanError for anything else."""
    if isinstance(steps, str) or not isinstance(steps, Iterable) or is_celery_task(steps):
        raise PlanError(
            f'plan {plan}: {steps!r:.200} is no list of steps: Plan("{plan}", [reserve, charge])'
        )
    found: tuple[Any, ...] = tuple(steps)
    for each in found:
        if not isinstance(each, Element):
            raise PlanError(f"plan {plan}: {each!r:.200} {not_a_step(each)}")
        if isinstance(each, Step):
            each.check_arguments(f"plan {plan}")
    if not found:
        raise PlanError(f"plan {plan} has no steps")
    return found


class Plan:
    """An ordered list of steps. The default route is the next step; the last one completes the run.

    Between the steps there may be waits: `wait("paid", timeout=days(3))` and `sleep(days=14)`; and
    runs of other plans: `child("invoice", invoice)` and `map_("parcels", parcel, at_once=20)`.

    `routes` declares where else a step may go (`Goto`): `{"Verify": ["Perceive", "Stop"]}`. A step
    whose function is annotated `-> Goto` (or `Finish`, or both) never goes on to the next one.
    `on_cancel` is a step that undoes the work of a cancelled run, before its RunFinished; it is
    not called for a run that had not begun. `default_input` is for runs that are started without.
    `limits` are those of its runs: each holds a lease only with a slot of every one of them.
    `renamed` maps names that steps had in earlier versions to their names now: runs that stand at
    such a step go on, with the same `ctx.key`; others that stand at a step which the plan does not
    have wait for a worker that has it. `moved` names steps that now stand before others: runs that
    are behind their new places, and have not executed them, go on without them; without it they
    wait for a worker with the former order.

    Raises PlanError, naming the plan and the step, for a plan that cannot work: two steps of one
    name, a route to nowhere, a step that nothing leads to, a default input that is not JSON.

    >>> from beatless import Plan, step
    >>> @step
    ... def reserve(ctx): ...
    >>> @step
    ... def charge(ctx): ...
    >>> Plan("checkout", [reserve, charge], queue="payments")
    Plan('checkout', [reserve, charge])
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Element],
        *,
        routes: Mapping[str, Sequence[str]] | None = None,
        queue: str = "default",
        on_cancel: Step | None = None,
        default_input: Any = None,
        renamed: Mapping[str, str] | None = None,
        moved: Iterable[str] = (),
        limits: Iterable[Limit] | None = None,
    ) -> None:
        if not isinstance(name, str) or not PLAN_NAME.fullmatch(name):
            raise PlanError(f"plan name {name!r:.200} must match {PLAN_NAME.pattern}")
        self.name = name
        self.queue = queue
        self.limits = checked_limits(f"plan {name}", limits)
        self.elements = _elements(name, steps)
        """Its steps and waits, in order."""
        self.steps = tuple(each for each in self.elements if isinstance(each, Step))
        self._by_name = {candidate.name: candidate for candidate in self.elements}
        self._after = dict(
            zip(self.names, (*self.elements[1:], None), strict=True),
        )
        if len(self._by_name) < len(self.elements):
            twice = sorted(label for label, times in Counter(self.names).items() if times > 1)
            raise PlanError(
                f"plan {name} has two steps called {', '.join(twice)}; give one another name: "
                'step(name="…")(function), Plan.task(task, name="…"), wait("paid", name="…"), '
                'sleep(days=14, name="…")'
            )
        self.routes = checked_routes(name, routes)
        self._add_routes_of_waits()
        for label, targets in self.routes.items():
            for unknown in {label, *targets} - self._by_name.keys():
                raise PlanError(
                    f"plan {name}: routes name {unknown!r}, which is not one of its steps"
                )
        self.on_cancel = on_cancel
        self.default_input = default_input
        self._check_routes()
        self._check_on_cancel()
        self.undo_steps = self._undo_steps()
        """Those that undo others, by name."""
        self.renamed = self._resolve(renamed or {})
        self.moved = checked_moved(name, moved, self.names)
        try:
            encode(default_input, where=f"plan {name}: default_input", limit=INPUT_BYTES)
        except BadPayload as error:
            raise PlanError(str(error)) from error
        self.version = self._hash()

    @property
    def names(self) -> list[str]:
        """The names of its steps and waits, in order."""
        return [each.name for each in self.elements]

    def _add_routes_of_waits(self) -> None:
        for each in self.elements:
            if not isinstance(each, Wait):
                continue
            if each.name in self.routes:
                raise PlanError(
                    f"plan {self.name}: routes names the wait {each.name}, which goes nowhere else "
                    'but on a time-out or failure: wait(…, on_timeout=Goto("…")), '
                    'child(…, on_failure=Goto("…"))'
                )
            if each.route is not None:
                self.routes[each.name] = (each.route.step,)

    def _check_routes(self) -> None:
        for step in self.steps:
            if Goto in step.outcomes and not self.routes.get(step.name):
                raise PlanError(
                    f"plan {self.name}: step {step.name} is annotated to return a Goto and has no "
                    f'routes; declare them: routes={{"{step.name}": [...]}}'
                )
        reached, ahead = set[str](), [self.elements[0].name]
        while ahead:
            name = ahead.pop()
            if name not in reached:
                reached.add(name)
                ahead += self.following(name)
        for lost in self.elements:
            if lost.name not in reached:
                raise PlanError(
                    f"plan {self.name}: nothing leads to step {lost.name}: the step before it goes "
                    "elsewhere, and no route of a step that can be reached names it"
                )

    def _check_on_cancel(self) -> None:
        step = self.on_cancel
        if step is None:
            return
        if not isinstance(step, Step):
            raise PlanError(f"plan {self.name}: on_cancel: {step!r:.200} {not_a_step(step)}")
        if step.name in self._by_name:
            raise PlanError(
                f"plan {self.name}: on_cancel is {step.name}, which is also one of its steps; give "
                "it a name of its own"
            )
        step.check_arguments(f"plan {self.name}")
        check_unlimited(f"plan {self.name}: its on_cancel step {step.name}", step.limits)
        if step.terminate_on_cancel:
            raise PlanError(
                f"plan {self.name}: step {step.name} is called by a cancel and cannot also be "
                "ended by it; remove terminate_on_cancel"
            )

    def _undo_steps(self) -> dict[str, Step]:
        """Raises PlanError for two steps of one name."""
        found: dict[str, Step] = {}
        for undo in (each.undo for each in self.steps if each.undo is not None):
            of_another = found.setdefault(undo.name, undo) is not undo
            last = self.on_cancel is not None and undo.name == self.on_cancel.name
            if of_another or last or undo.name in self._by_name:
                raise PlanError(
                    f"plan {self.name}: {undo.name} undoes a step, and another step of the plan is "
                    'called so, or it is on_cancel: give it a name of its own, step(name="…")'
                )
        return found

    def _resolve(self, renamed: Mapping[str, str]) -> dict[str, str]:
        """Each former name with the name that the step has now, through all renames after it."""
        resolved = {}
        if not isinstance(renamed, Mapping):
            raise PlanError(
                f"plan {self.name}: renamed is {renamed!r:.200}; it maps names of steps: "
                'renamed={"before": "now"}'
            )
        for former, now in renamed.items():
            for name in (former, now):
                if not isinstance(name, str) or not STEP_NAME.fullmatch(name):
                    raise PlanError(
                        f"plan {self.name}: renamed names {name!r}, which is no step name: it maps "
                        'names of steps, as {"before": "now"}, and their #2 with them'
                    )
            if self._find(former) is not None:
                raise PlanError(
                    f"plan {self.name}: renamed has {former!r} as a former name, and it is one of "
                    "its steps: runs that stand there could mean either"
                )
            passed = {former}
            while now in renamed:
                if now in passed:
                    raise PlanError(f"plan {self.name}: renamed goes round in a circle at {now!r}")
                passed.add(now)
                now = renamed[now]
            if not self._may_have(now):
                raise PlanError(
                    f"plan {self.name}: renamed leads from {former!r} to {now!r}, which is not one "
                    "of its steps"
                )
            resolved[former] = now
        return resolved

    @staticmethod
    def task(
        task: CeleryTask,
        *,
        name: str | None = None,
        arguments: Callable[[Any], Mapping[str, Any] | Sequence[Any]] | None = None,
        **options: Any,
    ) -> Step:
        """A step that calls an existing Celery task in the worker that has the run.

        The run's input becomes the arguments: an object's members by name, a list's items by place,
        null none, anything else the only one. `arguments` replaces that: it takes the StepContext
        and returns a mapping or a list. The step is called like the last part of the task's name,
        or `name`; other options are those of `step`. The task's class is called with a request of
        its own, whose id is `ctx.key`; its retries, limits, hooks and result backend do not apply.

        Raises PlanError for anything but a task.
        """
        if not is_celery_task(task):
            kind = "a step already" if isinstance(task, Step) else "no task of Celery's"
            raise PlanError(
                f"Plan.task({task!r:.200}): that is {kind}; a function that takes the context is "
                "made a step by @step, and a function that does not by @celery.task"
            )
        if arguments is not None and not callable(arguments):
            raise PlanError(
                f"Plan.task({short_name(task)}): arguments is {arguments!r:.200}; give it a "
                'function, as in arguments=lambda ctx: [ctx.input["order"]]'
            )
        timeout = options.get("timeout")

        def call(ctx: Any) -> Any:
            given = ctx.input if arguments is None else arguments(ctx)
            args: Sequence[Any] = ()
            kwargs: Mapping[str, Any] = {}
            match given:
                case None:
                    pass
                case Mapping():
                    kwargs = given
                case list() | tuple():
                    args = given
                case _:
                    args = [given]
            retries = found.retry.max_attempts - 1
            return call_task(task, ctx, args, kwargs, timeout=timeout, max_retries=retries)

        found = step(name=name or short_name(task), **options)(call)
        return replace(found, outcomes=outcomes_of(task.run))

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, [{', '.join(self.names)}])"

    def form(self, occurrence: str, reference: str) -> Form | None:
        """The form of an approval that has begun, with the form of this name then.

        None if the process does not have it.
        """
        element = self.get(step_of(occurrence))
        if isinstance(element, Wait) and element.form is not None:
            return element.form
        return find_form(reference)

    @property
    def first(self) -> Element | None:
        """The step or wait that every run begins with; None if only the plan's function knows."""
        return self.elements[0]

    @property
    def first_step(self) -> str | None:
        """The step that a claim begins; None before others, or one with an undo or limits."""
        first = self.first
        return first.name if isinstance(first, Step) and not (first.undo or first.limits) else None

    @property
    def all_limits(self) -> tuple[Limit, ...]:
        """Its own, and those of the steps that are known."""
        return (*self.limits, *(limit for step in self.steps for limit in step.limits))

    def get(self, name: str) -> Element | None:
        """The step of this name, now or formerly; None if another version of the plan has it."""
        return self._find(self.current(name))

    def _find(self, name: str) -> Element | None:
        if self.on_cancel is not None and name == self.on_cancel.name:
            return self.on_cancel
        return self._by_name.get(name) or self.undo_steps.get(name)

    def _may_have(self, name: str) -> bool:
        return self._find(name) is not None

    def current(self, name: str) -> str:
        """The current name of a step, or of an occurrence, with this name."""
        step, number, visit = name.partition("#")
        return self.renamed.get(step, step) + number + visit

    def after(self, name: str) -> Element | None:
        """The step that follows by default, or None at the end."""
        return self._after.get(name)

    def falls_through(self, name: str) -> bool:
        """Whether the next element of the list may follow this one."""
        found = self._by_name[name]
        return isinstance(found, Wait) or found.falls_through

    def following(self, name: str) -> list[str]:
        """The names of all steps that may follow, the default first."""
        default = self.after(name) if self.falls_through(name) else None
        return [*([default.name] if default else []), *self.routes.get(name, ())]

    def may_go(self, source: str, target: str) -> bool:
        """Whether a step may return Goto(target)."""
        return self.current(target) in self.routes.get(source, ())

    def _hash(self) -> str:
        """A hash of names and routes, not code: a stored run depends on these."""
        graph = repr((self.name, list(self._by_name), sorted(self.routes.items())))
        if self.on_cancel is not None:
            graph += self.on_cancel.name
        if self.renamed:
            graph += repr(sorted(self.renamed.items()))
        if self.moved:
            graph += repr(sorted(self.moved))
        return hashlib.sha256(graph.encode()).hexdigest()[:12]
