"""Postgres crashes, refuses to write, has no connection left, or its answers do not arrive.

The proxies and the servers that are hurt belong to one test each.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from beatless import App, RunState, Unreachable
from beatless.client import RunRequest
from beatless.local.postgres import EmbeddedPostgres
from beatless.migrations import migrate
from beatless.outbox.backoff import Backoff
from beatless.outbox.observer import (
    Drained,
    RelayAsleep,
    RelayFailed,
    StalledRelayEnded,
)
from beatless.outbox.relay import Relay
from beatless.testing import Kit
from beatless.testing.servers import POSTGRES_SETTINGS, Services
from tests.integration.test_relay import Announcements
from tests.proxy import Proxy, proxy
from tests.valkeys import until

QUICK = Backoff(initial=0.01, cap=0.05)


@contextmanager
def relaying(app: App, **options) -> Iterator[tuple[Relay, Announcements]]:
    announcements = Announcements()
    relay = app.relay(**{"observer": announcements, "backoff": QUICK, **options})
    relay.start()
    try:
        yield relay, announcements
    finally:
        relay.stop()


def at(app: App, url: str) -> App:
    """The same app, with its Postgres at another address."""
    settings = replace(app.settings, database_url=url, listen_url="")
    return App(settings, list(app.plans.values()))


@pytest.fixture
def path(beatless_services: Services) -> Iterator[Proxy]:
    """A proxy before the shared Postgres."""
    with proxy(make_url(beatless_services.database_url).port or 5432) as found:
        yield found


@pytest.fixture
def proxied(beatless_app: App, path: Proxy, tmp_path: Path) -> Iterator[Kit]:
    """The test's app, whose Postgres is behind the proxy."""
    url = make_url(beatless_app.settings.database_url).set(host="127.0.0.1", port=path.port)
    kit = Kit(at(beatless_app, url.render_as_string(hide_password=False)), directory=tmp_path)
    yield kit
    kit.close()


def counted(app: App) -> Callable[..., float | None]:
    """What the metrics of this process say."""

    def value(name: str, **labels: str) -> float | None:
        return app.metrics.registry.get_sample_value(f"beatless_{name}_total", labels)

    return value


@pytest.mark.parametrize("marker", [b"StepFinished", b"completed"])
def test_a_step_whose_commit_was_not_answered_is_neither_repeated_nor_lost(
    proxied: Kit, path: Proxy, marker: bytes
) -> None:
    run = proxied.start_run("two_steps")
    proxied.drain_outbox_once()
    path.lose_answer_to(marker)

    proxied.work_until_idle()

    assert path.lost.is_set()
    assert proxied.client.get_run(run.run_id).result == "one two"
    assert proxied.event_types(run.run_id) == [
        "RunStarted",
        *["StepStarted", "StepFinished"] * 2,
        "RunFinished",
    ]
    counts = counted(proxied.app)
    assert counts("runs_finished", plan="two_steps", outcome="completed") == 1
    for step in ("first", "second"):
        assert counts("step_attempts", plan="two_steps", step=step, outcome="finished") == 1
    proxied.verify()


def test_a_claim_whose_commit_was_not_answered_is_brought_back_by_its_lease(
    proxied: Kit, path: Proxy
) -> None:
    proxied.executor().connection()
    run = proxied.start_run("two_steps")
    proxied.drain_outbox_once()
    path.lose_answer_to(b"lease_token")

    plan = proxied.app.plans["two_steps"]
    assert not proxied.executor().execute(plan, run.run_id, 1)
    assert path.lost.is_set()
    assert proxied.client.get_run(run.run_id).state is RunState.RUNNING
    proxied.advance(60)
    proxied.work_until_idle()

    assert proxied.client.get_run(run.run_id).result == "one two"
    proxied.verify()


