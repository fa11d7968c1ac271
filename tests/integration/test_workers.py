"""Workers as processes: how they stop, what they hold, and which queues they serve."""

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import App, BadRequest, RunState, Settings
from beatless.cli.processes import weights
from beatless.client import RunRequest
from beatless.outbox.sockets import readable
from beatless.testing import Kit
from beatless.worker.bootsteps import ReadyFile
from beatless.worker.run import run_worker
from beatless.worker.weights import WeightedCycle
from tests.valkeys import until

APP = "tests.plans:app"
POOLS = {"prefork": [], "threads": ["--", "--pool", "threads"]}

GOES_ON = """
import os, signal, threading
from celery import signals
from beatless.worker.run import run_worker
from tests.plans import app

@signals.worker_ready.connect
def stop(**_):
    os.kill(os.getpid(), signal.SIGTERM)

run_worker(app.celery, app.settings, arguments=["--pool", "solo"])
for thread in threading.enumerate():
    if isinstance(thread, threading.Timer):
        thread.join()
print("goes on")
"""
"""A script that does something after its worker, and waits for whatever it has left."""


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Leases that outlive the test: what another worker takes over was given back."""
    return {"lease_seconds": 300, "redispatch_seconds": 300, "grace_seconds": 0.2}


def await_end(pid: int) -> None:
    watched = os.pidfd_open(pid)
    assert readable([watched], 60), "the worker does not end"
    os.close(watched)


class TestStop:
    @pytest.mark.long
    @pytest.mark.parametrize(
        ("pool", "how"),
        [("prefork", "swallow"), ("prefork", "wait"), ("threads", "wait")],
    )
    def test_a_step_that_outlasts_the_grace_is_given_back_and_no_attempt_is_wasted(
        self, beatless: Kit, tmp_path: Path, pool: str, how: str
    ) -> None:
        beatless.relay_process(APP)
        worker = beatless.worker_process(APP, arguments=POOLS[pool])
        given = {"started": str(tmp_path / "s"), "pids": str(tmp_path / "pids"), "how": how}
        run = beatless.start_run("obstinate", given)
        stream = beatless.client.stream_run(run.run_id, timeout=300)
        while next(stream).type != "StepStarted":
            pass
        until((tmp_path / "s").exists)  # a body that was not called has no first process

        os.kill(worker.pid, signal.SIGTERM)
        await_end(worker.pid)
        beatless.worker_process(APP, arguments=POOLS[pool])

        # Its first attempt; it may fail once, and crash once.
        assert beatless.wait_for_run_completion(run.run_id).result == 1
        told = [event.type for event in stream]
        assert told == ["DebugTrace", "StepStarted", "StepFinished", "RunFinished"]
        assert "given back: its worker stopped" in str(beatless.client.explain(run.run_id))
        beatless.verify()

    @pytest.mark.long
    def test_a_shutdown_from_flower_gives_back_what_runs(
        self, beatless: Kit, tmp_path: Path
    ) -> None:
        """Celery sends no signal then, neither to the process nor within it."""
        beatless.relay_process(APP)
        worker = beatless.worker_process(APP)
        given = {"started": str(tmp_path / "s"), "pids": str(tmp_path / "pids"), "how": "swallow"}
        run = beatless.start_run("obstinate", given)
        until((tmp_path / "s").exists)

        beatless.app.celery.control.shutdown()
        await_end(worker.pid)
        beatless.worker_process(APP)

        assert beatless.wait_for_run_completion(run.run_id).result == 1
        beatless.verify()

    @pytest.mark.slow
    def test_the_process_of_a_worker_that_has_ended_goes_on(self, beatless: Kit) -> None:
        """What would end a worker that hangs ends nobody else."""
        said = subprocess.run(
            [sys.executable, "-c", GOES_ON],
            env=os.environ | beatless.app.settings.to_env(),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
        assert said.endswith("goes on\n")

    @pytest.mark.slow
    def test_a_worker_that_runs_nothing_ends_at_once(self, beatless: Kit) -> None:
        worker = beatless.worker_process(APP, grace_seconds=3000)
        os.kill(worker.pid, signal.SIGTERM)
        await_end(worker.pid)


class TestReadyFile:
    @pytest.mark.slow
    def test_is_there_while_the_worker_takes_runs(self, beatless: Kit, tmp_path: Path) -> None:
        ready = tmp_path / "ready"
        worker = beatless.worker_process(APP, arguments=["--ready-file", str(ready)])
        assert ready.exists()
        os.kill(worker.pid, signal.SIGTERM)
        await_end(worker.pid)
        assert not ready.exists()

    def test_is_touched_and_never_made_again(self, tmp_path: Path) -> None:
        file = tmp_path / "ready"
        step = ReadyFile.of(file)(None)
        file.touch()
        os.utime(file, (0, 0))
        step._touch()
        assert file.stat().st_mtime > 0
        step._gone()
        step._touch()
        assert not file.exists()

    def test_is_the_same_when_a_body_has_changed_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        step = ReadyFile.of(Path("ready"))(None)
        monkeypatch.chdir("/")
        assert step.path == tmp_path / "ready"


class TestWeights:
    def test_busy_queues_get_their_shares_and_an_idle_one_saves_nothing_up(self) -> None:
        cycle = WeightedCycle({"fast": 3, "slow": 1})
        cycle.update(["slow", "fast"])

        def take(count: int, busy: set[str]) -> Counter[str]:
            return Counter(
                cycle.rotate(next(name for name in cycle.consume(2) if name in busy))
                for _ in range(count)
            )

        assert take(400, {"fast", "slow"}) == {"fast": 300, "slow": 100}
        assert take(400, {"fast"}) == {"fast": 400}
        assert take(400, {"fast", "slow"})["slow"] in (100, 101)

    @pytest.mark.slow
    def test_a_worker_takes_runs_by_weight(self, beatless: Kit) -> None:
        runs = {
            run.run_id: queue
            for queue in ("slow", "fast")
            for run in beatless.client.start_runs(
                [RunRequest(plan="two_steps", queue=queue) for _ in range(40)]
            )
        }
        beatless.drain_outbox_once()
        beatless.worker_process(APP, concurrency=1, arguments=["--queues", "fast=3,slow=1"])
        inspect = beatless.app.celery.control.inspect(timeout=1, limit=1)
        answers: list[Any] = []
        # Celery's worker is ready before it listens to broadcasts, which nobody keeps for it.
        until(lambda: answers.append(inspect.stats()) or answers[-1])
        (stats,) = answers[-1].values()
        order = stats["broker"]["transport_options"]["queue_order_strategy"]
        assert sorted(order.values()) == [1, 3]  # whoever inspects it is answered
        beatless.relay.start()  # else nobody tells of the ends
        ended = [beatless.wait_for_run_completion(run_id) for run_id in runs]

        ended.sort(key=lambda run: run.started_at)
        first = Counter(runs[run.run_id] for run in ended[:40])
        assert first["fast"] in (29, 30, 31)

    def test_are_read(self) -> None:
        assert weights("") == {}
        assert weights("a, b=3 ,") == {"a": 1, "b": 3}
        for bad in ("a=0", "a=", "a=x", "a=-1", "a=1000"):
            with pytest.raises(BadRequest, match="a weight is 1 to 999"):
                weights(bad)
        for bad in ("fast:3", "fast:3,slow", "a b", "-a", "ä"):
            with pytest.raises(BadRequest, match="no queue can be called: it must match"):
                weights(bad)
        with pytest.raises(BadRequest, match="a weight is written fast=3"):
            weights("fast:3,slow")

    def test_another_broker_than_redis_cannot_give_them(self, beatless_app: App) -> None:
        values: dict[str, Any] = {
            "database_url": beatless_app.settings.database_url,
            "redis_url": beatless_app.settings.redis_url,
            "broker_url": "amqp://nobody@127.0.0.1:1//",
        }
        app = App(Settings(**values), plans=[])
        with pytest.raises(BadRequest, match="only a Redis broker"):
            run_worker(app.celery, app.settings, queues={"a": 1, "b": 2})


@pytest.mark.long
def test_children_are_replaced_after_so_many_runs(beatless: Kit, tmp_path: Path) -> None:
    beatless.relay_process(APP)
    beatless.worker_process(APP, arguments=["--", "--max-tasks-per-child", "2"])
    runs = [beatless.start_run("two_steps") for _ in range(6)]
    workers = Counter(beatless.wait_for_run_completion(run.run_id).worker for run in runs)
    assert sorted(workers.values()) == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_a_worker_has_one_connection_for_each_place_and_none_before_the_fork(
    beatless: Kit, postgres: psycopg.Connection, pool: str
) -> None:
    """Those of the main process would be one more, and so would a connection for each run."""
    beatless.relay.start()
    beatless.worker_process(APP, concurrency=3, arguments=POOLS[pool])
    told = beatless.start_run("looks_for_its_process")
    runs = beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(60)])
    # What a child has begun with is never looked through again.
    assert pool == "threads" or beatless.wait_for_run_completion(told.run_id).result is False
    assert {beatless.wait_for_run_completion(run.run_id).state for run in runs} == {
        RunState.COMPLETED
    }
    found = postgres.execute(
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name LIKE 'beatless worker%%' AND strpos(query, %s) > 0",
        [f"{beatless.app.settings.schema}."],
    ).fetchone()
    assert found is not None
    assert 1 <= found[0] <= 3


@pytest.mark.slow
def test_priorities_order_a_backlog_that_is_larger_than_what_the_broker_holds(
    beatless: Kit,
) -> None:
    wanted = [RunRequest(plan="two_steps", priority=n * 7 % 10) for n in range(100)]
    runs = beatless.client.start_runs(wanted)
    beatless.work_until_idle()
    ended = sorted(
        (beatless.client.get_run(run.run_id) for run in runs), key=lambda run: run.started_at
    )
    assert [run.priority for run in ended] == sorted((r.priority for r in ended), reverse=True)
