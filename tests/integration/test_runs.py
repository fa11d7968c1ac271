"""The main walk: start, dispatch, execute, publish, follow."""

import itertools
import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import orm

from beatless import App, BadPayload, BadRequest, RunConflict, RunNotFound, RunState, UnknownPlan
from beatless.cli.demo import GOLDEN
from beatless.client import RunRequest
from beatless.testing import Kit

TABLES = ("runs", "run_events", "run_outbox", "dispatches", "queues", "dead_letters")


def rows(postgres: psycopg.Connection) -> dict[str, int]:
    return {
        table: postgres.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES
    }


def assert_dense(beatless: Kit, run_id: str) -> None:
    events = beatless.client.events(run_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events].count("RunFinished") == 1
    assert events[-1].type == "RunFinished"


def test_orchestrator_golden_path(beatless: Kit) -> None:
    run = beatless.start_run("agents.run", {"device": "d1"})

    assert beatless.work_until_idle() == 1

    events = beatless.client.events(run.run_id)
    assert [event.type for event in events] == GOLDEN
    assert [event.seq for event in events] == list(range(1, 14))
    assert events[2].data["name"] == "ensureDevice.check"
    assert [e.step for e in events if e.type == "StepFinished"] == [
        "EnsureDevice",
        "Warmup",
        "OpenApp",
        "Ping",
        "Teardown",
    ]
    assert [event.source for event in events] == ["api", *["worker"] * 12]
    finished = beatless.client.get_run(run.run_id)
    assert finished.state is RunState.COMPLETED
    assert finished.result == events[-1].data["result"]
    assert finished.started_at <= finished.finished_at
    beatless.verify()


def test_stream_emits_the_canonical_sequence_and_terminates(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()

    assert [event.type for event in beatless.collect_stream(run.run_id)] == GOLDEN


def test_debug_stream_prints_every_field(beatless: Kit) -> None:
    run = beatless.start_run("agents.run", {"device": "d7"})
    beatless.work_until_idle()

    trace = beatless.collect_stream(run.run_id)[2]

    assert trace.to_dict() == {
        "run_id": run.run_id,
        "seq": 3,
        "ts": trace.ts,
        "type": "DebugTrace",
        "v": 1,
        "source": "worker",
        "step": "EnsureDevice",
        "attempt": 1,
        "data": {"name": "ensureDevice.check", "serial": "d7", "battery": 71, "online": True},
    }
    assert abs(trace.ts / 1000 - datetime.now(UTC).timestamp()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 50])
def test_concurrent_runs_each_have_their_own_dense_seq(beatless: Kit, count: int) -> None:
    runs = beatless.client.start_runs([RunRequest(plan="agents.run") for _ in range(count)])
    # Step by step in turn, so that the runs really interleave.
    while any(not beatless.client.get_run(run.run_id).state.final for run in runs):
        for run in runs:
            beatless.step(run.run_id)

    for run in runs:
        assert_dense(beatless, run.run_id)
        assert beatless.event_types(run.run_id) == GOLDEN
    beatless.drain_outbox_once()
    beatless.verify()


@pytest.mark.slow
def test_many_concurrent_jobs_all_complete(beatless: Kit) -> None:
    beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(200)])

    beatless.work_until_idle()

    assert len(beatless.client.list_runs(state="completed", limit=1000)) == 200
    beatless.verify()


@pytest.mark.parametrize("kind", ["session", "connection", "psycopg"])
def test_a_rolled_back_transaction_leaves_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, kind: str
) -> None:
    before = rows(postgres)
    if kind == "session":
        session = orm.Session(beatless_app.engine)
        run = beatless.start_run("two_steps", connection=session)
        session.rollback()
        session.close()
    elif kind == "connection":
        with beatless_app.engine.connect() as connection:
            transaction = connection.begin()
            run = beatless.start_run("two_steps", connection=connection)
            transaction.rollback()
    else:
        own = beatless_app.executors.connect()
        own.autocommit = False
        run = beatless.start_run("two_steps", connection=own)
        own.rollback()
        own.close()

    assert rows(postgres) == before == dict.fromkeys(TABLES, 0)
    assert beatless.work_until_idle() == 0
    with pytest.raises(RunNotFound):
        beatless.client.get_run(run.run_id)


@pytest.mark.parametrize("kind", ["session", "connection", "psycopg"])
def test_a_run_exists_only_once_its_callers_transaction_has_committed(
    beatless: Kit, beatless_app: App, kind: str
) -> None:
    if kind == "session":
        caller = orm.Session(beatless_app.engine)
    elif kind == "connection":
        caller = beatless_app.engine.connect()
    else:
        caller = beatless_app.executors.connect()
        caller.autocommit = False
    run = beatless.start_run("two_steps", connection=caller)
    assert beatless.client.get_run(run.run_id, connection=caller).state is RunState.QUEUED

    assert beatless.client.list_runs() == []
    assert beatless.drain_outbox_once() == 0

    caller.commit()
    caller.close()
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).result == "one two"