def test_a_transactional_step_whose_commit_was_not_answered_is_not_executed_again(
    proxied: Kit, path: Proxy, postgres: psycopg.Connection
) -> None:
    """The classic double: the rows are there, and the worker was told that the connection broke."""
    postgres.execute("CREATE TABLE effects (key text)")
    run = proxied.start_run("transactional", {"table": f"{proxied.app.settings.schema}.effects"})
    journal = proxied.app.journal
    original = journal.settle

    def settle(*arguments):
        journal.settle = original
        appended = original(*arguments)
        path.lose_answer_to(b"COMMIT")  # the next one: that of the step's transaction
        return appended

    journal.settle = settle
    proxied.work_until_idle()

    assert path.lost.is_set()
    assert proxied.client.get_run(run.run_id).state is RunState.COMPLETED
    assert postgres.execute("SELECT key FROM effects").fetchall() == [(f"{run.run_id}:insert",)]
    attempts = [e.attempt for e in proxied.client.events(run.run_id) if e.type == "StepStarted"]
    assert attempts == [1, 1]
    counts = counted(proxied.app)
    for step in ("insert", "after_insert"):  # each once, that of the lost answer too
        assert counts("step_attempts", plan="transactional", step=step, outcome="finished") == 1
    postgres.execute("DROP TABLE effects")
    proxied.verify()


def test_a_cancelled_end_whose_commit_was_not_answered_is_counted_as_what_it_was(
    proxied: Kit, path: Proxy, postgres: psycopg.Connection
) -> None:
    postgres.execute("CREATE TABLE effects (key text)")
    run = proxied.start_run("transactional", {"table": f"{proxied.app.settings.schema}.effects"})
    journal = proxied.app.journal
    original = journal.settle

    def settle(*arguments):
        journal.settle = original
        proxied.client.cancel_run(run.run_id)
        appended = original(*arguments)
        path.lose_answer_to(b"COMMIT")
        return appended

    journal.settle = settle
    proxied.work_until_idle()

    assert path.lost.is_set()
    assert proxied.client.get_run(run.run_id).state is RunState.CANCELLED
    counts = counted(proxied.app)
    assert counts("runs_finished", plan="transactional", outcome="cancelled") == 1
    postgres.execute("DROP TABLE effects")
    proxied.verify()


def test_a_start_whose_commit_was_not_answered_is_one_run(proxied: Kit, path: Proxy) -> None:
    proxied.client.list_runs()  # a connection that the pool hands out again
    path.lose_answer_to(b"two_steps")  # the statement, which commits itself
    run = proxied.start_run("two_steps")
    assert path.lost.is_set()
    assert [found.run_id for found in proxied.client.list_runs()] == [run.run_id]


def test_starts_whose_commit_was_not_answered_are_one_run_each(proxied: Kit, path: Proxy) -> None:
    proxied.client.list_runs()
    path.lose_answer_to(b"COMMIT")
    runs = proxied.client.start_runs([RunRequest(plan="two_steps") for _ in range(2)])
    assert path.lost.is_set()
    found = {found.run_id for found in proxied.client.list_runs()}
    assert found == {run.run_id for run in runs}
    assert len(found) == 2


def test_a_retry_whose_commit_was_not_answered_is_one_run(proxied: Kit, path: Proxy) -> None:
    failed = proxied.start_run("fatally")
    proxied.work_until_idle()
    path.lose_answer_to(b"COMMIT")
    new = proxied.client.retry_run(failed.run_id)
    assert path.lost.is_set()
    assert {run.run_id for run in proxied.client.list_runs()} == {failed.run_id, new.run_id}


@pytest.mark.parametrize("namespace", ["default", "acme"])
def test_a_retry_of_all_failed_runs_knows_its_own_run_again(
    proxied: Kit, path: Proxy, namespace: str
) -> None:
    client = proxied.app.client_for(namespace)
    failed = client.start_run("fatally")
    proxied.work_until_idle()
    client.failed_runs()  # a connection that the pool hands out again: the next commit is the retry
    original = client._retry

    def retry(*arguments, **options):
        path.lose_answer_to(b"COMMIT")
        return original(*arguments, **options)

    client._retry = retry
    started, refused = client.retry_failed()

    assert path.lost.is_set()
    assert [run.retry_of for run in started] == [failed.run_id]
    assert refused == []


