"""The plans of Django's tasks: each task that an app declares is a plan of one step.

Needs Django 6 only where TASKS names a backend that executes its tasks as runs.
"""

import inspect
from collections.abc import Mapping
from traceback import format_exception
from types import ModuleType
from typing import Any

import django
from django.conf import settings as django_settings

from beatless.orchestrator.errors import Fatal
from beatless.orchestrator.plan import Plan, step
from beatless.orchestrator.retry import Retry

TASKS_MODULE = "tasks"
"""The module of a Django app whose tasks are found."""

FIRST_WITH_TASKS = (6, 0)
"""The version of Django that has `django.tasks`."""


def run_backends() -> dict[str, Any]:
    """The backends of TASKS that execute tasks as runs, by alias.

    Raises InvalidTaskBackend, as Django does, for one that cannot be imported.
    """
    if django.VERSION < FIRST_WITH_TASKS or not getattr(django_settings, "TASKS", None):
        return {}
    from django.tasks import task_backends

    found = {alias: task_backends[alias] for alias in task_backends}
    return {alias: each for alias, each in found.items() if hasattr(each, "task_from_run")}


def plans_of_tasks(modules: list[ModuleType]) -> list[Plan]:
    """A plan for each function of which the modules have a task as an attribute.

    Raises PlanError for a task that cannot be a plan, as by the length of its name.
    """
    from django.tasks import Task

    backends = run_backends()
    found: dict[str, Plan] = {}
    for each in (value for module in modules for value in vars(module).values()):
        if isinstance(each, Task) and each.module_path not in found:
            backend = backends.get(each.backend)
            found[each.module_path] = plan_of(each, backend.options if backend else {})
    return list(found.values())


def plan_of(task: Any, options: Mapping[str, Any]) -> Plan:
    """The plan of a task, with OPTIONS of its backend. Raises PlanError."""
    policy: Retry = getattr(task, "retry", None) or options.get("RETRY") or Retry()
    timeout = getattr(task, "timeout", None) or options.get("TIMEOUT")
    kind = _async_body if inspect.iscoroutinefunction(task.func) else _body
    body = step(name=task.name, timeout=timeout, retry=policy)(kind(task, policy))
    return Plan(task.module_path, [body], queue=task.queue_name)


def _body(task: Any, policy: Retry) -> Any:
    """The function of the step of a task."""

    def body(ctx: Any) -> Any:
        attempt = _Attempt(task, policy, ctx)
        attempt.result = attempt.backend.get_result(ctx.run_id)
        attempt.started.send_robust(attempt.sender, task_result=attempt.result)
        try:
            value = attempt.returned(task.func(*attempt.args(), **attempt.kwargs))
        except (Exception, SystemExit) as error:
            if attempt.failed(error):
                attempt.finished.send_robust(attempt.sender, task_result=attempt.result)
            raise
        attempt.finished.send_robust(attempt.sender, task_result=attempt.result)
        return value

    return body


def _async_body(task: Any, policy: Retry) -> Any:
    """The same of one whose function is `async def`."""

    async def body(ctx: Any) -> Any:
        attempt = _Attempt(task, policy, ctx)
        attempt.result = await attempt.backend.aget_result(ctx.run_id)
        await attempt.started.asend_robust(attempt.sender, task_result=attempt.result)
        try:
            value = attempt.returned(await task.func(*attempt.args(), **attempt.kwargs))
        except (Exception, SystemExit) as error:
            if attempt.failed(error):
                await attempt.finished.asend_robust(attempt.sender, task_result=attempt.result)
            raise
        await attempt.finished.asend_robust(attempt.sender, task_result=attempt.result)
        return value

    return body


class _Attempt:
    """One attempt of a task: its arguments and result, for Django's signals around it.

    They are sent robustly: a receiver that raises is logged by Django, and repeats no work.
    """

    def __init__(self, task: Any, policy: Retry, ctx: Any) -> None:
        from django.tasks import signals, task_backends

        given = ctx.input or {}
        self._task = task
        self._last = ctx.attempt >= policy.max_attempts
        self._args: list[Any] = given.get("args", [])
        self.kwargs: dict[str, Any] = given.get("kwargs", {})
        self.backend = task_backends[given.get("backend", task.backend)]
        self.sender = type(self.backend)
        self.started, self.finished = signals.task_started, signals.task_finished
        self.result: Any = None

    def args(self) -> list[Any]:
        """The positional arguments of the function, the context first if it takes one."""
        from django.tasks import TaskContext

        context = [TaskContext(task_result=self.result)] if self._task.takes_context else []
        return [*context, *self._args]

    def returned(self, value: Any) -> Any:
        """The value as JSON. Raises TypeError for another one, which fails the attempt."""
        from django.tasks import TaskResultStatus
        from django.utils.json import normalize_json

        normal = normalize_json(value)
        self._end(TaskResultStatus.SUCCESSFUL, _return_value=normal)
        return normal

    def failed(self, error: BaseException) -> bool:
        """Whether no other attempt follows: the result is then that of a failed task."""
        from django.tasks import TaskResultStatus
        from django.tasks.base import TaskError

        if not self._last and not isinstance(error, Fatal):
            return False
        kind = type(error)
        path = f"{kind.__module__}.{kind.__qualname__}"
        trace = "".join(format_exception(error))
        self.result.errors.append(TaskError(exception_class_path=path, traceback=trace))
        self._end(TaskResultStatus.FAILED)
        return True

    def _end(self, status: Any, **members: Any) -> None:
        from django.utils import timezone

        for name, value in {"status": status, "finished_at": timezone.now(), **members}.items():
            # It is frozen for others: Django's own backend sets its members so.
            object.__setattr__(self.result, name, value)
