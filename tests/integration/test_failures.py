"""`App(on_failure=…)`: told once of each run that has failed for good, and of dead letters."""

import logging
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from beatless import App, Failure, Fatal, Plan, RunState, StepContext, retry, step
from beatless.failures import Failures, OnFailure
from beatless.outbox.observer import DeadLettered, DeadlinesExpired, Drained
from beatless.testing import Kit
from tests import plans

RECIPE = Path(__file__).parents[2] / "docs" / "failures.md"


@step(retry=retry(max_attempts=3, initial=0))
def breaks(ctx: StepContext) -> None:
    raise ValueError(f"attempt {ctx.attempt}")


@step
def undone(ctx: StepContext) -> None:
    raise Fatal("never")


PLANS = [*plans.app.plans.values(), Plan("breaks", [breaks])]


@contextmanager
def hooked(beatless_app: App, on_failure: OnFailure, tmp_path: Path) -> Iterator[Kit]:
    app = App(beatless_app.settings, PLANS, on_failure=on_failure)
    kit = Kit(app, directory=tmp_path)
    yield kit
    kit.close()


@pytest.fixture
def told() -> list[Failure]:
    return []


@pytest.fixture
def kit(beatless_app: App, told: list[Failure], tmp_path: Path) -> Iterator[Kit]:
    with hooked(beatless_app, told.append, tmp_path) as kit:
        yield kit


def test_a_run_that_has_failed_for_good_is_told_once(kit: Kit, told: list[Failure]) -> None:
    run = kit.start_run("breaks", tags={"customer": "7"})
    fine = kit.start_run("two_steps")
    kit.work_until_idle()
    (failure,) = told
    assert (failure.kind, failure.run_id, failure.plan) == ("run", run.run_id, "breaks")
    assert (failure.queue, failure.step, failure.attempt) == ("default", "breaks", 3)
    assert (failure.error["type"], failure.error["message"]) == ("ValueError", "attempt 3")
    assert "raise ValueError" in failure.error["traceback"]
    assert isinstance(failure.exception, ValueError)
    assert failure.exception.__traceback__ is not None
    assert failure.tags == {"customer": "7"}
    assert kit.client.get_run(fine.run_id).state is RunState.COMPLETED


def test_a_cancelled_run_and_one_that_is_tried_again_have_not_failed(
    kit: Kit, told: list[Failure]
) -> None:
    kit.client.cancel_run(kit.start_run("two_steps").run_id)
    kit.start_run("retries", {"failures": 1})
    kit.work_until_idle()
    kit.advance(60)
    kit.work_until_idle()
    assert told == []


@pytest.mark.slow
def test_a_step_that_ends_its_process_is_told_without_an_exception(
    kit: Kit, told: list[Failure]
) -> None:
    run = kit.start_run("two_steps")
    for _ in range(10):
        if kit.client.get_run(run.run_id).state.final:
            break
        try:
            with kit.crash(at="step.before"):
                kit.work_until_idle()
        except AssertionError:
            break  # it was not begun again
        kit.advance(60)
    kit.work_until_idle()
    (failure,) = told
    assert (failure.error["type"], failure.exception) == ("StepCrashed", None)
    assert failure.step == "first"


def test_a_deadline_is_told(kit: Kit, told: list[Failure]) -> None:
    run = kit.start_run("two_steps", deadline=5)
    kit.advance(6)
    kit.work_until_idle()
    (failure,) = told
    assert (failure.run_id, failure.error["type"]) == (run.run_id, "DeadlineExceeded")
    assert (failure.step, failure.exception) == (None, None)


def test_what_a_relay_ends_and_gives_up_on_is_told() -> None:
    told: list[Failure] = []
    failures = Failures(told.append)
    failures(DeadlinesExpired(runs=[("r1", "p", "q")]))
    failures(DeadLettered(run_id="r2", reason="too large for Redis"))
    failures(Drained(events=0, tasks=0, rows=[], messages=[]))
    assert [(f.kind, f.run_id, f.plan) for f in told] == [
        ("run", "r1", "p"),
        ("dead letter", "r2", None),
    ]
    assert told[0].error["type"] == "DeadlineExceeded"
    assert told[1].error["message"] == "too large for Redis"


