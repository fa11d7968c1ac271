"""One Celery task for each plan, named after it: its message is the order to execute a run."""

from collections.abc import Callable

from celery import Celery

from orchestrator.executor import Executor
from orchestrator.plan import Plan


def register(celery: Celery, plan: Plan, executor: Callable[[], Executor]) -> None:
    """Let workers of this app execute runs of the plan."""

    def execute_run(run_id: str, dispatch: int) -> None:
        executor().execute(plan, run_id, dispatch)

    celery.task(execute_run, name=plan.name, shared=False, ignore_result=True)
