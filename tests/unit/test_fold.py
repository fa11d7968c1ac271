"""Where a run resumes: the journal folded by its plan."""

import pytest

from beatless import Plan, step
from beatless.orchestrator.events import Event
from beatless.orchestrator.executor import CONNECTION_LOST, SNOOZED, UnknownStep, fold

plan = Plan(
    "p",
    [step(name=name)(lambda ctx: None) for name in ("a", "b", "c")],
    routes={"b": ["a", "b"]},
)


def events(*members: tuple) -> list[Event]:
    return [
        Event(run_id="r", seq=seq, ts=0, type=type, source="worker", step=step, data=data)
        for seq, (type, step, data) in enumerate(members, 1)
    ]


STARTED = ("RunStarted", None, {"plan": "p"})


def test_a_fresh_run_begins_at_the_first_step():
    progress = fold(plan, events(STARTED))
    assert (progress.step.name, progress.occurrence, progress.crashes) == ("a", "a", 0)


def test_a_finished_step_is_not_done_again():
    progress = fold(
        plan, events(STARTED, ("StepStarted", "a", None), ("StepFinished", "a", {"result": 1}))
    )
    assert progress.step.name == "b"
    assert progress.results == {"a": 1}
    assert progress.starts == 0


def test_an_attempt_without_an_outcome_is_a_crash_and_one_that_failed_is_not():
    progress = fold(
        plan,
        events(
            STARTED,
            ("StepStarted", "a", None),
            ("StepFailed", "a", {"error": {}}),
            ("StepStarted", "a", None),
        ),
    )
    assert (progress.starts, progress.failures, progress.crashes) == (2, 1, 1)


def test_a_snooze_is_neither_a_failure_nor_a_crash():
    progress = fold(
        plan,
        events(STARTED, ("StepStarted", "a", None), ("DebugTrace", "a", {"name": SNOOZED})),
    )
    assert (progress.starts, progress.failures, progress.crashes) == (0, 0, 0)


LOST = ("DebugTrace", "a", {"name": CONNECTION_LOST})
REFUSED = ("DebugTrace", "a", {"name": CONNECTION_LOST, "refused": True})


def test_a_lost_transaction_is_neither_a_failure_nor_a_crash():
    begun = ("StepStarted", "a", None)
    progress = fold(plan, events(STARTED, begun, LOST, begun, REFUSED, begun, LOST, begun))
    assert (progress.starts, progress.failures, progress.crashes) == (1, 0, 1)
    assert (progress.lost, progress.refused) == (2, 1)


@pytest.mark.parametrize(
    "end", [("DebugTrace", "a", {"name": SNOOZED}), ("StepFailed", "a", {"error": {}})]
)
def test_lost_transactions_count_only_in_a_row(end: tuple):
    begun = ("StepStarted", "a", None)
    progress = fold(plan, events(STARTED, begun, LOST, begun, end, begun, LOST, begun))
    assert (progress.lost, progress.crashes) == (1, 1)


def test_a_route_back_makes_a_new_occurrence_and_the_latest_result_has_the_steps_name():
    progress = fold(
        plan,
        events(
            STARTED,
            ("StepFinished", "a", {"result": 1}),
            ("StepFinished", "b", {"result": 2, "next": "a"}),
            ("StepFinished", "a#2", {"result": 3}),
        ),
    )
    assert progress.occurrence == "b#2"
    assert progress.results == {"a": 3, "a#2": 3, "b": 2} | {"a": 3}


def test_the_end_of_the_last_step_and_an_early_finish_leave_nothing_to_do():
    assert fold(plan, events(STARTED, ("StepFinished", "c", {"result": 1}))).step is None
    early = events(STARTED, ("StepFinished", "a", {"result": 1, "next": None}))
    assert fold(plan, early).step is None


@pytest.mark.parametrize(
    "member",
    [
        ("StepFinished", "gone", {"result": 1}),
        ("StepFinished", "a", {"result": 1, "next": "gone"}),
        ("RunStarted", None, {"reused": {"next": "gone"}}),
    ],
)
def test_a_step_that_this_version_does_not_have_is_said_so(member):
    with pytest.raises(UnknownStep, match="plan p has no step gone in this version"):
        fold(plan, events(member))


def test_a_retried_run_takes_over_the_results_of_the_first():
    reused = {"results": {"a": 1}, "visits": {"a": 1}, "next": "b"}
    progress = fold(plan, events(("RunStarted", None, {"reused": reused})))
    assert (progress.step.name, progress.results, progress.occurrence) == ("b", {"a": 1}, "b")
