"""What a run will do: named steps and the routes between them. No registry, no I/O."""

import hashlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, overload

from beatless.orchestrator.celery_task import CeleryTask, call_task
from beatless.orchestrator.errors import BadPayload, Fatal
from beatless.orchestrator.events import encode
from beatless.orchestrator.retry import Retry

__all__ = ["Fatal", "Finish", "Goto", "Plan", "PlanError", "Snooze", "Step", "step"]

PLAN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
STEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")

INPUT_BYTES = 262_144
"""The largest default input of a plan: that of a run with the default settings."""


class PlanError(ValueError):
    """A plan that cannot work. Raised when it is built, which is when it is imported."""


@dataclass(frozen=True, slots=True)
class Goto:
    """Return it from a step to go on at another one, declared in the plan's `routes`."""

    step: str
    result: Any = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Return it from a step to complete the run now."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class Snooze:
    """Return it from a step to give the worker back and be called again after some seconds."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 <= self.seconds < float("inf"):
            raise ValueError("Snooze takes a number of seconds, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """An ordinary function that is checkpointed: once it has returned it never runs again."""

    name: str
    function: Callable[..., Any]
    timeout: float | None = None
    retry: Retry = field(default_factory=Retry)
    transactional: bool = False
    terminate_on_cancel: bool = False
    outcomes: frozenset[type] = frozenset()
    """Goto, Finish or Snooze, if the function is annotated to return nothing else."""

    @property
    def falls_through(self) -> bool:
        """Whether the next step of the list may follow."""
        return not self.outcomes

    def __call__(self, context: Any) -> Any:
        """Call the function itself, as a unit test would."""
        return self.function(context)


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
) -> Step | Callable[[Callable[..., Any]], Step]:
    """Make a function a step of plans. It takes one argument, the StepContext.

    `timeout` is seconds per attempt; then the attempt has failed, whatever the function does. A
    `transactional` step gets `ctx.connection`, whose work is committed together with its
    StepFinished. `terminate_on_cancel` ends a step that does not look for a cancel by itself.
    Raises PlanError for a bad name, timeout or signature.
    """

    def decorate(function: Callable[..., Any]) -> Step:
        label = name or function.__name__
        if not STEP_NAME.fullmatch(label):
            raise PlanError(f"step name {label!r} must match {STEP_NAME.pattern}")
        if timeout is not None and not timeout > 0:
            raise PlanError(f"step {label}: timeout must be more than 0 seconds, not {timeout!r}")
        if inspect.iscoroutinefunction(function):
            raise PlanError(f"step {label} is async; steps are ordinary functions (Celery is sync)")
        try:
            inspect.signature(function).bind(None)
        except TypeError as error:
            raise PlanError(f"step {label} must take exactly one argument, the context") from error
        return Step(
            name=label,
            function=function,
            timeout=timeout,
            retry=retry or Retry(),
            transactional=transactional,
            terminate_on_cancel=terminate_on_cancel,
            outcomes=outcomes_of(function),
        )

    return decorate if function is None else decorate(function)


def outcomes_of(function: Callable[..., Any]) -> frozenset[type]:
    """Those of Goto, Finish and Snooze that a function is annotated to return, if only those."""
    try:
        annotated = typing.get_type_hints(function).get("return", Any)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return frozenset()  # it names what only a type checker has
    union = typing.get_origin(annotated) in (typing.Union, UnionType)
    kinds = typing.get_args(annotated) if union else (annotated,)
    return frozenset(kinds if all(kind in (Goto, Finish, Snooze) for kind in kinds) else ())


class Plan:
    """An ordered list of steps. The default route is the next step; the last one completes the run.

    `routes` declares where else a step may go (`Goto`): `{"Verify": ["Perceive", "Stop"]}`. A step
    whose function is annotated `-> Goto` (or `Finish`, or both) never goes on to the next one.
    `on_cancel` is a step that undoes what a cancelled run has done, before its RunFinished; it is
    not called for a run that had not begun. `default_input` is for runs that are started without.

    Raises PlanError, naming the plan and the step, for what cannot work: two steps of one name, a
    route to nowhere, a step that nothing leads to, a default input that is not JSON.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        *,
        routes: Mapping[str, Sequence[str]] | None = None,
        queue: str = "default",
        on_cancel: Step | None = None,
        default_input: Any = None,
    ) -> None:
        if not PLAN_NAME.fullmatch(name):
            raise PlanError(f"plan name {name!r} must match {PLAN_NAME.pattern}")
        for candidate in steps:
            if not isinstance(candidate, Step):
                raise PlanError(f"plan {name}: {candidate!r} is not a step; decorate it with @step")
        if not steps:
            raise PlanError(f"plan {name} has no steps")
        self.name = name
        self.queue = queue
        self.steps = tuple(steps)
        self._by_name = {candidate.name: candidate for candidate in self.steps}
        if len(self._by_name) < len(self.steps):
            names = [candidate.name for candidate in self.steps]
            twice = sorted({label for label in names if names.count(label) > 1})
            raise PlanError(f"plan {name} has two steps called {', '.join(twice)}")
        self.routes = {label: tuple(targets) for label, targets in (routes or {}).items()}
        for label, targets in self.routes.items():
            for unknown in {label, *targets} - set(self._by_name):
                raise PlanError(
                    f"plan {name}: routes name {unknown!r}, which is not one of its steps"
                )
        self.on_cancel = on_cancel
        self.default_input = default_input
        self._check_routes()
        self._check_on_cancel()
        try:
            encode(default_input, where=f"plan {name}: default_input", limit=INPUT_BYTES)
        except BadPayload as error:
            raise PlanError(str(error)) from error
        self.version = self._hash()

    def _check_routes(self) -> None:
        for step in self.steps:
            if Goto in step.outcomes and not self.routes.get(step.name):
                raise PlanError(
                    f"plan {self.name}: step {step.name} is annotated to return a Goto and has no "
                    f'routes; declare them: routes={{"{step.name}": [...]}}'
                )
        reached, ahead = set[str](), [self.first.name]
        while ahead:
            name = ahead.pop()
            if name not in reached:
                reached.add(name)
                ahead += self.following(name)
        for lost in self.steps:
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
            raise PlanError(
                f"plan {self.name}: on_cancel is {step!r}, which is not a step; decorate it with "
                "@step"
            )
        if step.name in self._by_name:
            raise PlanError(
                f"plan {self.name}: on_cancel is {step.name}, which is also one of its steps; give "
                "it a name of its own"
            )
        if step.terminate_on_cancel:
            raise PlanError(
                f"plan {self.name}: step {step.name} is called by a cancel and cannot also be "
                "ended by it; remove terminate_on_cancel"
            )

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
        null none, anything else the only one. `arguments` says otherwise: it takes the StepContext
        and returns a mapping or a list. The step is called like the last part of the task's name;
        other options are those of `step`. The task's class is called with a request of its own,
        whose id is `ctx.key`; its retries, limits, hooks and result backend do not apply.
        """
        label = name or task.name.rpartition(".")[2]
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
            return call_task(task, ctx, args, kwargs, timeout=timeout)

        found = step(name=label, **options)(call)
        return replace(found, outcomes=outcomes_of(task.run))

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, [{', '.join(candidate.name for candidate in self.steps)}])"

    @property
    def first(self) -> Step:
        return self.steps[0]

    def get(self, name: str) -> Step | None:
        """The step of this name, or None: a newer version of the plan may have others."""
        if self.on_cancel is not None and name == self.on_cancel.name:
            return self.on_cancel
        return self._by_name.get(name)

    def after(self, name: str) -> Step | None:
        """The step that follows by default, or None at the end."""
        if name not in self._by_name:
            return None
        place = self.steps.index(self._by_name[name]) + 1
        return self.steps[place] if place < len(self.steps) else None

    def following(self, name: str) -> list[str]:
        """The names of all steps that may follow, the default first."""
        default = self.after(name) if self._by_name[name].falls_through else None
        return [*([default.name] if default else []), *self.routes.get(name, ())]

    def may_go(self, source: str, target: str) -> bool:
        """Whether a step may return Goto(target)."""
        return target in self.routes.get(source, ())

    def _hash(self) -> str:
        """Names and routes, not code: what a stored run depends on."""
        graph = repr((self.name, list(self._by_name), sorted(self.routes.items())))
        if self.on_cancel is not None:
            graph += self.on_cancel.name
        return hashlib.sha256(graph.encode()).hexdigest()[:12]
