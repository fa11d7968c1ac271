"""`beatless doctor` on stacks that are broken on purpose: it names what is broken."""

import http.server
import json
import os
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from queue import Queue
from typing import Any

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from beatless import App, Plan, StepContext, step
from beatless.cli import run
from beatless.doctor import Doctor, Finding, Status, postgres, probe
from beatless.doctor.doctor import CHECKS
from beatless.doctor.probe import Probe
from beatless.doctor.versions import REDIS, VALKEY, Fix, older_than
from beatless.errors import BadRequest, JobsError
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.privileges import server_user
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.queues import Presence, QueueStatements
from beatless.outbox.observer import (
    ChoreFailed,
    ChoreRested,
    Signal,
    ThreadFailed,
    ThreadRecovered,
    WatchdogRan,
)
from beatless.outbox.queries import execute
from beatless.outbox.sockets import readable
from beatless.settings import libpq_url
from beatless.system import look
from beatless.testing import Kit
from tests.valkeys import until

APP = "tests.plans:app"

ALWAYS_EAGER = {"task_always_eager": True}
"""What the doctor must find. Nothing is published under it here."""


@step
def sleepy(ctx: StepContext) -> None: ...


def examine(app: App, *checks: str, **options: Any) -> list[Finding]:
    return list(Doctor(app, **options).examine(checks))


@pytest.fixture
def _without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's answer is waited for, in a test that has no workers which could answer."""
    monkeypatch.setattr("beatless.doctor.probe.INSPECT_TIMEOUT_S", 0.1)


@pytest.fixture
def changed(beatless_app: App) -> Iterator[Callable[..., App]]:
    """Makes the test's app with other settings or plans."""
    made: list[App] = []

    def change(plans: Sequence[Plan] | None = None, **settings: Any) -> App:
        made.append(
            App(
                replace(beatless_app.settings, **settings),
                list(beatless_app.plans.values()) if plans is None else plans,
            )
        )
        return made[-1]

    yield change
    for app in made:
        app.close()


def only(found: Sequence[Finding], status: Status, *words: str) -> None:
    """One finding, this bad, which says these words and what to do."""
    (finding,) = found
    assert finding.status is status, found
    for word in words:
        assert word in finding.text, finding
    if status not in (Status.OK, Status.SKIPPED):
        assert finding.advice


@contextmanager
def altered(app: App, *statements: str, undo: Sequence[str]) -> Iterator[None]:
    """The database with some statements run, and others afterwards."""
    url = libpq_url(app.settings.database_url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"SET search_path TO {app.settings.schema}".encode())
        for statement in statements:
            connection.execute(statement.encode())
        try:
            yield
        finally:
            for statement in undo:
                connection.execute(statement.encode())


# Postgres


@pytest.mark.slow
def test_a_replica(beatless_app: App, tmp_path: Path, changed: Callable[..., App]) -> None:
    server = EmbeddedPostgres(tmp_path / "postgres", settings={"fsync": "off"})
    with server:
        pass
    (server.cluster / "standby.signal").touch()
    with server:
        app = changed(database_url=server.url, listen_url="")

        only(examine(app, "primary"), Status.PROBLEM, "replica")


@pytest.mark.slow
def test_a_replica_is_told_once_and_with_what_cannot_be_made_on_it(
    tmp_path: Path, changed: Callable[..., App]
) -> None:
    server = EmbeddedPostgres(tmp_path / "postgres", settings={"fsync": "off"})
    app = changed()
    with server:
        app = changed(database_url=server.url, listen_url="")
        migrate(app.engine, app.settings.schema)
    (server.cluster / "standby.signal").touch()
    with server:
        app = changed(database_url=server.url, listen_url="")
        among, listen = examine(app, patience=0.2), examine(app, "listen")

    told = {finding.check: finding for finding in among if "replica" in finding.text}
    assert {check: finding.status for check, finding in told.items()} == {
        "primary": Status.PROBLEM,
        "canary": Status.SKIPPED,
    }
    assert not [finding for finding in among if "could not be checked" in finding.text]
    assert [(finding.check, finding.status) for finding in listen] == [
        ("primary", Status.PROBLEM),
        ("listen", Status.SKIPPED),
    ]


