"""`beatless worker --pool async`: one process executes many runs at once."""

import os
import threading
from pathlib import Path
from time import monotonic

import pytest

from beatless import Plan, RunRequest, RunState
from beatless.local.child import Child
from beatless.testing import Kit
from tests.async_plans import ALL

APP = "tests.async_plans:app"
RUNS = 40


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return ALL


@pytest.fixture
def worker(beatless: Kit) -> Child:
    beatless.relay.start()
    return beatless.worker_process(APP, concurrency=RUNS, arguments=["--pool", "async"])


def traces(beatless: Kit, run_id: str) -> list[str]:
    events = beatless.client.events(run_id)
    return [event.data["name"] for event in events if event.type == "DebugTrace"]


@pytest.mark.slow
def test_one_process_executes_many_runs_at_once(beatless: Kit, worker: Child) -> None:
    given = {"gate": "all", "runs": RUNS}
    runs = beatless.client.start_runs([RunRequest(plan="together", input=given)] * RUNS)

    for run in runs:
        assert beatless.wait_for_run_completion(run.run_id).result == 7
        events = beatless.client.events(run.run_id)
        met, thread, *_ = [e.data["result"] for e in events if e.type == "StepFinished"]
        assert met == RUNS
        assert thread.startswith("beatless-body")
        assert traces(beatless, run.run_id) == ["inside", "here"]
    beatless.verify()


def test_a_function_is_executed_beside_others(beatless: Kit, worker: Child) -> None:
    runs = beatless.client.start_runs(
        [RunRequest(plan="sums", input=list(range(n))) for n in range(10)]
    )

    for number, run in enumerate(runs):
        assert beatless.wait_for_run_completion(run.run_id).result == sum(range(number))
    beatless.verify()


def test_a_time_out_and_a_cancel_end_one_task_each(beatless: Kit, worker: Child) -> None:
    endless = [beatless.start_run("endless") for _ in range(2)]
    for run in endless:
        beatless.wait_for_event(run.run_id, "DebugTrace")
    late = beatless.start_run("late")
    beatless.client.cancel_run(endless[0].run_id)

    assert beatless.wait_for_run_completion(late.run_id).error["type"] == "StepTimeout"
    cancelled = beatless.wait_for_run_completion(endless[0].run_id)
    assert cancelled.state is RunState.CANCELLED
    assert beatless.client.get_run(endless[1].run_id).state is RunState.RUNNING
    assert beatless.wait_for_run_completion(beatless.start_run("quick", 3).run_id).result == 3


def test_a_worker_that_is_killed_costs_none_of_its_runs_a_crash(
    beatless: Kit, worker: Child, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    given = {"go": str(go)}
    runs = beatless.client.start_runs([RunRequest(plan="survives", input=given)] * RUNS)
    for run in runs:
        beatless.wait_for_event(run.run_id, "DebugTrace")
    worker.kill()
    beatless.worker_process(APP, concurrency=RUNS, arguments=["--pool", "async"])
    go.touch()

    for run in runs:
        ended = beatless.wait_for_run_completion(run.run_id)
        assert ended.state is RunState.COMPLETED
    beatless.verify()


def test_a_worker_that_is_asked_to_stop_gives_its_runs_back(beatless: Kit, tmp_path: Path) -> None:
    beatless.relay.start()
    worker = beatless.worker_process(
        APP, concurrency=4, arguments=["--pool", "async"], grace_seconds=0.2
    )
    runs = [beatless.start_run("survives", {"go": str(tmp_path / "go")}) for _ in range(4)]
    for run in runs:
        beatless.wait_for_event(run.run_id, "DebugTrace")
    worker.terminate()
    worker.reap(monotonic() + 60)

    for run in runs:
        assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
    beatless.verify()


@pytest.mark.long
def test_a_step_that_ends_its_process_fails_alone(beatless: Kit) -> None:
    beatless.relay.start()
    runs = beatless.client.start_runs(
        [RunRequest(plan="deadly", input={"poison": number == 3}) for number in range(RUNS)]
    )
    worker = beatless.worker_process(APP, concurrency=RUNS, arguments=["--pool", "async"])
    deaths, never = 0, threading.Event()
    while not never.wait(0.2) and not beatless.client.get_run(runs[3].run_id).state.final:
        if not worker.alive:
            deaths += 1
            worker = beatless.worker_process(APP, concurrency=RUNS, arguments=["--pool", "async"])

    assert 1 <= deaths <= 6
    poison, *others = [runs[3], *runs[:3], *runs[4:]]
    assert beatless.client.get_run(poison.run_id).error["type"] == "StepCrashed"
    for run in others:
        assert beatless.wait_for_run_completion(run.run_id).result == "well"
    beatless.verify()


MOST_RSS_BYTES = 500 * 2**20
"""Above it the kernel would end the process, in a container of this size."""


def rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@pytest.mark.long
def test_of_500_steps_the_one_that_exhausts_the_memory_fails_alone(beatless: Kit) -> None:
    """As the kernel does, the test ends the process whose memory is too large; five times."""
    beatless.relay.start()
    runs = beatless.client.start_runs(
        [RunRequest(plan="hungry", input={"poison": number == 3}) for number in range(500)]
    )
    arguments = ["--pool", "async"]
    worker = beatless.worker_process(APP, concurrency=500, arguments=arguments)
    deaths, never = 0, threading.Event()
    while not beatless.client.get_run(runs[3].run_id).state.final:
        never.wait(0.02)
        if rss_bytes(worker.pid) > MOST_RSS_BYTES:
            worker.kill()
            deaths += 1
            worker = beatless.worker_process(APP, concurrency=500, arguments=arguments)

    assert 1 <= deaths <= 6
    poison, *others = [runs[3], *runs[:3], *runs[4:]]
    assert beatless.client.get_run(poison.run_id).error["type"] == "StepCrashed"
    for run in others:
        assert beatless.wait_for_run_completion(run.run_id).result == "well"
    beatless.verify()
