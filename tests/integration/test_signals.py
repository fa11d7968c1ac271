"""Signals of whoever ends a worker, its exit status, and processes that bodies start."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from beatless import Plan, StepContext, StepEnded, step
from beatless.testing import Kit
from beatless.worker.child_signals import EVERY_CHILD, IgnoredSignal, TerminatedChildren
from tests.child_logs import await_line
from tests.plans import ALL

APP = "tests.plans:app"


@step
def forks(ctx: StepContext) -> int:
    """Its copy comes to an end of its own: by a return, an exit, or an error."""
    pid = os.fork()
    if pid == 0:
        if ctx.input == "returns":
            return 99
        if ctx.input == "fails":
            raise ValueError("in the copy")
        sys.exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


SPEAK = {
    "trace": lambda ctx: ctx.trace("of the copy"),
    "emit": lambda ctx: ctx.emit("of the copy"),
    "raise_if_cancelled": lambda ctx: ctx.raise_if_cancelled(),
}


@step
def speaks_twice(ctx: StepContext) -> str:
    """In a copy, which tells by a pipe what came of it, and by itself."""
    told, tells = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(told)
        try:
            SPEAK[ctx.input](ctx)
        except StepEnded as error:
            os.write(tells, str(error).encode())
        os._exit(0)
    os.close(tells)
    said = os.read(told, 1000).decode()
    os.close(told)
    os.waitpid(pid, 0)
    SPEAK[ctx.input](ctx)
    return said


@step
def returns_low(ctx: StepContext) -> str:
    """Leaves hardly room for its own return: the call above it could make none."""
    for limit in range(1, sys.getrecursionlimit()):
        with suppress(RecursionError):  # fewer than there are calls now
            sys.setrecursionlimit(limit)
            break
    return "low"


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        *ALL,
        Plan("forks", [forks]),
        Plan("speaks_twice", [speaks_twice]),
        Plan("returns_low", [returns_low]),
    ]


@pytest.mark.parametrize(
    "beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 300, "grace_seconds": 300}]
)
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_to_the_whole_group_of_a_worker_lets_its_step_end(
    beatless: Kit, tmp_path: Path, number: signal.Signals
) -> None:
    go = tmp_path / "go"
    beatless.relay.start()
    worker = beatless.worker_process(APP)
    run = beatless.start_run("gated", {"go": str(go)})
    beatless.wait_for_event(run.run_id, "StepStarted")

    os.killpg(worker.pid, number)
    await_line(worker, "runs are released")
    if number == signal.SIGTERM:
        os.killpg(worker.pid, number)  # once more: only a second SIGINT ends steps
    go.touch()

    assert beatless.wait_for_run_completion(run.run_id).attempt == 1
    assert worker._process.wait(60) == 0
    assert beatless.event_types(run.run_id)[2:] == ["StepFinished", "RunFinished"]
    beatless.verify()


@pytest.mark.slow
@pytest.mark.parametrize(
    "beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 300, "grace_seconds": 300}]
)
def test_a_variable_by_which_another_celery_ends_its_tasks_at_once_is_ignored(
    beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery documents it for Heroku: SIGTERM begins a cold shutdown."""
    monkeypatch.setenv("REMAP_SIGTERM", "SIGQUIT")
    go = tmp_path / "go"
    beatless.relay.start()
    worker = beatless.worker_process(APP)
    run = beatless.start_run("gated", {"go": str(go)})
    beatless.wait_for_event(run.run_id, "StepStarted")

    os.kill(worker.pid, signal.SIGTERM)
    await_line(worker, "runs are released")
    go.touch()

    assert beatless.wait_for_run_completion(run.run_id).attempt == 1
    assert worker._process.wait(60) == 0
    assert "REMAP_SIGTERM" in worker.log.read_text()