@pytest.mark.slow
def test_a_listen_url_that_reaches_a_replica(tmp_path: Path, changed: Callable[..., App]) -> None:
    primary = EmbeddedPostgres(tmp_path / "primary", settings={"fsync": "off"})
    replica = EmbeddedPostgres(tmp_path / "replica", settings={"fsync": "off"})
    with primary:
        pass
    replica.directory.mkdir()
    shutil.copy2(primary.directory / "password", replica.directory)
    shutil.copytree(primary.cluster, replica.cluster)
    if (owner := server_user().owner) is not None:
        for path in (replica.cluster, *replica.cluster.rglob("*")):
            os.chown(path, *owner)
    (replica.cluster / "standby.signal").touch()
    with primary, replica:
        app = changed(database_url=primary.url, listen_url=replica.url)

        only(examine(app, "listen"), Status.PROBLEM, "the listen URL reaches a replica")


def test_a_replica_of_redis(tmp_path: Path, changed: Callable[..., App], shut_port: int) -> None:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.execute_command("REPLICAOF", "127.0.0.1", shut_port)
        app = changed(redis_url=server.url, broker_url=server.url)

        only(examine(app, "broker"), Status.PROBLEM, "reaches a replica")
        only(examine(app, "redis"), Status.WARNING, "reaches a replica")


def test_a_read_only_database(beatless_app: App, changed: Callable[..., App]) -> None:
    url = make_url(beatless_app.settings.database_url).update_query_dict(
        {"options": "-cdefault_transaction_read_only=on"}
    )
    app = changed(database_url=url.render_as_string(hide_password=False))

    only(examine(app, "primary"), Status.PROBLEM, "read-only")


def test_a_schema_behind_ahead_or_missing(beatless_app: App, changed: Callable[..., App]) -> None:
    (head,) = examine(beatless_app, "schema")
    version = head.text.rpartition(" ")[2]
    undo = [f"UPDATE beatless_version SET version_num = '{version}'"]
    with altered(beatless_app, "UPDATE beatless_version SET version_num = '0001'", undo=undo):
        only(examine(beatless_app, "schema"), Status.PROBLEM, "0001", "behind")
    with altered(beatless_app, "UPDATE beatless_version SET version_num = '9999'", undo=undo):
        only(examine(beatless_app, "schema"), Status.WARNING, "9999", "ahead")
    app = changed(schema="nowhere")
    only(examine(app, "schema"), Status.PROBLEM, "nowhere")
    app = changed(schema="public")  # which is there, without a table of ours
    only(examine(app, "schema"), Status.PROBLEM, "public was never migrated")


@pytest.mark.slow
def test_a_pooler_that_swallows_notifications(
    beatless_app: App, changed: Callable[..., App]
) -> None:
    with pooler(beatless_app.settings.database_url) as url:
        app = changed(listen_url=url)

        only(examine(app, "listen"), Status.PROBLEM, "pooler")
    only(examine(beatless_app, "listen"), Status.OK, "arrives")


def test_a_listen_url_of_another_database(beatless_app: App, changed: Callable[..., App]) -> None:
    url = make_url(beatless_app.settings.database_url).set(database="template1")
    app = changed(listen_url=url.render_as_string(hide_password=False))

    only(examine(app, "listen"), Status.PROBLEM, "template1")