@pytest.mark.parametrize("error", [RuntimeError("no mail server"), SystemExit(3)])
def test_what_it_raises_is_logged_and_harms_nothing(
    beatless_app: App, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def careless(_failure: Failure) -> None:
        raise error

    with (
        caplog.at_level(logging.ERROR),
        hooked(beatless_app, careless, tmp_path) as kit,
    ):
        runs = [kit.start_run("breaks"), kit.start_run("two_steps")]
        kit.work_until_idle()
        states = [kit.client.get_run(run.run_id).state for run in runs]
    assert states == [RunState.FAILED, RunState.COMPLETED]
    assert "on_failure raised an error" in caplog.text


def test_one_that_hangs_is_waited_for_no_longer_than_said(
    beatless_app: App,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("beatless.failures.ON_FAILURE_S", 0.1)
    go = threading.Event()
    with (
        caplog.at_level(logging.WARNING),
        hooked(beatless_app, lambda _failure: go.wait(60), tmp_path) as kit,
    ):
        runs = [kit.start_run("breaks"), kit.start_run("two_steps")]
        kit.work_until_idle()
        assert kit.client.get_run(runs[1].run_id).state is RunState.COMPLETED
    go.set()
    assert "on_failure has not returned" in caplog.text


def test_one_that_hangs_holds_up_a_relay_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float | None] = []
    join = threading.Thread.join

    def noted(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "beatless-on-failure":
            waited.append(timeout)
        join(thread, timeout)

    monkeypatch.setattr("beatless.failures.ON_FAILURE_S", 0.5)
    monkeypatch.setattr("beatless.failures.MAX_HANGING", 40)
    go, told = threading.Event(), threading.Semaphore(0)

    def hangs(_failure: Failure) -> None:
        go.wait(60)
        told.release()

    failures = Failures(hangs)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "join", noted)
        failures(DeadlinesExpired(runs=[(f"r{n}", "p", "q") for n in range(100)]))
    assert waited == [0.5]
    go.set()
    for _ in range(40):
        assert told.acquire(timeout=60)
    for thread in failures._hanging:
        thread.join(60)
    failures(DeadlinesExpired(runs=[("later", "p", "q")]))
    assert told.acquire(timeout=60)


def test_a_thread_that_cannot_be_started_harms_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    Failures(lambda _failure: None)(DeadLettered(run_id="r", reason="too large"))
    assert "on_failure was not called" in caplog.text


def test_the_recipe_for_sentry_sends_the_exception_once_with_its_tags(
    beatless_app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Any, dict[str, Any]]] = []
    tags: list[dict[str, Any]] = []

    @contextmanager
    def new_scope() -> Iterator[Any]:
        tags.append({})
        yield SimpleNamespace(set_tag=lambda name, value: tags[-1].update({name: value}))

    sentry = ModuleType("sentry_sdk")
    vars(sentry).update(
        new_scope=new_scope,
        capture_exception=lambda error: sent.append((error, tags[-1])),
        capture_message=lambda text, level: sent.append((f"{level}: {text}", tags[-1])),
        flush=lambda timeout: None,
    )
    monkeypatch.setitem(sys.modules, "sentry_sdk", sentry)
    code = re.findall(r"```python\n(.*?)```", RECIPE.read_text(), re.DOTALL)[1]
    recipe: dict[str, Any] = {}
    exec(code.partition("\n\napp = ")[0], recipe)

    with hooked(beatless_app, recipe["to_sentry"], tmp_path) as kit:
        run = kit.start_run("breaks")
        kit.work_until_idle()
        late = kit.start_run("two_steps", deadline=5)
        kit.advance(6)
        kit.work_until_idle()

    (error, failed), (message, overdue) = sent
    assert isinstance(error, ValueError)
    assert failed == {
        "beatless.run_id": run.run_id,
        "beatless.plan": "breaks",
        "beatless.queue": "default",
        "beatless.step": "breaks",
        "beatless.attempt": 3,
    }
    assert message.startswith("error: DeadlineExceeded: ")
    assert overdue["beatless.run_id"] == late.run_id
