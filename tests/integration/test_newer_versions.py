"""What a newer version has written ends no process of an older one."""

import asyncio
import json
from collections.abc import Iterator

import psycopg
import pytest
from prometheus_client import generate_latest

from beatless import App
from beatless.auth import Scope, Tokens
from beatless.cli import run as run_command
from beatless.doctor import Doctor
from beatless.flower import FleetState
from beatless.orchestrator.events import Event
from beatless.orchestrator.open_waits import received_of
from beatless.orchestrator.state import FINAL, RunState, allowed
from beatless.system import look
from beatless.testing import Kit
from beatless.verify import verify

CHECKS = {
    "runs_state": (
        "runs",
        "CHECK (state IN ('queued', 'running', 'completed', 'failed', 'cancelled'))",
    ),
    "dispatches_state": (
        "dispatches",
        "CHECK (state IN ('waiting', 'delayed', 'sent', 'running'))",
    ),
}


@pytest.fixture
def newer(postgres: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """A schema in which a newer version may write other states."""
    for name, (table, _) in CHECKS.items():
        postgres.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    yield postgres
    postgres.execute("DELETE FROM dispatches; DELETE FROM runs")
    for name, (table, check) in CHECKS.items():
        postgres.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} {check}")


def append(postgres: psycopg.Connection, run_id: str, type: str, data: object) -> None:
    """An event that only the newer version knows, and its outbox row."""
    postgres.execute(
        "WITH u AS (UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = %s RETURNING *)"
        " INSERT INTO run_events (run_id, seq, ts, type, source, step, attempt, data)"
        " SELECT run_id, last_seq, clock_timestamp(), %s, 'scheduler', NULL, NULL, %s FROM u",
        (run_id, type, json.dumps(data)),
    )
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
        " SELECT (SELECT shard FROM dispatches LIMIT 1), run_id, last_seq, last_seq"
        " FROM runs WHERE run_id = %s",
        (run_id,),
    )


def look_everywhere(beatless: Kit, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shows runs: none of it ends."""
    app = beatless.app
    found = beatless.client.get_run(run_id)
    assert run_id in {run.run_id for run in beatless.client.list_runs()}
    assert beatless.client.explain(run_id)
    assert beatless.client.events(run_id)
    assert json.dumps(found.to_dict())
    beatless.client.queues()
    look(app, app.engine)
    generate_latest(app.metrics.registry)
    list(Doctor(app).examine(["plans", "queues", "rows", "outbox", "places", "threads"]))
    with app.engine.connect() as connection:
        verify(connection, app.settings.schema)
    for name, value in app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BEATLESS_APP", "tests.plans:app")
    for arguments in (["runs"], ["show", run_id], ["explain", run_id], ["events", run_id]):
        assert run_command(arguments) == 0, arguments


@pytest.mark.slow
@pytest.mark.parametrize("data", [{"n": 1}, None, [1, 2], "text", 7])
def test_a_run_with_an_event_that_is_not_known_is_shown_executed_and_followed(
    beatless: Kit,
    newer: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    data: object,
) -> None:
    run = beatless.start_run("two_steps")
    append(newer, run.run_id, "QuotaTaken", data)
    look_everywhere(beatless, run.run_id, monkeypatch)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    types = [event.type for event in beatless.client.stream_run(run.run_id, timeout=60)]
    assert types[:3] == ["RunStarted", "QuotaTaken", "StepStarted"]
    look_everywhere(beatless, run.run_id, monkeypatch)

    async def follow() -> list[str]:
        return [event.type async for event in beatless.client.astream_run(run.run_id, timeout=60)]

    assert asyncio.run(follow()) == types


@pytest.mark.slow
def test_a_run_in_a_state_that_is_not_known_is_shown_and_left_alone(
    beatless: Kit, newer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    newer.execute("UPDATE runs SET state = 'suspended' WHERE run_id = %s", (run.run_id,))
    look_everywhere(beatless, run.run_id, monkeypatch)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state.value == "suspended"
    assert beatless.client.get_run(other.run_id).state is RunState.COMPLETED
    assert beatless.client.cancel_run(run.run_id).state.value == "suspended"
    assert not any(allowed(RunState("suspended"), state) for state in FINAL)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["parked", "waiting"])
def test_a_dispatch_that_is_not_understood_stops_no_other(
    beatless: Kit, newer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    newer.execute(
        "UPDATE dispatches SET state = %s, reason = 'quota' WHERE run_id = %s", (state, run.run_id)
    )
    look_everywhere(beatless, run.run_id, monkeypatch)

    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id).state
    assert ended is (RunState.COMPLETED if state == "waiting" else RunState.QUEUED)
    assert beatless.client.get_run(other.run_id).state is RunState.COMPLETED


@pytest.mark.slow
def test_an_end_that_is_not_known_is_shown(
    beatless: Kit, newer: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    newer.execute("UPDATE runs SET state = 'expired' WHERE run_id = %s", (run.run_id,))
    newer.execute(
        """UPDATE run_events SET data = data || '{"outcome": "expired"}'"""
        " WHERE run_id = %s AND type = 'RunFinished'",
        (run.run_id,),
    )
    look_everywhere(beatless, run.run_id, monkeypatch)
    assert [e.type for e in beatless.client.stream_run(run.run_id, timeout=60)][-1] == "RunFinished"


@pytest.mark.parametrize("more", [{}, {"by": "ann@example.com", "at": 1}])
def test_a_signal_that_a_retry_takes_over_is_read_without_members_that_are_not_known(
    more: dict[str, object],
) -> None:
    stored = {"name": "paid", "data": 12, "seq": 7} | more
    assert received_of(stored | {"channel": "mail"}) == received_of(stored)
    assert received_of(stored).to_dict() == stored


def test_flower_shows_what_it_does_not_know() -> None:
    state = FleetState(plans={"plan"})

    def event(seq: int, type: str, **data: object) -> Event:
        return Event(run_id="r", seq=seq, ts=seq, type=type, source="x", step=None, data=data)

    state.journal(event(1, "RunStarted", plan="plan"))
    state.journal(event(2, "QuotaTaken"))
    state.journal(event(3, "RunFinished", outcome="expired"))
    assert state.tasks["r"].state == "FAILURE"


def test_a_scope_that_is_not_known_grants_nothing_and_takes_nothing_away(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, secret = tokens.create([Scope.RUNS_READ])
    postgres.execute("UPDATE api_tokens SET scopes = scopes || ARRAY['schedules:write']")
    grant = tokens.find(secret)
    assert grant is not None
    assert grant.allows(Scope.RUNS_READ)
    assert not grant.allows(Scope.RUNS_WRITE)
    assert "schedules:write" in tokens.list()[0].scopes
