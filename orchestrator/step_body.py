"""The function of a step: which objects can be one, and their names and outcomes. No I/O."""

import functools
import inspect
import typing
from collections.abc import Callable
from types import UnionType
from typing import Any

from beatless.orchestrator.celery_task import CeleryTask, is_celery_task
from beatless.orchestrator.outcomes import Finish, Goto, PlanError, Snooze

POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
"""The kinds of parameters that may take the context."""


def step_name(function: Callable[..., Any]) -> Any:
    """The name that a function gives its step. Raises PlanError if it has none."""
    try:
        return function.__name__
    except AttributeError:
        raise PlanError(
            f"{function!r} has no name of its own to call the step by; "
            'give one: step(name="…")(function)'
        ) from None


def check_body(label: str, function: Callable[..., Any]) -> None:
    """Raises PlanError for an object that cannot be called with the context."""
    if (task := _task_of(function)) is not None:
        raise PlanError(
            f"step {label} is a task of Celery's, whose first argument would be the context; make "
            f"it a step that gets the run's input: Plan.task({short_name(task)})"
        )
    if inspect.isclass(function):
        raise PlanError(
            f"step {label} is a class, and an instance is no result; "
            "give it a function that returns JSON"
        )
    if not callable(function):
        raise PlanError(
            f"step {label} is a {type(function).__name__}, which cannot be called; give it a "
            "function (in a class: put @step below nothing but @staticmethod, or outside)"
        )
    body = body_of(function)
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise PlanError(
            f"step {label} is a generator, whose body would not run; return its result "
            "instead of yielding, or make each part a step"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise PlanError(
            f"step {label} is a builtin without a signature; "
            "call it in a function that takes the context"
        ) from error
    if not any(each.kind in POSITIONAL for each in parameters):
        raise PlanError(f"step {label} must take the context as its first argument")


def _task_of(function: Any) -> Any:
    """The Celery task that it is, or that it is a partial of; else None."""
    while isinstance(function, functools.partial):
        function = function.func
    return function if is_celery_task(function) else None


def short_name(task: CeleryTask) -> str:
    """The last part of a task's name, as its module calls it."""
    return task.name.rpartition(".")[2]


def body_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the code: of a partial its target, of an object its `__call__`."""
    while isinstance(function, functools.partial | staticmethod):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if inspect.isroutine(function):
        return function
    # Looked up on the class, as a call does.
    return type(function).__call__


def unfinished(function: Callable[..., Any]) -> str:
    """What a call of a function gives in place of its value: `a generator`, or ""."""
    body = body_of(function)
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        return "a generator"
    return "a coroutine" if inspect.iscoroutinefunction(body) else ""


def outcomes_of(function: Callable[..., Any]) -> frozenset[type]:
    """Those of Goto, Finish and Snooze that a function is annotated to return, if only those."""
    try:
        annotated = typing.get_type_hints(body_of(function)).get("return", Any)
    except Exception:  # evaluates the user's annotations, which may need names of a type checker
        return frozenset()
    union = typing.get_origin(annotated) in (typing.Union, UnionType)
    kinds = typing.get_args(annotated) if union else (annotated,)
    return frozenset(kinds if all(kind in (Goto, Finish, Snooze) for kind in kinds) else ())
