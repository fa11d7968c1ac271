"""Queue control is exact, for the whole fleet."""

import threading
from contextlib import nullcontext
from dataclasses import replace
from time import monotonic
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import sqlalchemy
from celery.signals import before_task_publish

from beatless import App, BadRequest, RunNotFound, RunState
from beatless.client import RunRequest
from beatless.errors import QueueBusy, Unreachable
from beatless.orchestrator.ended_runs import SHORTEST_REST_S, CountsEndedRuns
from beatless.orchestrator.errors import RunIsActive
from beatless.orchestrator.plan_versions import PlanVersions
from beatless.orchestrator.queues import PRESENCE_EXPIRES_S, Presence, QueueStatements
from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import TaskMessage
from beatless.outbox.publishers import CeleryTaskPublisher
from beatless.outbox.queries import execute
from beatless.outbox.sessions import prepare_to_drain
from beatless.testing import Kit
from tests.valkeys import until


def start(beatless: Kit, count: int, queue: str = "default") -> list[str]:
    requests = [RunRequest(plan="two_steps", queue=queue) for _ in range(count)]
    return [run.run_id for run in beatless.client.start_runs(requests)]


def states(beatless: Kit, runs: list[str]) -> set[RunState]:
    return {beatless.client.get_run(run_id).state for run_id in runs}


def test_nothing_of_a_paused_queue_starts_even_if_it_was_sent(beatless: Kit) -> None:
    runs, others = start(beatless, 5), start(beatless, 5, "other")
    beatless.drain_outbox_once()  # all ten are in the broker now

    beatless.client.pause_queue("default")
    beatless.work_until_idle()

    assert states(beatless, runs) == {RunState.QUEUED}
    assert states(beatless, others) == {RunState.COMPLETED}
    beatless.client.pause_queue("default")  # again: nothing changes
    beatless.client.resume_queue("default")
    beatless.work_until_idle()
    assert states(beatless, runs) == {RunState.COMPLETED}
    beatless.verify()


def test_a_run_that_was_begun_goes_on_in_a_paused_queue(beatless: Kit) -> None:
    (run_id,) = start(beatless, 1)
    with beatless.crash(at="step.committed"):
        beatless.work_until_idle()
    beatless.client.pause_queue("default")
    beatless.advance(60)
    beatless.work_until_idle()
    assert states(beatless, [run_id]) == {RunState.COMPLETED}


def test_no_run_starts_after_pause_has_returned(beatless: Kit, beatless_app: App) -> None:
    """Workers claim as fast as they can while the queue is paused and resumed many times."""
    runs = start(beatless, 300)
    remaining = iter(runs)
    mutex = threading.Lock()
    portions = threading.Semaphore(0)  # or they would be through before a slow `pause`

    def work() -> None:
        connection = beatless_app.executors.connect()
        while True:
            portions.acquire()
            with mutex:
                run_id = next(remaining, None)
            if run_id is None:
                break
            claimed = None
            while claimed is None:
                claimed = beatless_app.leases.claim(
                    connection, run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
                )
        connection.close()

    def active() -> int:
        return sum(state.active for state in beatless.client.queues())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(runs) // 20):
            portions.release(20)
            beatless.client.pause_queue("default")
            before = active()
            for _ in range(3):
                assert active() == before
            beatless.client.resume_queue("default")
    finally:
        beatless.client.resume_queue("default")
        portions.release(len(runs))
        for thread in threads:
            thread.join()
    assert active() == 300


def test_counts_per_state(beatless: Kit) -> None:
    start(beatless, 2, "q")
    beatless.work_until_idle()
    beatless.client.cancel_run(start(beatless, 1, "q")[0])
    beatless.start_run("fatally", queue="q")
    beatless.work_until_idle()
    beatless.start_run("two_steps", queue="q", delay=60)
    with beatless.crash(at="step.before"):
        start(beatless, 1, "q")
        beatless.work_until_idle()
    start(beatless, 3, "q")
    beatless.client.pause_queue("q")

    (found,) = beatless.client.queues()

    assert found.name == "q"
    assert found.paused_at is not None
    assert (found.queued, found.delayed, found.waiting, found.active) == (3, 1, 0, 1)
    assert (found.completed, found.failed, found.cancelled) == (2, 1, 1)
    assert found.oldest is not None
    assert (found.per_minute, found.workers) == (4, 1)


