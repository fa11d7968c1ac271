"""The backend of Django's tasks (`django.tasks`, of Django 6): each enqueued task is a run.

    TASKS = {"default": {"BACKEND": "beatless.django.tasks.BeatlessBackend"}}

`enqueue` is an INSERT in the caller's `transaction.atomic()`; workers of beatless execute the run.
A task is a plan of one step, called by the path of its function.
"""

import asyncio
import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import django
from django.apps import apps
from django.conf import settings as django_settings
from django.core import checks
from django.utils import timezone
from django.utils.module_loading import import_string

from beatless.client import Client
from beatless.client.requests import queue_name
from beatless.django.django_client import client
from beatless.django.project import app_of_project
from beatless.django.task_plans import FIRST_WITH_TASKS, TASKS_MODULE
from beatless.errors import BadRequest, UnknownPlan
from beatless.orchestrator import errors as our_errors
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.records import Run
from beatless.orchestrator.retry import Retry
from beatless.orchestrator.state import RunState
from beatless.outbox.times import problem_with_seconds

if django.VERSION < FIRST_WITH_TASKS:
    raise ImportError(
        f"beatless.django.tasks needs django.tasks, which Django has from 6.0 on, and this is "
        f"{django.__version__}: install Django 6 (on Python 3.12 or newer), or start runs by "
        "beatless.django.start_run"
    )

from django.tasks import Task, TaskResult, TaskResultStatus
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskError
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.utils.json import normalize_json

OPTIONS = ("RETRY", "TIMEOUT")
"""Members of OPTIONS: for tasks that say nothing themselves."""

PRIORITIES_EACH = 20
"""Of Django's priorities, -100 to 100, so many are one of ours, 0 to 9."""

UNKNOWN_WORKER = "unknown"
"""In `worker_ids`: a run keeps the name of its last worker alone."""

STATUSES = {
    RunState.RUNNING: TaskResultStatus.RUNNING,
    RunState.COMPLETED: TaskResultStatus.SUCCESSFUL,
    RunState.FAILED: TaskResultStatus.FAILED,
    RunState.CANCELLED: TaskResultStatus.FAILED,
}
"""A run in another state is READY: to be executed, or executed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatlessTask(Task):  # type: ignore[misc]  # Django has no types
    """A task of `BeatlessBackend`: in Django 6.1 `@task(retry=…, timeout=…)` sets these two."""

    retry: Retry | None = None
    """None: RETRY in OPTIONS of its backend, or else one attempt."""
    timeout: float | None = None
    """Seconds of an attempt. None: TIMEOUT in OPTIONS of its backend, or else no limit."""


class BeatlessBackend(BaseTaskBackend):  # type: ignore[misc]  # Django has no types
    """Enqueues tasks as runs, and reads runs as results.

    The plans are the tasks in the module `tasks` of each app in INSTALLED_APPS. OPTIONS are RETRY,
    as `retry(max_attempts=3)`, and TIMEOUT, in seconds.
    """

    task_class = BeatlessTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def validate_task(self, task: Any) -> None:
        """As Django's. Raises InvalidTask for a queue that none of ours can be called, too."""
        super().validate_task(task)
        try:
            queue_name(task.queue_name)
        except BadRequest as error:
            raise InvalidTask(f"queue_name of {task.module_path}: {error}") from error

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Store a run in the caller's `transaction.atomic()`; outside of one at once.

        Raises InvalidTask for a task that workers would not find, TypeError for arguments that are
        no JSON, BadPayload for too long ones, and SynchronousOnlyOperation in a coroutine within a
        block.
        """
        self.validate_task(task)
        given = {
            "args": normalize_json(args),
            "kwargs": normalize_json(kwargs),
            "backend": self.alias,
            "priority": task.priority,
        }
        if task.run_after is not None:
            given["run_after"] = task.run_after.isoformat()
        try:
            run = client().start_run(
                task.module_path,
                given,
                queue=task.queue_name,
                priority=min(9, (int(task.priority) + 100) // PRIORITIES_EACH),
                not_before=_aware(task.run_after),
            )
        except UnknownPlan as error:
            raise InvalidTask(
                f"{task.module_path} is in no module that workers import: declare it in the module "
                f"{TASKS_MODULE} of an app in INSTALLED_APPS, or import it there, under any name"
            ) from error
        result = self._result(task, run, [])
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: Any) -> Any:
        """The result of a run, in the caller's `transaction.atomic()` if there is one.

        In a coroutine, where no block can be, it is read on a connection of ours: the event loop
        waits for it, as it does not for `aget_result`.

        Raises TaskResultDoesNotExist: there is no such run, it is of another backend, or of a plan
        that is no task (any more).
        """
        reader = _reader()
        try:
            run = reader.get_run(str(result_id))
            events = reader.events(run.run_id) if run.started_at else []
        except (RunNotFound, BadRequest) as error:
            raise TaskResultDoesNotExist(result_id) from error
        except EventsPruned:
            events = []  # it ended long ago
        return self._result(self.task_from_run(run), run, events)

    def task_from_run(self, run: Run) -> Any:
        """The task as it was enqueued. Raises TaskResultDoesNotExist."""
        given = run.input if isinstance(run.input, dict) else {}
        try:
            found = import_string(run.plan)
        except ImportError as error:
            raise TaskResultDoesNotExist(run.run_id) from error
        ours = isinstance(found, Task) and found.module_path == run.plan
        if not ours or given.get("backend", self.alias) != self.alias:
            raise TaskResultDoesNotExist(run.run_id)
        after = given.get("run_after")
        stored = {
            **{each.name: getattr(found, each.name) for each in fields(found)},
            "backend": self.alias,
            "queue_name": run.queue,
            "priority": given.get("priority", found.priority),
            "run_after": None if after is None else datetime.fromisoformat(after),
        }
        # Not by `using`, which validates: it is read, whatever QUEUES are now.
        task = object.__new__(type(found))
        for name, value in stored.items():
            object.__setattr__(task, name, value)
        return task

    def check(self, **_: Any) -> list[checks.CheckMessage]:
        """E002: an entry of TASKS that cannot work."""
        problems = [
            f"OPTIONS has {name!r}; there are: {', '.join(OPTIONS)}"
            for name in self.options
            if name not in OPTIONS
        ]
        policy, timeout = self.options.get("RETRY"), self.options.get("TIMEOUT")
        if policy is not None and not isinstance(policy, Retry):
            problems.append(f"RETRY is {policy!r}; give it a policy: retry(max_attempts=3)")
        if timeout is not None and (problem := problem_with_seconds(timeout) or not timeout):
            problems.append(f"TIMEOUT {problem if isinstance(problem, str) else 'is 0'}")
        if not apps.is_installed("beatless.django"):
            problems.append("it needs beatless.django in INSTALLED_APPS")
        for name in sorted(self.queues):
            try:
                queue_name(name)
            except BadRequest as error:
                problems.append(f"QUEUES: {error}")
        return [
            checks.Error(
                f"TASKS[{self.alias!r}]: {problem}",
                hint="see docs/django.md",
                id="beatless.E002",
            )
            for problem in problems
        ]

    def _result(self, task: Any, run: Run, events: Sequence[Event]) -> Any:
        """The run and its events as Django's result."""
        given = run.input if isinstance(run.input, dict) else {}
        starts = [each for each in events if each.type == EventType.STEP_STARTED]
        attempts = max([each.attempt or 1 for each in starts], default=1 if run.worker else 0)
        last = datetime.fromtimestamp(starts[-1].ts / 1000, UTC) if starts else run.started_at
        found = TaskResult(
            task=task,
            id=run.run_id,
            status=STATUSES.get(run.state, TaskResultStatus.READY),
            enqueued_at=_shown(run.created_at),
            started_at=_shown(run.started_at),
            last_attempted_at=_shown(run.started_at if attempts == 1 else last),
            finished_at=_shown(run.finished_at),
            args=given.get("args", []),
            kwargs=given.get("kwargs", {}),
            backend=self.alias,
            errors=[task_error(each) for each in _errors(run, events)],
            worker_ids=[UNKNOWN_WORKER] * (attempts - 1) + [run.worker] * min(attempts, 1),
        )
        if run.state is RunState.COMPLETED:
            object.__setattr__(found, "_return_value", run.result)
        return found


