"""Queue control under load: real workers and relays, a thousand runs, and nothing gets lost."""

import random
from itertools import pairwise

import psycopg
import pytest

from beatless import App, RunState
from beatless.cli.demo import without_handbacks
from beatless.client import RunRequest
from beatless.testing import Kit
from tests.plans import TWO_STEPS
from tests.valkeys import until

APP = "tests.plans:app"
WORKERS = 4
CYCLES = 50
RUNS, ADDED = 800, 4
"""Runs that wait before the first pause ends, and those that come within each."""


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Leases that no busy machine lets run out: a step is begun once."""
    return {"lease_seconds": 300, "redispatch_seconds": 2}


def requests(count: int, queue: str) -> list[RunRequest]:
    return [RunRequest(plan="two_steps", queue=queue) for _ in range(count)]


def clock(postgres: psycopg.Connection) -> float:
    row = postgres.execute("SELECT clock_timestamp()").fetchone()
    assert row
    return float(row[0].timestamp())


@pytest.mark.long(minutes=1)
def test_no_run_starts_within_a_pause_and_none_is_lost_or_doubled(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    chance = random.Random(7)
    client = beatless.client
    for _ in range(2):
        beatless.relay_process(APP)
    for _ in range(WORKERS):
        beatless.worker_process(APP, arguments=["--queues", "busy,calm"])
    client.pause_queue("busy")
    runs = client.start_runs(requests(RUNS, "busy"))
    # Each cycle lets at least one more of these end, so that the pauses spread over all the work.
    marks = sorted(chance.sample(range(RUNS), CYCLES))
    pauses = []
    for mark in marks:
        client.pause_queue("busy")
        since = clock(postgres)
        runs += client.start_runs(requests(ADDED, "busy"))  # that no pause is without work
        # A pause lasts as long as this: another queue is served meanwhile, by the same workers.
        elsewhere = client.start_runs(requests(chance.randint(1, 3), "calm"))
        for run in elsewhere:
            assert beatless.wait_for_run_completion(run.run_id).result == "one two"
        pauses.append((since, clock(postgres)))
        client.resume_queue("busy")
        beatless.wait_for_run_completion(runs[mark].run_id)
    for run in runs:
        assert beatless.wait_for_run_completion(run.run_id).result == "one two"

    assert all(since < until for since, until in pauses)
    assert all(until < since for (_, until), (since, _) in pairwise(pauses))
    started = [client.get_run(run.run_id).started_at.timestamp() for run in runs]
    assert not [at for at in started if any(since <= at <= until for since, until in pauses)], (
        "runs started while their queue was paused"
    )
    for run in runs:
        events = without_handbacks(client.events(run.run_id))
        assert [event.type for event in events] == TWO_STEPS
    beatless.verify()


@pytest.mark.long
def test_obliterating_a_busy_queue_leaves_nothing_of_it_and_everything_of_the_other(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    client = beatless.client
    beatless.relay_process(APP)
    for _ in range(2):
        beatless.worker_process(
            APP, concurrency=2, arguments=["--queues", "doomed,spared", "--", "--pool", "threads"]
        )
    pairs = zip(requests(500, "doomed"), requests(500, "spared"), strict=True)
    runs = client.start_runs([request for pair in pairs for request in pair])
    doomed, spared = runs[::2], runs[1::2]
    beatless.wait_for_run_completion(doomed[20].run_id)
    beatless.wait_for_run_completion(spared[20].run_id)

    assert client.obliterate_queue("doomed", force=True) == 500

    for run in spared:
        assert beatless.wait_for_run_completion(run.run_id).result == "one two"
    gone = [run.run_id for run in doomed]
    for table in ("runs", "run_events", "run_outbox", "dispatches", "dead_letters"):
        found = postgres.execute(
            f"SELECT count(*) FROM {table} WHERE run_id = ANY(%s)", (gone,)
        ).fetchone()
        assert found == (0,), table
    assert not postgres.execute("SELECT FROM queues WHERE name = 'doomed'").fetchall()
    assert client.list_runs(queue="doomed") == []
    left = {each.name: each.queued + each.delayed + each.active for each in client.queues()}
    assert left.pop("doomed", 0) == 0  # listed for its workers alone
    assert [*left] == ["spared"]
    with beatless_app.redis() as bus:
        # Messages that were on their way to the broker come after it: a worker drops them.
        until(lambda: not [key for key in bus.scan_iter() if b"doomed" in key], 60)
    beatless.verify()


@pytest.mark.long
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 2, "redispatch_seconds": 2}])
def test_when_every_worker_is_killed_others_complete_everything_without_a_person(
    beatless: Kit,
) -> None:
    client = beatless.client
    beatless.relay_process(APP)
    first = [beatless.worker_process(APP, concurrency=2) for _ in range(3)]
    runs = client.start_runs(requests(300, "default"))
    beatless.wait_for_run_completion(runs[60].run_id)

    for worker in first:
        worker.kill()
    for _ in range(2):
        beatless.worker_process(APP, concurrency=2)

    for run in runs:
        ended = beatless.wait_for_run_completion(run.run_id)
        assert ended.state is RunState.COMPLETED
        finished = [e.step for e in client.events(run.run_id) if e.type == "StepFinished"]
        assert finished == ["first", "second"]
    beatless.verify()