def test_something_that_is_no_connection_is_refused(beatless: Kit) -> None:
    with pytest.raises(TypeError, match="SQLAlchemy Connection or Session"):
        beatless.start_run("two_steps", connection="postgresql://")


def test_custom_id_deduplicates(beatless: Kit) -> None:
    one = beatless.client.start_run("two_steps", {"n": 1}, run_id="order-1")
    two = beatless.client.start_run("two_steps", {"n": 1}, run_id="order-1")

    assert two == one
    with pytest.raises(RunConflict, match="another input"):
        beatless.client.start_run("two_steps", {"n": 2}, run_id="order-1")
    assert beatless.work_until_idle() == 1


def test_one_id_twice_in_a_bulk_start_is_one_run(beatless: Kit) -> None:
    def twice(*inputs: object, **options: str) -> list[str]:
        requests = [RunRequest(plan="two_steps", input=given, **options) for given in inputs]
        return [run.run_id for run in beatless.client.start_runs(requests)]

    assert twice(1, 1, run_id="order-1") == ["order-1", "order-1"]
    with pytest.raises(RunConflict, match="another input"):
        twice(2, 3, run_id="order-2")
    first, second = twice(4, 4, key="order:4")
    assert first == second
    assert beatless.work_until_idle() == 2
    beatless.verify()


