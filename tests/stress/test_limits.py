"""A limit under load, while workers and relays are killed and frozen.

By a log of all leases, and by what the bodies have written down themselves.
"""

import json
import os
import random
import signal
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import Plan, RunRequest, RunState
from beatless.testing import Kit
from tests import limited
from tests.valkeys import until

APP = "tests.limited:app"
RUNS = 2000
WORKERS, PROCESSES = 4, 4
FAULTS = 9


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": 3, "redispatch_seconds": 2}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return list(limited.app.plans.values())


LOG = """
CREATE TABLE lease_log (id bigint GENERATED ALWAYS AS IDENTITY, run_id text, begins boolean,
  at double precision DEFAULT extract(epoch FROM clock_timestamp()));
CREATE FUNCTION log_lease() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(4711);
  INSERT INTO lease_log (run_id, begins) VALUES (NEW.run_id, NEW.state = 'running');
  RETURN NULL;
END $$;
CREATE TRIGGER zz_log AFTER UPDATE OF state ON runs FOR EACH ROW
  WHEN (OLD.state <> NEW.state AND 'running' IN (OLD.state, NEW.state))
  EXECUTE FUNCTION log_lease();
"""
"""Its lock makes the order of the rows that of the commits."""


def leases_at_once(log: Sequence[tuple[str, bool]]) -> list[int]:
    """How many runs had a lease after each change."""
    held: set[str] = set()
    counts = []
    for run_id, begins in log:
        assert begins != (run_id in held), run_id
        held ^= {run_id}
        counts.append(len(held))
    assert not held
    return counts


def leases_of(log: Sequence[tuple[str, bool, float]]) -> dict[str, list[tuple[float, float]]]:
    """The begin and the end of each lease, by its run."""
    begun: dict[str, float] = {}
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run_id, begins, at in log:
        if begins:
            begun[run_id] = at
        else:
            found[run_id].append((begun.pop(run_id), at))
    return found


def bodies_at_once(
    ledger: Path, leases: dict[str, list[tuple[float, float]]]
) -> Iterator[tuple[float, int]]:
    """How many runs had a body at each time, of bodies that have begun and ended in a lease.

    That of a frozen worker can outlive its lease, or be there beside that of who has taken the run
    over. One at least of each run has begun and ended in a lease.
    """
    changes = []
    for line in ledger.read_text().splitlines():
        body = json.loads(line)
        for begin, end in leases[body["run_id"]]:
            if begin <= body["begin"] and body["end"] <= end:
                changes += [(body["begin"], 1, body["run_id"]), (body["end"], -1, body["run_id"])]
    assert {run_id for *_, run_id in changes} == leases.keys()
    bodies: Counter[str] = Counter()
    for at, change, run_id in sorted(changes):
        bodies[run_id] += change
        yield at, sum(count > 0 for count in bodies.values())


LEASES_NOW = (
    "SELECT count(*) FILTER (WHERE begins) - count(*) FILTER (WHERE NOT begins) FROM lease_log"
)