@pytest.mark.slow
def test_a_full_notify_queue_and_a_forgotten_prepared_transaction(
    beatless_app: App, tmp_path: Path, changed: Callable[..., App]
) -> None:
    settings = {"fsync": "off", "max_notify_queue_pages": "64", "max_prepared_transactions": "1"}
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(tmp_path / "postgres", settings=settings))
        deaf, loud, forgetful = (stack.enter_context(psycopg.connect(server.url)) for _ in range(3))
        deaf.execute("LISTEN anything")
        deaf.commit()
        deaf.execute("SELECT 1")  # a transaction: what comes now is not read
        for _ in range(40):
            loud.execute("SELECT pg_notify('anything', repeat('x', 7000))")
            loud.commit()
        forgetful.execute("CREATE TABLE t ()")
        forgetful.execute("PREPARE TRANSACTION 'forgotten'")
        app = changed(database_url=server.url, listen_url="")

        only(examine(app, "notify queue"), Status.PROBLEM, "listens and does not read")
        only(examine(app, "transactions"), Status.WARNING, "1 prepared")


def test_a_transaction_that_stays_open(beatless_app: App) -> None:
    url = libpq_url(beatless_app.settings.database_url)
    with psycopg.connect(url, application_name="sleepy") as connection:
        connection.execute("SELECT 1")

        only(examine(beatless_app, "transactions", old_transaction=0), Status.WARNING, "in a trans")


@pytest.mark.slow
def test_a_session_of_ours_that_stands_in_line_is_no_old_transaction(
    tmp_path: Path, changed: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        EmbeddedPostgres(tmp_path / "postgres", settings={"fsync": "off"}) as server,
        psycopg.connect(server.url, autocommit=True) as first,
        closing(psycopg.connect(server.url, application_name="beatless relay 1")) as second,
        psycopg.connect(server.url, autocommit=True) as watching,
    ):
        app = changed(database_url=server.url, listen_url="")
        first.execute("SELECT pg_advisory_lock(424242)")
        second.pgconn.send_query(b"SELECT pg_advisory_lock(424242)")
        stands = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'advisory'"
        until(lambda: bool(watching.execute(stands, [second.info.backend_pid]).fetchall()))

        def named() -> bool:
            found = examine(app, "transactions", old_transaction=0)
            return f"(pid {second.info.backend_pid})" in str(found)

        assert not named()
        monkeypatch.setattr(postgres, "IN_LINE_S", 0.0)
        assert named()


def test_no_autovacuum_and_its_dead_rows(beatless_app: App) -> None:
    with altered(
        beatless_app,
        "ALTER TABLE run_outbox SET (autovacuum_enabled = false)",
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) "
        "SELECT 0, 'r', 1, 1 FROM generate_series(1, 25000)",
        "DELETE FROM run_outbox",
        "SELECT pg_stat_force_next_flush()",
        "SELECT 1",
        undo=["ALTER TABLE run_outbox RESET (autovacuum_enabled)", "VACUUM run_outbox"],
    ):
        found = examine(beatless_app, "bloat")

    assert [finding.status for finding in found] == [Status.PROBLEM, Status.WARNING]
    assert "autovacuum is off for run_outbox" in found[0].text
    # Sessions of the test before count their last rows as they end, maybe after its schema's.
    assert re.search(r"run_outbox has 25,\d{3} dead rows", found[1].text)


@pytest.fixture
def unflushed(beatless_app: App) -> str:
    """A URL of the test's database whose sessions do not flush, whatever the server does."""
    url = make_url(beatless_app.settings.database_url)
    return url.update_query_dict({"options": "-csynchronous_commit=off"}).render_as_string(
        hide_password=False
    )


def test_commits_that_are_not_flushed(unflushed: str, changed: Callable[..., App]) -> None:
    app = changed(database_url=unflushed)

    only(examine(app, "durability"), Status.WARNING, "synchronous_commit")


# Redis, the broker and Celery


def test_a_redis_that_evicts_and_whose_subscribers_have_no_limit(
    beatless_app: App, tmp_path: Path, changed: Callable[..., App]
) -> None:
    with EmbeddedValkey(tmp_path, settings={"maxmemory-policy": "allkeys-lru"}) as valkey:
        app = changed(redis_url=valkey.url, broker_url="")
        with app.redis() as client:
            client.config_set("client-output-buffer-limit", "pubsub 0 0 0")
            only(examine(app, "eviction"), Status.PROBLEM, "allkeys-lru")
            only(examine(app, "output buffers"), Status.WARNING, "no limit")
            client.config_set("client-output-buffer-limit", "pubsub 1mb 1mb 1")
            only(examine(app, "output buffers"), Status.WARNING, "cut off")
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1mb")
            only(examine(app, "eviction"), Status.WARNING, "maxmemory")