def _reader() -> Client:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return client()
    return app_of_project().client


def _errors(run: Run, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Those of its attempts; and its own, if that is no attempt's, as that of a cancel."""
    failed = [each.data for each in events if each.type == EventType.STEP_FAILED and each.data]
    found: list[dict[str, Any]] = [each["error"] for each in failed]
    if run.error is not None:
        same = {key: run.error.get(key) for key in ("type", "message")}
        if not found or any(found[-1].get(key) != value for key, value in same.items()):
            found.append(run.error)
    return found


def task_error(error: dict[str, Any]) -> Any:
    """A stored error as Django's."""
    kind, message = error["type"], error["message"]
    trace = error.get("traceback") or f"{kind}: {message}\n"
    return TaskError(exception_class_path=class_path(kind, message, trace), traceback=trace)


def class_path(kind: str, message: str, trace: str) -> str:
    """The path of an error's class: stored are its name, and a traceback that ends with it."""
    said = re.escape(f"{kind}: {message}") if message else rf"{re.escape(kind)}$"
    found = re.findall(rf"(?<![\w.])([\w.]*){said}", trace, re.MULTILINE)
    if found and found[-1]:
        return f"{found[-1]}{kind}"
    for module in (builtins, our_errors):
        if hasattr(module, kind):
            return f"{module.__name__}.{kind}"
    return str(kind)


def _aware(moment: datetime | None) -> datetime | None:
    """Without USE_TZ a time is one of TIME_ZONE."""
    return timezone.make_aware(moment) if moment and timezone.is_naive(moment) else moment


def _shown(moment: datetime | None) -> datetime | None:
    """As Django shows times: in UTC, or without USE_TZ in TIME_ZONE, naive."""
    if moment is None or django_settings.USE_TZ:
        return moment and moment.astimezone(UTC)
    naive: datetime = timezone.make_naive(moment)
    return naive