@pytest.mark.long(minutes=1)
def test_a_limit_is_reached_and_never_passed_while_workers_and_relays_die_and_freeze(
    beatless: Kit, postgres: psycopg.Connection[Any], tmp_path: Path
) -> None:
    postgres.execute(LOG.encode())
    rng, pause = random.Random(21), threading.Event()
    relays = [beatless.relay_process(APP) for _ in range(2)]
    workers = [beatless.worker_process(APP, concurrency=PROCESSES) for _ in range(WORKERS)]
    go, ledger = tmp_path / "go", tmp_path / "ledger"
    requests = [RunRequest(plan="limited", input={"go": str(go), "ledger": str(ledger)})] * RUNS
    runs = beatless.client.start_runs(requests[: RUNS // 2])
    runs += [beatless.client.start_run(each.plan, each.input) for each in requests[RUNS // 2 :]]

    # No body returns before the limit is reached, by a fleet that has room for more.
    until(lambda: postgres.execute(LEASES_NOW).fetchone() >= (limited.AT_ONCE,), 300)
    go.touch()
    for number in range(FAULTS):
        mark = runs[RUNS * (number + 1) // (FAULTS + 1)]  # spreads the faults over the work
        beatless.wait_for_run_completion(mark.run_id, timeout=300)
        kind = relays if number % 3 == 2 else workers
        victim = rng.choice(kind)
        if number % 3 == 1:
            os.kill(victim.pid, signal.SIGSTOP)
            pause.wait(1.0)
            os.kill(victim.pid, signal.SIGCONT)
            continue
        victim.kill()
        kind[kind.index(victim)] = (
            beatless.relay_process(APP)
            if kind is relays
            else beatless.worker_process(APP, concurrency=PROCESSES)
        )
    for run in runs:
        beatless.wait_for_run_completion(run.run_id, timeout=300)

    log = postgres.execute("SELECT run_id, begins, at FROM lease_log ORDER BY id").fetchall()
    counts = leases_at_once([(run_id, begins) for run_id, begins, _ in log])
    assert max(counts) == limited.AT_ONCE
    bodies = list(bodies_at_once(ledger, leases_of(log)))
    most = max(now for _, now in bodies)
    assert most <= limited.AT_ONCE
    rate = RUNS / (bodies[-1][0] - bodies[0][0])
    sys.stderr.write(f"{RUNS} runs, {FAULTS} faults: at most {most} at once, {rate:.0f} a second\n")
    assert {beatless.client.get_run(run.run_id).state for run in runs} == {RunState.COMPLETED}
    assert postgres.execute("SELECT count(*) FROM limit_slots").fetchone() == (0,)
    beatless.verify()


def trees_at_once(log: Sequence[tuple[str, bool]]) -> int:
    """How many runs have begun and not ended at most."""
    first = {run_id: n for n, (run_id, _) in reversed([*enumerate(log)])}
    last = {run_id: n for n, (run_id, _) in enumerate(log)}
    return max(sum(first[run] <= n <= last[run] for run in first) for n in range(len(log)))


@pytest.mark.long
def test_runs_that_keep_their_slots_are_never_too_many_while_workers_die(
    beatless: Kit, postgres: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """Each waits for a time and for a child, which is executed by the slot of its parent."""
    postgres.execute(LOG.encode())
    beatless.relay_process(APP)
    workers = [beatless.worker_process(APP, concurrency=PROCESSES) for _ in range(2)]
    go = tmp_path / "go"
    runs = beatless.client.start_runs([RunRequest(plan="kept", input={"go": str(go)})] * 30)
    until(lambda: postgres.execute("SELECT count(*) FROM limit_slots").fetchone() == (3,), 300)
    go.touch()
    for number in range(2):
        beatless.wait_for_run_completion(runs[10 * number].run_id, timeout=300)
        workers[number].kill()
        workers[number] = beatless.worker_process(APP, concurrency=PROCESSES)
    for run in runs:
        beatless.wait_for_run_completion(run.run_id, timeout=300)

    log = postgres.execute("SELECT run_id, begins FROM lease_log ORDER BY id").fetchall()
    roots = {run.run_id for run in runs}
    assert trees_at_once([each for each in log if each[0] in roots]) == 3
    assert len({run_id for run_id, _ in log} - roots) == len(runs)
    assert {beatless.client.get_run(run.run_id).state for run in runs} == {RunState.COMPLETED}
    assert postgres.execute("SELECT count(*) FROM limit_slots").fetchone() == (0,)
    beatless.verify()


STEP_LOG = """
CREATE TABLE step_log (id bigint GENERATED ALWAYS AS IDENTITY, run_id text, begins boolean);
CREATE FUNCTION log_step() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(4711);
  INSERT INTO step_log (run_id, begins) VALUES (NEW.run_id, NEW.type = 'StepStarted');
  RETURN NULL;
END $$;
CREATE TRIGGER zz_log_step AFTER INSERT ON run_events FOR EACH ROW
  WHEN (NEW.step = 'narrow' AND (NEW.type IN ('StepStarted', 'StepFinished')
                                 OR NEW.data ->> 'name' = 'beatless.given_back'))
  EXECUTE FUNCTION log_step();
"""
"""A thread may give a run back whose step has begun, as another one lasts."""


@pytest.mark.long
def test_a_limit_of_a_step_is_never_passed_in_workers_of_any_kind_that_die(
    beatless: Kit, postgres: psycopg.Connection[Any]
) -> None:
    """Processes, threads with groups of short steps, and a pool of runs in one process."""
    postgres.execute(STEP_LOG.encode())
    beatless.relay_process(APP)
    kinds = [(), ("--pool", "threads"), ("--pool", "async")]
    workers = [
        beatless.worker_process(APP, concurrency=PROCESSES, arguments=each) for each in kinds
    ]
    runs = beatless.client.start_runs([RunRequest(plan="narrow")] * 150)
    for number, kind in enumerate(kinds):
        beatless.wait_for_run_completion(runs[40 * number].run_id, timeout=300)
        workers[number].kill()
        workers[number] = beatless.worker_process(APP, concurrency=PROCESSES, arguments=kind)
    for run in runs:
        beatless.wait_for_run_completion(run.run_id, timeout=300)

    log = postgres.execute("SELECT run_id, begins FROM step_log ORDER BY id").fetchall()
    held: set[str] = set()
    for run_id, begins in log:
        held = held | {run_id} if begins else held - {run_id}
        assert len(held) <= 2
    assert not held
    assert {run_id for run_id, _ in log} == {run.run_id for run in runs}
    ended = [beatless.client.get_run(run.run_id) for run in runs]
    assert [run.error for run in ended if run.state is not RunState.COMPLETED] == []
    assert postgres.execute("SELECT count(*) FROM limit_slots").fetchone() == (0,)
    beatless.verify()
