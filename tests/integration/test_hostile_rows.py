"""Rows that SQL permits and the product never writes: each costs its own run, and no other."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    CannotRetry,
    Plan,
    RunContext,
    Schedule,
    StepContext,
    Undone,
    plan,
    retry,
    step,
    wait,
)
from beatless.auth import Scope, Tokens
from beatless.doctor import Doctor
from beatless.http import Client as HttpClient
from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.state import RunState
from beatless.outbox.backoff import Backoff
from beatless.outbox.message import UNREADABLE as UNREAD_JSON
from beatless.outbox.observer import RelayAsleep, RelayFailed, RunSetAside
from beatless.places import places
from beatless.system import look
from beatless.testing import Kit
from beatless.verify import verify
from tests.integration.test_relay import Announcements, Door, doors, pending, recording, seqs
from tests.serving import serving

__all__ = ["doors"]

UNINDEXABLE = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) AS n)"
"""What repeats would be packed until it fits."""

DISPATCHES = {
    "attempts beyond what a float's power takes": "attempts = 1024",
    "attempts at their end": "attempts = 2147483647",
    "attempts one before their end": "attempts = 2147483646",
    "attempts below zero": "attempts = -2147483648",
    "due at infinity": "due_at = 'infinity'",
    "due at minus infinity": "due_at = '-infinity'",
    "due in the last year": "due_at = '294276-12-31'",
    "due in the first year": "due_at = '4713-01-01 BC'",
    "a deadline at infinity": "deadline_at = 'infinity'",
    "a deadline at minus infinity": "deadline_at = '-infinity'",
    "highest priority": "priority = 32767",
    "lowest priority": "priority = -32768",
    "a shard that is none": "shard = 99",
    "a shard below zero": "shard = -1",
    "a queue without a name": "queue = ''",
    "a queue of odd characters": "queue = E'\\x06\\x16 \\n *#. ü \\'\" {}'",
    "a very long queue": "queue = repeat('q', 100000)",
    "a queue that no index takes": f"queue = {UNINDEXABLE}, state = 'running'",
    "a delayed queue that no index takes": f"queue = {UNINDEXABLE}, state = 'delayed'",
    "a plan that is none": "queue = 'theirs', task = 'no such plan'",
    "a plan without a name": "queue = 'theirs', task = ''",
    "a plan of odd characters": "queue = 'theirs', task = E'\\x01\\n\\'\"{}%%s'",
    "a reason of odd characters": "reason = E'\\x01\\'\"'",
}
STATES = ("waiting", "sent", "running")


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_hostile_dispatches_cost_their_own_runs_only(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, state: str
) -> None:
    for hostile in DISPATCHES.values():
        culprit = beatless.start_run("two_steps", priority=9)
        postgres.execute(
            f"UPDATE dispatches SET state = '{state}', reason = 'start' WHERE run_id = %s".encode(),
            (culprit.run_id,),
        )
        postgres.execute(
            f"UPDATE dispatches SET {hostile} WHERE run_id = %s".encode(), (culprit.run_id,)
        )
    beatless.advance(500)
    announcements = Announcements()
    relay = beatless_app.relay(observer=announcements, backoff=Backoff(initial=0.01, cap=0.05))
    for _ in range(3):
        others = [beatless.start_run("two_steps") for _ in range(2)]
        relay.drain_once()
        beatless.work_until_idle()
        assert [beatless.client.get_run(run.run_id).state.final for run in others] == [True] * 2
        beatless.advance(500)
    relay.start()
    announcements.wait(RelayAsleep)
    relay.stop()
    assert pending(postgres) == 0
    assert announcements.all(RelayFailed) == []


OUTBOX = {
    "an event at the end of time": "UPDATE run_events SET ts = 'infinity' WHERE run_id = %s",
    "an event before all time": "UPDATE run_events SET ts = '-infinity' WHERE run_id = %s",
    "events that are none": "UPDATE run_outbox SET from_seq = 7, to_seq = 3 WHERE run_id = %s",
    "more events than there are": "UPDATE run_outbox SET from_seq = -2147483648,"
    " to_seq = 2147483647 WHERE run_id = %s",
    "a type with quotes": "UPDATE run_events SET type = E'\"\\n' WHERE run_id = %s",
    "a shard that is none": "UPDATE run_outbox SET shard = 99 WHERE run_id = %s",
}


@pytest.mark.parametrize("hostile", OUTBOX)
def test_a_hostile_event_costs_its_own_run_only(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres, hostile: str
) -> None:
    others = [beatless.start_run("two_steps")]
    culprit = beatless.start_run("two_steps")
    others += [beatless.start_run("two_steps")]
    postgres.execute(OUTBOX[hostile].encode(), (culprit.run_id,))
    relay = recording(beatless_app, doors)

    relay.drain_once()

    published = [message.run_id for message in doors[0].messages]
    assert [run_id for run_id in published if run_id != culprit.run_id] == [
        other.run_id for other in others
    ]
    assert pending(postgres) == (hostile == "a shard that is none")
    relay.stop()


UNREADABLE = """
ALTER TABLE run_events RENAME TO stored_events;
CREATE VIEW run_events AS SELECT * FROM stored_events
 WHERE CASE WHEN source = 'unreadable' THEN 1 / (seq - seq) = 0 ELSE true END"""
"""Postgres refuses to read these rows, as it does those of a damaged page."""


def test_an_event_that_cannot_be_read_is_a_dead_letter(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    culprit = beatless.start_run("two_steps")
    postgres.execute(UNREADABLE)
    postgres.execute("UPDATE stored_events SET source = 'unreadable'")

    beatless.drain_outbox_once()

    (letter,) = beatless.client.dead_letters()
    assert (letter.run_id, letter.from_seq, letter.to_seq) == (culprit.run_id, 1, 1)
    assert "division by zero" in letter.reason


@pytest.mark.parametrize("sign", [1, -1])
def test_an_event_at_no_time_is_read_as_all_others_and_verify_tells(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, sign: int
) -> None:
    run = beatless.start_run("two_steps")
    infinity = "infinity" if sign == 1 else "-infinity"
    postgres.execute("UPDATE run_events SET ts = %s", (infinity,))
    assert ("I1", run.run_id) in violations(beatless_app)

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state == "completed"
    stored = beatless.client.events(run.run_id)
    assert (stored[0].ts, len(stored)) == (sign * (2**53 - 1), 6)
    assert beatless.collect_stream(run.run_id) == stored
    assert beatless.client.dead_letters() == []
    with serving(beatless_app) as api, HttpClient(api.url) as over_http:
        assert over_http.events(run.run_id) == stored
    assert beatless.client.explain(run.run_id)[0].kind == "accepted"


def test_events_that_cannot_be_read_one_after_another_stop_no_relay(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    postgres.execute(UNREADABLE)
    for _ in range(4):
        beatless.start_run("two_steps")
        postgres.execute("UPDATE stored_events SET source = 'unreadable' WHERE seq = 1")
        other = beatless.start_run("two_steps")
        beatless.work_until_idle()
        assert beatless.client.get_run(other.run_id).state.final


TIMES = {
    "runs": ("created_at", "not_before", "deadline_at", "lease_expires_at", "started_at"),
    "queues": ("paused_at",),
    "workers": ("started_at",),
    "dead_letters": ("created_at",),
    "api_tokens": ("created_at", "expires_at"),
}


@pytest.mark.parametrize("moment", ["infinity", "-infinity", "294276-12-31", "4713-01-01 BC"])
def test_a_time_that_python_does_not_have_fails_no_list(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, moment: str
) -> None:
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    tokens.create([Scope.ADMIN])
    beatless.start_run("two_steps")
    beatless.client.pause_queue("default")
    postgres.execute("INSERT INTO workers VALUES ('w', 'h', '{default}', 1, '1')")
    postgres.execute(LETTER, ("{}",))
    for table, columns in TIMES.items():
        for column in columns:
            postgres.execute(f"UPDATE {table} SET {column} = '{moment}'".encode())

    assert len(beatless.client.list_runs()) == 1
    assert [queue.name for queue in beatless.client.queues()] == ["default"]
    assert len(look(beatless_app, beatless_app.engine).workers) == 1
    assert len(beatless.client.dead_letters()) == 1
    assert len(tokens.list()) == 1


SCHEDULES = {
    "an interval of nothing": "every = 0",
    "an interval that goes back": "every = -5",
    "jitter without end": "jitter = 'infinity'",
    "jitter that is no number": "jitter = 'NaN'",
    "jitter of years": "jitter = 1e9",
    "a cron that never comes": "cron = '0 0 30 2 *', every = NULL",
    "a tick at minus infinity": "tick = '-infinity'",
    "a priority that is none": "run = jsonb_set(run, '{priority}', '1e30')",
    "a priority that is no number": "run = jsonb_set(run, '{priority}', '[]')",
    "a deadline that is none": "run = jsonb_set(run, '{deadline}', '1e400')",
}


def test_a_hostile_schedule_keeps_no_other_from_being_fired_and_listed(
    beatless: Kit, postgres: psycopg.Connection, subtests: pytest.Subtests
) -> None:
    for what, change in SCHEDULES.items():
        with subtests.test(what):
            for name in ("good", "hostile"):
                beatless.client.create_schedule(Schedule(name, "two_steps", every=60))
            postgres.execute(f"UPDATE schedules SET {change} WHERE name = 'hostile'".encode())
            beatless.advance(61)
            beatless.advance(61)

            fired = [run for run in beatless.client.list_runs() if run.schedule == "good"]
            assert len(fired) >= 2
            assert [each.name for each in beatless.client.schedules()] == ["good", "hostile"]
        postgres.execute("DELETE FROM schedules; DELETE FROM dispatches; DELETE FROM runs")


UNREAD = {"deep": "[" * 12_000 + "]" * 12_000, "long": "1" * 5000}


@pytest.mark.parametrize("text", UNREAD.values(), ids=UNREAD)
def test_json_that_python_does_not_read_fails_no_list_and_no_other_run(
    beatless: Kit, postgres: psycopg.Connection, text: str
) -> None:
    deep, other = (beatless.start_run("two_steps").run_id for _ in range(2))
    for column in ("input", "trace_context"):
        postgres.execute(f"UPDATE runs SET {column} = %s WHERE run_id = %s".encode(), (text, deep))

    beatless.work_until_idle()

    assert {run.run_id: run.state for run in beatless.client.list_runs()}[other] == "completed"
    shown = beatless.client.get_run(deep)
    assert (shown.input, shown.state) == (UNREAD_JSON, RunState.FAILED)
    assert "nested too deeply" in shown.error["message"]
    assert beatless.client.explain(deep)


@step
def echo(ctx: StepContext) -> Any:
    return ctx.input


@plan("function")
def function(run: RunContext) -> Any:
    return run.step(echo)


@pytest.mark.parametrize("kind", [Plan("list", [echo]), function], ids=["list", "function"])
def test_no_step_gets_what_stands_for_an_input_that_cannot_be_read(
    beatless_app: App, postgres: psycopg.Connection, tmp_path: Path, kind: Plan
) -> None:
    with closing(Kit(App(beatless_app.settings, [kind]), directory=tmp_path)) as kit:
        run_id = kit.start_run(kind.name).run_id
        unread = "UPDATE runs SET input = %s WHERE run_id = %s"
        postgres.execute(unread, (UNREAD["deep"], run_id))
        kit.work_until_idle()

        run = kit.client.get_run(run_id)
        assert (run.state, run.error["type"]) == (RunState.FAILED, "BadPayload")
        assert "StepFinished" not in [event.type for event in kit.client.events(run_id)]
        kit.verify()


ODD = {
    "taken-over results that are a number": ("RunStarted", '{"reused": 7}'),
    "taken-over results in a list": ("RunStarted", '{"reused": {"results": [1], "calls": [1]}}'),
    "taken-over visits that are none": ("RunStarted", '{"reused": {"visits": {"one": "x"}}}'),
    "a next step that is a number": ("StepFinished", '{"next": [7]}'),
    "a following step that is none": ("StepFinished", '{"following": {}}'),
    "a name that is a list": ("StepStarted", '{"renamed_from": []}'),
    "a version that is text": ("StepStarted", '{"version": "x"}'),
    "an error that is a number": ("StepFailed", '{"error": 7}'),
    "a back-off that is text": ("StepFailed", '{"retry_in": "x"}'),
    "a wait of no kind": ("WaitStarted", '{"names": 5}'),
    "a signal without a name": ("SignalReceived", '{"name": [[]]}'),
    "the end of no wait": ("WaitFinished", '{"outcome": {}, "seq": "x"}'),
    "children that are no numbers": ("ChildrenStarted", '{"plan": "p", "first": "x", "count": []}'),
    "children without an end": ("ChildrenFinished", "{}"),
    "a trace with a name that is none": ("DebugTrace", '{"name": {}}'),
    "a restart of nothing": ("RunRestarted", '{"children": {}}'),
}
"""Types of events, and data that the product never writes."""


@step(retry=retry(max_attempts=3, jitter=0))
def twice(ctx: StepContext) -> Any:
    if ctx.attempt == 1:
        raise ValueError("once more")
    return ctx.attempt


@plan("calls")
def calls(run: RunContext) -> Any:
    run.step(twice)
    return run.wait("go", timeout=3600)


@pytest.mark.parametrize("kind", [Plan("elements", [twice, wait("go", timeout=3600)]), calls])
def test_a_run_whose_journal_has_a_value_of_another_type_goes_on_or_ends_and_never_loops(
    beatless_app: App, postgres: psycopg.Connection, tmp_path: Path, kind: Plan
) -> None:
    ended = 0
    app = App(beatless_app.settings, [kind])
    with closing(app), closing(Kit(app, directory=tmp_path)) as kit:
        for type, data in ODD.values():
            run_id = kit.start_run(kind.name).run_id
            kit.executor().execute(kind, run_id, 0)  # to its back-off
            postgres.execute(
                "UPDATE run_events SET type = %s, data = %s WHERE run_id = %s AND seq = "
                "CASE WHEN %s = 'RunStarted' THEN 1 ELSE 3 END",
                (type, data, run_id, type),
            )
            kit.advance(10)
            list(places(app.engine, app.journal, app.plans))
            assert kit.executor().execute(kind, run_id, 0), data
            for _ in range(3):  # once more to its back-off, to its wait, and to its end
                kit.advance(4000)
                kit.executor().execute(kind, run_id, 0)
            run = kit.client.get_run(run_id)
            assert run.state.final, (type, data)
            if run.state == "failed":
                seq = 1 if type == "RunStarted" else 3
                assert run.error["type"] == "BadPayload", run.error
                assert (
                    f"the data of event {seq} ({type}) of the run's journal" in run.error["message"]
                )
                with pytest.raises(CannotRetry):
                    kit.client.retry_run(run_id)
                ended += 1
    assert ended > 3


@pytest.mark.parametrize("change", ["2147483647", "last_seq + 5", "last_seq - 1"])
@pytest.mark.parametrize("kind", [Plan("elements", [twice, wait("go", timeout=3600)]), calls])
def test_a_run_whose_last_seq_is_none_of_its_journal_ends_and_names_the_column(
    beatless_app: App, postgres: psycopg.Connection, tmp_path: Path, kind: Plan, change: str
) -> None:
    app = App(beatless_app.settings, [kind])
    with closing(app), closing(Kit(app, directory=tmp_path)) as kit:
        run_id = kit.start_run(kind.name).run_id
        kit.executor().execute(kind, run_id, 0)
        last = kit.client.get_run(run_id).last_seq
        postgres.execute(f"UPDATE runs SET last_seq = {change}".encode())
        kit.advance(10)
        assert kit.executor().execute(kind, run_id, 0)
        run = kit.client.get_run(run_id)
        assert (run.state, run.last_seq, run.error["type"]) == ("failed", last + 1, "BadPayload")
        assert "last_seq was" in run.error["message"]
        kit.verify()


def test_a_run_that_was_claimed_as_often_as_a_number_can_say_is_claimed_again(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    postgres.execute("UPDATE runs SET attempt = 2147483647, queue = ''")
    beatless.work_until_idle()
    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.attempt) == ("completed", 2147483647)


LETTER = "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES ('event', 'a', 'b', %s)"


def test_a_hostile_letter_keeps_no_other_from_being_listed_and_requeued(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    hostile = ["5", "null", "[]", "{}", '{"from_seq": "x"}', '{"shard": 99999, "from_seq": 1e30}']
    good = '{"shard": 0, "from_seq": 1, "to_seq": 2}'
    for message in [*hostile, good]:
        postgres.execute(LETTER, (message,))

    letters = beatless.client.dead_letters()

    assert [(letter.from_seq, letter.to_seq) for letter in letters] == [(0, 0)] * 6 + [(1, 2)]
    assert beatless.client.requeue_dead_letters() == 1
    assert len(beatless.client.dead_letters()) == len(hostile)


@pytest.mark.parametrize("carried", ["5", "[]", "null", '{"traceparent": 5}'])
def test_a_run_goes_on_whatever_its_trace_context_is(
    beatless: Kit, postgres: psycopg.Connection, carried: str
) -> None:
    run = beatless.start_run("two_steps")
    postgres.execute("UPDATE runs SET trace_context = %s", (carried,))

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state == "completed"


@pytest.mark.parametrize("column", ["pruned_seq", "last_seq", "attempt"])
def test_a_counter_at_its_end_does_not_keep_verify_from_the_others(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, column: str
) -> None:
    run = beatless.start_run("two_steps")
    postgres.execute(f"UPDATE runs SET {column} = 2147483647".encode())

    assert run.run_id in {run_id for _, run_id in violations(beatless_app)}


def test_scopes_of_a_token_that_are_no_names_grant_nothing(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    secret = tokens.create([Scope.ADMIN])[1]
    for scopes in ("{{admin}}", "{NULL}", "{}"):
        postgres.execute("UPDATE api_tokens SET scopes = %s", (scopes,))
        assert not (found := tokens.find(secret)) or not found.allows(Scope.RUNS_READ)


@pytest.fixture
def refusing(postgres: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """Tables that take no change to the rows of the run 'culprit'."""
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'not this one'; END $$"
    )
    for table in ("dispatches", "run_outbox"):
        postgres.execute(
            f"CREATE TRIGGER refuse BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW"
            " WHEN (old.run_id = 'culprit') EXECUTE FUNCTION refuse()".encode()
        )
    yield postgres
    for table in ("dispatches", "run_outbox"):
        postgres.execute(f"DROP TRIGGER refuse ON {table}".encode())
    postgres.execute("DROP FUNCTION refuse")


def test_a_run_whose_rows_cannot_be_written_is_set_aside_and_tried_again_later(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], refusing: psycopg.Connection
) -> None:
    beatless.start_run("two_steps", run_id="culprit")
    others = [beatless.start_run("two_steps") for _ in range(3)]
    announcements = Announcements()
    relay = recording(beatless_app, doors, observer=announcements)

    for _ in range(3):
        relay.drain_once()

    assert pending(refusing) == 1
    marked = {
        row[0] for row in refusing.execute("SELECT run_id FROM dispatches WHERE state='sent'")
    }
    assert marked == {other.run_id for other in others}
    assert seqs(doors[0]) == {run_id: [1] for run_id in ("culprit", *marked)}
    assert {signal.run_id for signal in announcements.all(RunSetAside)} == {"culprit"}
    refusing.execute("ALTER TABLE run_outbox DISABLE TRIGGER ALL")
    refusing.execute("ALTER TABLE dispatches DISABLE TRIGGER ALL")
    drain = relay._once[1]
    assert 0 < drain.retry_in_s <= 60
    drain._quarantine._until.clear()
    relay.drain_once()
    relay.stop()
    assert pending(refusing) == 0


def test_a_queue_that_is_refused_costs_nothing_to_the_others_though_a_row_cannot_be_postponed(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], refusing: psycopg.Connection
) -> None:
    beatless.start_run("two_steps", run_id="culprit", queue="bad")
    postponed = beatless.start_run("two_steps", queue="bad")
    other = beatless.start_run("two_steps")
    refusing.execute("ALTER TABLE run_outbox DISABLE TRIGGER ALL")
    doors[1].refused_queues = {"bad"}
    relay = recording(beatless_app, doors)

    relay.drain_once()
    relay.stop()

    rows = dict(refusing.execute("SELECT run_id, reason FROM dispatches").fetchall())
    assert rows == {"culprit": "start", postponed.run_id: "refused", other.run_id: "start"}
    assert {message.run_id for message in doors[1].messages} == {other.run_id}


UNFIT = {
    "dispatches SET shard = 99": "I7",
    "dispatches SET due_at = 'infinity'": "I7",
    "dispatches SET attempts = 2147483647": "I7",
    "dispatches SET attempts = -1": "I7",
    "dispatches SET task = 'another'": "I7",
    "runs SET attempt = 2147483647": "I7",
    "runs SET lease_token = 9223372036854775807": "I7",
    "run_outbox SET shard = -1": "I8",
}


@pytest.mark.parametrize("hostile", UNFIT)
def test_verify_and_doctor_name_a_row_that_no_relay_can_act_on(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, hostile: str
) -> None:
    culprit = beatless.start_run("two_steps")
    other = beatless.start_run("two_steps")
    postgres.execute(f"UPDATE {hostile} WHERE run_id = %s".encode(), (culprit.run_id,))

    named = violations(beatless_app)

    assert (UNFIT[hostile], culprit.run_id) in named
    assert other.run_id not in {run_id for _, run_id in named}
    said = str(list(Doctor(beatless_app).examine(["rows"])))
    assert culprit.run_id in said
    assert other.run_id not in said


def violations(app: App) -> list[tuple[str, str]]:
    with app.engine.connect() as connection:
        found = verify(connection, app.settings.schema)
    return [(violation.invariant, violation.run_id) for violation in found]


def test_an_overdue_run_without_a_number_left_keeps_no_other_from_its_end(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    culprit, other = (beatless.start_run("two_steps", deadline=60) for _ in range(2))
    postgres.execute("UPDATE runs SET last_seq = 2147483647 WHERE run_id = %s", (culprit.run_id,))
    beatless.client.pause_queue("default")
    beatless.advance(61)
    beatless.drain_outbox_once()
    assert beatless.client.get_run(other.run_id).state.final
    assert not beatless.client.get_run(culprit.run_id).state.final


FULL = "UPDATE runs SET last_seq = 2147483647 WHERE run_id = %s"


def test_a_run_without_a_number_left_keeps_no_other_from_its_cancel(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """Those of several runs are one statement: of children, and of runs that are replaced."""
    schema, limit = beatless.app.settings.schema, beatless.app.settings.max_event_bytes
    culprit, other = (beatless.start_run("two_steps").run_id for _ in range(2))
    postgres.execute(FULL, (culprit,))

    cancelled = Cancels(schema, max_event_bytes=limit).cancel(
        postgres, [culprit, other], reason=None, undo={"two_steps": None}, source="relay"
    )

    assert [(run.run_id, run.state) for run in cancelled] == [(other, RunState.CANCELLED)]


def test_a_run_without_a_number_left_keeps_no_other_lease_of_a_dead_worker(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    leases = beatless.app.leases
    held = []
    for _ in range(2):
        run_id = beatless.start_run("two_steps").run_id
        lease = leases.claim(
            postgres, run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
        )
        assert lease is not None
        held.append((run_id, lease.token))
    postgres.execute(FULL, (held[0][0],))

    tokens = {token for _, token in held}
    assert leases.end(postgres, held, uncalled=tokens) == dict.fromkeys(tokens, True)


class TestEventsThatNobodyCanFold:
    """What the run has done is unknown: it ends, and says which event it is."""

    @pytest.fixture
    def begun(self) -> list[str]:
        return []

    @pytest.fixture
    def beatless_plans(self, begun: list[str]) -> list[Plan]:
        @step
        def release(ctx: StepContext, undone: Undone) -> None:
            begun.append("release")

        @step(undo=release)
        def first(ctx: StepContext) -> str:
            return "first"

        @step
        def second(ctx: StepContext) -> None:
            begun.append("second")

        @plan("function")
        def function(run: RunContext) -> None:
            run.step(first)
            run.step(second)

        return [Plan("list", [first, second]), function]

    @pytest.mark.parametrize(
        "data",
        [
            "(repeat('[', 3000) || repeat(']', 3000))::jsonb",
            """jsonb_build_object('result', repeat('9', 5000)::jsonb, 'name', '","data":')""",
            "'[1]'",
            "'7'",
        ],
        ids=["deep", "long", "a list", "a number"],
    )
    def test_they_end_their_own_run_with_a_word(
        self, beatless: Kit, postgres: psycopg.Connection, begun: list[str], data: str
    ) -> None:
        runs = [beatless.start_run(name).run_id for name in ("list", "function") * 2]
        for run_id in runs:
            beatless.step(run_id)
        update = f"UPDATE run_events SET data = {data} WHERE type = 'StepFinished'"
        postgres.execute(update.encode())
        other = beatless.start_run("list")
        for run_id in runs[2:]:
            beatless.client.cancel_run(run_id)
        found = places(beatless.app.engine, beatless.app.journal, beatless.app.plans)
        assert sum(place.runs for place in found) == 5

        beatless.work_until_idle()

        assert beatless.client.get_run(other.run_id).state is RunState.COMPLETED
        assert begun == ["second"]
        for run_id, state in zip(runs, ["failed"] * 2 + ["cancelled"] * 2, strict=True):
            run = beatless.client.get_run(run_id)
            assert (run.state, run.error["type"]) == (state, "BadPayload")
            assert "data of event 3 (StepFinished)" in run.error["message"]
            assert beatless.client.events(run_id)[2].data == UNREAD_JSON
