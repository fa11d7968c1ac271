"""`beatless verify` sees each violation that is planted in stored data, and nothing else."""

import psycopg
import pytest
import sqlalchemy

from beatless import App
from beatless.cli import run
from beatless.testing import Kit
from beatless.verify import verify, verify_all


def found(app: App) -> list[tuple[str, str]]:
    with app.engine.connect() as connection:
        return found_on(connection, app.settings.schema)


def found_on(
    connection: sqlalchemy.Connection, schema: str, run_ids: list[str] | None = None
) -> list[tuple[str, str]]:
    violations = verify(connection, schema, run_ids)
    return sorted({(violation.invariant, violation.run_id) for violation in violations})


@pytest.fixture
def finished(beatless: Kit) -> None:
    """A completed run r, and another one that must never be blamed."""
    beatless.start_run("agents.run", run_id="r")
    beatless.start_run("agents.run", run_id="other")
    beatless.work_until_idle()
    beatless.start_run("agents.run", run_id="waits")


DISPATCH = """
INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)
VALUES ('r', 0, 'agents.run', 'default', 0, 'waiting', now(), 'start');"""

PLANTED = {
    "I2 an event is missing": "DELETE FROM run_events WHERE run_id = 'r' AND seq = 3",
    "I2 last_seq is beyond the events": "UPDATE runs SET last_seq = 14 WHERE run_id = 'r'",
    "I2 a seq is left out": """
UPDATE run_events SET seq = 14 WHERE run_id = 'r' AND seq = 13;
UPDATE runs SET last_seq = 14 WHERE run_id = 'r'""",
    "I2 the first event is another": """
UPDATE run_events SET type = 'DebugTrace' WHERE run_id = 'r' AND seq = 1""",
    "I4 a step has two results": """
UPDATE run_events SET step = 'Warmup' WHERE run_id = 'r' AND type = 'StepFinished' AND seq = 12""",
    "I4 a step is started after its result": """
UPDATE runs SET attempt = 9 WHERE run_id = 'r';
UPDATE run_events SET step = 'Ping', type = 'StepStarted' WHERE run_id = 'r' AND seq = 12""",
    "I4 a step is passed without a result": """
UPDATE run_events SET type = 'DebugTrace' WHERE run_id = 'r' AND seq = 4""",
    "I4 the last step has no result": """
UPDATE run_events SET type = 'DebugTrace' WHERE run_id = 'r' AND seq = 12""",
    "I5 there is no RunFinished": """
UPDATE run_events SET type = 'DebugTrace' WHERE run_id = 'r' AND seq = 13""",
    "I5 there are two RunFinished": """
UPDATE run_events SET type = 'RunFinished', data = '{"outcome": "completed"}'
 WHERE run_id = 'r' AND seq = 3""",
    "I5 something follows RunFinished": """
UPDATE runs SET last_seq = 14 WHERE run_id = 'r';
INSERT INTO run_events (run_id, seq, type, source) VALUES ('r', 14, 'DebugTrace', 'worker')""",
    "I5 the state is not the outcome": "UPDATE runs SET state = 'failed' WHERE run_id = 'r'",
    "I5 an unfinished run has RunFinished": DISPATCH
    + "UPDATE runs SET state = 'running' WHERE run_id = 'r'",
    "I7 a finished run would be dispatched": DISPATCH,
    "I8 the outbox names an event that is not there": """
INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (0, 'r', 13, 14)""",
    "I8 the outbox is not empty long after the end": """
INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (0, 'r', 13, 13);
UPDATE runs SET finished_at = now() - interval '2 minutes' WHERE run_id = 'r'""",
    "I9 steps went on after a cancel": """
UPDATE run_events SET type = 'CancelRequested' WHERE run_id = 'r' AND seq = 2;
UPDATE runs SET state = 'cancelled' WHERE run_id = 'r';
UPDATE run_events SET data = '{"outcome": "cancelled"}' WHERE run_id = 'r' AND seq = 13""",
    "I9 a cancelled run completed": """
UPDATE run_events SET type = 'CancelRequested', step = NULL WHERE run_id = 'r' AND seq = 12""",
    "I10 a step was tried too often": """
UPDATE run_events SET type = 'StepStarted' WHERE run_id = 'r' AND seq = 3""",
}


