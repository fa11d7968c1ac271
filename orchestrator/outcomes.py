"""The outcomes that a step may return beside a result, and the error of a plan. Pure."""

import re
from dataclasses import dataclass
from typing import Any

from beatless.outbox.times import problem_with_seconds

STEP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class PlanError(ValueError):
    """A plan that cannot work. Raised when it is built, which is when it is imported."""


@dataclass(frozen=True, slots=True)
class Goto:
    """Return it from a step to continue at another one, declared in the plan's `routes`.

    >>> from beatless import Goto
    >>> def verify(ctx) -> Goto:
    ...     return Goto("Stop" if ctx.input["done"] else "Perceive", result={"seen": 3})
    """

    step: str
    result: Any = None


@dataclass(frozen=True, slots=True)
class Finish:
    """Return it from a step to complete the run now, with this result.

    >>> from beatless import Finish, step
    >>> @step
    ... def look_up(ctx):
    ...     if ctx.input["cached"]:
    ...         return Finish({"answer": 42})
    """

    result: Any = None


@dataclass(frozen=True, slots=True)
class Snooze:
    """Return it from a step to release the worker and be called again after some seconds.

    It is not a failed attempt. Raises ValueError for a negative number, and for one that is none.

    >>> from beatless import Snooze, step
    >>> @step
    ... def wait_for_payment(ctx):
    ...     if not ctx.input["paid"]:
    ...         return Snooze(30)
    """

    seconds: float

    def __post_init__(self) -> None:
        if problem := problem_with_seconds(self.seconds):
            raise ValueError(f"Snooze takes a number of seconds, 0 or more: it {problem}")