@pytest.mark.long
@pytest.mark.parametrize(
    "beatless_settings", [{"lease_seconds": 300, "redispatch_seconds": 300, "grace_seconds": 300}]
)
def test_a_hangup_of_the_whole_group_lets_its_step_end_and_starts_the_worker_again(
    beatless: Kit, tmp_path: Path
) -> None:
    """As when a terminal closes, and as Celery's workers take it."""
    go = tmp_path / "go"
    beatless.relay_process(APP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored below nohup, and inherited
    try:
        worker = beatless.worker_process(APP)
    finally:
        signal.signal(signal.SIGHUP, before)
    run = beatless.start_run("gated", {"go": str(go)})
    beatless.wait_for_event(run.run_id, "StepStarted")

    os.killpg(worker.pid, signal.SIGHUP)
    await_line(worker, "runs are released")
    go.touch()

    assert beatless.wait_for_run_completion(run.run_id).attempt == 1
    assert beatless.event_types(run.run_id)[2:] == ["StepFinished", "RunFinished"]
    after = beatless.start_run("two_steps")
    assert beatless.wait_for_run_completion(after.run_id).attempt == 1
    assert worker.alive
    beatless.verify()


@pytest.mark.long
def test_a_child_that_celery_ends_gives_its_run_back(beatless: Kit, tmp_path: Path) -> None:
    """Flower's "Terminate": no failure and no crash."""
    go = tmp_path / "go"
    beatless.relay_process(APP)
    beatless.worker_process(APP, concurrency=1)
    run = beatless.start_run("gated", {"go": str(go)})
    beatless.wait_for_event(run.run_id, "StepStarted")
    control = beatless.app.celery.control
    (active,) = control.inspect(timeout=60, limit=1).active().values()

    control.revoke(active[0]["id"], terminate=True)

    trace = beatless.wait_for_event(run.run_id, "DebugTrace")
    assert trace.data["name"] == "beatless.given_back"
    go.touch()
    ended = beatless.wait_for_run_completion(run.run_id)
    assert (ended.result, ended.attempt) == ("through", 2)
    beatless.verify()


def test_a_handler_obeys_only_who_means_its_process() -> None:
    meant = TerminatedChildren()
    left = IgnoredSignal(meant)
    assert left == signal.SIG_IGN
    left(signal.SIGTERM, None)
    assert os.getpid() not in meant
    for pid in range(2, 1030):
        meant.add(pid)
    meant.add(os.getpid())
    assert os.getpid() in meant
    other = TerminatedChildren()
    other.add(EVERY_CHILD)
    assert os.getpid() in other


def test_a_process_that_a_step_has_forked_ends_by_a_signal() -> None:
    left = IgnoredSignal(TerminatedChildren())
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, left)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(("how", "status"), [("returns", 0), ("exits", 7), ("fails", 1)])
def test_a_copy_that_a_body_forks_ends_with_the_body_and_writes_nothing(
    beatless: Kit, how: str, status: int
) -> None:
    run = beatless.start_run("forks", how)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == status
    types = ["RunStarted", "StepStarted", "StepFinished", "RunFinished"]
    assert beatless.event_types(run.run_id) == types
    beatless.verify()


@pytest.mark.parametrize("call", SPEAK)
def test_a_copy_that_a_body_forks_cannot_speak_for_it(beatless: Kit, call: str) -> None:
    run = beatless.start_run("speaks_twice", call)
    beatless.work_until_idle()
    assert "executed by another process, of which this is a copy" in (
        beatless.client.get_run(run.run_id).result
    )
    said = {"trace": ["DebugTrace"], "emit": ["StepOutput"], "raise_if_cancelled": []}[call]
    types = ["RunStarted", "StepStarted", *said, "StepFinished", "RunFinished"]
    assert beatless.event_types(run.run_id) == types
    beatless.verify()


def test_a_recursion_limit_that_a_body_has_lowered_ends_with_it(beatless: Kit) -> None:
    before = sys.getrecursionlimit()
    try:
        run = beatless.start_run("returns_low")
        beatless.work_until_idle()
        assert sys.getrecursionlimit() == before
    finally:
        sys.setrecursionlimit(before)
    assert beatless.client.get_run(run.run_id).result == "low"


@pytest.mark.long
def test_a_body_in_a_child_of_the_worker_may_use_multiprocessing(beatless: Kit) -> None:
    beatless.relay_process(APP)
    beatless.worker_process(APP)
    run = beatless.start_run("multiplies")
    found = beatless.wait_for_run_completion(run.run_id, timeout=300)
    made = {method: [1, 2] for method in ("fork", "spawn", "forkserver")}
    assert found.result == made | {"executor": [3, 4], "manager": [5, 6]}, found.error


@pytest.mark.long
def test_a_worker_that_cannot_go_on_says_so_by_its_status(beatless: Kit) -> None:
    code = (
        "from beatless.cli import main\n"
        "import tests.plans\n"
        "tests.plans.app.celery.conf.result_backend = 'no-such-backend'\n"
        "main()\n"
    )
    settings = beatless.app.settings.to_env() | {"BEATLESS_APP": APP}
    done = subprocess.run(
        [sys.executable, "-c", code, "worker", "--concurrency", "1"],
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=600,
    )
    assert b"Unrecoverable error" in done.stderr + done.stdout
    assert done.returncode != 0