@pytest.mark.usefixtures("finished")
def test_a_planted_violation_is_found(beatless_app: App, subtests: pytest.Subtests) -> None:
    assert found(beatless_app) == []
    schema = beatless_app.settings.schema
    for what, planted in PLANTED.items():
        invariant = what.split()[0]
        with subtests.test(what), beatless_app.engine.connect() as connection:
            connection.exec_driver_sql(f"SET LOCAL search_path TO {schema}")
            connection.exec_driver_sql(planted)  # and taken back at the end of the block

            assert found_on(connection, schema) == [(invariant, "r")]
            assert found_on(connection, schema, ["r"]) == [(invariant, "r")]
            assert found_on(connection, schema, ["other", "waits"]) == []


@pytest.mark.usefixtures("finished")
def test_an_unfinished_run_that_nobody_will_look_at_is_found(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    postgres.execute("DELETE FROM dispatches WHERE run_id = 'waits'")

    assert found(beatless_app) == [("I7", "waits")]


@pytest.mark.usefixtures("finished")
def test_rows_of_a_run_that_does_not_exist_are_found(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    postgres.execute("DELETE FROM runs WHERE run_id IN ('other', 'waits')")

    assert found(beatless_app) == [("I12", "other"), ("I12", "waits")]


@pytest.mark.usefixtures("finished")
def test_an_outbox_row_of_a_run_that_ended_just_now_is_no_violation(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (0, 'r', 13, 13)"
    )

    assert found(beatless_app) == []


def test_failures_retries_crashes_and_cancels_are_no_violations(beatless: Kit) -> None:
    beatless.start_run("retries", {"failures": 2})
    beatless.start_run("agents.run", 7)
    cancelled = beatless.start_run("agents.run")
    beatless.step(cancelled.run_id)
    beatless.client.cancel_run(cancelled.run_id)
    beatless.start_run("agents.run")
    with beatless.crash("step.effect_done"):
        beatless.work_until_idle()
    for _ in range(5):
        beatless.advance(120)
        beatless.work_until_idle()

    assert {run.state for run in beatless.client.list_runs()} == {
        "completed",
        "failed",
        "cancelled",
    }
    beatless.verify()


def test_all_runs_are_checked_page_by_page_in_their_order(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a run per page by its events, and two by their number; the rest is beyond the last."""
    for number in range(7):
        beatless.start_run("two_steps", run_id=f"r{number}")
    beatless.work_until_idle()
    postgres.execute("UPDATE runs SET state = 'failed' WHERE run_id IN ('r0', 'r3', 'r6')")
    for lost in ("a", "r3-lost", "z"):
        postgres.execute(
            "INSERT INTO run_events (run_id, seq, type, source) "
            "VALUES (%s, 1, 'RunStarted', 'api')",
            (lost,),
        )
    wanted = [
        ("a", "I12"),
        ("r0", "I5"),
        ("r3", "I5"),
        ("r3-lost", "I12"),
        ("r6", "I5"),
        ("z", "I12"),
    ]
    for runs, events in ((2, 1_000_000), (100, 1), (7, 1_000_000)):
        monkeypatch.setattr("beatless.verify.PAGE_RUNS", runs)
        monkeypatch.setattr("beatless.verify.PAGE_EVENTS", events)
        told: list[tuple[int, int]] = []
        found = verify_all(
            beatless_app.engine,
            beatless_app.settings.schema,
            progress=lambda *done: told.append(done),  # noqa: B023 - called before the next turn
        )
        assert [(each.run_id, each.invariant) for each in found] == wanted
        assert told[-1] == (7, 42)


@pytest.mark.usefixtures("finished")
def test_the_command_prints_one_line_for_each_violation_and_ends_with_1(
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    assert run(["verify", "--all"]) == 0
    assert "every guarantee holds" in capsys.readouterr().err
    postgres.execute("UPDATE runs SET state = 'failed' WHERE run_id = 'r'")
    postgres.execute("DELETE FROM dispatches WHERE run_id = 'waits'")

    assert run(["verify", "--all"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "I5 run r: it is failed, its RunFinished says completed",
        "I7 run waits: it is queued and nothing will ever look at it again",
    ]
    assert run(["verify", "r", "--json"]) == 1
    assert '"invariant": "I5"' in capsys.readouterr().out
    assert run(["verify", "other"]) == 0
