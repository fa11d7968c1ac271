"""What limits let through, beside what they could: `python -m benchmarks.limits`, 3 minutes.

2,000 runs of 50 ms in 4 workers of 4 processes, with a limit of 10, with one of 10,000, and with
none, in turn. They wait in a paused queue until all are started. Measured from the first claim to
the last end, by the clock of Postgres: beside the 200 runs a second that a limit of 10 could let
through, and those with a limit that does not bind beside those without.
"""

import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from beatless import App, Limit, Plan, RunRequest, StepContext, step
from beatless.testing import Kit
from benchmarks.measure import Bench, interleaved, ratios, record, services

APP = "benchmarks.limits_app:app"
RUNS = 2_000
BODY_S = 0.05
AT_ONCE = 10
WORKERS = 4
CHILDREN = 4
CHECK_S = 0.05
"""Seconds between two looks whether all have ended."""
LIMIT_S = 300.0


@step
def wait(_: StepContext) -> None:
    """Holds its slot, and no processor."""
    threading.Event().wait(BODY_S)


PLANS = [
    Plan("bound", [wait], limits=[Limit("bound", at_once=AT_ONCE)]),
    Plan("above", [wait], limits=[Limit("above", at_once=10_000)]),
    Plan("free", [wait]),
]


def throughput(bench: Bench, kit: Kit, plan: str, runs: int) -> float:
    """Runs in a second."""
    kit.client.pause_queue("default")
    ids = [run.run_id for run in kit.client.start_runs([RunRequest(plan=plan)] * runs)]
    kit.client.resume_queue("default")
    left, pause = runs, threading.Event()
    for _ in range(round(LIMIT_S / CHECK_S)):
        ((left,),) = bench.db.execute("SELECT count(*) FROM dispatches").fetchall()
        if not left:
            break
        pause.wait(CHECK_S)
    if left:
        raise TimeoutError(f"{left} runs have not ended within {LIMIT_S:g} s")
    ((seconds,),) = bench.db.execute(
        "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM runs "
        "WHERE run_id = ANY(%s)",
        (ids,),
    ).fetchall()
    print(f"{plan:6} {runs / seconds:7.1f} runs/s", flush=True)
    return float(runs / seconds)


def main() -> None:
    with services() as bench, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kit = Kit(App(bench.settings, PLANS), directory=Path(folder))
        stack.callback(kit.close)
        kit.relay_process(APP)
        for _ in range(WORKERS):
            kit.worker_process(APP, concurrency=CHILDREN)

        def measured(plan: str, runs: int = RUNS) -> Callable[[], float]:
            return lambda: throughput(bench, kit, plan, runs)

        for plan in PLANS:  # what is imported, prepared and cached at first is not measured
            measured(plan.name, 200)()
        found = interleaved({plan.name: measured(plan.name) for plan in PLANS})
        kit.verify()
    most = AT_ONCE / BODY_S
    record(
        "limits.bound",
        [value / most for value in found["bound"]],
        unit="share",
        what=f"runs of 50 ms with a limit of {AT_ONCE}, of {most:.0f} a second",
    )
    record(
        "limits.above",
        ratios(found["above"], found["free"]),
        unit="share",
        what="runs of 50 ms with a limit that does not bind, of those without one",
    )


if __name__ == "__main__":
    main()
