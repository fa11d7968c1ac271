"""A plan's `on_cancel` step: what a cancelled run has begun is undone before it ends."""

from pathlib import Path

import pytest

from beatless import RunState
from beatless.cli.render import facts
from beatless.testing import Kit

UNDONE = ["StepStarted", "StepFinished", "RunFinished"]


def after_cancel(kit: Kit, run_id: str) -> list[str]:
    types = kit.event_types(run_id)
    return types[types.index("CancelRequested") + 1 :]


def test_a_run_cancelled_between_steps_is_undone_before_it_ends(beatless: Kit) -> None:
    run = beatless.start_run("compensated")
    beatless.step(run.run_id)
    waiting = beatless.client.cancel_run(run.run_id)
    assert waiting.state is RunState.QUEUED  # it needs a worker

    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id) == UNDONE
    events = beatless.client.events(run.run_id)
    assert events[-2].step == "undo"
    assert events[-2].data["result"] == {"undone": ["first"]}
    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.error["type"]) == (RunState.CANCELLED, "RunCancelled")
    beatless.verify()


def test_a_run_that_waits_for_a_retry_is_undone_at_once(beatless: Kit) -> None:
    run = beatless.start_run("compensated")
    beatless.work_until_idle()
    beatless.client.cancel_run(run.run_id)

    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id) == UNDONE
    beatless.verify()


def test_a_run_that_had_not_begun_ends_without_a_worker(beatless: Kit) -> None:
    run = beatless.start_run("compensated")

    assert beatless.client.cancel_run(run.run_id).state is RunState.CANCELLED

    assert after_cancel(beatless, run.run_id) == ["RunFinished"]
    assert beatless.work_until_idle() == 0
    beatless.verify()


def test_a_step_that_notices_the_cancel_is_followed_by_the_undoing(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = beatless.start_run("compensated", {"look": True})
    original = beatless.app.journal.settle

    def cancelled_meanwhile(*arguments):
        monkeypatch.setattr(beatless.app.journal, "settle", original)
        settled = original(*arguments)  # the second step has started now
        beatless.client.cancel_run(run.run_id)
        return settled

    monkeypatch.setattr(beatless.app.journal, "settle", cancelled_meanwhile)
    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id) == ["StepFailed", *UNDONE]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()
    (failed,) = [e for e in beatless.client.events(run.run_id) if e.type == "StepFailed"]
    assert "tried again" not in facts(failed)  # nor is it: the run goes on with `undo`
    told = [m.at for m in beatless.client.explain(run.run_id) if m.kind in ("attempt", "cancel")]
    assert len(told) == 4
    assert told == sorted(told)  # the cancel came in the middle of the second attempt


def test_an_undoing_that_fails_is_tried_again_and_then_recorded(beatless: Kit) -> None:
    run = beatless.start_run("compensated", {"undo_failures": 9})
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)

    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
    beatless.advance(10)
    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id) == [
        "StepStarted",
        "StepFailed",
        "StepStarted",
        "StepFailed",
        "RunFinished",
    ]
    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.CANCELLED
    assert ended.error["on_cancel"]["message"] == "cannot be undone"
    assert beatless.client.events(run.run_id)[-1].data["error"] == ended.error
    beatless.verify()


def test_an_undoing_that_works_in_its_second_attempt_is_enough(beatless: Kit) -> None:
    run = beatless.start_run("compensated", {"undo_failures": 1})
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()
    beatless.advance(10)
    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.CANCELLED
    assert "on_cancel" not in ended.error
    beatless.verify()


@pytest.mark.parametrize("point", ["step.before", "step.effect_done", "task.before_ack"])
def test_a_worker_that_dies_while_it_undoes_is_replaced(beatless: Kit, point: str) -> None:
    run = beatless.start_run("compensated")
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    with beatless.crash(at=point):
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id)[-2:] == UNDONE[-2:]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


def test_an_undoing_that_kills_its_process_again_and_again_is_recorded(beatless: Kit) -> None:
    run = beatless.start_run("compensated")
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    for _ in range(5):
        with beatless.crash(at="step.before"):
            beatless.work_until_idle()
        beatless.advance(60)
    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.CANCELLED
    assert ended.error["on_cancel"]["message"] == "step undo ended its process 5 times"
    beatless.verify()


def test_a_cancel_during_the_last_step_is_undone_too(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = beatless.start_run("compensated")
    beatless.work_until_idle()
    beatless.advance(10)
    with beatless.crash(at="step.before", nth=2):  # in the last step
        beatless.work_until_idle()
    beatless.client.cancel_run(run.run_id)
    beatless.advance(60)
    beatless.work_until_idle()

    assert after_cancel(beatless, run.run_id) == UNDONE
    beatless.verify()


def test_a_run_that_is_not_cancelled_never_sees_the_step(beatless: Kit) -> None:
    run = beatless.start_run("compensated")
    beatless.work_until_idle()
    beatless.advance(10)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    assert "undo" not in {event.step for event in beatless.client.events(run.run_id)}
