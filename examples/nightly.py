"""A report of each customer, every night at two in Brussels; a customer that fails stops no other.

beatless --app nightly:app dev     # then, in a second terminal in the same directory:
beatless schedules show nightly; beatless schedules run-now nightly     # prints the RUN
beatless show RUN; beatless children RUN
"""

from datetime import datetime
from typing import Any

from beatless import (
    App,
    ChildFailed,
    Plan,
    RunContext,
    Schedule,
    Settings,
    StepContext,
    plan,
    retry,
    step,
)

CUSTOMERS = ["ada", "grace", "katherine"]


@step
def find_customers(_: StepContext) -> list[str]:
    return CUSTOMERS


@step(timeout=300, retry=retry(max_attempts=5, initial=60))
def report(ctx: StepContext) -> str:
    return f"{ctx.input['customer']} on {ctx.input['day']}"


report_of_one = Plan("report_of_one", [report])


@plan("reports")
def reports(run: RunContext) -> dict[str, Any]:
    """Works with the tick, not with the clock: late, or retried tomorrow, it does the same."""
    tick: datetime = run.tick or run.now()
    customers = run.step(find_customers)
    inputs = [{"customer": name, "day": f"{tick:%Y-%m-%d}"} for name in customers]
    done = run.map(report_of_one, inputs, at_once=10, failure="collect")
    failed = [each.message for each in done if isinstance(each, ChildFailed)]
    return {"reports": len(done) - len(failed), "failed": failed}


nightly = Schedule("nightly", reports, cron="0 2 * * *", tz="Europe/Brussels", overlap="skip")
app = App(Settings.from_env(), [reports, report_of_one], schedules=[nightly])