def test_a_run_that_is_removed_while_it_is_started_again_is_started(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = beatless.start_run("two_steps", key="order:1")
    original = beatless_app.journal._existing

    def existing(*arguments):
        monkeypatch.undo()
        beatless.client.remove_run(old.run_id)
        return original(*arguments)

    monkeypatch.setattr(beatless_app.journal, "_existing", existing)

    new = beatless.start_run("two_steps", key="order:1")

    assert new.run_id != old.run_id
    assert [run.run_id for run in beatless.client.list_runs()] == [new.run_id]


def test_a_state_that_there_is_not_is_refused(beatless: Kit) -> None:
    with pytest.raises(BadRequest, match="state is 'done'; choose queued, waiting, running"):
        beatless.client.list_runs(state="done")


def test_a_key_is_used_once(beatless: Kit) -> None:
    one = beatless.start_run("two_steps", {"n": 1}, key="order:1")
    again = beatless.start_run("two_steps", {"n": 1}, key="order:1")

    assert again.run_id == one.run_id
    with pytest.raises(RunConflict, match="another plan"):
        beatless.start_run("agents.run", {"n": 1}, key="order:1")
    assert beatless.work_until_idle() == 1
    beatless.assert_started("two_steps", input={"n": 1}, key="order:1")


def test_assert_started_says_what_was_started_instead(beatless: Kit) -> None:
    beatless.start_run("two_steps", {"n": 1})

    with pytest.raises(AssertionError, match=r"0 runs of agents.run .*two_steps \{'n': 1\}"):
        beatless.assert_started("agents.run")


def test_a_start_survives_that_all_connections_of_the_pool_have_died(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    client = beatless_app.client
    for name, start in {
        "alone": lambda: client.start_run("two_steps"),
        "many": lambda: client.start_runs([RunRequest(plan="two_steps")] * 2),
        "keyed": lambda: client.start_run("two_steps", dedupe_key="customer:7"),
    }.items():
        for pid in pooled_backends(beatless_app, 3):
            postgres.execute("SELECT pg_terminate_backend(%s, 60000)", (pid,))
        assert start(), name


def pooled_backends(app: App, count: int) -> list[int]:
    """The processes of so many connections, which are back in the pool."""
    with ExitStack() as stack:
        opened = [stack.enter_context(app.engine.connect()) for _ in range(count)]
        return [each.exec_driver_sql("SELECT pg_backend_pid()").scalar_one() for each in opened]


def test_a_start_leaves_no_connection_in_autocommit(beatless_app: App) -> None:
    """Whatever becomes of it: else the next transaction on its connection would be none."""
    beatless_app.engine.dispose()  # so that there is one connection, for all that follows
    client = beatless_app.client
    client.start_run("two_steps", {"order": 1}, key="order:1")
    with pytest.raises(RunConflict):
        client.start_run("two_steps", {"order": 2}, key="order:1")
    with beatless_app.engine.connect() as connection:
        connection.exec_driver_sql(f"DELETE FROM {beatless_app.settings.schema}.runs")
    assert len(client.list_runs()) == 1


def test_bulk_start_gives_the_runs_in_order_and_is_one_transaction(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    requests = [RunRequest(plan="two_steps", run_id=f"bulk-{n}", input=n) for n in range(20)]
    assert [run.input for run in beatless.client.start_runs(requests)] == list(range(20))
    assert beatless.client.start_runs([]) == []
    before = rows(postgres)

    with pytest.raises(RunConflict):
        beatless.client.start_runs(
            [
                RunRequest(plan="two_steps", run_id="bulk-new"),
                RunRequest(plan="two_steps", run_id="bulk-1", input="other"),
            ]
        )

    assert rows(postgres) == before


BAD_OPTIONS: list[tuple[dict, type[Exception], str]] = [
    ({"plan": "no'such\"plan"}, UnknownPlan, "this app has: agents.run"),
    ({"run_id": "a b"}, BadRequest, "run_id is 'a b'"),
    ({"run_id": ""}, BadRequest, "run_id"),
    ({"queue": "a/b"}, BadRequest, "queue"),
    ({"key": ""}, BadRequest, "key"),
    ({"key": "order \ud800"}, BadRequest, "key must be .* valid text"),
    ({"tags": {"a": "\ud800"}}, BadRequest, "tags must .* valid text"),
    ({"tags": {"\udfff": "a"}}, BadRequest, "tags must .* valid text"),
    ({"input": {"\ud800": 1}}, BadPayload, "input has the key"),
    ({"priority": 10}, BadRequest, "priority"),
    ({"delay": -1}, BadRequest, "delay"),
    ({"delay": 1, "not_before": datetime.now(UTC)}, BadRequest, "both"),
    ({"not_before": datetime(2030, 1, 1)}, BadRequest, "time zone"),  # noqa: DTZ001
    ({"not_before": datetime.max.replace(tzinfo=UTC)}, BadRequest, "years 1000 to 9998"),
    ({"not_before": datetime.min.replace(tzinfo=UTC)}, BadRequest, "years 1000 to 9998"),
    ({"tags": {"a": 1}}, BadRequest, "tags"),
    ({"input": {"a": [1, float("nan")]}}, BadPayload, r"input.a\[1\] is nan"),
    ({"input": {"a": "x\0y"}}, BadPayload, "input.a holds a NUL"),
    ({"input": {(1, 2): 2}}, BadPayload, r"input has the key \(1, 2\)"),
    ({"input": {"a": object()}}, BadPayload, "input.a is an object"),
    ({"input": "\ud800"}, BadPayload, "surrogate"),
    ({"input": "x" * 300_000}, BadPayload, "the limit is 262144"),
]


def test_bad_input_is_refused_before_anything_is_stored(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    for options, error, message in BAD_OPTIONS:
        with subtests.test(message):
            with pytest.raises(error, match=message):
                beatless.start_run(**{"plan": "two_steps", **options})
            assert beatless.client.list_runs() == []


def test_a_delayed_run_waits_for_its_time(beatless: Kit) -> None:
    run = beatless.start_run("two_steps", delay=timedelta(minutes=5))
    assert beatless.work_until_idle() == 0
    assert beatless.client.get_run(run.run_id).not_before is not None

    beatless.advance(240)
    assert beatless.work_until_idle() == 0
    beatless.advance(61)
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED


def test_higher_priority_goes_first(beatless: Kit) -> None:
    low = beatless.start_run("two_steps", priority=0)
    high = beatless.start_run("two_steps", priority=9)

    beatless.work_once()

    assert beatless.client.get_run(high.run_id).state is RunState.COMPLETED
    assert beatless.client.get_run(low.run_id).state is RunState.QUEUED
    beatless.work_until_idle()


def test_a_processed_job_has_run_each_step_once_and_keeps_its_result(
    beatless: Kit, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    run = beatless.start_run("ledger", {"ledger": str(ledger)})
    assert (run.state, run.result, run.finished_at) == (RunState.QUEUED, None, None)

    assert beatless.work_until_idle() == 1

    done = beatless.client.get_run(run.run_id)
    assert (done.state, done.result, done.attempt) == (RunState.COMPLETED, "abc", 1)
    assert done.finished_at is not None
    assert done.finished_at >= done.created_at
    assert [json.loads(line)["step"] for line in ledger.read_text().splitlines()] == ["a", "b", "c"]
    assert beatless.work_until_idle() == 0
    beatless.verify()


def test_a_retried_job_fails_waits_and_completes(beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 2})

    assert beatless.work_until_idle() == 1
    waiting = beatless.client.get_run(run.run_id)
    assert waiting.state is RunState.QUEUED
    failed = beatless.client.events(run.run_id)[-1]
    assert failed.type == "StepFailed"
    assert failed.data["error"]["message"] == "attempt 1 fails"
    assert abs(failed.data["retry_at"] - waiting.not_before.timestamp() * 1000) <= 1

    beatless.advance(11)
    assert beatless.work_until_idle() == 1
    beatless.advance(21)
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).result == 3
    beatless.verify()


def test_a_failed_job_keeps_its_reason(beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 9})
    for _ in range(3):
        beatless.work_until_idle()
        beatless.advance(100)

    failed = beatless.client.get_run(run.run_id)
    assert failed.state is RunState.FAILED
    assert failed.error["type"] == "ValueError"
    assert "attempt 3 fails" in failed.error["traceback"]
    assert "orchestrator" not in failed.error["traceback"]  # it begins where the step does
    assert beatless.event_types(run.run_id)[-2:] == ["StepFailed", "RunFinished"]
    assert beatless.work_until_idle() == 0
    beatless.verify()


def test_fatal_fails_the_run_at_once(beatless: Kit) -> None:
    run = beatless.start_run("fatally")
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).error["message"] == "no use trying again"


@pytest.mark.parametrize("what", ["nan", "set", "nul", "big"])
def test_a_result_that_cannot_be_stored_fails_the_step_and_names_it(
    beatless: Kit, what: str
) -> None:
    run = beatless.start_run("bad_results", {"what": what})
    beatless.work_until_idle()
    failed = beatless.client.get_run(run.run_id)
    assert failed.state is RunState.FAILED
    assert failed.error["message"].startswith("step returns_input:")
    beatless.verify()


def test_goto_returns_to_a_step_under_a_new_occurrence(beatless: Kit) -> None:
    run = beatless.start_run("loop", {"turns": 3})
    beatless.work_until_idle()

    steps = [e.step for e in beatless.client.events(run.run_id) if e.type == "StepFinished"]
    assert steps == ["turn", "turn#2", "turn#3", "stop"]
    assert beatless.client.get_run(run.run_id).result == "stopped after 3"
    beatless.verify()


def test_finish_completes_the_run_now(beatless: Kit) -> None:
    run = beatless.start_run("loop", {"turns": 2, "finish": True})
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == {"turns": 2}


def test_a_loop_resumes_at_its_turn_after_every_step(beatless: Kit) -> None:
    run = beatless.start_run("loop", {"turns": 4})
    while not beatless.client.get_run(run.run_id).state.final:
        assert beatless.step(run.run_id)
    assert beatless.client.get_run(run.run_id).result == "stopped after 4"
    beatless.verify()


def test_snooze_gives_the_worker_back_and_comes_again(beatless: Kit, tmp_path) -> None:
    wake = tmp_path / "wake"
    run = beatless.start_run("sleepy", {"wake": str(wake)})
    for _ in range(8):  # more often than a crashing step would be allowed to
        assert beatless.work_until_idle() == 1
        assert beatless.client.get_run(run.run_id).state is RunState.QUEUED
        beatless.advance(61)

    wake.touch()
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).result == "awake"
    beatless.verify()