@pytest.mark.long
def test_a_relay_whose_sessions_are_black_holes_comes_back_and_takes_its_shards_from_itself(
    beatless: Kit, proxied: Kit, path: Proxy
) -> None:
    """No end of the connection is ever seen, and the server keeps the old sessions' locks."""
    with relaying(proxied.app, watchdog=0.5) as (_, announcements):
        announcements.wait(RelayAsleep)
        path.hold()
        run = beatless.start_run("two_steps")
        announcements.wait(RelayFailed)
        announcements.wait(StalledRelayEnded)
        beatless.wait_for_outbox_flush(run.run_id)


@contextmanager
def own_postgres(
    app: App, directory: Path, **settings: str
) -> Iterator[tuple[EmbeddedPostgres, Kit]]:
    """A migrated Postgres of the test's own, with a kit on it."""
    with ExitStack() as stack:
        server = stack.enter_context(
            EmbeddedPostgres(directory / "postgres", settings=POSTGRES_SETTINGS | settings)
        )
        kit = Kit(at(app, server.url), directory=directory)
        migrate(kit.app.engine, kit.app.settings.schema)
        stack.callback(kit.close)
        yield server, kit


def test_a_crash_of_postgres_in_the_middle_of_a_step_loses_nothing(
    beatless_app: App, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    with (
        own_postgres(beatless_app, tmp_path) as (server, kit),
        relaying(kit.app) as (_, announcements),
    ):
        run = kit.start_run("gated", {"go": str(go)})
        queued = kit.start_run("two_steps")
        kit.wait_for_outbox_flush(run.run_id)
        executor = kit.app.executors.new()
        plan = kit.app.plans["gated"]
        worker = threading.Thread(target=executor.execute, args=(plan, run.run_id, 1))
        worker.start()
        stream = kit.client.stream_run(run.run_id, timeout=300)
        while next(stream).type != "StepStarted":
            pass

        server.crash()
        announcements.wait(RelayFailed)
        go.touch()
        server.start()

        assert next(stream).type == "StepFinished"
        assert [event.type for event in stream] == ["RunFinished"]
        worker.join(60)
        executor.disconnect()
        kit.app.engine.dispose()  # its idle connections are dead
        kit.wait_for_outbox_flush(run.run_id)
        assert [e.type for e in kit.client.events(queued.run_id)] == ["RunStarted"]
        kit.verify()


class Waits(Backoff):
    """Notes how many failures in a row were counted."""

    noted: list[int]

    def delay(self, failures: int) -> float:
        self.noted.append(failures)
        return super().delay(failures)


@pytest.mark.slow
def test_a_primary_that_becomes_read_only_fails_no_run_and_is_not_flooded(
    beatless_app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "beatless.outbox.relay.BACKOFF_RESET_S", 3600.0
    )  # a slow life is no reason to count anew
    go = tmp_path / "go"
    waits = Waits(initial=0.001, cap=0.02)
    object.__setattr__(waits, "noted", [])
    with own_postgres(beatless_app, tmp_path) as (server, kit):
        run = kit.start_run("gated", {"go": str(go)})
        with (
            relaying(kit.app, backoff=waits) as (_, announcements),
            psycopg.connect(server.url, autocommit=True) as admin,
        ):
            kit.wait_for_outbox_flush(run.run_id)
            executor = kit.app.executors.new()
            worker = threading.Thread(
                target=executor.execute, args=(kit.app.plans["gated"], run.run_id, 1)
            )
            worker.start()
            stream = kit.client.stream_run(run.run_id, timeout=300)
            while next(stream).type != "StepStarted":
                pass
            later = kit.start_run("two_steps", delay=3600)
            kit.wait_for_outbox_flush(later.run_id)

            admin.execute("SET default_transaction_read_only = off")  # not for us
            admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            admin.execute("SELECT pg_reload_conf()")
            await_read_only(server)
            go.touch()
            assert announcements.all(RelayFailed) == []
            admin.execute(f"UPDATE {kit.app.settings.schema}.dispatches SET due_at = now()")
            admin.execute("SELECT pg_notify(%s, '')", (kit.app.queries.channel,))
            announcements.wait(RelayFailed, 4)
            assert waits.noted[:4] == [1, 2, 3, 4]  # each new session is no new beginning
            admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
            admin.execute("SELECT pg_reload_conf()")

            first, *_, last = failures(announcements)[:4]
            published = [each for each in announcements.seen[first:last] if type(each) is Drained]
            assert len(published) <= 3  # once in each life, and not over and over
            assert [event.type for event in stream] == ["StepFinished", "RunFinished"]
            worker.join(60)
            executor.disconnect()
            kit.wait_for_outbox_flush(run.run_id)
        assert kit.client.get_run(run.run_id).state is RunState.COMPLETED
        kit.verify()


def await_read_only(server: EmbeddedPostgres) -> None:
    """Return when every session takes it for its next statement.

    A new one that has it was begun while the postmaster told the others, or after that; one that
    comes after it was begun after that.
    """

    def read_only() -> bool:
        with psycopg.connect(server.url) as fresh:
            return fresh.execute("SHOW default_transaction_read_only").fetchone() == ("on",)

    until(read_only)
    assert read_only()


def failures(announcements: Announcements) -> list[int]:
    """The places of the ends of lives among all that was announced."""
    return [place for place, each in enumerate(announcements.seen) if type(each) is RelayFailed]


@pytest.mark.slow
def test_without_a_connection_left_a_relay_waits_and_leaves_none_open(
    beatless_app: App, tmp_path: Path
) -> None:
    settings = {"max_connections": "12", "superuser_reserved_connections": "0"}
    settings |= {"reserved_connections": "0", "autovacuum": "off", "max_wal_senders": "0"}
    with own_postgres(beatless_app, tmp_path, **settings) as (server, kit), ExitStack() as crowd:
        run = kit.start_run("two_steps")
        kit.app.engine.dispose()
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            take_all(server, crowd)
        with pytest.raises(Unreachable, match="too many clients"):
            kit.client.get_run(run.run_id)

        with relaying(kit.app) as (_, announcements):
            announcements.wait(RelayFailed, 5)
            crowd.close()
            announcements.wait(RelayAsleep)
            kit.wait_for_outbox_flush(run.run_id)
        kit.work_until_idle()
        assert kit.client.get_run(run.run_id).state is RunState.COMPLETED


def take_all(server: EmbeddedPostgres, crowd: ExitStack) -> None:
    while True:
        crowd.enter_context(psycopg.connect(server.url))


@pytest.mark.parametrize("session", ["transaction", "statement", "worker", "pooled"])
def test_the_server_looks_after_every_session_so_that_a_lost_host_keeps_no_lock(
    beatless_app: App, session: str
) -> None:
    watched = {
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "1",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "8000",
        "client_connection_check_interval": "5s",
    }
    url = beatless_app.settings.database_url
    settings = replace(beatless_app.settings, listen_url=f"{url}?application_name=direct")
    pooled = App(settings, [])
    with ExitStack() as opened:
        opened.callback(pooled.close)
        if session == "worker":
            show = opened.enter_context(beatless_app.executors.connect()).execute
        else:
            engine = pooled.engine if session == "pooled" else beatless_app.engine
            if session == "statement":
                engine = engine.execution_options(isolation_level="AUTOCOMMIT")
            show = opened.enter_context(engine.connect()).exec_driver_sql
        found = {name: show(f"SHOW {name}").fetchone()[0] for name in watched}
    # A pooler's session is not ours to set.
    assert (found == watched) is (session != "pooled"), found
