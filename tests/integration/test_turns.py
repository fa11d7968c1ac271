"""A worker that takes a run up reads what says where it is, and not all that it ever wrote."""

import itertools
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from beatless import App, Plan, step
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.events import Event
from beatless.orchestrator.journal import PAGE_EVENTS, Journal
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


def read(journal: Journal, postgres: psycopg.Connection, run_id: str) -> list[Event]:
    """The events that a claim reads."""
    return list(journal.checkpoint_events(postgres, run_id, names=FOLDED, rest=SNOOZED))


@pytest.mark.parametrize("page_events", [1, 2, 3, 2000])
def test_what_is_left_out_changes_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, page_events: int
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    journal = beatless_app.journal
    sql = journal.sql["checkpoint_page"]
    assert f"LIMIT {PAGE_EVENTS}" in sql
    journal.sql["checkpoint_page"] = sql.replace(f"LIMIT {PAGE_EVENTS}", f"LIMIT {page_events}")

    @settings(max_examples=40)
    @given(histories)
    def check(history: list[Entry]) -> None:
        write(postgres, run_id, history)
        everything = journal.read(postgres, run_id)
        turns = read(journal, postgres, run_id)
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

    turns = read(beatless_app.journal, postgres, run_id)

    assert [event.seq for event in turns] == [1, 3000, 3001]


def test_a_run_that_was_taken_away_is_not_found(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    with pytest.raises(RunNotFound):
        read(beatless_app.journal, postgres, "gone")


def test_a_claim_of_a_function_that_began_again_looks_at_no_events_of_before(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    turn: list[Entry] = [("StepStarted", "a", None), ("StepFinished", "a", {"result": 1})]
    turns = 50

    def scanned(generations: int) -> int:
        """Rows of the journal that the statement reads."""
        history: list[Entry] = []
        for number in range(generations):
            again = {"generation": number + 2, "signals_from": len(history) + 2 * turns + 2}
            history += [*turn * turns, ("RunRestarted", None, again)]
        write(postgres, run_id, [*history, *turn * turns])
        postgres.execute("ANALYZE run_events")
        parameters = {
            "run_id": run_id,
            "names": list(FOLDED),
            "rest": SNOOZED,
            "after": 0,
            "restarted": None,
            "token": None,
        }
        statement = beatless_app.journal.sql["checkpoint_page"]
        ((found,),) = postgres.execute(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters
        ).fetchall()
        return sum(
            node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
            for node in nodes(found[0]["Plan"])
            if node.get("Relation Name") == "run_events"
        )

    postgres.execute("SET enable_seqscan = off")  # the table is short
    assert scanned(20) <= 5 * turns  # the events of the generation, twice


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A plan of Postgres with those below it."""
    yield plan
    for each in plan.get("Plans", ()):
        yield from nodes(each)
