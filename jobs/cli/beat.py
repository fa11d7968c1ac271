"""Celery's `beat_schedule`, written as schedules of beatless."""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from celery.schedules import crontab
from celery.schedules import schedule as interval

from beatless.cli.environment import project_module
from beatless.errors import BadRequest
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.schedule import Schedule

UNFIT = re.compile(r"[^A-Za-z0-9._:-]+")
"""Characters that the name of a schedule cannot have."""


def celery_app_of(name: str) -> Any:
    """The Celery app at `module:attribute`. Raises BadRequest and AppFailed."""
    module_name, _, attribute = name.partition(":")
    if not module_name:
        raise BadRequest("celery app", f"is {name!r}; give MODULE:ATTRIBUTE of one")
    try:
        found = getattr(project_module(module_name), attribute or "app")
    except (ModuleNotFoundError, AttributeError) as error:
        raise BadRequest("celery app", f"{name} cannot be loaded: {error}") from error
    if not hasattr(getattr(found, "conf", None), "beat_schedule"):
        raise BadRequest("celery app", f"{name} is no Celery app; give MODULE:ATTRIBUTE of one")
    return found


def lines_of(app: Any) -> Iterator[str]:
    """Python source: a list of `Schedule(…)`, with a comment for each entry that cannot be one."""
    yield "from beatless import Schedule"
    yield ""
    yield "SCHEDULES = ["
    for name, entry in sorted(app.conf.beat_schedule.items()):
        try:
            arguments = arguments_of(app, entry)
            plan, label = str(entry["task"]), UNFIT.sub("-", str(name)).strip("-._:")
            Schedule(label, plan, **arguments)
            shown = "".join(f", {member}={value!r}" for member, value in arguments.items())
            yield f"    Schedule({label!r}, {plan!r}{shown}),"
        except PlanError as error:
            yield f"    # {name}: {' '.join(str(error).split())}"
    yield "]"


def arguments_of(app: Any, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a Schedule. Raises PlanError for an entry that has no equivalent."""
    found: dict[str, Any] = {}
    tz = str(app.conf.timezone or "UTC")
    when = entry["schedule"]
    if isinstance(when, crontab):
        minute, hour, weekday, day, month = when.__reduce__()[1]
        found["cron"] = " ".join(_field(each) for each in (minute, hour, day, month, weekday))
        found |= {"tz": tz} if tz != "UTC" else {}
    elif isinstance(when, interval | timedelta | int | float):
        run_every = when.run_every if isinstance(when, interval) else when
        seconds = run_every.total_seconds() if isinstance(run_every, timedelta) else run_every
        found["every"] = int(seconds) if seconds == int(seconds) else seconds
    else:
        raise PlanError(f"{type(when).__name__} is neither a crontab nor an interval")
    args, kwargs = list(entry.get("args") or ()), dict(entry.get("kwargs") or {})
    if args or kwargs:
        # As `Plan.task` calls the task with it.
        both = args and kwargs
        found["input"] = _by_name(app, str(entry["task"]), args, kwargs) if both else args or kwargs
    options = entry.get("options") or {}
    if queue := options.get("queue"):
        found["queue"] = str(queue)
    if isinstance(expires := options.get("expires"), int | float | timedelta):
        found["deadline"] = expires.total_seconds() if isinstance(expires, timedelta) else expires
    return found


def _by_name(app: Any, task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a task by name. Raises PlanError for those that have none."""
    advice = "give Plan.task an `arguments` that makes them of one input"
    try:
        app.loader.import_default_modules()
        signature = inspect.signature(app.tasks[task].run)  # that of a bound task lacks `self`
        bound = signature.bind(*args, **kwargs).arguments
    except Exception as error:  # a module of the project raises it, or the call does not fit
        reason = f"{type(error).__name__}: {error}"
        raise PlanError(
            f"its args and kwargs cannot be bound to {task} ({reason}): {advice}"
        ) from error
    found: dict[str, Any] = {}
    for name, value in bound.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise PlanError(f"{task} takes {parameter} by position alone, not by name: {advice}")
        found |= value if parameter.kind is parameter.VAR_KEYWORD else {name: value}
    return found


def _field(given: Any) -> str:
    """A field of a cron expression, which Celery also takes as a number or a set."""
    if isinstance(given, Iterable) and not isinstance(given, str):
        return ",".join(str(each) for each in sorted(given))
    return str(given).replace(" ", "")
