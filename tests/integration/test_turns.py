"""A worker that takes a run up reads what says where it is, and not all that it ever wrote."""

import itertools

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from beatless import App, Plan, step
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.progress import CONNECTION_LOST, FOLDED, GIVEN_BACK, SNOOZED, fold
from beatless.testing import Kit

plan = Plan(
    "p",
    [step(name=name)(lambda ctx: None) for name in ("a", "b")],
    routes={"a": ["b"], "b": ["a"]},
    on_cancel=step(name="undo")(lambda ctx: None),
)

Entry = tuple[str, str | None, dict | None]


def trace(name: str, **data: object) -> st.SearchStrategy[Entry]:
    return st.just(("DebugTrace", "a", {"name": name, **data}))


started = st.sampled_from(["a", "b", "undo"]).map(lambda name: ("StepStarted", name, None))
entries: st.SearchStrategy[Entry] = st.one_of(
    started,
    started,
    trace(SNOOZED),
    trace(SNOOZED),
    trace(GIVEN_BACK),
    trace(CONNECTION_LOST),
    trace(CONNECTION_LOST, refused=True),
    trace("the user's"),
    st.just(("DebugTrace", "a", None)),
    st.just(("CancelRequested", None, {})),
    st.sampled_from(["ValueError", "RunCancelled"]).map(
        lambda kind: ("StepFailed", "a", {"error": {"type": kind}})
    ),
    st.sampled_from(["a", "b"]).map(lambda name: ("StepFinished", name, {"result": 1})),
)
naps = st.integers(1, 4).map(
    lambda count: [("StepStarted", "a", None), ("DebugTrace", "a", {"name": SNOOZED})] * count
)
histories = st.lists(st.one_of(entries.map(lambda entry: [entry]), naps), max_size=12).map(
    lambda parts: list(itertools.chain(*parts))
)


def write(postgres: psycopg.Connection, run_id: str, history: list[Entry]) -> None:
    """Make this the run's history, after its RunStarted."""
    postgres.execute("DELETE FROM run_events WHERE run_id = %s AND seq > 1", (run_id,))
    with postgres.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO run_events (run_id, seq, ts, type, source, step, attempt, data) "
            "VALUES (%s, %s, clock_timestamp(), %s, 'worker', %s, 1, %s)",
            [
                (run_id, seq, type, step, None if data is None else Jsonb(data))
                for seq, (type, step, data) in enumerate(history, 2)
            ],
        )
    postgres.execute("UPDATE runs SET last_seq = %s WHERE run_id = %s", (len(history) + 1, run_id))


def test_what_is_left_out_changes_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    journal = beatless_app.journal

    @settings(max_examples=80)
    @given(histories)
    def check(history: list[Entry]) -> None:
        write(postgres, run_id, history)
        everything = journal.read(postgres, run_id)
        turns = journal.checkpoint_events(postgres, run_id, names=FOLDED, rest=SNOOZED)
        assert fold(plan, turns) == fold(plan, everything)
        assert turns[-1] == everything[-1]

    check()


def test_a_run_that_was_polled_for_a_month_is_taken_up_by_a_few_events(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    nap = [("StepStarted", "a", None), ("DebugTrace", "a", {"name": SNOOZED})]
    traces = [("DebugTrace", "a", {"name": "progress", "percent": n}) for n in range(1000)]
    write(postgres, run_id, [*nap * 500, *traces, *nap * 500])

    turns = beatless_app.journal.checkpoint_events(postgres, run_id, names=FOLDED, rest=SNOOZED)

    assert [event.seq for event in turns] == [1, 3000, 3001]


def test_a_run_that_was_taken_away_is_not_found(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    with pytest.raises(RunNotFound):
        beatless_app.journal.checkpoint_events(postgres, "gone", names=FOLDED, rest=SNOOZED)
