"""Where a run resumes: the journal folded by its plan."""

import re
from pathlib import Path

import pytest

import beatless
from beatless import Plan, RunContext, step
from beatless import plan as function_plan
from beatless.orchestrator.events import Event
from beatless.orchestrator.history import history_of
from beatless.orchestrator.progress import CONNECTION_LOST, GIVEN_BACK, SNOOZED, UNCOUNTED, fold

plan = Plan(
    "p",
    [step(name=name)(lambda ctx: None) for name in ("a", "b", "c")],
    routes={"b": ["a", "b"]},
)


@function_plan("p")
def function(run: RunContext) -> None:
    """Its calls are those of the journal."""


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


TWICE = {
    **{name: ({"name": GIVEN_BACK}, {"name": name}) for name in UNCOUNTED},
    "died": ({"name": GIVEN_BACK}, {"name": GIVEN_BACK, "process_died": True}),
    "lapsed": ({"name": GIVEN_BACK}, {"name": GIVEN_BACK, "lease_ran_out": True}),
    "died before": ({"name": GIVEN_BACK, "process_died": False}, {"name": GIVEN_BACK}),
}


@pytest.mark.parametrize("traces", TWICE.values(), ids=TWICE)
def test_an_attempt_is_uncounted_once_however_often_it_was_given_back(traces: tuple):
    journal = events(STARTED, ("StepStarted", "a", None), *(("DebugTrace", "a", t) for t in traces))
    progress = fold(plan, journal)
    assert (progress.starts, progress.deaths, progress.ran_out) == (0, 0, 0)
    call = history_of(function, journal).calls["a"]
    assert (call.starts, call.deaths, call.ran_out) == (0, 0, 0)


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
        ("StepStarted", "gone", None),
        ("StepStarted", "gone#2", None),
        ("StepFinished", "gone", {"result": 1}),
        ("StepFinished", "a", {"result": 1, "next": "gone"}),
        ("StepFinished", "a", {"result": 1, "following": "gone"}),
        ("RunStarted", None, {"reused": {"next": "gone"}}),
    ],
)
def test_a_step_that_this_version_does_not_have_is_said_so(member):
    progress = fold(plan, events(member))
    assert (progress.step, progress.unknown) == (None, "gone")


def test_a_retried_run_takes_over_the_results_of_the_first():
    reused = {"results": {"a": 1}, "visits": {"a": 1}, "next": "b"}
    progress = fold(plan, events(("RunStarted", None, {"reused": reused})))
    assert (progress.step.name, progress.results, progress.occurrence) == ("b", {"a": 1}, "b")


def make(*names: str, **options) -> Plan:
    return Plan("p", [step(name=name)(lambda ctx: None) for name in names], **options)


@pytest.mark.parametrize(
    ("names", "goes_on"),
    [("one pack charge mail", "charge"), ("one mail", None), ("charge one mail", "charge")],
)
def test_an_open_attempt_goes_on_where_it_is_and_keeps_its_count(names, goes_on):
    begun, failed = ("StepStarted", "charge", None), ("StepFailed", "charge", {"error": {}})
    progress = fold(
        make(*names.split()), events(STARTED, ("StepFinished", "one", None), begun, failed, begun)
    )
    if goes_on is None:
        assert (progress.step, progress.unknown) == (None, "charge")
    else:
        assert (progress.step.name, progress.unknown) == ("charge", None)
    assert (progress.starts, progress.failures) == (2, 1)


def test_attempts_never_pass_from_one_step_to_another():
    """Not in a history that an older release has written either."""
    progress = fold(
        make("one", "mail"),
        events(
            STARTED,
            ("StepStarted", "charge", None),
            ("StepFailed", "charge", {"error": {}}),
            ("StepStarted", "mail", None),
        ),
    )
    assert (progress.step.name, progress.starts, progress.failures) == ("mail", 1, 0)


def test_after_a_step_comes_what_follows_it_in_this_version():
    given_back = ("StepFinished", "one", {"result": 1, "following": "mail"})
    assert fold(make("one", "pack", "mail"), events(STARTED, given_back)).step.name == "pack"


def test_after_a_step_that_is_gone_comes_what_followed_it_in_the_version_that_finished_it():
    given_back = ("StepFinished", "charge", {"result": 1, "following": "mail"})
    progress = fold(make("one", "pay", "mail"), events(STARTED, given_back))
    assert (progress.step.name, progress.results) == ("mail", {"charge": 1})


RENAMED = make("one", "pay", "mail", renamed={"charge": "bill", "bill": "pay", "two": "one"})


def test_a_renamed_step_keeps_its_key_its_attempts_and_its_results():
    progress = fold(
        RENAMED,
        events(
            STARTED,
            ("StepFinished", "two", {"result": 1}),
            ("StepFinished", "charge", {"result": 2, "next": "charge"}),
            ("StepStarted", "charge#2", None),
            ("StepFailed", "charge#2", {"error": {}}),
            ("StepStarted", "bill#2", {"renamed_from": "charge#2"}),
        ),
    )
    assert (progress.step.name, progress.occurrence, progress.key) == ("pay", "pay#2", "charge#2")
    assert (progress.starts, progress.failures) == (2, 1)
    assert progress.results == {"one": 1, "pay": 2}


def test_what_a_retry_took_over_is_renamed_too():
    reused = {"results": {"charge": 1, "charge#2": 2}, "visits": {"charge": 2}, "next": "bill"}
    progress = fold(RENAMED, events(("RunStarted", None, {"reused": reused})))
    assert progress.results == {"pay": 1, "pay#2": 2}
    assert (progress.occurrence, progress.key) == ("pay#3", "pay#3")


def test_a_step_that_began_after_the_cancel_is_the_one_that_undoes_and_no_other():
    cancelled = [STARTED, ("StepStarted", "one", None), ("CancelRequested", None, None)]
    undoing = [*cancelled, ("StepStarted", "undo", None)]
    undo = step(name="undo")(lambda ctx: None)
    progress = fold(make("one", on_cancel=undo), events(*undoing))
    assert progress.step is undo
    assert progress.compensating
    for other in (
        make("one"),
        make("one", "undo"),
        make("one", on_cancel=step(name="other")(lambda ctx: None)),
    ):
        progress = fold(other, events(*undoing))
        assert (progress.step, progress.unknown, progress.compensating) == (None, "undo", True)
    renamed = make("one", renamed={"undo": "other"}, on_cancel=step(name="other")(lambda ctx: None))
    assert fold(renamed, events(*undoing)).step is renamed.on_cancel


def test_the_step_that_undoes_is_no_step_of_a_run_that_nobody_cancelled():
    undo = step(name="undo")(lambda ctx: None)
    progress = fold(make("one", on_cancel=undo), events(STARTED, ("StepStarted", "undo", None)))
    assert (progress.step, progress.unknown) == (None, "undo")


def test_the_page_knows_the_traces_of_attempts_that_do_not_count():
    page = (Path(beatless.__file__).parent / "api/static/timeline.js").read_text()
    assert set(re.findall(r'"(beatless\.[a-z_]+)"', page)) == set(UNCOUNTED)
