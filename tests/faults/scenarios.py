"""`python -m tests.faults.scenarios`: the five chaos scenarios of a public cross-system harness.

Rebuilt from its description (github.com/hardbyte/postgresql-job-queue-benchmarking, commit 93677ca,
docs/method.md and bench_harness/hooks.py): a steady load of jobs that do nothing, a baseline, one
kind of stress, and the rate of completed jobs afterwards, as a share of the baseline. Ours counts
from ten seconds after the stress on, theirs over the minute after it; phases are shorter here. All
of beatless' settings are the default ones. Stores benchmarks/results/scenarios.json; exit status 1
if less than 99 % of the baseline came back within ten seconds, or a run was lost.
"""

import argparse
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, time
from typing import Any

import psycopg

from tests.faults.results import SCENARIOS as SCENARIOS_FILE
from tests.faults.results import read, write
from tests.faults.steady import SHOWN_ROWS, SmallFleet, SteadyLoad

WARM_UP_S = 5.0
BASELINE_S = 15.0
STRESS_S = 16.0
WITHIN_S = 10.0
"""The rate must be back so long after the stress."""
WINDOW_S = 15.0
"""For so long it is measured then."""
DRAIN_S = 120.0
SHARE = 0.99
RUNS_PER_S = 20.0
IDLE_CONNECTIONS = 300
KILLS_PER_S = 2.0

Stress = Callable[[SmallFleet], None]
SCENARIOS: dict[str, Stress] = {}


def scenario(act: Stress) -> Stress:
    SCENARIOS[act.__name__] = act
    return act


def hold(seconds: float) -> None:
    threading.Event().wait(seconds)


@scenario
def postgres_restart(fleet: SmallFleet) -> None:
    """Postgres is stopped, is away for half of the stress, and is started again."""
    fleet.postgres.stop()
    hold(STRESS_S / 2)
    fleet.postgres.start()


@scenario
def pg_backend_kill(fleet: SmallFleet) -> None:
    """Twice a second all sessions end that are active or in a transaction."""
    until = monotonic() + STRESS_S
    with fleet.connect() as session:
        while monotonic() < until:
            session.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND state IN ('active', 'idle in transaction')"
            )
            hold(1 / KILLS_PER_S)


@scenario
def pool_exhaustion(fleet: SmallFleet) -> None:
    """Idle sessions take every connection that Postgres has left, up to 300."""
    held: list[psycopg.Connection] = []
    try:
        while len(held) < IDLE_CONNECTIONS:
            held.append(fleet.connect())
    except psycopg.OperationalError:
        pass  # no slot is left
    hold(STRESS_S)
    for session in held:
        session.close()


@scenario
def crash_recovery(fleet: SmallFleet) -> None:
    """One of two workers is killed, is away for half of the stress, and is started again."""
    fleet.kill("worker-1")
    hold(STRESS_S / 2)
    fleet.start("worker-1")
    fleet.processes["worker-1"].wait_ready()


@scenario
def repeated_kills(fleet: SmallFleet) -> None:
    """One of two workers is killed again and again, and started each time."""
    until = monotonic() + STRESS_S
    while monotonic() < until:
        fleet.kill("worker-1")
        fleet.start("worker-1")
        fleet.processes["worker-1"].wait_ready()
        hold(STRESS_S / 6)


def rate(ends: Sequence[float], begin: float, end: float) -> float:
    """Ended runs per second between two times."""
    return sum(begin <= moment < end for moment in ends) / (end - begin)


def back_after(ends: Sequence[float], begin: float, wanted: float) -> float | None:
    """Seconds after `begin` until the runs of one second reach the wanted rate."""
    last = max(ends, default=begin)
    for tenths in range(int((last - begin) * 10)):
        moment = begin + tenths / 10
        if rate(ends, moment, moment + 1) >= wanted:
            return tenths / 10
    return None


def measured(act: Stress, runs_per_s: float) -> dict[str, Any]:
    """The result of one scenario on a fleet of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="scenario-") as folder,
        SmallFleet(Path(folder)) as fleet,
    ):
        Path(folder).chmod(0o755)
        load = SteadyLoad(fleet.app.client, runs_per_s)
        load.start()
        try:
            begin = load.wait(WARM_UP_S)
            calm = load.wait(BASELINE_S)
            act(fleet)
            over = time()
            end = load.wait(WITHIN_S + WINDOW_S)
        finally:
            load.stop()
        if load.failed:
            raise RuntimeError(f"the load itself failed: {load.failed}")
        fleet.wait_until_all_have_ended(DRAIN_S)
        with fleet.connect() as session:
            rows = session.execute(SHOWN_ROWS).fetchall()
    completed = {run_id for run_id, state, _ in rows if state == "completed"}
    ends = [moment for _, state, moment in rows if state == "completed"]
    baseline = rate(ends, begin, calm)
    return {
        "what": act.__doc__,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "offered_per_s": runs_per_s,
        "baseline_per_s": round(baseline, 2),
        "during_share": round(rate(ends, calm, over) / baseline, 4),
        "back_share": round(rate(ends, over + WITHIN_S, end) / baseline, 4),
        "back_after_s": back_after(ends, over, 0.9 * baseline),
        "accepted": len(load.accepted),
        "refused": load.refused,
        "lost": len(set(load.accepted) - completed),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.scenarios", description=__doc__)
    parser.add_argument("--only", help="these scenarios, comma separated", default="")
    parser.add_argument("--rate", type=float, default=RUNS_PER_S, help="runs started per second")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or list(SCENARIOS)
    if unknown := set(names) - SCENARIOS.keys():
        parser.error(f"no scenario {sorted(unknown)}: choose from {', '.join(SCENARIOS)}")
    stored = read(SCENARIOS_FILE) or {}
    found = {name: stored[name] for name in SCENARIOS if name in stored}
    bad = []
    for name in names:
        found[name] = result = measured(SCENARIOS[name], given.rate)
        write(SCENARIOS_FILE, found)
        if result["back_share"] < SHARE or result["lost"]:
            bad.append(name)
        print(
            f"{name:17} {result['back_share']:7.1%} of {result['baseline_per_s']:g} runs/s back, "
            f"first after {result['back_after_s']} s; during {result['during_share']:.0%}; "
            f"{result['lost']} of {result['accepted']} lost",
            flush=True,
        )
    print(
        f"scenarios: {len(names)}, below {SHARE:.0%} or with lost runs: {', '.join(bad) or 'none'}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
