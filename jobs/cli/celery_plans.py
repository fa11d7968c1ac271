"""The tasks of a Celery app, written as plans of beatless: text for a person to go on with.

The modules of the tasks are imported; no task is called. Canvas (chains, groups, chords) is made
where tasks are called, and is not read: docs/from-celery.md translates it.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from celery import Task

from beatless.errors import BadRequest
from beatless.orchestrator.celery_task import is_celery_task
from beatless.orchestrator.limit import LIMIT_NAME, MAX_STARTS
from beatless.orchestrator.plan import PLAN_NAME
from beatless.orchestrator.step_body import short_name

RATE = re.compile(r"([0-9]+)(?:/([smh]))?")
PERIODS = {"s": "s", "m": "min", "h": "h"}
UNFIT = re.compile(r"[^A-Za-z0-9_.-]+")
"""Characters that the name of a limit cannot have."""

HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")

SENDS = {
    "delay": "sends tasks, to Celery as ever: a step or child run would be sure",
    "apply_async": "sends tasks, to Celery as ever: a step or child run would be sure",
    "chain": "makes a chain: a list of steps",
    "group": "makes a group: run.map",
    "chord": "makes a chord: run.map, then a step",
    "chunks": "makes chunks: run.map",
    "replace": "calls self.replace, which fails the run: return a value for the next step",
    "add_to_chord": "calls self.add_to_chord, which fails the run",
    "AsyncResult": "looks at results of tasks: those of steps are in ctx.results",
}
"""Names in a task's code, by which it does what a step does otherwise."""


def lines_of(app: Any, named: str) -> Iterator[str]:
    """Python source: a plan of one step for each task of the app, which `named` has loaded.

    A comment above it names what has no equivalent.
    """
    tasks = _tasks(app)
    module, _, attribute = named.partition(":")
    imports: dict[tuple[str, str], str] = {}
    body: list[str] = []
    plans: list[str] = []
    names = {"Limit", "Plan", "retry", "PLANS"}
    for task in tasks:
        found = _attribute(task)
        source = found or (module, attribute or "app")
        if source not in imports:
            imports[source] = _unused(source[1], names)
        reference = imports[source] if found else f"{imports[source]}.tasks[{task.name!r}]"
        plans.append(_unused(re.sub(r"\W", "_", short_name(task)) + "_plan", names))
        route = route_of(app, task)
        body += ["", *(f"# {text}" for text in notes(task, route))]
        body += _plan(app, task, plans[-1], reference, route)
    text = "\n".join(body)
    used = [name for name in ("Limit", "Plan", "retry") if name == "Plan" or f"{name}(" in text]
    yield f"from beatless import {', '.join(used)}"
    for (owner, name), alias in sorted(imports.items()):
        yield f"from {owner} import {name}{f' as {alias}' if alias != name else ''}"
    yield ""
    yield "# A step is called again if its worker dies: each task must bear that, for example by"
    yield "# `self.request.id`, which stays the same. What a body does cannot be seen here."
    if lost := [task.name for task in tasks if not task.acks_late]:
        yield f"# With acks_late off Celery did not call these again: {', '.join(lost)}"
    yield from body
    yield ""
    yield f"PLANS = [{', '.join(plans)}]"


def _tasks(app: Any) -> list[Any]:
    """The tasks of the app by name, without those of Celery. Raises BadRequest."""
    try:
        app.loader.import_default_modules()
    except ImportError as error:
        raise BadRequest("celery app", f"its tasks cannot be loaded: {error}") from error
    except Exception as error:  # of a module of the project
        reason = f"{type(error).__name__}: {error}"
        raise BadRequest("celery app", f"its tasks cannot be loaded: {reason}") from error
    app.finalize()
    return [app.tasks[name] for name in sorted(app.tasks) if not name.startswith("celery.")]


def _unused(name: str, used: set[str]) -> str:
    """The name, or one like it that is not used yet."""
    name = name if name.isidentifier() else f"_{name}"
    found, n = name, 1
    while found in used:
        n += 1
        found = f"{name}_{n}"
    used.add(found)
    return found


def _attribute(task: Any) -> tuple[str, str] | None:
    """The module and the name in it by which the task is found; None if it has none."""
    module = sys.modules.get(task.__module__)
    names = [
        name
        for name, value in vars(module).items()
        if name.isidentifier() and is_celery_task(value) and value.name == task.name
    ]
    return (task.__module__, min(names, key=len)) if names else None


def _plan(
    app: Any, task: Any, variable: str, reference: str, route: Mapping[str, Any]
) -> Iterator[str]:
    """The lines of the plan of a task."""
    name = task.name if PLAN_NAME.fullmatch(task.name) else UNFIT.sub("-", task.name)[:100]
    options = [f", {member}={value}" for member, value in step_options(task).items()]
    short = short_name(task)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", short):
        options.insert(0, f", name={UNFIT.sub('-', short)[:100]!r}")
    yield f"{variable} = Plan("
    yield f"    {name!r},"
    yield f"    [Plan.task({reference}{''.join(options)})],"
    queue = route.get("queue")
    queue = getattr(queue, "name", queue)
    if queue not in (None, app.conf.task_default_queue):
        yield f"    queue={queue!r},"
    if (rate := rate_of_task(task)) is not None:
        limit = UNFIT.sub("-", task.name)[:64]
        limit = limit if LIMIT_NAME.fullmatch(limit) else f"_{limit[:63]}"
        yield f"    limits=[Limit({limit!r}, rate={rate!r})],"
    yield ")"


