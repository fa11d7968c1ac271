"""The end of a run that has waited for a slot claims the next run, in the same commit."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from beatless import App, Limit, Plan, RunState, StepContext, plan, step
from beatless.orchestrator import executor as executors
from beatless.orchestrator import group as groups
from beatless.orchestrator import lease as leases
from beatless.orchestrator.children import CancelsChildren
from beatless.orchestrator.lease import Connection, Lease, Leases
from beatless.orchestrator.observer import Claimed
from beatless.orchestrator.pace import Pace
from beatless.orchestrator.wakes import Wakes
from beatless.outbox.clock import monotonic
from beatless.outbox.message import SHARDS
from beatless.outbox.observer import Signal
from beatless.testing import Kit
from beatless.worker.bootsteps import GroupLimit
from tests.integration.test_groups import Known, be_patient
from tests.integration.test_postgres_faults import at
from tests.integration.test_races import at_once
from tests.integration.test_run_limits import ENDS, assert_idle, parked, slots
from tests.proxy import proxy

BODIES: list[str] = []
ACTS: dict[str, Callable[[StepContext], Any]] = {}
"""What the body of a run does, by its input."""

ONE = Limit("one", at_once=1)


@step
def act(ctx: StepContext) -> Any:
    BODIES.append(ctx.run_id)
    ACTS.get(ctx.input, lambda _: None)(ctx)


@step(limits=[Limit("held", at_once=1)])
def hold(ctx: StepContext) -> Any:
    act.function(ctx)


@plan("function", limits=[ONE])
def function(run: Any) -> Any:
    return run.step(act)


@plan("waits")
def waits(run: Any) -> Any:
    run.wait("go")
    return run.step(act)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        waits,
        Plan("one", [act], limits=[ONE]),
        Plan("two", [act], limits=[Limit("two", at_once=2)]),
        Plan("both", [act], limits=[ONE, Limit("two", at_once=2)]),
        Plan("free", [act]),
        Plan("holds", [hold]),
        Plan("ends", [act, hold], limits=[ONE]),
        function,
    ]


class Worker:
    """A worker of the test's app, and what it has announced."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.signals: list[Signal] = []
        self.worker = kit.app.executors.new_group_executor(observer=self.signals.append)

    def deliver(self, run_id: str) -> list[str]:
        """Execute the message of a run; the runs that were claimed."""
        self.signals.clear()
        plan = self.kit.client.get_run(run_id).plan
        self.worker.execute(self.kit.app.plans[plan], run_id, 1)
        return [each.lease.run.run_id for each in self.signals if isinstance(each, Claimed)]


