"""Real worker processes, killed at named points and frozen; and a broker that forgets everything.

A crash point kills the process that executes: a child of the prefork pool, or with the solo pool
the whole worker, which is then replaced by another.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import psycopg
import pytest
import redis

from beatless import App, RunState
from beatless.cli.demo import without_handbacks
from beatless.client import RunRequest
from beatless.local.valkey import EmbeddedValkey
from beatless.testing import Kit
from tests.child_logs import await_line
from tests.integration.test_processes import await_death
from tests.integration.test_relay import lose_messages
from tests.plans import TWO_STEPS

APP = "tests.plans:app"
RUNS = 3

# Each new child dies at the same pass again, so it must be one that it reaches after some progress.
POINTS = {
    "claim.committed": "claim.committed@2:kill",
    "step.before": "step.before@4:kill",
    "inside": "",
    "step.effect_done": "step.effect_done@4:kill",
    "step.committed": "step.committed@4:kill",
    "task.before_ack": "task.before_ack@2:kill",
}
FAST = {("step.committed", "worker")}


def cases() -> Iterator[object]:
    for point in POINTS:
        for who in ("child", "worker"):
            marks = [] if (point, who) in FAST else [pytest.mark.long]
            yield pytest.param(point, who, marks=marks, id=f"{point}-{who}")


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Short, because these tests wait for real time to pass."""
    return {"lease_seconds": 1, "redispatch_seconds": 1}


@pytest.mark.parametrize(("point", "who"), list(cases()))
def test_a_kill_at_any_point_loses_and_doubles_nothing(
    beatless: Kit, postgres: psycopg.Connection, tmp_path: Path, point: str, who: str
) -> None:
    postgres.execute("CREATE TABLE effects (key text)")
    ledger = tmp_path / "ledger"
    input = {"ledger": str(ledger), "table": f"{beatless.app.settings.schema}.effects"}
    if point == "inside":
        input["kill_in"] = "s4"
    pool = [] if who == "child" else ["--", "--pool", "solo"]
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP, arguments=pool, fault=POINTS[point])
    runs = [beatless.start_run("six", input) for _ in range(RUNS)]
    if who == "worker":
        for _ in range(RUNS if point == "inside" else 1):
            worker.reap(monotonic() + 300)  # it ends by itself
            worker = beatless.worker_process(APP, arguments=pool)

    for run in runs:
        ended = beatless.wait_for_run_completion(run.run_id)
        assert (ended.state, ended.result) == (RunState.COMPLETED, 6)
    bodies = [tuple(json.loads(line)) for line in ledger.read_text().splitlines()]
    assert len(set(bodies)) == len(bodies)  # each attempt was one call at most
    crashed = 0
    for run in runs:
        events = beatless.client.events(run.run_id)
        attempts = {(e.step, e.attempt) for e in events if e.type == "StepStarted"}
        assert {(step, attempt) for run_id, step, attempt in bodies if run_id == run.run_id} <= (
            attempts
        )
        crashed += beatless.client.get_run(run.run_id).attempt - 1
    assert crashed or point == "task.before_ack"
    keys = sorted(key for (key,) in postgres.execute("SELECT key FROM effects").fetchall())
    assert keys == sorted(f"{run.run_id}:s3" for run in runs)
    postgres.execute("DROP TABLE effects")
    beatless.verify()  # no step begun after its result, dense journals, one RunFinished each