def test_a_second_delivery_is_nothing(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    before = beatless.client.events(run.run_id)

    plan = beatless_app.plans["two_steps"]
    assert beatless.executor().execute(plan, run.run_id, 1) is False

    assert beatless.client.events(run.run_id) == before


def test_listing_is_newest_first_and_pages_without_gaps(beatless: Kit) -> None:
    started = [
        beatless.start_run("two_steps" if n % 2 else "traces", {"traces": 0}, tags={"n": str(n)})
        for n in range(9)
    ]
    pages, before = [], None
    while page := beatless.client.list_runs(limit=4, before=before):
        pages.append([run.run_id for run in page])
        before = page[-1]

    assert list(itertools.chain(*pages)) == [run.run_id for run in reversed(started)]
    assert len(beatless.client.list_runs(plan="traces")) == 5
    assert [run.tags for run in beatless.client.list_runs(tags={"n": "3"})] == [{"n": "3"}]
    assert beatless.client.list_runs(state="failed") == []


def test_tags_are_for_finding_runs_and_not_for_content(beatless: Kit) -> None:
    with pytest.raises(BadRequest, match="tags are longer than 16384 bytes"):
        beatless.start_run("two_steps", tags={"a": "x" * 10_000, "b": "x" * 7000})
    with pytest.raises(BadRequest, match="tags are longer than 16384 bytes"):
        beatless.start_run("two_steps", tags={"a": "漢" * 5500})
    assert beatless.start_run("two_steps", tags={"a": "x" * 16_383}).tags["a"] == "x" * 16_383
