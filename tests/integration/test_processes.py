"""Real workers and relays as processes, killed with SIGKILL."""

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from beatless import App, RunState
from beatless.cli.demo import GOLDEN, without_handbacks
from beatless.client import RunRequest
from beatless.outbox.publishers import worker_queue
from beatless.testing import Kit
from tests.child_logs import await_line
from tests.valkeys import until

APP = "tests.plans:app"


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Leases that end when the test says so, and time to stop: who is only slow loses nothing."""
    return {"lease_seconds": 300, "redispatch_seconds": 1, "grace_seconds": 300}


def notes(ledger: Path, step: str) -> list[dict[str, Any]]:
    """The lines of a step in the ledger of a run that may be writing another one."""
    text = ledger.read_text() if ledger.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [line for line in lines if line["step"] == step]


def await_death(pid: int) -> None:
    """Return when the process executes nothing any more, reaped or not."""
    stat = Path(f"/proc/{pid}/stat")

    def dead() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    until(dead, 60)


def test_a_worker_killed_in_the_middle_of_a_step_is_replaced(beatless: Kit, tmp_path: Path) -> None:
    beatless.relay.start()
    beatless.worker_process(APP)
    ledger = tmp_path / "ledger"
    run = beatless.start_run("ledger", {"ledger": str(ledger), "kills": 2})

    for death in (1, 2):
        until(lambda death=death: len(notes(ledger, "b")) >= death)
        await_death(notes(ledger, "b")[death - 1]["pid"])

    finished = beatless.wait_for_run_completion(run.run_id)

    assert finished.result == "abc"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert Counter(line["step"] for line in lines) == {"a": 1, "b": 3, "c": 1}
    assert len({line["pid"] for line in lines}) >= 3
    beatless.verify()


@pytest.mark.long
def test_kill_9_of_the_whole_worker_lets_another_finish(
    beatless: Kit, beatless_app: App, tmp_path: Path
) -> None:
    beatless.relay.start()
    worker = beatless.worker_process(APP)
    started, go = tmp_path / "started", tmp_path / "go"
    run = beatless.start_run("patient", {"started": str(started), "go": str(go)})
    stream = beatless.client.stream_run(run.run_id, timeout=300)
    while next(stream).type != "StepStarted":
        pass

    worker.kill()  # its child goes with it
    go.touch()
    beatless.advance(301)
    beatless.worker_process(APP)

    assert beatless.wait_for_run_completion(run.run_id).result == "one"
    assert beatless.client.get_run(run.run_id).attempt == 2
    assert [event.seq for event in stream][-1] == len(beatless.client.events(run.run_id))
    beatless.verify()


def test_a_relay_killed_and_restarted_goes_on_where_it_was(beatless: Kit) -> None:
    relay = beatless.relay_process(APP)
    beatless.worker_process(APP)
    first = beatless.start_run("agents.run")
    beatless.wait_for_run_completion(first.run_id)

    relay.kill()
    runs = beatless.client.start_runs([RunRequest(plan="agents.run") for _ in range(20)])
    beatless.relay_process(APP)

    for run in runs:
        events = without_handbacks(beatless.collect_stream(run.run_id))
        assert [event.type for event in events] == GOLDEN
    beatless.wait_for_outbox_flush(runs[-1].run_id)
    beatless.verify()


@pytest.mark.long
def test_a_standby_relay_takes_over_from_a_killed_one(beatless: Kit) -> None:
    relay = beatless.relay_process(APP)
    beatless.relay_process(APP)
    beatless.worker_process(APP)

    relay.kill()

    for run in beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(20)]):
        assert beatless.wait_for_run_completion(run.run_id).result == "one two"
    beatless.verify()


def test_a_cancel_reaches_a_step_that_looks_for_it(beatless: Kit, tmp_path: Path) -> None:
    beatless.relay.start()
    beatless.worker_process(APP)
    run = beatless.start_run(
        "patient", {"started": str(tmp_path / "started"), "go": str(tmp_path / "never")}
    )
    stream = beatless.client.stream_run(run.run_id, timeout=300)
    while next(stream).type != "StepStarted":
        pass

    beatless.client.cancel_run(run.run_id)

    assert [event.type for event in stream] == ["CancelRequested", "StepFailed", "RunFinished"]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


def test_a_worker_told_to_stop_gives_its_run_back_at_the_boundary(
    beatless: Kit, tmp_path: Path
) -> None:
    beatless.relay.start()
    worker = beatless.worker_process(APP)
    started, go = tmp_path / "started", tmp_path / "go"
    run = beatless.start_run("patient", {"started": str(started), "go": str(go)})
    stream = beatless.client.stream_run(run.run_id, timeout=300)
    while next(stream).type != "StepStarted":
        pass

    os.kill(worker.pid, signal.SIGTERM)
    await_line(worker, "runs are released")
    holder = beatless.client.get_run(run.run_id).worker
    go.touch()
    assert next(stream).type == "StepFinished"
    beatless.worker_process(APP)  # starts for longer than the handover of an unbroken run takes

    ended = beatless.wait_for_run_completion(run.run_id)
    assert (ended.result, ended.attempt) == ("one", 2)
    assert ended.worker != holder
    # One attempt of each step: the first one's ended, the second one's began elsewhere.
    assert [(event.type, event.step, event.attempt) for event in stream] == [
        ("StepStarted", "first", 1),
        ("StepFinished", "first", 1),
        ("RunFinished", None, None),
    ]
    told = [moment.text for moment in beatless.client.explain(run.run_id)]
    assert "waited for another worker" in told
    beatless.verify()


@pytest.mark.long
def test_a_broker_that_lost_everything_is_filled_again(beatless: Kit, beatless_app: App) -> None:
    runs = beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(10)])
    beatless.drain_outbox_once()
    with beatless_app.celery.connection_for_write() as broker:
        queue = worker_queue(beatless_app.settings.prefix, "default")(broker.default_channel)
        queue.delete()
        queue.exchange.delete()

    beatless.relay_process(APP)
    beatless.worker_process(APP)

    for run in runs:
        assert beatless.wait_for_run_completion(run.run_id).result == "one two"
    beatless.verify()