def test_a_redis_that_may_not_be_asked(
    beatless_app: App, tmp_path: Path, changed: Callable[..., App]
) -> None:
    with EmbeddedValkey(tmp_path) as valkey:
        app = changed(redis_url=valkey.url)
        with app.redis() as client:
            client.acl_setuser(
                "shy",
                enabled=True,
                nopass=True,
                categories=["+@all"],
                commands=["-config"],
                keys=["*"],
                channels=["*"],
            )
        shy = changed(redis_url=f"redis://shy:x@127.0.0.1:{valkey.port}/0")

        only(examine(shy, "output buffers"), Status.SKIPPED, "does not tell")


@pytest.mark.parametrize(
    ("table", "version", "fixed"),
    [
        (REDIS, "7.4.8", "7.4.9"),
        (REDIS, "7.4.9", None),
        (REDIS, "7.0.15", "8.6.3"),
        (REDIS, "8.6.2", "8.6.3"),
        (REDIS, "9.0.0", None),
        (VALKEY, "9.1.0", "9.1.1"),
        (VALKEY, "9.1.2", None),
        (VALKEY, "8.1.7", None),
    ],
)
def test_versions_with_known_holes(table: Any, version: str, fixed: str | None) -> None:
    found = older_than(table, version)

    assert (found and found[0]) == fixed


@pytest.mark.usefixtures("_without_workers")
def test_pickle_and_eager_tasks(beatless_app: App, changed: Callable[..., App]) -> None:
    app = changed()
    app.celery.conf.accept_content = ["json", "pickle"]
    only(examine(app, "celery"), Status.PROBLEM, "pickle")
    app = changed()
    app.celery.add_defaults(ALWAYS_EAGER)
    only(examine(app, "celery"), Status.PROBLEM, "task_always_eager")


def test_a_visibility_timeout_below_a_step(beatless_app: App, changed: Callable[..., App]) -> None:
    @step(timeout=120)
    def long(_ctx: StepContext) -> None: ...

    app = changed(plans=[Plan("long", [long])])
    app.celery.conf.broker_transport_options = {"visibility_timeout": 60}
    only(examine(app, "visibility timeout"), Status.WARNING, "60 s", "long.long", "120 s")
    app.celery.conf.broker_transport_options = {"visibility_timeout": 600}
    only(examine(app, "visibility timeout"), Status.OK)


# The fleet


@pytest.mark.usefixtures("_without_workers")
def test_nobody_is_there(beatless: Kit, beatless_app: App) -> None:
    only(examine(beatless_app, "relays"), Status.PROBLEM, "no relay runs")
    only(examine(beatless_app, "workers"), Status.PROBLEM, "no worker answers")
    only(examine(beatless_app, "canary", patience=0.2), Status.PROBLEM, "no relay took it")
    beatless.verify()


@pytest.mark.usefixtures("_without_workers")
def test_a_relay_without_workers(beatless: Kit, beatless_app: App) -> None:
    relay = beatless_app.relay()
    relay.start()
    try:
        only(
            examine(beatless_app, "canary", patience=1),
            Status.PROBLEM,
            "sent it to the broker, and no worker",
        )
    finally:
        relay.stop()


