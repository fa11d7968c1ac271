"""What a run will do: named steps and the routes between them. No registry, no I/O."""

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from orchestrator.errors import Fatal
from orchestrator.retry import Retry

__all__ = ["Fatal", "Finish", "Goto", "Plan", "PlanError", "Snooze", "Step", "step"]

PLAN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
STEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


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

    `timeout` is seconds per attempt. A `transactional` step gets `ctx.connection`, whose work is
    committed together with its StepFinished. Raises PlanError for a bad name, timeout or signature.
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
        )

    return decorate if function is None else decorate(function)


class Plan:
    """An ordered list of steps. The default route is the next step; the last one completes the run.

    `routes` declares where else a step may go (`Goto`): `{"Verify": ["Perceive", "Stop"]}`. Raises
    PlanError, naming the plan and the step, for what cannot work.
    """

    def __init__(
        self,
        name: str,
        steps: Sequence[Step],
        *,
        routes: Mapping[str, Sequence[str]] | None = None,
        queue: str = "default",
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
        self.version = self._hash()

    def __repr__(self) -> str:
        return f"Plan({self.name!r}, [{', '.join(candidate.name for candidate in self.steps)}])"

    @property
    def first(self) -> Step:
        return self.steps[0]

    def get(self, name: str) -> Step | None:
        """The step of this name, or None: a newer version of the plan may have others."""
        return self._by_name.get(name)

    def after(self, name: str) -> Step | None:
        """The step that follows by default, or None at the end."""
        place = self.steps.index(self._by_name[name]) + 1
        return self.steps[place] if place < len(self.steps) else None

    def may_go(self, source: str, target: str) -> bool:
        """Whether a step may return Goto(target)."""
        return target in self.routes.get(source, ())

    def _hash(self) -> str:
        """Names and routes, not code: what a stored run depends on."""
        graph = repr((self.name, list(self._by_name), sorted(self.routes.items())))
        return hashlib.sha256(graph.encode()).hexdigest()[:12]