@pytest.fixture
def worker(beatless: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Time is no reason to stop, nor is a lock that somebody else has for a moment."""
    monkeypatch.setattr(groups, "GOES_ON_S", 600.0)
    monkeypatch.setattr(leases, "NEXT_LOCK_TIMEOUT_S", 600.0)
    BODIES.clear()
    ACTS.clear()
    found = Worker(beatless)
    yield found
    found.worker.executor.disconnect()


def started(kit: Kit, *plans: str, **options: Any) -> list[str]:
    """Runs of which the first was executed, and the second let in by its end."""
    found = [kit.start_run(name, **options).run_id for name in plans]
    kit.drain_outbox_once()
    assert kit.executor().execute(kit.app.plans[plans[0]], found[0], 1)
    return found[1:]


def state(postgres: psycopg.Connection, run_id: str) -> str:
    """Of the dispatch of a run."""
    ((found,),) = postgres.execute("SELECT state FROM dispatches WHERE run_id = %s", (run_id,))
    return str(found)


def limit_of_two(kit: Kit, postgres: psycopg.Connection) -> str:
    """The id of the limit of plan `two`, none of whose slots is taken."""
    kit.start_run("two")
    ((limit_id,),) = postgres.execute("SELECT limit_id FROM dispatches").fetchall()
    kit.work_until_idle()
    return str(limit_id)


@pytest.mark.parametrize("is_short", [True, False])
def test_runs_that_wait_for_a_slot_follow_each_other_without_a_message(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection, is_short: bool
) -> None:
    if is_short:
        worker.worker.executor.pace = Known()
    held: list[list[str]] = []
    ACTS["look"] = lambda _: held.append(slots(postgres))
    runs = started(beatless, "one", "one", "function", "both", "one", input="look")
    held.clear()

    assert worker.deliver(runs[0]) == runs

    assert held == [[run_id] if run_id != runs[2] else [run_id] * 2 for run_id in runs]
    assert_idle(postgres)
    beatless.verify()


def test_the_end_of_a_run_that_has_not_waited_claims_none(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("one").run_id for _ in range(3)]

    assert worker.deliver(runs[0]) == runs[:1]

    assert state(postgres, runs[1]) == "waiting"
    beatless.work_until_idle()
    assert_idle(postgres)


def test_the_next_run_is_that_of_the_highest_priority(beatless: Kit, worker: Worker) -> None:
    runs = started(beatless, "one", "one", "one")
    urgent = beatless.start_run("one", priority=5).run_id

    assert worker.deliver(runs[0]) == [runs[0], urgent, runs[1]]


def test_the_slot_of_a_step_is_passed_on_with_the_end_of_its_run(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("holds", n).run_id for n in ("first", "", "")]
    ACTS["first"] = lambda _: [worker.deliver(run_id) for run_id in runs[1:]]  # they find no slot
    assert beatless.executor().execute(beatless.app.plans["holds"], runs[0], 1)
    assert runs[:1] == BODIES

    assert worker.deliver(runs[1]) == runs[1:]

    assert runs == BODIES
    beatless.drain_outbox_once()  # what those that found no slot have noted
    assert_idle(postgres)
    beatless.verify()


def test_the_end_of_a_run_beside_others_claims_none(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last boundary is written by itself, as that step has limits; the group is not left."""
    be_patient(monkeypatch)
    worker.worker.executor.pace = Known()
    runs = started(beatless, "ends", "ends", "ends")
    runs.append(beatless.start_run("free").run_id)
    worker.worker.execute(beatless.app.plans["free"], "none", 1)  # in a backlog from now on

    assert worker.deliver(runs[0]) == [runs[0], runs[2]]

    assert slots(postgres) == []
    assert state(postgres, runs[1]) == "waiting"
    beatless.work_until_idle()
    assert_idle(postgres)


def pause(kit: Kit) -> None:
    kit.client.pause_queue("default")


def start_with_group(kit: Kit) -> None:
    kit.start_run("free", group="tenant")


def set_age(kit: Kit) -> None:
    kit.client.set_age_after("default", 60)


def start_before(kit: Kit) -> None:
    kit.start_run("free", priority=1)


@pytest.mark.parametrize("change", [pause, start_with_group, set_age, start_before])
def test_no_run_is_claimed_out_of_turn(
    beatless: Kit,
    worker: Worker,
    postgres: psycopg.Connection,
    change: Callable[[Kit], None],
) -> None:
    """In a paused queue, where the relay knows who is next, and before a run without limits."""
    runs = started(beatless, "one", "one", "one", "one", input="change")
    ACTS["change"] = lambda _: change(beatless)

    assert worker.deliver(runs[0]) == runs[:1]

    assert slots(postgres) == []
    assert state(postgres, runs[1]) == "waiting"
    ACTS.clear()
    beatless.client.resume_queue("default")
    beatless.work_until_idle()
    assert BODIES.count(runs[2]) == 1
    assert_idle(postgres)


@pytest.mark.parametrize(
    ("queue", "due_s", "reason", "goes_on"),
    [
        ("default", 50, "start", False),
        ("other", 50, "start", False),
        ("strange", 50, "start", True),
        ("gone", 50, "start", True),
        ("default", 1000, "start", True),
        ("default", 2000, "start", False),
        ("default", 50, "slot", True),
    ],
)
def test_messages_that_wait_for_a_worker_of_the_queue_come_first(
    beatless: Kit,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    queue: str,
    due_s: int,
    reason: str,
    goes_on: bool,
) -> None:
    """Those of all queues that its workers have, but one that has told nothing for long; not those
    that were sent just now.

    One that is due after more than the redispatch time was looked for, and is in the broker still.
    """
    monkeypatch.setattr(leases, "MOMENT_S", 900.0)
    worker.worker.executor.redispatch_s = 1000.0
    postgres.execute(
        "INSERT INTO workers (worker, hostname, queues, processes, version, seen_at) "
        "SELECT name, name, queues, 4, '1', clock_timestamp() + hours * interval '1 h' "
        "FROM (VALUES ('w1', '{default,other}'::text[], 1), ('w2', '{strange}', 1), "
        "('w3', '{default,gone}', -1)) w(name, queues, hours)"
    )
    runs = started(beatless, "one", "one", "one")
    message = beatless.start_run("free", queue=queue).run_id
    postgres.execute(
        "UPDATE dispatches SET state = 'sent', reason = %s, attempts = 1, "
        "due_at = clock_timestamp() + make_interval(secs => %s) WHERE run_id = %s",
        (reason, due_s, message),
    )

    assert worker.deliver(runs[0]) == (runs if goes_on else runs[:1])

    assert slots(postgres) == []


def test_a_worker_that_stops_claims_no_other(beatless: Kit, worker: Worker) -> None:
    runs = started(beatless, "one", "one", "one", input="stop")
    executor = worker.worker.executor
    executor.stopping = type(executor.stopping)()
    ACTS["stop"] = lambda _: executor.stopping.set()

    assert worker.deliver(runs[0]) == runs[:1]


def test_a_worker_goes_on_for_some_time_only(
    beatless: Kit, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "GOES_ON_S", 0.0)
    runs = started(beatless, "one", "one", "one")

    assert worker.deliver(runs[0]) == runs[:1]


def test_where_celery_counts_tasks_the_end_of_a_run_claims_none(
    beatless: Kit, worker: Worker, beatless_app: App
) -> None:
    """With `--max-tasks-per-child`, which is a number of runs."""
    runs = started(beatless, "one", "one", "one")
    given = SimpleNamespace(pool_cls=object, concurrency=1, max_tasks_per_child=1, steps=[])
    GroupLimit.of(beatless_app.executors)(given)
    other = Worker(beatless)

    assert other.deliver(runs[0]) == runs[:1]

    other.worker.executor.disconnect()


def test_an_end_claims_the_next_run_with_the_place_that_it_has_freed(
    beatless: Kit,
    beatless_app: App,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other place seems free, and would be waited for: another claim has not committed."""
    monkeypatch.setattr(leases, "NEXT_LOCK_TIMEOUT_S", 0.05)
    limit_id = limit_of_two(beatless, postgres)
    table = f"{beatless_app.settings.schema}.limit_slots"
    take = f"INSERT INTO {table} (limit_id, n, run_id) VALUES (%s, 1, 'elsewhere')"
    postgres.execute(take, (limit_id,))
    runs = started(beatless, "two", "two", "two", input="take")
    with closing(beatless_app.executors.connect()) as other:

        def take_first(_: StepContext) -> None:
            ACTS.clear()
            postgres.execute("DELETE FROM limit_slots WHERE n = 1")
            other.execute("BEGIN")
            other.execute(take, (limit_id,))

        ACTS["take"] = take_first
        assert worker.deliver(runs[0]) == runs
        other.execute("ROLLBACK")
    assert_idle(postgres)


def test_a_place_that_a_session_names_is_none_of_more_than_there_are(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("two").run_id for _ in range(6)]
    ((limit_id,),) = postgres.execute("SELECT DISTINCT limit_id FROM dispatches").fetchall()
    places = []
    with closing(beatless_app.executors.connect()) as session:
        freed = ["1 elsewhere", f"3 {limit_id}", f"0 {limit_id}", f"x {limit_id}", limit_id, ""]
        for run_id, named in zip(runs, freed, strict=True):
            session.execute("SELECT set_config('beatless.freed_slot', %s, false)", (named,))
            lease = beatless_app.leases.claim(
                session, run_id, plan="two", worker="w", first_step="act", dispatch=1
            )
            assert lease is not None
            places += postgres.execute("SELECT n FROM limit_slots").fetchall()
            assert beatless_app.journal.settle(session, run_id, lease.token, ENDS) is not None
    assert places == [(1,)] * 6


def test_a_claim_that_would_wait_for_another_is_left_out_and_the_end_is_not(
    beatless: Kit,
    beatless_app: App,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next run has another limit too, whose place seems free: a claim has not committed."""
    monkeypatch.setattr(leases, "NEXT_LOCK_TIMEOUT_S", 0.05)
    limit_id = limit_of_two(beatless, postgres)
    table = f"{beatless_app.settings.schema}.limit_slots"
    runs = started(beatless, "one", "one", "both", input="wait")
    with closing(beatless_app.executors.connect()) as other:

        def wait(_: StepContext) -> None:
            other.execute("BEGIN")
            other.execute(
                f"INSERT INTO {table} (limit_id, n, run_id) VALUES (%s, 1, 'elsewhere')",
                (limit_id,),
            )

        ACTS["wait"] = wait
        assert worker.deliver(runs[0]) == runs[:1]
        assert beatless.client.get_run(runs[0]).state is RunState.COMPLETED
        assert state(postgres, runs[1]) == "waiting"
        other.execute("ROLLBACK")
    ACTS.clear()
    beatless.work_until_idle()
    assert beatless.client.get_run(runs[1]).state is RunState.COMPLETED
    assert_idle(postgres)


def test_a_claim_that_would_wait_for_a_pause_is_left_out_and_the_end_is_not(
    beatless: Kit, beatless_app: App, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of an older version, which holds the fence alone."""
    monkeypatch.setattr(leases, "NEXT_LOCK_TIMEOUT_S", 0.05)
    runs = started(beatless, "one", "one", "one", input="pause")
    queues = f"'{beatless_app.settings.schema}.queues'::regclass::oid::int4"
    with closing(beatless_app.executors.connect()) as other:

        def pause(_: StepContext) -> None:
            other.execute("BEGIN")
            other.execute(f"SELECT pg_advisory_xact_lock({queues}, 0)".encode())

        ACTS["pause"] = pause
        assert worker.deliver(runs[0]) == runs[:1]
        assert beatless.client.get_run(runs[0]).state is RunState.COMPLETED
        other.execute("ROLLBACK")


NOTE_WAITS = """
CREATE TABLE waits (run_id text, at_most text);
CREATE FUNCTION note_wait() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
  INSERT INTO waits VALUES (NEW.run_id, current_setting('lock_timeout'));
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER zz_note_wait AFTER UPDATE OF state ON runs
  DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (NEW.finished_at IS NOT NULL)
  EXECUTE FUNCTION note_wait();
"""
"""Called by the commit."""


def test_the_commit_of_an_end_with_a_claim_waits_for_others_as_long_as_it_takes(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    """Those that ring commit one after another: the short wait for locks is the claim's alone."""
    runs = started(beatless, "one", "one", "one", "one")
    postgres.execute(NOTE_WAITS.encode())

    assert worker.deliver(runs[0]) == runs

    found = postgres.execute("SELECT run_id, at_most FROM waits").fetchall()
    assert found == [(run_id, "0") for run_id in runs]


def test_a_run_whose_other_limit_is_full_waits_for_that(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    runs = started(beatless, "one", "one", "both", "one")
    postgres.execute(
        "INSERT INTO limit_slots (limit_id, n, run_id) "
        "SELECT l ->> 'id', n, 'elsewhere' FROM runs, jsonb_array_elements(limits) l, "
        "generate_series(1, 2) n WHERE run_id = %s AND l ->> 'at_once' = '2'",
        (runs[1],),
    )

    assert worker.deliver(runs[0]) == runs[:1]

    assert runs[1] in parked(postgres)
    assert set(slots(postgres)) == {"elsewhere"}
    postgres.execute("DELETE FROM limit_slots WHERE run_id = 'elsewhere'")
    beatless.work_until_idle()
    assert_idle(postgres)


def test_a_run_whose_worker_dies_right_after_its_claim_is_taken_over(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    runs = started(beatless, "one", "one", "one", "one")

    with beatless.crash("claim.committed", nth=2):
        worker.deliver(runs[0])

    assert slots(postgres) == [runs[1]]
    beatless.advance(3600)
    beatless.work_until_idle()
    assert [BODIES.count(run_id) for run_id in runs] == [1, 1, 1]
    assert_idle(postgres)
    beatless.verify()


def test_a_claim_whose_answer_psycopg_loses_is_looked_for_and_the_end_is_written_once(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    """With one more answer than it counts it cannot leave its pipeline, nor use the session again.

    The first claim was committed so. The second one was not: it had failed in Postgres.
    """
    runs = started(beatless, "one", "one", "one", "one")
    BODIES.clear()
    executor = worker.worker.executor
    claim = executor.claim_next
    sessions: list[int] = []

    def lose_count(connection: Connection, ended: Lease) -> Callable[[], Lease | None]:
        sessions.append(connection.info.backend_pid)
        following = claim(connection, ended)
        if len(sessions) == 2:
            connection.execute("SELECT 1 / 0")
        connection.pgconn.pipeline_sync()
        return following

    executor.claim_next = lose_count

    assert worker.deliver(runs[0]) == runs[:2]

    assert len(set(sessions)) == 2
    assert runs[:2] == BODIES
    assert state(postgres, runs[2]) == "waiting"
    executor.claim_next = claim
    assert worker.deliver(runs[2]) == runs[2:]
    ended = [beatless.client.get_run(run_id) for run_id in runs]
    assert [(run.state, run.attempt) for run in ended] == [(RunState.COMPLETED, 1)] * 3
    assert_idle(postgres)
    beatless.verify()


def test_a_run_whose_claim_behind_an_end_was_not_answered_goes_on_at_once(
    beatless: Kit,
    beatless_app: App,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """One that the claim has begun, one of a function, and one that is cancelled meanwhile."""
    runs = started(beatless, "one", "one", "one", "function", "one", input="lose")
    BODIES.clear()
    found: list[str | None] = []
    find = Leases.find_following
    server = make_url(beatless_app.settings.database_url)
    with proxy(server.port or 5432) as path, ExitStack() as stack:
        url = server.set(host="127.0.0.1", port=path.port).render_as_string(hide_password=False)
        kit = Kit(at(beatless_app, url), directory=tmp_path)
        stack.callback(kit.close)
        other = Worker(kit)
        stack.callback(other.worker.executor.disconnect)

        def lose(_: StepContext) -> None:
            path.lost.clear()
            path.lose_answer_to(b"completed")

        def look(*arguments: Any) -> Lease | None:
            assert path.lost.is_set()
            if len(found) == 2:
                beatless.client.cancel_run(runs[3])
            lease = find(*arguments)
            found.append(lease and lease.run.run_id)
            return lease

        monkeypatch.setattr(Leases, "find_following", look)
        ACTS["lose"] = lose

        assert other.deliver(runs[0]) == runs

    assert found == runs[1:]
    assert runs[:3] == BODIES
    ended = [beatless.client.get_run(run_id) for run_id in runs]
    assert [run.attempt for run in ended] == [1] * 4
    assert [run.state for run in ended] == [*[RunState.COMPLETED] * 3, RunState.CANCELLED]
    assert_idle(postgres)
    beatless.verify()


def test_a_run_that_another_end_has_let_in_is_left_to_its_message(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    """It is first in the queue; each end claims the run that it has let in itself."""
    runs = [beatless.start_run("two").run_id for _ in range(6)]
    beatless.drain_outbox_once()
    for run_id in runs[:2]:  # of those that have not waited
        assert beatless.executor().execute(beatless.app.plans["two"], run_id, 1)
    assert [state(postgres, run_id) for run_id in runs[2:]] == ["waiting"] * 2 + ["delayed"] * 2

    assert worker.deliver(runs[3]) == runs[3:]

    assert state(postgres, runs[2]) == "waiting"
    assert worker.deliver(runs[2]) == runs[2:3]
    assert_idle(postgres)
    beatless.verify()


def test_two_workers_that_end_at_once_claim_different_runs(
    beatless: Kit, beatless_app: App, worker: Worker, postgres: psycopg.Connection
) -> None:
    others = [worker, Worker(beatless)]
    runs = [beatless.start_run("two").run_id for _ in range(12)]
    beatless.drain_outbox_once()
    for run_id in runs[:2]:
        assert beatless.executor().execute(beatless_app.plans["two"], run_id, 1)

    claimed = at_once(
        *(
            lambda each=each, run_id=run_id: each.deliver(run_id)
            for each, run_id in zip(others, runs[2:4], strict=True)
        )
    )

    found = [run_id for each in claimed for run_id in each]
    assert len(found) == len(set(found))
    beatless.work_until_idle()
    assert sorted(BODIES) == sorted(runs)
    assert_idle(postgres)
    others[1].worker.executor.disconnect()


# Without limits: runs that are executed alone


@pytest.fixture
def backlog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run has waited for long enough, and time is no reason to stop."""
    monkeypatch.setattr(executors, "BACKLOG_S", 0.0)
    monkeypatch.setattr(groups, "BEHIND_S", 600.0)
    monkeypatch.setattr(groups, "BEHIND_PLACE_S", 600.0)


def told(kit: Kit, number: int, **options: Any) -> list[str]:
    """Runs that have got their signal, and were never claimed."""
    runs = [kit.start_run("waits", **options).run_id for _ in range(number)]
    for run_id in runs:
        kit.signal(run_id, "go")
    return runs


class Long(Pace):
    """Every step is long but those of these plans."""

    def __init__(self, *short: str) -> None:
        super().__init__()
        self._short = short

    def suits_groups(self, plan: Plan) -> bool:
        return plan.name in self._short


@pytest.mark.usefixtures("backlog")
def test_in_a_backlog_runs_of_long_steps_follow_each_other_without_a_message(
    beatless: Kit, worker: Worker
) -> None:
    worker.worker.executor.pace = Long()
    runs = [beatless.start_run("free").run_id for _ in range(3)]
    urgent = beatless.start_run("free", priority=9).run_id

    assert worker.deliver(runs[0]) == [runs[0], urgent, *runs[1:]]

    assert [runs[0], urgent, *runs[1:]] == BODIES
    beatless.verify()


@pytest.mark.usefixtures("backlog")
def test_runs_with_limits_follow_each_other_while_there_are_slots(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    """They have not waited for a slot, so the end of one lets no other in."""
    worker.worker.executor.pace = Long()
    held: list[list[str]] = []
    ACTS["look"] = lambda _: held.append(slots(postgres))
    plans = ("two", "free", "two", "function")
    runs = [beatless.start_run(name, input="look").run_id for name in plans]

    assert worker.deliver(runs[0]) == runs

    assert held == [[runs[0]], [], [runs[2]], [runs[3]]]
    assert_idle(postgres)
    beatless.verify()


@pytest.mark.usefixtures("backlog")
def test_no_run_of_short_steps_follows_for_a_message_brings_others_with_it(
    beatless: Kit, worker: Worker
) -> None:
    worker.worker.executor.pace = Long("free")
    free = [beatless.start_run("free").run_id for _ in range(3)]
    runs = told(beatless, 3)

    assert worker.deliver(free[0]) == free[:1]
    assert worker.deliver(runs[0]) == runs

    assert [free[0], *runs] == BODIES
    beatless.work_until_idle()
    beatless.verify()


@pytest.mark.usefixtures("backlog")
def test_runs_that_were_woken_follow_each_other(
    beatless: Kit, worker: Worker, postgres: psycopg.Connection
) -> None:
    """They wait in the lane of their queue, for there are more than have a place in the broker."""
    runs = [beatless.start_run("waits").run_id for _ in range(3)]
    beatless.work_until_idle()
    for run_id in runs:
        beatless.signal(run_id, "go")
    cancels = CancelsChildren(beatless.app.journal, {})
    Wakes(beatless.app.settings.schema, cancels).wake(postgres, range(SHARDS))

    assert worker.deliver(runs[0]) == runs

    assert {beatless.client.get_run(run_id).attempt for run_id in runs} == {2}
    assert runs == BODIES
    beatless.verify()


@pytest.mark.usefixtures("backlog")
def test_runs_follow_one_that_was_parked(beatless: Kit, worker: Worker) -> None:
    runs = [beatless.start_run("waits").run_id for _ in range(3)]
    last = told(beatless, 1)

    assert worker.deliver(runs[0]) == [*runs, *last]

    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.WAITING}
    assert last == BODIES
    beatless.verify()


@pytest.mark.usefixtures("backlog")
@pytest.mark.parametrize(("queue", "goes_on"), [("default", True), ("other", False)])
def test_in_a_backlog_messages_of_another_queue_of_the_worker_come_first(
    beatless: Kit,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    queue: str,
    goes_on: bool,
) -> None:
    """Those of the queue itself wait in each backlog."""
    monkeypatch.setattr(leases, "MOMENT_S", 900.0)
    worker.worker.executor.redispatch_s = 1000.0
    postgres.execute(
        "INSERT INTO workers (worker, hostname, queues, processes, version, seen_at) "
        "VALUES ('w', 'w', '{default,other}', 4, '1', clock_timestamp() + interval '1 h')"
    )
    runs = told(beatless, 2)
    message = beatless.start_run("free", queue=queue).run_id
    postgres.execute(
        "UPDATE dispatches SET state = 'sent', attempts = 1, "
        "due_at = clock_timestamp() + interval '50 s' WHERE run_id = %s",
        (message,),
    )

    assert worker.deliver(runs[0]) == (runs if goes_on else runs[:1])


@pytest.mark.usefixtures("backlog")
def test_a_run_that_cannot_be_claimed_behind_one_that_was_parked_fails_nothing(
    beatless: Kit,
    worker: Worker,
    postgres: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    run = beatless.start_run("waits").run_id
    (other,) = told(beatless, 1)
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$"
    )
    postgres.execute(
        "CREATE TRIGGER refuse BEFORE UPDATE ON runs FOR EACH ROW"
        f" WHEN (NEW.run_id = '{other}' AND NEW.state = 'running') EXECUTE FUNCTION refuse()"
    )

    assert worker.deliver(run) == [run]

    actions = [getattr(record, "action", None) for record in caplog.records]
    assert actions.count("claim_next_failed") == 1
    assert beatless.client.get_run(run).state is RunState.WAITING
    postgres.execute("DROP FUNCTION refuse CASCADE")
    beatless.work_until_idle()
    assert [other] == BODIES
    beatless.verify()


def test_without_a_backlog_no_run_follows_another(
    beatless: Kit, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "BACKLOG_S", 600.0)
    runs = told(beatless, 2)
    assert worker.deliver(runs[0]) == runs[:1]
    beatless.work_until_idle()


@pytest.mark.parametrize(("places", "places_that_count"), [(1, 1), (2, 2), (9, 3)])
def test_runs_follow_for_longer_where_more_messages_are_executed_at_once(
    beatless: Kit,
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    places: int,
    places_that_count: int,
) -> None:
    monkeypatch.setattr(groups, "BEHIND_S", 1800.0)
    monkeypatch.setattr(groups, "BEHIND_PLACE_S", 600.0)
    beatless_app.executors.places = places
    here = Worker(beatless)

    here.deliver(beatless.start_run("free").run_id)

    left_s = here.worker.executor.behind_until - monotonic()
    assert 600 * (places_that_count - 1) < left_s <= 600 * places_that_count
    here.worker.executor.disconnect()


@pytest.mark.usefixtures("backlog")
@pytest.mark.parametrize(
    "why", ["paused", "held", "limited", "its time is over", "stopping", "each has a message"]
)
def test_no_run_follows_which(
    beatless: Kit,
    worker: Worker,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    caplog.set_level(logging.INFO)
    runs = told(beatless, 1)
    if why == "limited":
        holder, other = (beatless.start_run("two").run_id for _ in range(2))
        assert beatless.executor().claim(beatless.app.plans["two"], holder, 1)
        beatless.client.set_limit("two", 1)
    else:
        (other,) = told(beatless, 1)
    if why == "its time is over":
        monkeypatch.setattr(groups, "BEHIND_S", 0.0)
    if why == "each has a message":
        monkeypatch.setattr(worker.worker, "_max_runs", 1)
    executor = worker.worker.executor
    executor.stopping = type(executor.stopping)()  # of this worker, and of no other

    def prevent(_: StepContext) -> None:
        if why == "paused":
            beatless.app.queues.pause("default")
        elif why == "held":
            held.enter_context(postgres.transaction())
            postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (other,))
        elif why == "stopping":
            executor.stopping.set()

    ACTS[None] = prevent  # type: ignore[index]  # the input of these runs
    with ExitStack() as held:
        assert worker.deliver(runs[0]) == runs

    assert beatless.client.get_run(other).attempt == 0
    actions = {getattr(record, "action", None) for record in caplog.records}
    assert "claim_next_failed" not in actions  # as Postgres would have it without a slot
    ACTS.clear()
    if why == "paused":
        beatless.app.queues.resume("default")
    beatless.work_until_idle()
    assert beatless.client.get_run(runs[0]).state is RunState.COMPLETED