@pytest.mark.slow
def test_a_worker_of_an_old_version_and_a_queue_without_workers(
    beatless: Kit, beatless_app: App, changed: Callable[..., App]
) -> None:
    @step
    def nothing(_ctx: StepContext) -> None: ...

    beatless.relay_process(APP)
    beatless.worker_process(APP)
    plans = [*beatless_app.plans.values(), Plan("brand.new", [nothing])]
    app = changed(plans=[*plans, Plan("elsewhere", [nothing], queue="gpu")])

    doctor = Doctor(app)
    found = list(doctor.examine(["relays", "workers", "canary"]))

    told = [(finding.check, finding.status, finding.text) for finding in found]
    assert [(check, status) for check, status, _ in told] == [
        ("relays", Status.OK),
        ("workers", Status.PROBLEM),
        ("workers", Status.PROBLEM),
        ("canary", Status.OK),
    ]
    assert "does not know brand.new" in told[1][2]
    assert "BEATLESS_PREFIX" in found[1].advice
    assert "nobody consumes queue gpu" in told[2][2]
    # A queue that is consumed is no good news while its messages are dropped.
    only(Doctor(changed(plans=plans)).examine(["workers"]), Status.PROBLEM, "brand.new")
    hops = {hop.name: hop.seconds for hop in doctor.hops}
    assert list(hops) == ["commit", "doorbell", "relay", "broker", "step", "event"]
    assert all(seconds is None or 0 <= seconds < 10 for seconds in hops.values())
    assert beatless.client.list_runs() == []
    left = f"SELECT count(*) FROM {beatless_app.settings.schema}.runs"
    with beatless_app.engine.connect() as connection:
        assert execute(connection, left, {}) == [(0,)]


@pytest.mark.slow
def test_events_that_go_to_another_redis(beatless: Kit, beatless_app: App, tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "other") as other:
        broker = beatless_app.settings.redis_url
        beatless.relay_process(APP, redis_url=other.url, broker_url=broker)
        beatless.worker_process(APP)

        only(
            examine(beatless_app, "canary", patience=3),
            Status.PROBLEM,
            "did not come over Redis",
        )


@pytest.mark.slow
def test_a_user_of_redis_who_may_not_subscribe(
    beatless: Kit, beatless_app: App, changed: Callable[..., App]
) -> None:
    """The run went through: neither the relay nor a worker is to blame."""
    beatless.relay_process(APP)
    beatless.worker_process(APP, concurrency=1)
    name = f"{beatless_app.settings.prefix}-deaf"
    with beatless_app.redis() as client:
        client.acl_setuser(
            name, enabled=True, nopass=True, categories=["+@all"], commands=["-subscribe"]
        )
        try:
            url = make_url(beatless_app.settings.redis_url).set(username=name, password="x")
            deaf = changed(redis_url=url.render_as_string(hide_password=False))
            only(examine(deaf, "canary"), Status.PROBLEM, "event: it was executed")
        finally:
            client.acl_deluser(name)


def test_runs_of_a_plan_that_nobody_has(
    beatless: Kit, beatless_app: App, changed: Callable[..., App]
) -> None:
    beatless.start_run("two_steps")
    app = changed(plans=[beatless_app.plans["retries"]])

    only(examine(app, "plans"), Status.WARNING, "two_steps (1)")


def test_runs_that_wait_and_events_that_are_not_published(beatless: Kit, beatless_app: App) -> None:
    beatless.start_run("two_steps")
    beatless.client.pause_queue("slow")
    beatless.advance(1200)

    only(examine(beatless_app, "outbox"), Status.PROBLEM, "1 appends", "oldest for 12")
    waiting, paused = examine(beatless_app, "queues")
    assert (waiting.status, paused.status) == (Status.WARNING, Status.WARNING)
    assert "1 run of queue default waits, the oldest for " in waiting.text
    assert "slow" in paused.text


@pytest.mark.parametrize("sent", [False, True])
def test_runs_that_are_due_and_that_no_worker_takes(
    beatless: Kit, beatless_app: App, sent: bool
) -> None:
    for _ in range(5):
        beatless.start_run("two_steps")
    if sent:
        beatless.drain_outbox_once()
        assert {queue.queued for queue in beatless.client.queues()} == {5}
    beatless.advance(90)

    found = examine(beatless_app, "queues")
    only(found, Status.WARNING, "5 runs of queue default wait, the oldest for ")
    assert found[0].advice == "no worker answers: beatless worker --queues default"


