"""One Celery task for each plan, named after it: its message is the order to execute a run.

Celery copies the tasks of a project's own app into each app of the process. One that is named as a
plan is not copied: a message for a run would call it, with the run's id as its argument.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn, Protocol, cast

from celery import Task
from celery.concurrency.base import BasePool

from beatless.orchestrator.events import storable
from beatless.orchestrator.plan import Plan
from beatless.outbox.queries import LAST_ATTEMPT
from beatless.worker.celery_app import FleetCelery
from beatless.worker.shutdown import is_exiting

logger = logging.getLogger("beatless.tasks")


class RunExecutor(Protocol):
    """Executes the run of a message."""

    def execute(self, plan: Plan, run_id: str, dispatch: int) -> bool:
        """See `Executor.execute`."""


class RunTask(Task):  # type: ignore[misc]  # Celery has no types
    """Executes runs that the relay has dispatched, and refuses other callers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Called by a worker, once for each message."""
        request = self.request
        if request.called_directly or request._protected:
            self.refuse()
        request._protected = 1  # as Celery marks a call that must not be taken for another
        return self.run(*args, **kwargs)

    @property
    def rate_limit(self) -> None:
        """None: a limited plan would hold back the other plans of its queue in a worker."""
        return None

    @rate_limit.setter
    def rate_limit(self, limit: Any) -> None:
        """Raises ValueError, as an answer to Flower's button; 0 asks for no change."""
        if limit not in (None, 0, "0"):
            raise ValueError(f"{self.name} is a plan of beatless: runs have no rate limit")

    @property
    def time_limit(self) -> None:
        """None: Celery would end a process in the middle of a step, and other runs with it."""
        return None

    @time_limit.setter
    def time_limit(self, limit: Any) -> None:
        """Raises ValueError, as an answer to Flower's button; None and 0 ask for no change."""
        if limit:
            raise ValueError(
                f"{self.name} is a plan of beatless: runs have no time limit of Celery's; give "
                "their steps a timeout, or the run a deadline"
            )

    soft_time_limit = time_limit

    def refuse(self, *_: Any, **__: Any) -> NoReturn:
        """Raises TypeError: a message without a stored run would execute nothing."""
        raise not_to_be_called(self.name)

    # `push_request`: a step that calls a `shared_task` of this name; workers push by the stack.
    delay = apply_async = apply = retry = push_request = refuse
    signature = subtask = s = si = map = starmap = chunks = refuse


class RunsCelery(FleetCelery):
    """A Celery app whose plans cannot be sent by name either."""

    async_pool: type[BasePool]
    """The pool by which one process executes many runs."""

    @cached_property
    def run_task(self) -> type[RunTask]:
        """The base of this app's plans, which finds settings for the tasks of them all.

        Without it each plan would read a dozen of them anew: most of the making of an app.
        """
        base: Any = type("RunTask", (RunTask,), {"__module__": __name__})
        base.bind(self)
        return cast("type[RunTask]", base)  # Celery has no types

    def type_checker(self, fun: Any, bound: bool = False) -> Any:
        """Celery's, made once for all plans: their tasks take the same, and nobody calls them."""
        if fun.__module__ == __name__:
            return staticmethod(anything)
        return super().type_checker(fun, bound)

    def _task_from_fun(self, fun: Any, name: str | None = None, **options: Any) -> Any:
        """Celery's, which warns of a second function for a name: a plan keeps its own."""
        name = name or self.gen_task_name(fun.__name__, fun.__module__)
        found = self._tasks.get(name)
        return found if isinstance(found, RunTask) else super()._task_from_fun(fun, name, **options)

    def send_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Raises TypeError for a plan: the messages of runs are made by a relay."""
        if isinstance(self.tasks.get(name), RunTask):
            raise not_to_be_called(name)
        return super().send_task(name, *args, **options)


def anything(*_: Any, **__: Any) -> None:
    """Takes whatever a message for a run may have as its arguments."""


def not_to_be_called(plan: str) -> TypeError:
    return TypeError(
        f"{plan} is a plan of beatless and not a task to call: start a run of it, as in "
        f'run = app.client.start_run("{plan}", input), and wait for its result with '
        "app.client.wait_for_run(run.run_id)"
    )


def register(celery: RunsCelery, plan: Plan, executor: Callable[[], RunExecutor]) -> None:
    """Let workers of this app execute runs of the plan."""

    def execute_run(run_id: Any = None, dispatch: Any = None, *_: Any, **__: Any) -> None:
        # Any client of the broker can send anything.
        if not isinstance(run_id, str) or not storable(run_id) or not isinstance(dispatch, int):
            logger.warning(
                "message dropped: it is not one of a relay's",
                extra={"action": "strange_message", "plan": plan.name},
            )
            return
        try:
            executor().execute(plan, run_id, min(max(dispatch, 0), LAST_ATTEMPT))
        except Exception:
            raise
        except BaseException as error:
            if is_exiting():
                raise
            # Celery's pools lose a place, or a process, by a BaseException.
            raise RuntimeError(f"run {run_id} was left by {type(error).__name__}") from error

    celery.task(
        execute_run,
        base=celery.run_task,
        name=plan.name,
        __bound__=False,  # unlike its base: each has a stack of requests of its own
        shared=False,
        lazy=False,  # before the tasks of other apps are copied
        ignore_result=True,
    )
