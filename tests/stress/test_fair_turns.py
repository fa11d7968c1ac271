"""Turns of groups with workers and relays of their own: many small tenants beside a large one."""

import sys
from datetime import datetime
from typing import Any

import psycopg
import pytest

from beatless import Plan, RunRequest
from beatless.testing import Kit
from tests import limited
from tests.valkeys import until

APP = "tests.limited:app"
LARGE, PAGE = 20_000, 1000
TENANTS, EACH = 50, 10
RELAYS, WORKERS, PROCESSES = 2, 2, 4


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Leases and messages that no busy machine takes for lost."""
    return {"lease_seconds": 300, "redispatch_seconds": 300}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return list(limited.app.plans.values())


BEGUN = (
    'SELECT r."group" FROM run_events e JOIN runs r USING (run_id)'
    " WHERE type = 'StepStarted' AND ts > %s ORDER BY ts"
)


def begun_since(postgres: psycopg.Connection[Any], since: datetime) -> list[str]:
    return [group for (group,) in postgres.execute(BEGUN, (since,)).fetchall()]


def small_runs(kit: Kit, postgres: psycopg.Connection[Any], name: str) -> tuple[float, list[str]]:
    """Seconds until those of all small tenants have ended; the groups of all that began until then.

    None of a large one is counted that began after the last of a small one.
    """
    ((since,),) = postgres.execute("SELECT clock_timestamp()").fetchall()
    runs = kit.client.start_runs(
        [
            RunRequest(plan="free", group=f"{name}-{tenant}")
            for _ in range(EACH)
            for tenant in range(TENANTS)
        ]
    )
    for run in runs:
        kit.wait_for_run_completion(run.run_id, timeout=300)
    ends = [kit.client.get_run(run.run_id).finished_at for run in runs]
    groups = begun_since(postgres, since)
    last = max(n for n, group in enumerate(groups) if group.startswith(f"{name}-"))
    return (max(end for end in ends if end) - since).total_seconds(), groups[: last + 1]


@pytest.mark.long(minutes=1)
def test_small_tenants_are_done_beside_one_with_twenty_thousand_runs(
    beatless: Kit, postgres: psycopg.Connection[Any]
) -> None:
    for _ in range(RELAYS):
        beatless.relay_process(APP)
    for _ in range(WORKERS):
        beatless.worker_process(APP, concurrency=PROCESSES)
    small_runs(beatless, postgres, "first")  # all processes are there after it
    alone_s, _ = small_runs(beatless, postgres, "alone")
    ((since,),) = postgres.execute("SELECT clock_timestamp()").fetchall()
    for _ in range(LARGE // PAGE):
        beatless.client.start_runs([RunRequest(plan="free", group="large")] * PAGE)
    until(lambda: len(begun_since(postgres, since)) > 0, 300)
    beside_s, begun = small_runs(beatless, postgres, "small")

    # Shown by `-rP`. The times are the machine's: none is asserted. The order of turns is that of
    # tests/integration/test_fair_turns.py; here each process goes on when the machine lets it.
    large = begun.count("large")
    sys.stderr.write(
        f"{TENANTS} tenants with {EACH} runs each: {alone_s:.2f} s alone, {beside_s:.2f} s beside "
        f"one with {LARGE} runs, of which {large} began meanwhile\n"
    )
    assert len(begun) - large == TENANTS * EACH
    assert large < LARGE // 2