def step_options(task: Any) -> dict[str, str]:
    """The options of the step as source."""
    found = {}
    seconds = task.time_limit or task.app.conf.task_time_limit
    seconds = seconds or task.soft_time_limit or task.app.conf.task_soft_time_limit
    if seconds:
        found["timeout"] = f"{seconds:g}"
    if (policy := retry_of(task)) is not None:
        found["retry"] = f"retry({', '.join(f'{name}={value}' for name, value in policy.items())})"
    return found


def retry_of(task: Any) -> dict[str, str] | None:
    """The arguments of the retry policy as source; None for a task that is never tried again."""
    given: Mapping[str, Any] = getattr(task, "retry_kwargs", None) or {}
    caught: Any = getattr(task, "autoretry_for", ())
    if not caught and "retry" not in names_in(task):
        return None
    retries = given.get("max_retries", task.max_retries)
    found = {"max_attempts": 'float("inf")' if retries is None else str(max(0, retries) + 1)}
    backoff = float(getattr(task, "retry_backoff", False))
    if backoff and caught:
        found["initial"] = f"{max(1.0, backoff):g}"
        found["cap"] = f"{getattr(task, 'retry_backoff_max', 600):g}"
        found["jitter"] = "1" if getattr(task, "retry_jitter", True) else "0"
    else:
        delay = given.get("countdown", task.default_retry_delay)
        delay = delay if isinstance(delay, int | float) else task.default_retry_delay
        found |= {"initial": f"{delay:g}", "backoff": "1", "cap": f"{delay:g}", "jitter": "0"}
    return found


def route_of(app: Any, task: Any) -> Mapping[str, Any]:
    """The options with which its messages are sent: queue, priority. Raises BadRequest."""
    names = ("queue", "exchange", "routing_key", "priority")
    own = {name: given for name in names if (given := getattr(task, name, None)) is not None}
    try:
        found: Mapping[str, Any] = app.amqp.router.route(own, task.name)
    except Exception as error:  # of a router of the project, or of a queue that is not declared
        raise BadRequest("celery app", f"task {task.name} has no route: {error}") from error
    return found


def rate_of_task(task: Any) -> str | None:
    """Its rate limit as that of a Limit; None if it has none, or one that is none of ours."""
    limit = task.rate_limit
    if isinstance(limit, int | float) and limit == int(limit):
        limit = str(int(limit))
    match = RATE.fullmatch(limit) if isinstance(limit, str) else None
    if match is None or not 1 <= int(match[1]) <= MAX_STARTS:
        return None
    return f"{int(match[1])}/{PERIODS[match[2] or 's']}"


def notes(task: Any, route: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the task that a step does otherwise, or not at all."""
    names = names_in(task)
    if caught := getattr(task, "autoretry_for", ()):
        if not any(each in (Exception, BaseException) for each in caught):
            only = ", ".join(each.__name__ for each in caught)
            yield f"Celery tries again on {only} only: raise Fatal for what must not be tried again"
        if never := getattr(task, "dont_autoretry_for", ()):
            yield f"raise Fatal in place of {', '.join(each.__name__ for each in never)}"
    if "retry" in names:
        yield "self.retry fails the attempt: its countdown does not count, the step's retry decides"
    if task.soft_time_limit or task.app.conf.task_soft_time_limit:
        yield "no SoftTimeLimitExceeded is raised in it: the timeout ends the attempt"
    if task.rate_limit and rate_of_task(task) is None:
        yield f"its rate limit {task.rate_limit!r} is none of beatless's: give Limit(…) another one"
    elif task.rate_limit:
        yield "a rate limit of Celery holds in each worker, that of a Limit in the whole fleet"
    if task.expires:
        yield "expires: give start_run deadline="
    if priority := route.get("priority"):
        yield f"priority {priority}: give start_run priority="
    hooks = [name for name in HOOKS if getattr(type(task), name) is not getattr(Task, name)]
    if hooks:
        yield f"not called: {', '.join(hooks)}"
    for name, effect in SENDS.items():
        if name in names:
            yield f"{name}: {effect}"


def names_in(task: Any) -> frozenset[str]:
    """The names in the code of its body, and in the functions within."""
    function = getattr(task, "_orig_run", task.run)
    ahead = [getattr(getattr(function, "__func__", function), "__code__", None)]
    found: set[str] = set()
    while ahead:
        code = ahead.pop()
        if code is not None:
            found |= {*code.co_names}
            ahead += [each for each in code.co_consts if hasattr(each, "co_names")]
    return frozenset(found)
