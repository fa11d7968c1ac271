"""The roles of Postgres and the users of Redis that `deploy` brings, on real servers."""

import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from beatless import App, Settings
from beatless.demo import PLANS
from beatless.doctor import Doctor, Status
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.observe.families import RUNS_ACTIVE
from beatless.testing import Kit

DEPLOY = Path(__file__).parents[2] / "deploy"
TABLES = ("runs", "run_events", "run_outbox", "dispatches", "queues", "dead_letters", "api_tokens")


class Roles:
    """A database as the README makes it: roles, migration by the owner, rights of the monitor."""

    def __init__(self, server: EmbeddedPostgres, redis_url: str) -> None:
        self._url = make_url(server.url)
        self._redis_url = redis_url
        with psycopg.connect(server.url) as admin:
            for _ in range(2):  # to repeat it is harmless
                admin.execute((DEPLOY / "postgres" / "roles.sql").read_text())
            for role in ("owner", "app", "monitor"):
                admin.execute(f"ALTER ROLE beatless_{role} PASSWORD 'secret'")
        owner = self.app("owner")
        migrate(owner.engine, "beatless")
        owner.close()
        with self.session("owner") as session:
            session.execute((DEPLOY / "postgres" / "monitor.sql").read_text())

    def url(self, role: str) -> str:
        found = self._url.set(username=f"beatless_{role}", password="secret")
        return found.render_as_string(hide_password=False)

    def app(self, role: str) -> App:
        app = App(Settings(database_url=self.url(role), redis_url=self._redis_url), PLANS)
        app.celery.conf.broker_transport_options["polling_interval"] = 0.05
        return app

    def session(self, role: str) -> psycopg.Connection:
        return psycopg.connect(self.url(role), autocommit=True, options="-csearch_path=beatless")


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Roles]:
    directory = tmp_path_factory.mktemp("roles")
    with (
        EmbeddedPostgres(directory / "postgres", settings={"fsync": "off"}) as postgres,
        EmbeddedValkey(directory / "valkey") as valkey,
    ):
        yield Roles(postgres, valkey.url)


def test_everything_that_runs_works_with_the_role_of_the_app(
    roles: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 0)  # else only under load
    kit = Kit(roles.app("app"), directory=tmp_path)
    try:
        client = kit.client
        run = kit.start_run("agents.run", key="once")
        cancelled = kit.start_run("agents.run", delay=60)
        client.cancel_run(cancelled.run_id)
        client.pause_queue("default")
        client.resume_queue("default")
        kit.work_until_idle()
        assert [event.seq for event in kit.collect_stream(run.run_id)] == list(range(1, 14))
        for ended in (run, cancelled):
            kit.wait_for_run_completion(ended.run_id)
            kit.wait_for_outbox_flush(ended.run_id)
        kit.verify()
        client.remove_run(cancelled.run_id)
        client.obliterate_queue("default", force=True)
    finally:
        kit.close()


@pytest.mark.parametrize(
    "statement",
    [
        *(f"DROP TABLE {table}" for table in TABLES),
        *(f"ALTER TABLE {table} ADD x int" for table in TABLES),
        *(f"TRUNCATE {table}" for table in TABLES),
        "CREATE TABLE more ()",
        "CREATE INDEX more ON runs (plan)",
        "DROP SCHEMA beatless CASCADE",
        "CREATE ROLE another",
        "COPY runs TO PROGRAM 'cat'",
    ],
)
def test_the_role_of_the_app_cannot_change_what_tables_there_are(
    roles: Roles, statement: str
) -> None:
    with (
        roles.session("app") as session,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        session.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM runs",
        "SELECT input FROM runs",
        "SELECT result FROM runs",
        "SELECT error FROM runs",
        "SELECT tags FROM runs",
        "SELECT data FROM run_events",
        "SELECT message FROM dead_letters",
        "SELECT id FROM api_tokens",
        "SELECT run FROM schedules",
        "SELECT run_id FROM decisions",
        "UPDATE runs SET state = 'queued'",
        "DELETE FROM run_outbox",
        "INSERT INTO queues VALUES ('x')",
        "CREATE TABLE more ()",
        "SELECT pg_terminate_backend(pg_backend_pid() - 1)",
    ],
)
def test_the_monitor_sees_no_content_and_changes_nothing(roles: Roles, statement: str) -> None:
    with roles.session("monitor") as session:
        try:
            session.execute(statement)
        except psycopg.errors.InsufficientPrivilege:
            return
        # Of a session that is not there, the function only says so.
        assert "pg_terminate_backend" in statement


def test_the_monitor_sees_what_metrics_and_autoscaling_ask_for(roles: Roles) -> None:
    kit = Kit(roles.app("app"))
    run = kit.start_run("agents.run", run_id="seen")
    monitor = roles.app("monitor")
    text = (DEPLOY / "kubernetes/overlays/production/autoscale.yaml").read_text()
    query = re.search(r"query: >-\n(.*?)\n +targetQueryValue", text, re.DOTALL)
    assert query
    try:
        with roles.session("monitor") as session:
            assert session.execute(query[1]).fetchone() == (1,)
            state = session.execute("SELECT state FROM runs WHERE run_id = 'seen'").fetchone()
        assert state == ("queued",)
        monitor.metrics.relay.shards = frozenset({0})  # as the relay that exports them
        exported = {metric.name for metric in monitor.metrics.postgres.collect()}
        assert RUNS_ACTIVE.name in exported
    finally:
        kit.work_until_idle()
        assert kit.wait_for_run_completion(run.run_id).state == "completed"
        kit.close()
        monitor.close()


def test_redis_takes_the_file_of_users(roles: Roles, tmp_path: Path) -> None:
    users = (DEPLOY / "redis" / "users.acl").read_text()
    # The kit's own door, which the file closes.
    (tmp_path / "users.acl").write_text(
        users.replace("user default off", "user default on >doorkeeper ~* &* +@all")
    )
    directory = tmp_path / "valkey"
    directory.mkdir()
    (directory / "password").write_text("doorkeeper")
    settings = {"aclfile": str(tmp_path / "users.acl")}
    with EmbeddedValkey(directory, settings=settings) as server:
        checks = ("redis", "eviction", "output buffers", "shared broker", "clocks")
        made = {}
        for user, broker in (("relay", "broker"), ("admin", "admin")):
            settings = {
                variable: f"redis://{name}:change-me-{name}@127.0.0.1:{server.port}/0"
                for variable, name in (("redis_url", user), ("broker_url", broker))
            }
            looking = App(Settings(database_url=roles.url("app"), **settings), PLANS)
            found = list(Doctor(looking).examine(checks))
            looking.close()
            for finding in found:
                assert finding.status in (Status.OK, Status.SKIPPED), finding
            made[user] = {each.check for each in found if each.status is Status.OK}
        assert "shared broker" in made["relay"]
        assert made["admin"] == set(checks)

        def client(user: str) -> "redis.Redis":
            return redis.Redis(
                port=server.port, username=user, password=f"change-me-{user}", socket_timeout=60
            )

        with client("relay") as relay, client("viewer") as viewer:
            assert relay.publish("beatless:events:run", "x") == 0
            with pytest.raises(redis.exceptions.NoPermissionError):
                relay.publish("elsewhere", "x")
            with pytest.raises(redis.exceptions.NoPermissionError):
                viewer.publish("beatless:events:run", "x")
            with pytest.raises(redis.exceptions.NoPermissionError):
                viewer.get("beatless:default")