@pytest.mark.long
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 1}])
def test_a_worker_frozen_past_its_lease_writes_nothing_and_says_so(
    beatless: Kit, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    beatless.relay_process(APP)
    frozen = beatless.worker_process(APP)
    run = beatless.start_run("gated", {"go": str(go)})
    beatless.wait_for_event(run.run_id, "StepStarted")

    os.killpg(frozen.pid, signal.SIGSTOP)
    beatless.advance(301)
    other = beatless.worker_process(APP)
    go.touch()
    assert beatless.wait_for_run_completion(run.run_id).result == "through"
    before = beatless.client.events(run.run_id)
    other.kill()
    os.killpg(frozen.pid, signal.SIGCONT)
    # Its only child comes to the next run when it is through with the first.
    after = beatless.start_run("two_steps")
    assert beatless.wait_for_run_completion(after.run_id).result == "one two"

    assert beatless.client.events(run.run_id) == before
    # A lease that ran out is no crash: the attempt is made again.
    assert [event.attempt for event in before if event.type == "StepStarted"] == [1, 1]
    await_line(frozen, "lease lost")
    beatless.verify()


@pytest.mark.long
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 1}])
def test_a_body_that_lets_no_other_thread_run_ends_its_process_all_the_same(
    beatless: Kit, tmp_path: Path
) -> None:
    """Neither heartbeat nor watchdog can run; a timer in C ends it, which its worker sees."""
    beatless.relay_process(APP)
    beatless.worker_process(APP)
    run = beatless.start_run("stuck", {"started": str(tmp_path / "started"), "how": "stuck"})
    beatless.wait_for_event(run.run_id, "StepStarted")
    await_death(int((beatless.client.get_run(run.run_id).worker or "").split(":")[-2]))
    other = beatless.start_run("two_steps")
    assert beatless.wait_for_run_completion(other.run_id).result == "one two"  # by another child
    assert beatless.wait_for_run_completion(run.run_id).result == "one"

    starts = [e for e in beatless.client.events(run.run_id) if e.type == "StepStarted"]
    assert [(e.step, e.attempt) for e in starts] == [("hangs", 1), ("hangs", 2), ("first", 1)]
    beatless.verify()


@pytest.mark.long
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 1}])
def test_of_a_thousand_delayed_runs_none_starts_early_with_two_relays(beatless: Kit) -> None:
    for _ in range(2):
        beatless.relay_process(APP)
    beatless.worker_process(APP, concurrency=4, arguments=["--", "--pool", "threads"])
    runs = beatless.client.start_runs(
        [RunRequest(plan="two_steps", delay=number / 200) for number in range(1000)]
    )

    for run in runs:
        ended = beatless.wait_for_run_completion(run.run_id)
        assert ended.started_at >= run.not_before
        events = without_handbacks(beatless.client.events(run.run_id))
        assert [event.type for event in events] == TWO_STEPS
    beatless.verify()


@pytest.mark.long
class TestBrokerThatForgets:
    @pytest.fixture
    def broker(self, tmp_path: Path) -> Iterator[EmbeddedValkey]:
        """A broker of the test's own: others have their messages in the shared one."""
        with EmbeddedValkey(tmp_path / "broker") as server:
            yield server

    @pytest.fixture
    def beatless_settings(self, broker: EmbeddedValkey) -> dict[str, object]:
        return {"lease_seconds": 300, "redispatch_seconds": 2, "broker_url": broker.url}

    def test_flushall_with_500_queued_and_20_running_loses_and_doubles_nothing(
        self, beatless: Kit, beatless_app: App, broker: EmbeddedValkey, tmp_path: Path
    ) -> None:
        go = tmp_path / "go"
        beatless.relay_process(APP)
        beatless.worker_process(APP, concurrency=20, arguments=["--", "--pool", "threads"])
        running = beatless.client.start_runs(
            [RunRequest(plan="gated", input={"go": str(go)}) for _ in range(20)]
        )
        for run in running:
            beatless.wait_for_event(run.run_id, "StepStarted")
        queued = beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(500)])

        with redis.Redis.from_url(broker.url) as client:
            assert client.dbsize() > 0
            client.flushall()
        go.touch()

        for run in [*running, *queued]:
            assert beatless.wait_for_run_completion(run.run_id).state is RunState.COMPLETED
        one_step = ["RunStarted", "StepStarted", "StepFinished", "RunFinished"]
        for runs, types in ((running, one_step), (queued, TWO_STEPS)):
            for run in runs:
                events = without_handbacks(beatless.client.events(run.run_id))
                assert [event.type for event in events] == types
        beatless.verify()


@pytest.mark.slow
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 1}])
def test_a_message_of_a_dead_workers_run_that_is_lost_is_sent_again(
    beatless: Kit, tmp_path: Path, postgres: psycopg.Connection
) -> None:
    """A relay that sleeps looks at it when it is overdue, though nobody rings."""
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP)
    run = beatless.start_run("gated", {"go": str(tmp_path / "go")})
    beatless.wait_for_event(run.run_id, "StepStarted")
    worker.kill()
    beatless.advance(301)  # its lease has run out

    sent, until = 0, monotonic() + 60
    while sent < 4:
        assert monotonic() < until, f"sent {sent} times"
        lose_messages(beatless.app)
        (sent,) = postgres.execute("SELECT attempts FROM dispatches").fetchone()