def test_a_worker_in_which_a_thread_has_failed(beatless_app: App) -> None:
    only(examine(beatless_app, "threads"), Status.OK, "work")
    statements = QueueStatements(beatless_app.settings.schema)
    counts = beatless_app.metrics.worker

    def announce() -> None:
        with beatless_app.engine.begin() as connection:
            for name, failing in (("sound", []), ("sick", counts.failing())):
                statements.announce(
                    connection,
                    Presence(
                        worker=name,
                        hostname=f"{name}@here",
                        queues=["default"],
                        processes=1,
                        version="1",
                        failing=failing,
                    ),
                )

    counts(ThreadFailed(thread="watchdog", first=True))
    announce()
    only(examine(beatless_app, "threads"), Status.PROBLEM, "sick@here", "watchdog")
    counts(ThreadRecovered(thread="watchdog"))
    announce()
    only(examine(beatless_app, "threads"), Status.OK, "work")


def test_a_relay_in_which_a_thread_has_failed(beatless_app: App) -> None:
    looked: Queue[Signal] = Queue()

    def observe(signal: Signal) -> None:
        if isinstance(signal, WatchdogRan):
            looked.put(signal)

    def after(signal: Signal) -> list[Finding]:
        beatless_app.metrics.relay(signal)
        looked.queue.clear()
        for _ in range(2):  # the first look may have begun before
            looked.get(timeout=60)
        return examine(beatless_app, "threads")

    relay = beatless_app.relay(watchdog=0.05, observer=observe)
    relay.start()
    try:
        only(
            after(ThreadFailed(thread="courier", first=True)),
            Status.PROBLEM,
            "in the relay at",
            "courier",
        )
        only(after(ChoreFailed(error="odd")), Status.PROBLEM, "chores, courier")
        (shown,) = look(beatless_app, beatless_app.engine).relays
        assert shown.version == metadata.version("beatless")
        only(after(ThreadRecovered(thread="courier")), Status.PROBLEM, "since: chores")
        only(after(ChoreRested(rest_s=60)), Status.OK, "workers and relays work")
    finally:
        relay.stop()


# The checks themselves


def test_the_page_has_a_row_for_each_check_and_for_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    table = page.partition("## The checks")[2]
    rows = [cell for line in table.splitlines() for cell in re.findall(r"^\| (`[^|]+`) \|", line)]
    documented = [name for cell in rows for name in re.findall("`([^`]+)`", cell)]
    canaries = ["canary"]  # it has a section of its own
    assert sorted(documented + canaries) == sorted(check.name for check in CHECKS)


def test_a_check_that_does_not_name_what_it_needs_fails_at_once(beatless_app: App) -> None:
    with pytest.raises(RuntimeError, match=r"does not name Need\.POSTGRES"):
        Probe(beatless_app).rows("SELECT 1")


# Alone and among all


def test_a_check_that_there_is_not_is_told_with_those_that_there_are(beatless_app: App) -> None:
    with pytest.raises(BadRequest, match=r"'output-buffers' is none of these: postgres, primary,"):
        examine(beatless_app, "relays", "output-buffers")


@pytest.mark.usefixtures("_without_workers")
def test_every_check_says_alone_what_it_says_among_all(
    beatless: Kit, beatless_app: App, changed: Callable[..., App]
) -> None:
    beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    beatless.advance(90)
    app = changed(plans=[*beatless_app.plans.values(), Plan("other", [sleepy], queue="unheard")])
    among = examine(app, patience=0.2)
    checks = {finding.check for finding in among}
    assert {"wraparound", "canary", "queues", "workers", "celery"} <= checks
    for check in checks - {"connections", "clocks"}:  # whose numbers move
        found = examine(app, check, patience=0.2)
        told = [finding for finding in among if finding.check == check]
        assert [verdict(finding) for finding in found] == [verdict(finding) for finding in told]


def verdict(finding: Finding) -> tuple[str, Status, str, str]:
    """Without its numbers."""
    return finding.check, finding.status, re.sub(r"[\d.,]+", "0", finding.text), finding.advice


