"""Celery tasks as they are, one as a step of a run and one called by delay, in one worker.

beatless --app celery_tasks:app dev --env-file dev.env     # then, in a second terminal:
set -a; . ./dev.env; set +a; beatless start order --input '{"number": 7}' --follow
python -c 'from celery_tasks import count_visit; count_visit.delay("home")'
"""

from celery import Celery
from celery.utils.log import get_task_logger

from beatless import App, Plan, Settings, StepContext, retry, step

log = get_task_logger(__name__)

# The Celery app that you have. Its workers go on beside this one; nothing of theirs changes.
shop = Celery("shop")


@shop.task(bind=True)
def send_receipt(self, number: int) -> str:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """As a step its id is `ctx.key`: the same in every attempt."""
    return f"receipt {self.request.id} for order {number}"


@step
def charge(ctx: StepContext) -> int:
    return ctx.input["number"]


order = Plan(
    "order",
    [
        charge,
        Plan.task(
            send_receipt,
            retry=retry(max_attempts=5),
            arguments=lambda ctx: [ctx.results["charge"]],
        ),
    ],
)
app = App(Settings.from_env(), [order])


# Fire and forget, on the broker of beatless: executed by the same workers, and lost with one.
@app.celery.task
def count_visit(page: str) -> None:
    log.info("a visit of %s", page)