def test_a_run_that_was_given_back_goes_before_those_that_have_not_begun(beatless: Kit) -> None:
    begun, *others = start(beatless, 3, "q")
    urgent = beatless.start_run("two_steps", queue="q", priority=1).run_id
    assert beatless.step(begun)  # as a worker that stops after it
    for run_id in (urgent, begun, *others):
        assert beatless.client.get_run(run_id).state is RunState.QUEUED
        assert beatless.work_once()
        assert beatless.client.get_run(run_id).state is RunState.COMPLETED


def test_a_run_that_was_given_back_waits_since_then(beatless: Kit) -> None:
    (run_id,) = start(beatless, 1, "q")
    beatless.advance(3600)
    assert beatless.step(run_id)
    (found,) = beatless.client.queues()
    assert found.oldest == beatless.client.get_run(run_id).not_before


@pytest.mark.slow
def test_the_oldest_run_is_told_whether_it_was_sent_or_not(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    def oldest() -> float:
        (found,) = beatless.client.queues()
        ((passed,),) = postgres.execute("SELECT extract(epoch FROM now() - %s)", (found.oldest,))
        return float(passed or -1)

    start(beatless, 41, "q")
    beatless.advance(90)
    assert 89 < oldest() < 100
    while beatless.drain_outbox_once():
        pass
    assert 89 < oldest() < 100  # most were sent to the broker, and nobody takes them
    beatless.advance(600)
    beatless.drain_outbox_once()
    assert 689 < oldest() < 700  # sent again
    beatless.work_until_idle()
    assert oldest() == -1
    retried = beatless.start_run("retries", {"failures": 1}, queue="q")
    beatless.work_until_idle()
    beatless.advance(50)
    beatless.drain_outbox_once()
    assert 10 < oldest() < 51  # since the back-off of its attempt
    beatless.client.cancel_run(retried.run_id)


def test_workers_are_counted_by_what_they_consume(beatless: Kit, beatless_app: App) -> None:
    start(beatless, 1, "q")
    statements = QueueStatements(beatless_app.settings.schema)

    def workers() -> int:
        (found,) = [queue for queue in beatless.client.queues() if queue.name == "q"]
        return found.workers

    def presence(name: str, *queues: str) -> Presence:
        return Presence(worker=name, hostname="here", queues=list(queues), processes=8, version="1")

    with beatless_app.engine.begin() as connection:
        statements.announce(connection, presence("a", "q", "other"))
        statements.announce(connection, presence("b", "q"))
        statements.announce(connection, presence("c", "other"))
    assert workers() == 2
    with beatless_app.engine.begin() as connection:
        statements.announce(connection, presence("b", "other"))  # told to consume another
        statements.withdraw(connection, presence("c"))
    assert workers() == 1
    beatless.advance(PRESENCE_EXPIRES_S)  # killed
    assert workers() == 0
    beatless.advance(86_400)
    with beatless_app.engine.begin() as connection:
        statements.announce(connection, presence("d"))
        rows = execute(connection, f"SELECT worker FROM {beatless_app.settings.schema}.workers", {})
    assert rows == [("d",)]


def test_explain_says_whether_a_worker_consumes_the_queue_of_a_run_that_was_sent(
    beatless: Kit, beatless_app: App
) -> None:
    statements = QueueStatements(beatless_app.settings.schema)
    run = beatless.start_run("two_steps", queue="q")

    def told() -> str:
        return " ".join(moment.text for moment in beatless.client.explain(run.run_id))

    assert "no worker has claimed it" not in told()
    beatless.drain_outbox_once()
    assert "no worker has claimed it yet: none tells that it consumes the queue q" in told()
    assert "start `beatless worker --queues q`" in told()
    for name, queues in (("a", ["other"]), ("b", ["q"]), ("c", ["q", "other"])):
        with beatless_app.engine.begin() as connection:
            presence = Presence(
                worker=name, hostname="here", queues=queues, processes=1, version="1"
            )
            statements.announce(connection, presence)
            seen = "seen_at = clock_timestamp() + interval '1 hour'"  # however long this test takes
            execute(connection, f"UPDATE {beatless_app.settings.schema}.workers SET {seen}", {})
        if name == "b":
            assert "claimed it yet: the worker of the queue q had no process free, or" in told()
    assert "claimed it yet: the 2 workers of the queue q had no process free, or" in told()


@pytest.mark.long
def test_workers_that_consume_a_queue_are_counted_while_they_are_idle(beatless: Kit) -> None:
    workers = [beatless.worker_process("tests.plans:app") for _ in range(2)]
    run = beatless.start_run("two_steps")

    def counted(number: int) -> None:
        until(lambda: [queue.workers for queue in beatless.client.queues()] == [number])

    counted(2)
    # The first announcement comes behind the versions of the worker's plans.
    plan = beatless.app.plans["two_steps"]
    with beatless.app.engine.begin() as connection:
        known = PlanVersions(beatless.app.settings.schema).known(connection)
    assert known["two_steps"] == {plan.version: plan.names}
    assert beatless.client.get_run(run.run_id).plan_version == plan.version
    workers[0].terminate()
    counted(1)


def test_a_long_history_is_counted_by_the_relay(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> dict[str, tuple[int, int, int]]:
        found = beatless.client.queues()
        return {q.name: (q.completed, q.failed, q.queued) for q in found}

    monkeypatch.setattr("beatless.orchestrator.ended_runs.FEW", 2)
    monkeypatch.setattr("beatless.orchestrator.ended_runs.PAGE_RUNS", 2)
    counting = CountsEndedRuns(beatless_app.settings.schema)
    with beatless_app.direct_connection() as session:
        prepare_to_drain(session)

        def counted() -> None:
            while counting.step(session) < SHORTEST_REST_S:
                pass

        start(beatless, 2, "a")
        beatless.work_until_idle()
        counted()
        assert seen() == {"a": (2, 0, 0)}  # few: each reader counts them
        beatless.start_run("fatally", queue="b")
        start(beatless, 2, "b")
        beatless.work_until_idle()
        assert seen() == {"a": (2, 0, 0), "b": (2, 1, 0)}
        counted()
        start(beatless, 3, "a")
        beatless.work_until_idle()
        start(beatless, 1, "a")
        # What waits is always as it is now; what has ended, as it was counted.
        assert seen() == {"a": (2, 0, 1), "b": (2, 1, 0)}
        counted()
        assert seen() == {"a": (5, 0, 1), "b": (2, 1, 0)}
        beatless.client.obliterate_queue("a")
        assert seen() == {"b": (2, 1, 0)}
        start(beatless, 1, "b")
        beatless.work_until_idle()
        beatless.client.clean("completed", 0, limit=2)
        counted()
        assert seen() == {"b": (1, 1, 0)}


def test_ends_within_a_minute_are_told_also_if_they_are_too_many_to_read(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def per_minute() -> dict[str, int]:
        return {queue.name: queue.per_minute for queue in beatless.client.queues()}

    start(beatless, 3, "a"), start(beatless, 1, "b")
    beatless.work_until_idle()
    assert per_minute() == {"a": 3, "b": 1}
    beatless.advance(20)
    monkeypatch.setattr("beatless.orchestrator.queues.RECENT_ENDS", 4)
    beatless_again = QueueStatements(beatless.app.settings.schema)
    with beatless.app.engine.connect() as connection:
        found = {queue.name: queue.per_minute for queue in beatless_again.states(connection)}
    assert 6 <= found["a"] <= 9  # three within the last twenty seconds and a little
    assert 2 <= found["b"] <= 3
    beatless.advance(60)
    assert per_minute() == {"a": 0, "b": 0}


def test_drain_takes_what_waits_and_leaves_what_runs(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    with beatless.crash(at="step.before"):
        (running,) = start(beatless, 1)
        beatless.work_until_idle()
    waiting, others = start(beatless, 4), start(beatless, 2, "other")
    beatless.drain_outbox_once()

    assert beatless.client.drain_queue("default") == 4

    for run_id in waiting:
        with pytest.raises(RunNotFound):
            beatless.client.get_run(run_id)
    beatless.advance(60)
    beatless.work_until_idle()
    assert states(beatless, [running, *others]) == {RunState.COMPLETED}
    beatless.verify()


@pytest.mark.parametrize("verb", ["drain_queue", "obliterate_queue"])
def test_a_queue_that_nothing_knows_is_refused(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, verb: str
) -> None:
    act = getattr(beatless.client, verb)
    [ended] = start(beatless, 1, "ended")
    beatless.client.cancel_run(ended)
    start(beatless, 1, "waiting")
    beatless.client.pause_queue("paused")
    postgres.execute(
        "INSERT INTO workers (worker, hostname, queues, processes, version)"
        " VALUES ('w', 'h', '{consumed}', 1, '1')"
    )
    with pytest.raises(BadRequest, match="is 'wating', which no plan names, no worker consumes"):
        act("wating")
    assert [run.queue for run in beatless.client.list_runs()] == ["waiting", "ended"]

    for known in ("default", "ended", "waiting", "paused", "consumed"):
        act(known)


@pytest.mark.slow
def test_obliterate_leaves_nothing_of_the_queue_and_all_of_the_others(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    gone, kept = start(beatless, 20, "gone"), start(beatless, 20, "kept")
    for _ in range(5):
        beatless.work_once()
    with beatless.crash(at="step.before"):
        beatless.step(start(beatless, 1, "gone")[0])
    with pytest.raises(QueueBusy, match="gone has 1 of its runs running"):
        beatless.client.obliterate_queue("gone")

    assert [state.paused_at for state in beatless.client.queues()] == [None, None]
    beatless.client.pause_queue("gone")
    with pytest.raises(QueueBusy):
        beatless.client.obliterate_queue("gone")
    # A refusal changes nothing: who had paused it finds it paused.
    assert [bool(state.paused_at) for state in beatless.client.queues()] == [True, False]

    assert beatless.client.obliterate_queue("gone", force=True) == 21

    assert [state.name for state in beatless.client.queues()] == ["kept"]
    for table in ("run_events", "run_outbox", "dispatches"):
        rows = postgres.execute(f"SELECT DISTINCT run_id FROM {table}").fetchall()
        assert not {run_id for (run_id,) in rows} & set(gone)
    client = beatless_app.redis()
    keys = [key.decode() for key in client.scan_iter(match=f"{beatless_app.settings.prefix}*")]
    assert not [key for key in keys if "gone" in key]
    client.close()
    beatless.work_until_idle()
    assert states(beatless, kept) == {RunState.COMPLETED}
    beatless.verify()


def test_obliterate_spares_a_run_whose_takeover_is_on_its_way(beatless: Kit) -> None:
    with beatless.crash(at="step.before"):
        (run_id,) = start(beatless, 1)
        beatless.work_until_idle()
    beatless.advance(60)
    beatless.drain_outbox_once()  # its worker is lost, and another is told to take it over

    with pytest.raises(QueueBusy, match="default has 1 of its runs running"):
        beatless.client.obliterate_queue("default")

    beatless.work_until_idle()
    assert states(beatless, [run_id]) == {RunState.COMPLETED}
    beatless.verify()


def test_a_refused_obliterate_writes_nothing_about_the_queue(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """Whatever it wrote for a moment, it could undo what another administrator says meanwhile."""
    with beatless.crash(at="step.before"):
        start(beatless, 1)
        beatless.work_until_idle()
    postgres.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'somebody wrote about a queue'; END $$"
    )
    postgres.execute(
        "CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON queues "
        "EXECUTE FUNCTION refuse()"
    )

    try:
        with pytest.raises(QueueBusy):
            beatless.client.obliterate_queue("default")
    finally:
        postgres.execute("DROP FUNCTION refuse CASCADE")


def test_obliterate_is_refused_for_a_run_that_starts_while_it_comes(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs, found = start(beatless, 2), []

    def obliterate() -> None:
        with pytest.raises(QueueBusy) as refused:
            beatless.client.obliterate_queue("default")
        found.append(refused.value)

    thread = threading.Thread(target=obliterate)
    with postgres.transaction():
        postgres.execute("UPDATE runs SET state = 'running' WHERE run_id = %s", (runs[1],))
        thread.start()
        blocking(postgres)
    thread.join(60)

    assert [refused.active for refused in found] == [1]
    assert len(beatless.client.list_runs()) == 2


def blocking(postgres: psycopg.Connection) -> None:
    """Return once somebody waits for this session: Postgres announces it nowhere."""
    deadline, pause = monotonic() + 60, threading.Event()
    asked = (
        "SELECT EXISTS (SELECT FROM pg_locks WHERE pg_backend_pid() = ANY(pg_blocking_pids(pid)))"
    )
    while postgres.execute(asked).fetchone() != (True,):
        assert monotonic() < deadline, "nobody waits"
        pause.wait(0.002)


def test_clean_and_remove(beatless: Kit) -> None:
    done = start(beatless, 3)
    beatless.work_until_idle()
    (waiting,) = start(beatless, 1)

    with pytest.raises(BadRequest, match="older_than is missing"):
        beatless.client.clean("completed", older_than=None)
    assert beatless.client.clean("completed", older_than=3600) == 0
    assert beatless.client.clean("completed", older_than=0, limit=2) == 2
    assert [run.run_id for run in beatless.client.list_runs(state="completed")] == [done[2]]
    with pytest.raises(BadRequest, match="choose cancelled, completed, failed"):
        beatless.client.clean("queued", older_than=0)
    for never in (-1, float("nan"), 1e12):
        with pytest.raises(BadRequest, match="older_than is"):
            beatless.client.clean("completed", older_than=never)

    beatless.client.remove_run(waiting)
    with pytest.raises(RunNotFound):
        beatless.client.remove_run(waiting)
    with beatless.crash(at="step.before"):
        (running,) = start(beatless, 1)
        beatless.work_until_idle()
    with pytest.raises(RunIsActive):
        beatless.client.remove_run(running)
    beatless.verify()


def test_clean_and_obliterate_go_in_pages_and_an_interrupted_one_is_made_again(
    beatless: Kit, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trigger tells the transactions apart, and stops the third one of the obliteration."""
    monkeypatch.setattr("beatless.queues.PAGE_RUNS", 2)
    monkeypatch.setattr("beatless.orchestrator.queues.PAGE_EVENTS", 12)
    postgres.execute(
        "CREATE TABLE pages (id bigint, runs int); CREATE FUNCTION page() RETURNS trigger "
        "LANGUAGE plpgsql SET search_path FROM CURRENT AS $$ BEGIN "
        "INSERT INTO pages SELECT txid_current(), count(*) FROM gone; "
        "IF (SELECT count(*) FROM pages) = 7 THEN RAISE 'stopped'; END IF; RETURN NULL; END $$; "
        "CREATE TRIGGER page AFTER DELETE ON runs REFERENCING OLD TABLE AS gone "
        "EXECUTE FUNCTION page()"
    )
    try:
        start(beatless, 13)
        beatless.work_until_idle()
        start(beatless, 1)
        assert beatless.client.clean("completed", 0, limit=7) == 7
        pages = "SELECT array_agg(runs ORDER BY id) FROM pages"
        assert postgres.execute(pages).fetchone() == ([2, 2, 2, 1],)

        with pytest.raises(sqlalchemy.exc.DBAPIError, match="stopped"):
            beatless.client.obliterate_queue("default")
        # First the one that waits, then two with six events each.
        assert postgres.execute(pages).fetchone() == ([2, 2, 2, 1, 1, 2],)
        postgres.execute("INSERT INTO pages VALUES (0, 0)")
        assert beatless.client.obliterate_queue("default") == 4
    finally:
        postgres.execute("DROP TABLE pages; DROP FUNCTION page CASCADE")
    assert beatless.client.queues() == []
    beatless.verify()


def test_what_clean_would_take_away_is_counted(beatless: Kit) -> None:
    for plan in ("two_steps", "two_steps", "fatally"):
        beatless.start_run(plan)
    beatless.work_until_idle()
    beatless.start_run("two_steps")
    beatless.advance(3601)

    assert beatless.client.count_finished("completed", 3600) == (2, 12)
    assert beatless.client.count_finished("completed", 3700) == (0, 0)
    with pytest.raises(BadRequest, match="choose cancelled, completed, failed"):
        beatless.client.count_finished("queued", 0)
    assert len(beatless.client.list_runs()) == 4


def test_a_connection_that_died_in_the_pool_is_nobodys_problem(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    start(beatless, 2)
    beatless_app.engine.dispose()
    with beatless_app.engine.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
    assert postgres.execute("SELECT pg_terminate_backend(%s, 60000)", (pid,)).fetchone() == (True,)

    assert beatless.client.drain_queue("default") == 2


def test_runs_are_not_taken_away_again_when_the_answer_to_the_commit_was_lost(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """They may be gone: `clean` would take as many others, and a drain tell of too few."""
    start(beatless, 2)
    beatless.work_until_idle()
    postgres.execute("CREATE SEQUENCE deaths")
    postgres.execute(
        "CREATE FUNCTION die_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval(TG_TABLE_SCHEMA || '.deaths') = 1 THEN"
        " PERFORM pg_terminate_backend(pg_backend_pid()); END IF; RETURN NULL; END $$"
    )
    postgres.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER DELETE ON runs"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die_once()"
    )
    try:
        with pytest.raises(Unreachable):
            beatless.client.clean("completed", older_than=0, limit=1)
        assert len(beatless.client.list_runs()) == 2
    finally:
        postgres.execute("DROP FUNCTION die_once CASCADE; DROP SEQUENCE deaths")


def test_what_a_broker_refuses_is_told_with_its_own_batch_and_blames_no_other(
    beatless_app: App,
) -> None:
    """RabbitMQ answers no publish: what it refuses closes the channel a moment later."""

    def forge(properties: dict[str, Any], **_: Any) -> None:
        # It checks this property of a message, which may name nobody but who has logged in.
        properties["user_id"] = "somebody"

    before_task_publish.connect(forge, sender="forged")
    door = CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix)
    bad, good, later = (
        TaskMessage(run_id=task, task=task, queue=task, attempt=1)
        for task in ("forged", "good", "later")
    )
    rabbitmq = beatless_app.settings.broker_url.startswith("amqp")
    for batch in ([bad], [good, bad], [bad, good]):
        with pytest.raises(PublishRefused, match="somebody") if rabbitmq else nullcontext():
            door.publish(batch)
        door.publish([good])
        door.publish([good, later])


def test_a_broker_that_rejects_the_login_is_a_shut_door_and_refuses_no_queue(
    beatless_app: App,
) -> None:
    broker = urlsplit(beatless_app.settings.broker_url)
    # Not the user of the URL: a Redis without a password takes any from its default user.
    where = f"nobody:wrong@{broker.hostname}:{broker.port}"
    url = urlunsplit(broker._replace(netloc=where))
    app = App(replace(beatless_app.settings, broker_url=url), list(beatless_app.plans.values()))
    door = CeleryTaskPublisher(app.celery, app.settings.prefix)
    with pytest.raises(PublishFailed, match="the broker cannot be reached"):
        door.publish([TaskMessage(run_id="r", task="t", queue="default", attempt=1)])
    app.close()