def test_a_frozen_redis_and_broker_are_asked_once_each_and_named(
    changed: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGSTOP: the kernel takes connections, and nobody answers them."""
    monkeypatch.setattr(probe, "REDIS_TIMEOUT_S", 0.2)
    with ExitStack() as stack:
        frozen = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        urls = [f"redis://127.0.0.1:{server.getsockname()[1]}/0" for server in frozen]
        found = examine(changed(redis_url=urls[0], broker_url=urls[1]))
        told = {finding.check: finding for finding in found}
        for check, name, server in zip(
            ("redis", "broker"), ("Redis", "broker"), frozen, strict=True
        ):
            assert told[check].status is Status.UNREACHABLE
            assert f"{name} cannot be reached: Timeout" in told[check].text
            asked = 0
            while readable([server], 0):
                stack.enter_context(server.accept()[0])
                asked += 1
            assert asked == 1


def test_without_redis_nobody_is_told_to_start_a_relay(changed: Callable[..., App]) -> None:
    app = changed(redis_url="redis://127.0.0.1:1/0", broker_url="redis://127.0.0.1:1/0")
    found = examine(app)
    told = {finding.check: finding for finding in found}
    assert told["redis"].status is told["broker"].status is Status.UNREACHABLE
    assert told["canary"].text == "not looked at: Redis cannot be reached"
    assert not [finding for finding in found if "rights" in finding.advice]
    assert "workers" not in told
    only(examine(app, "workers"), Status.SKIPPED, "the broker cannot be reached")


def test_a_version_that_a_distribution_may_have_mended_is_not_called_open(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.doctor.versions.VALKEY", {(99, 0): Fix(1, "CVE-1")})
    monkeypatch.setattr("beatless.doctor.versions.REDIS", {(99, 0): Fix(1, "CVE-1")})
    (found,) = examine(beatless_app, "redis")
    assert "older than 99.0.1, which closes CVE-1" in found.text
    assert "hole" not in found.text
    assert "distribution that has mended it under the old number" in found.advice


# What listens


DOORS = [
    (200, "127.0.0.2", Status.PROBLEM),
    (200, "127.0.0.1", Status.OK),
    (401, "127.0.0.2", Status.OK),
    (302, "127.0.0.2", Status.OK),
    (503, "127.0.0.1", Status.PROBLEM),
]


def test_a_door_that_is_open(beatless_app: App, subtests: pytest.Subtests) -> None:
    for status, host, expected in DOORS:

        class Door(http.server.BaseHTTPRequestHandler):
            answer = status

            def do_GET(self) -> None:
                self.send_response(self.answer)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        with http.server.ThreadingHTTPServer((host, 0), Door) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            url = f"http://{host}:{server.server_port}"
            found = {
                check: examine(beatless_app, check, **{f"{check}_url": url})
                for check in ("api", "flower")
            }
            server.shutdown()
            thread.join()
        for check, findings in found.items():
            with subtests.test(check, status=status, host=host):
                only(findings, expected)


def test_a_door_that_is_not_there(beatless_app: App) -> None:
    only(examine(beatless_app, "api"), Status.SKIPPED)
    only(examine(beatless_app, "api", api_url="http://127.0.0.1:1"), Status.PROBLEM, "not answer")
    only(examine(beatless_app, "api", api_url="ftp://x"), Status.PROBLEM, "no http address")


# The command


def test_the_command_says_what_to_do_and_its_status_tells(
    beatless_app: App,
    unflushed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)

    assert run(["doctor", "--check", "relays", "--check", "schema"]) == 1
    told = capsys.readouterr().out
    assert "✗ relays" in told
    assert "→ start `beatless relay`" in told
    assert "✓ schema" in told
    monkeypatch.setenv("BEATLESS_DATABASE_URL", unflushed)
    assert run(["doctor", "--json", "--check", "durability"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["status"], document["checks"][0]["check"]) == ("warning", "durability")


@pytest.mark.parametrize(
    ("setting", "check", "url"),
    [
        ("database_url", "postgres", "postgresql://nobody@127.0.0.1:1/nothing"),
        ("redis_url", "redis", "redis://127.0.0.1:1/0"),
        ("broker_url", "broker", "redis://127.0.0.1:1/0"),
    ],
)
def test_what_cannot_be_reached_is_status_3(
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    check: str,
    url: str,
) -> None:
    monkeypatch.setenv("BEATLESS_BROKER_URL", beatless_app.settings.broker_url)
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(f"BEATLESS_{setting.upper()}", url)
    if setting == "database_url":
        monkeypatch.setenv("BEATLESS_LISTEN_URL", url)

    assert run(["doctor", "--json", "--check", check]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["status"] == "unreachable"
    assert [found["check"] for found in document["checks"]] == [check]


def test_the_canarys_name_is_taken(beatless_app: App, changed: Callable[..., App]) -> None:
    @step
    def nothing(_ctx: StepContext) -> None: ...

    with pytest.raises(PlanError, match=r"beatless\.canary"):
        changed(plans=[Plan("beatless.canary", [nothing])])
    assert "beatless.canary" not in beatless_app.plans
    with pytest.raises(JobsError):
        beatless_app.client.start_run("beatless.canary")


@contextmanager
def pooler(database_url: str) -> Iterator[str]:
    """A door to Postgres that passes everything on but notifications, as PgBouncer does."""
    server = make_url(database_url)
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket, *, swallow: bool) -> None:
        waiting = b""
        with source, target:
            while not over.is_set():
                if not readable([source], 0.05):
                    continue
                try:
                    data = source.recv(65536)
                except OSError:
                    return
                if not data:
                    return
                if not swallow:
                    target.sendall(data)
                    continue
                waiting += data
                while len(waiting) >= 5:
                    (size,) = struct.unpack("!I", waiting[1:5])
                    if len(waiting) < size + 1:
                        break
                    message, waiting = waiting[: size + 1], waiting[size + 1 :]
                    if message[:1] != b"A":
                        target.sendall(message)

    def accept() -> None:
        while not over.is_set():
            if not readable([listener], 0.05):
                continue
            client, _ = listener.accept()
            upstream = socket.create_connection((server.host or "", server.port or 0))
            for source, target, swallow in ((client, upstream, False), (upstream, client, True)):
                thread = threading.Thread(
                    target=pump, args=(source.dup(), target.dup()), kwargs={"swallow": swallow}
                )
                threads.append(thread)
                thread.start()
            client.close()
            upstream.close()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    url = server.set(host="127.0.0.1", port=listener.getsockname()[1]).update_query_dict(
        {"sslmode": "disable", "gssencmode": "disable"}
    )
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        listener.close()


@pytest.mark.parametrize(
    ("celery", "kombu", "told"),
    [
        ("5.5.3", "5.5.4", ["celery 5.5.3: a prefork", "kombu 5.5.4: a relay"]),
        ("5.6.0", "5.6.1", ["kombu 5.6.1: a relay"]),
        ("5.7.0", "5.10.0", ["celery 5.7.0, kombu 5.10.0"]),
    ],
)
def test_an_older_package_is_told_with_its_weakness(
    celery: str,
    kombu: str,
    told: list[str],
    changed: Callable[..., App],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = {"celery": celery, "kombu": kombu}
    monkeypatch.setattr("beatless.doctor.configuration.metadata.version", versions.__getitem__)
    found = examine(changed(), "packages")
    assert len(found) == len(told)
    assert all(finding.text.startswith(text) for finding, text in zip(found, told, strict=True))


def test_takeover_through_a_pooler_is_told_to_wait_for_leases(
    beatless_app: App, changed: Callable[..., App]
) -> None:
    only(examine(beatless_app, "takeover"), Status.OK, "go on at once", "cut off")
    direct = beatless_app.settings.database_url
    pooled = changed(listen_url=f"{direct}{'&' if '?' in direct else '?'}connect_timeout=6")
    only(examine(pooled, "takeover"), Status.OK, "when their leases have run out")
