"""A cancel is stored first; it can come at any time."""

from collections.abc import Callable
from typing import Any

import pytest

from beatless import (
    Fatal,
    Plan,
    RunContext,
    RunNotFound,
    RunState,
    StepFailed,
    plan,
    retry,
    step,
    wait,
)
from beatless.testing import Kit


def test_cancelled_while_queued_ends_without_a_worker(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")

    cancelled = beatless.client.cancel_run(run.run_id, reason="changed my mind")

    assert cancelled.state is RunState.CANCELLED
    assert cancelled.error["message"] == "changed my mind"
    assert beatless.work_until_idle() == 0
    assert beatless.event_types(run.run_id) == ["RunStarted", "CancelRequested", "RunFinished"]
    assert beatless.collect_stream(run.run_id)[-1].data["outcome"] == "cancelled"
    beatless.verify()


def test_cancelled_after_dispatch_the_message_is_dropped(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()  # the message is in the broker now
    beatless.client.cancel_run(run.run_id)

    beatless.work_until_idle()

    assert beatless.event_types(run.run_id) == ["RunStarted", "CancelRequested", "RunFinished"]


def test_cancelled_between_steps_finishes_without_running_the_next(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)

    beatless.work_until_idle()

    assert beatless.event_types(run.run_id) == [
        "RunStarted",
        "StepStarted",
        "StepFinished",
        "CancelRequested",
        "RunFinished",
    ]
    beatless.verify()


def test_cancelled_while_running_commits_the_step_in_flight_and_ends(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="step.before"):
        beatless.work_until_idle()
    requested = beatless.client.cancel_run(run.run_id)
    assert requested.state is RunState.RUNNING

    beatless.advance(60)
    beatless.work_until_idle()

    # The next worker sees the cancel before it starts the step again.
    assert beatless.event_types(run.run_id) == [
        "RunStarted",
        "StepStarted",
        "CancelRequested",
        "RunFinished",
    ]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


def test_cancelled_while_waiting_for_a_retry_ends_at_once(beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 2})
    beatless.work_until_idle()

    assert beatless.client.cancel_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


def test_cancelled_while_finished_is_a_clear_no_op(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    before = beatless.client.events(run.run_id)

    after = beatless.client.cancel_run(run.run_id)

    assert after.state is RunState.COMPLETED
    assert after.cancel_requested_at is None
    assert beatless.client.events(run.run_id) == before


def test_a_second_cancel_changes_nothing(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    first = beatless.client.cancel_run(run.run_id)
    assert beatless.client.cancel_run(run.run_id) == first


def test_cancelling_an_unknown_run_says_so(beatless: Kit) -> None:
    with pytest.raises(RunNotFound, match="no run has id 'nobody'"):
        beatless.client.cancel_run("nobody")


def test_a_cancel_rolls_back_with_its_transaction(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with beatless.app.engine.connect() as connection:
        transaction = connection.begin()
        beatless.client.cancel_run(run.run_id, connection=connection)
        transaction.rollback()

    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


@pytest.mark.parametrize(("plan", "executed"), [("half", []), ("compensated", ["undo"])])
def test_a_retried_run_that_is_cancelled_before_its_first_claim_ends(
    beatless: Kit, plan: str, executed: list[str]
) -> None:
    """With an `on_cancel` step as well, which a worker has to execute first."""
    first = beatless.start_run(plan)
    beatless.step(first.run_id)
    beatless.client.cancel_run(first.run_id)
    beatless.work_until_idle()
    retried = beatless.client.retry_run(first.run_id)

    beatless.client.cancel_run(retried.run_id)
    beatless.work_until_idle()

    assert beatless.client.get_run(retried.run_id).state is RunState.CANCELLED
    events = beatless.client.events(retried.run_id)
    assert [event.step for event in events if event.type == "StepFinished"] == executed
    beatless.verify()


@step
def undo(ctx: Any) -> None: ...


@pytest.mark.parametrize(("undone", "state"), [(False, "cancelled"), (True, "queued")])
def test_a_run_that_waits_is_given_back_as_it_is_after_the_cancel(
    beatless: Kit, undone: bool, state: str
) -> None:
    options: dict[str, Any] = {"on_cancel": undo} if undone else {}
    beatless.app.plans["waits"] = Plan("waits", [wait("paid")], **options)
    run = beatless.start_run("waits")
    beatless.work_until_idle()
    found = beatless.client.cancel_run(run.run_id)
    assert (found.state, found.cancel_requested_at is not None) == (state, True)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED


def listed(body: Any, **options: Any) -> Plan:
    return Plan("fails", [step(name="body", retry=RETRY)(body)], **options)


def asked(body: Any) -> Plan:
    failing = step(name="body", retry=RETRY)(body)

    @plan("fails")
    def function(run: RunContext[Any]) -> str:
        try:
            run.step(failing)
        except StepFailed:
            return "went on"
        return "never"

    return function


RETRY = retry(max_attempts=2, initial=10, jitter=0)

FAILURES: dict[str, tuple[Callable[[Any], Plan], type[Exception], bool, bool]] = {
    "cancelled": (lambda body: listed(body, on_cancel=undo), ValueError, True, True),
    "cancelled, given up": (lambda body: listed(body, on_cancel=undo), Fatal, True, True),
    "cancelled, of a function": (asked, ValueError, True, False),
    "given up, of a function": (asked, Fatal, False, True),
    "given up": (listed, Fatal, False, False),
}


@pytest.mark.parametrize(("made", "error", "cancels", "goes_on"), FAILURES.values(), ids=FAILURES)
def test_a_failure_without_another_attempt_has_no_time_of_one(
    beatless: Kit,
    made: Callable[[Any], Plan],
    error: type[Exception],
    cancels: bool,
    goes_on: bool,
) -> None:
    def body(ctx: Any) -> None:
        if cancels:
            beatless.client.cancel_run(ctx.run_id)
        raise error("no")

    beatless.app.plans["fails"] = made(body)
    run = beatless.start_run("fails")
    beatless.work_until_idle()
    [failed] = [e for e in beatless.client.events(run.run_id) if e.type == "StepFailed"]
    assert failed.data["retry_at"] is None
    assert failed.data.get("final", False) is goes_on
    assert beatless.client.get_run(run.run_id).state.final
    beatless.verify()


def test_a_failure_with_another_attempt_has_its_time(beatless: Kit) -> None:
    def body(ctx: Any) -> None:
        raise ValueError("no")

    beatless.app.plans["fails"] = asked(body)
    run = beatless.start_run("fails")
    beatless.work_until_idle()
    beatless.advance(10)
    beatless.work_until_idle()
    failures = [e.data for e in beatless.client.events(run.run_id) if e.type == "StepFailed"]
    assert [(each["retry_at"] is None, each.get("final")) for each in failures] == [
        (False, None),
        (True, True),
    ]
