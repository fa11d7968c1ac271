"""What role, database, environment and callers say of sessions changes nothing of ours."""

import asyncio
import decimal
import functools
import inspect
import json
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from psycopg.types.json import set_json_loads
from psycopg.types.numeric import Int8BinaryLoader
from psycopg.types.string import StrDumperVarchar, TextLoader
from sqlalchemy import make_url, orm

from beatless import (
    App,
    ApprovalNotOpen,
    Client,
    Plan,
    Run,
    RunNotFound,
    RunRequest,
    Schedule,
    Settings,
    SignalRequest,
    StepContext,
    TransactionConflict,
    WrongEncoding,
    step,
    transactions,
)
from beatless.doctor import Doctor, Status
from beatless.migrations import migrate
from beatless.outbox import sessions
from beatless.outbox.queries import execute
from beatless.outbox.sessions import OWN, prepare_session
from beatless.postgres import connect_directly
from beatless.postgres import engine as connect_engine
from beatless.settings import engine_url, libpq_url
from beatless.testing import Kit
from beatless.testing.servers import Services
from beatless.transactions import reaching_postgres, transact, transact_by_driver
from tests.serving import serving

HOSTILE = {
    "DateStyle": "German",
    "IntervalStyle": "sql_standard",
    "TimeZone": "Asia/Kathmandu",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "client_encoding": "LATIN1",
    "search_path": "nowhere",
    # What a loaded machine needs for the statement that lifts it, and less than `compute` takes.
    "statement_timeout": "1s",
    "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "50ms",
    "idle_session_timeout": "1s",
    "transaction_timeout": "1s",
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "jit": "on",
    "jit_above_cost": "0",
    "transform_null_equals": "on",
    "debug_parallel_query": "on",
}

TEXT = "→ 漢字 € ü"


@step
def speak(ctx: StepContext) -> dict[str, Any]:
    ctx.trace("said", text=TEXT)
    return {"text": TEXT, "price": 9.99}


@step(transactional=True)
def compute(ctx: StepContext) -> Any:
    return ctx.connection.exec_driver_sql("SELECT 42 FROM pg_sleep(1.2)").scalar()


@step
def fail(ctx: StepContext) -> None:
    raise ValueError(TEXT)


@step
def answer(ctx: StepContext) -> dict[str, str]:
    return {"text": TEXT}


@step(transactional=True)
def answer_in_transaction(ctx: StepContext) -> dict[str, str]:
    return {"text": TEXT}


PLANS = [
    Plan("speaks", [speak, compute]),
    Plan("answers", [answer]),
    Plan("answers_in_transaction", [answer_in_transaction]),
    Plan("fails", [fail]),
    Plan("plain", [compute]),
]


@pytest.fixture
def server(beatless_services: Services) -> Iterator[psycopg.Connection]:
    with psycopg.connect(libpq_url(beatless_services.database_url), autocommit=True) as found:
        yield found


def available(server: psycopg.Connection) -> dict[str, str]:
    rows = server.execute("SELECT name FROM pg_settings WHERE name = ANY(%s)", (list(HOSTILE),))
    return {name: HOSTILE[name] for (name,) in rows.fetchall()}


@pytest.fixture
def database(server: psycopg.Connection) -> Iterator[tuple[str, str]]:
    """A role of the test's own, and a database: their names, which are the same."""
    name = f"t_{uuid.uuid4().hex[:8]}"
    server.execute(f"CREATE ROLE {name} SUPERUSER LOGIN PASSWORD 'secret'".encode())
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 OWNER {name}".encode())
    yield name
    server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
    server.execute(f"DROP ROLE {name}".encode())


@pytest.fixture
def settings(beatless_app: App, database: str) -> Settings:
    url = make_url(beatless_app.settings.database_url).set(
        username=database, password="secret", database=database, query={}
    )
    text = url.render_as_string(hide_password=False)
    return replace(beatless_app.settings, database_url=text, listen_url=text)


def walk(settings: Settings, tmp_path: Any) -> None:
    """Everything that processes and people do."""
    engine = connect_engine(settings.listen_url, "migrate", direct=True, session=OWN)
    migrate(engine, settings.schema)
    engine.dispose()
    app = App(settings, PLANS)
    kit = Kit(app, directory=tmp_path)
    try:
        run = kit.client.start_run("speaks", {"who": TEXT}, key="k", tags={"a": TEXT}, delay=0.001)
        assert kit.client.start_run("speaks", {"who": TEXT}, key="k", tags={"a": TEXT}) == run
        kit.work_until_idle()
        kit.advance(60)
        kit.work_until_idle()
        events = kit.collect_stream(run.run_id)
        assert events[-1].data["result"] == 42
        assert events[2].data["text"] == TEXT
        (listed,) = kit.client.list_runs(tags={"a": TEXT}, before=None)
        assert listed.state == "completed"
        assert listed.created_at.utcoffset().total_seconds() == 0
        assert kit.client.explain(run.run_id)
        failed = kit.client.start_run("speaks")
        kit.client.cancel_run(failed.run_id)
        retried = kit.client.retry_run(failed.run_id)
        errors: list[Exception] = []
        relay = app.relay()
        relay.start(errors.append)
        try:
            kit.wait_for_outbox_flush(retried.run_id)
        finally:
            relay.stop()
        assert errors == []
        kit.work_until_idle()
        assert kit.client.get_run(retried.run_id).state == "completed"
        with serving(app) as api:
            assert len(api("GET", "/v1/runs").json["runs"]) == 3
        kit.client.pause_queue("default")
        kit.client.resume_queue("default")
        assert kit.client.clean("completed", 0) == 2
        kit.verify()
        checks = ("postgres", "primary", "encoding", "sessions", "schema", "listen", "transactions")
        found = list(Doctor(app).examine((*checks, "outbox", "queues", "connections", "bloat")))
        assert [f for f in found if f.status in (Status.PROBLEM, Status.UNREACHABLE)] == []
    finally:
        kit.close()


@pytest.mark.parametrize("where", ["ROLE", "DATABASE"])
def test_settings_of_role_and_database_change_nothing(
    server: psycopg.Connection, database: str, settings: Settings, tmp_path: Any, where: str
) -> None:
    for name, value in available(server).items():
        server.execute(f"ALTER {where} {database} SET {name} = '{value}'".encode())
    walk(settings, tmp_path)


@pytest.mark.slow
def test_the_environment_of_libpq_changes_nothing(
    settings: Settings, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGOPTIONS", "-c statement_timeout=1s -c default_transaction_read_only=on")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGDATESTYLE", "German")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    walk(settings, tmp_path)


@pytest.mark.parametrize("where", ["password file", "service", "service of the environment"])
def test_passwords_and_services_are_found_where_libpq_has_them(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    url = make_url(settings.database_url)
    file = tmp_path / "file"
    if where == "password file":
        file.write_text(f"{url.host}:{url.port}:*:{url.username}:{url.password}\n")
        file.chmod(0o600)  # libpq reads no other
        monkeypatch.setenv("PGPASSFILE", str(file))
        text = f"postgresql://{url.username}@{url.host}:{url.port}/{url.database}"
    else:
        members = {"host": url.host, "port": url.port, "dbname": url.database, "user": url.username}
        told = members | {"password": url.password}
        file.write_text("[shop]\n" + "".join(f"{name}={told[name]}\n" for name in told))
        monkeypatch.setenv("PGSERVICEFILE", str(file))
        text = "postgresql:///"
        if where == "service":
            text += "?service=shop"
        else:
            monkeypatch.setenv("PGSERVICE", "shop")
    app = App(replace(settings, database_url=text, listen_url=text), PLANS)
    try:
        with app.engine.connect() as ours:
            assert ours.exec_driver_sql("SELECT current_user").scalar() == url.username
        with (
            app.executors.connect() as workers,
            connect_directly(app.settings, "relay", psycopg.Connection) as relay,
        ):
            for connection in (workers, relay):
                assert connection.execute("SELECT current_user").fetchone() == (url.username,)
    finally:
        app.close()


def test_what_the_url_itself_sets_is_meant_for_us(settings: Settings) -> None:
    url = f"{settings.database_url}?options=-c%20statement_timeout%3D1234"
    app = App(replace(settings, database_url=url, listen_url=url), PLANS)
    try:
        with app.engine.connect() as ours, app.executors.connect() as workers:
            shown = ours.exec_driver_sql("SHOW statement_timeout").scalar()
            assert shown == workers.execute("SHOW statement_timeout").fetchone()[0] == "1234ms"
    finally:
        app.close()


def act(app: App, connection: Any) -> None:
    """What may be done on a caller's connection."""
    act_by(app.client, connection)


def act_by(client: Client, connection: Any) -> None:
    content = {"price": 9.99, "who": TEXT}
    key = uuid.uuid4().hex
    run = client.start_run(
        "two_steps", content, key=key, tags={"a": TEXT}, delay=60, connection=connection
    )
    assert (
        client.start_run("two_steps", content, key=key, tags={"a": TEXT}, connection=connection)
        == run
    )
    assert run.input == content
    assert run.created_at.utcoffset().total_seconds() == 0
    assert client.get_run(run.run_id, connection=connection) == run
    listed = client.list_runs(tags={"a": TEXT}, before=None, connection=connection)
    assert run in listed
    rest = client.list_runs(tags={"a": TEXT}, before=listed[0], connection=connection)
    assert rest == listed[1:]
    assert [e.type for e in client.events(run.run_id, connection=connection)] == ["RunStarted"]
    assert client.explain(run.run_id, connection=connection)
    cancelled = client.cancel_run(run.run_id, reason=TEXT, connection=connection)
    assert cancelled.error["message"] == TEXT
    assert client.retry_run(run.run_id, connection=connection).input == content
    assert client.children(run.run_id, connection=connection) == []
    signal(client, connection, content)
    schedule(client, connection, content)


def signal(client: Client, connection: Any, content: Any) -> None:
    """Signals, approvals and links: what one call stores is what another one finds."""
    wanted = RunRequest(plan="two_steps", input=content, tags={"b": TEXT})
    (run,) = client.start_runs([wanted], connection=connection)
    sent = client.signal_run(run.run_id, "paid", content, key="k", connection=connection)
    assert sent.new
    again = client.signal_run(run.run_id, "paid", content, key="k", connection=connection)
    assert not again.new
    request = SignalRequest(run.run_id, "told", content, key="l")
    assert [each.new for each in client.signal_runs([request], connection=connection)] == [True]
    assert client.waits(run.run_id, connection=connection) == []
    with pytest.raises(ApprovalNotOpen):
        client.approve_run(run.run_id, "Refund", by=TEXT, connection=connection)
    link = client.approval_link(run.run_id, "Refund", by=TEXT, connection=connection)
    assert link.expires_at.utcoffset().total_seconds() == 0
    client.revoke_approval_link(link.id, connection=connection)


def schedule(client: Client, connection: Any, content: Any) -> None:
    """Schedules: a calendar of another zone than the session's, and a backfill of two ticks."""
    name = uuid.uuid4().hex
    given = Schedule(name, "two_steps", cron="30 2 * * *", tz="America/Lima", input=content)
    made = client.create_schedule(given, connection=connection)
    assert (made.next_tick.hour, made.next_tick.minute) == (7, 30)
    found = client.schedule(name, connection=connection)
    assert (found, found.input) == (made, content)
    assert found in client.schedules(after="", limit=1000, connection=connection)
    given = replace(given, cron="30 3 * * *")
    assert client.update_schedule(given, connection=connection).next_tick.hour == 8
    assert client.pause_schedule(name, connection=connection).state == "paused"
    assert client.resume_schedule(name, connection=connection).state == "active"
    run = client.run_schedule_now(name, connection=connection)
    assert (run.schedule, run.input, run.tick.utcoffset()) == (name, content, timedelta())
    first = datetime(2024, 5, 1, tzinfo=UTC)
    days = client.backfill_schedule(name, first, first + timedelta(2), connection=connection)
    assert days.runs == 2
    runs = client.list_runs(tags={"backfill": days.id}, connection=connection)
    assert {run.tick for run in runs} == {first.replace(day=d, hour=8, minute=30) for d in (1, 2)}
    assert client.cancel_backfill(days.id, connection=connection) == 2
    client.delete_schedule(name, connection=connection)


def test_no_statement_of_ours_waits_for_parallel_workers(
    beatless_app: App, server: psycopg.Connection
) -> None:
    """They begin with the limits of the database, by which they may end."""
    (name,) = server.execute(
        "SELECT name FROM pg_settings WHERE name IN ('debug_parallel_query', 'force_parallel_mode')"
    ).fetchone() or ("",)
    plans = []
    for session in (server, beatless_app.executors.connect()):
        with session:
            session.execute(f"SET {name} TO 'on'".encode())
            plans.append(str(session.execute("EXPLAIN SELECT * FROM pg_class").fetchall()))
    assert ["Gather" in plan for plan in plans] == [True, False]


def test_every_call_on_a_callers_connection_is_made_by_these_tests() -> None:
    source = "".join(map(inspect.getsource, (act_by, signal, schedule)))
    calls = [
        name
        for name, call in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_")
        and "connection" in inspect.signature(call).parameters
        and not inspect.iscoroutinefunction(call)
    ]
    assert [name for name in calls if f"client.{name}(" not in source] == []


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_settings_of_a_callers_session_change_nothing(
    beatless_app: App, server: psycopg.Connection, name: str
) -> None:
    if name not in available(server):
        return  # this server has no such setting
    # Who forbids to write, or sets a limit of a millisecond, means our statements too.
    value = {"default_transaction_read_only": "off", "statement_timeout": "20s"}.get(name)
    value = value or ("20s" if name.endswith("timeout") else HOSTILE[name])
    change = f"SET {name} TO '{value}'"
    url = beatless_app.settings.database_url
    for autocommit in (True, False):
        with psycopg.connect(libpq_url(url), autocommit=True) as connection:
            connection.execute(change.encode())
            before = connection.execute(f"SHOW {name}".encode()).fetchone()
            connection.autocommit = autocommit
            with connection.transaction():
                act(beatless_app, connection)
            assert connection.execute(f"SHOW {name}".encode()).fetchone() == before
            connection.rollback()
    engine = sqlalchemy.create_engine(engine_url(url))
    with engine.connect() as given:
        given.exec_driver_sql(change)
        act(beatless_app, given)
        assert given.exec_driver_sql(f"SHOW {name}").scalar() == before[0]
    engine.dispose()


class Shouting(TextLoader):
    def load(self, data: Any) -> str:
        return super().load(data).upper()


class Wrong(Int8BinaryLoader):
    def load(self, data: Any) -> Any:
        return decimal.Decimal(super().load(data))


def spoil(adapters: Any) -> None:
    """Adapters as applications register them, and worse."""
    set_json_loads(functools.partial(json.loads, parse_float=decimal.Decimal), adapters)
    adapters.adapters.register_loader("text", Shouting)
    adapters.adapters.register_loader("int8", Wrong)
    adapters.adapters.register_dumper(str, StrDumperVarchar)


@pytest.fixture
def url(beatless_app: App) -> str:
    return libpq_url(beatless_app.settings.database_url)


@pytest.mark.parametrize(
    "options",
    [
        {"row_factory": dict_row},
        {"cursor_factory": psycopg.RawCursor},
        {"cursor_factory": psycopg.ClientCursor},
        {"prepare_threshold": 0},
        {"prepare_threshold": None},
    ],
    ids=["rows", "raw", "client", "prepared", "unprepared"],
)
def test_factories_of_a_callers_connection_are_not_ours(
    beatless_app: App, url: str, options: dict[str, Any]
) -> None:
    for autocommit in (True, False):
        with (
            psycopg.connect(url, autocommit=autocommit, **options) as connection,
            connection.transaction(),
        ):
            act(beatless_app, connection)


def test_adapters_of_a_callers_connection_are_not_ours(beatless_app: App, url: str) -> None:
    with psycopg.connect(url) as connection:
        spoil(connection)
        act(beatless_app, connection)
    engine = sqlalchemy.create_engine(
        engine_url(beatless_app.settings.database_url),
        json_deserializer=functools.partial(json.loads, parse_float=decimal.Decimal),
    )
    sqlalchemy.event.listen(engine, "connect", lambda connection, _: spoil(connection))
    with orm.Session(engine) as session:
        act(beatless_app, session)
    engine.dispose()


def test_adapters_of_the_whole_process_are_not_ours(
    beatless: Kit, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        psycopg.types.json._JsonLoader,
        "_loads",
        functools.partial(json.loads, parse_float=decimal.Decimal),
    )
    content = {"price": 9.99}
    run = beatless.start_run("two_steps", content, key="k")
    assert beatless.client.start_run("two_steps", content, run_id=run.run_id, key="k") == run
    beatless.work_until_idle()
    with serving(beatless.app) as api:
        assert api("GET", "/v1/runs").json["runs"][0]["input"] == content
    assert beatless.client.retry_run(run.run_id, "second").input == content
    with psycopg.connect(url) as connection:
        act(beatless.app, connection)


def test_a_pipeline_of_the_callers_is_none_of_ours(beatless_app: App, url: str) -> None:
    for autocommit in (True, False):
        with (
            psycopg.connect(url, autocommit=autocommit) as connection,
            connection.pipeline(),
            connection.transaction(),
        ):
            act(beatless_app, connection)
            connection.execute("SELECT 1")
            act(beatless_app, connection)


def test_a_scoped_session_is_taken(beatless_app: App) -> None:
    sessions = orm.scoped_session(orm.sessionmaker(beatless_app.engine))
    act(beatless_app, sessions)
    sessions.remove()


def test_a_connection_in_autocommit_is_taken_in_a_transaction_only(
    beatless_app: App, url: str
) -> None:
    """Else the run would be there, although the caller's own statements were rolled back."""
    client = beatless_app.client
    with psycopg.connect(url, autocommit=True) as connection:
        for call in (
            lambda: client.start_run("two_steps", connection=connection),
            lambda: client.cancel_run("any", connection=connection),
            lambda: client.signal_run("any", "paid", connection=connection),
        ):
            with pytest.raises(ValueError, match=r"in no transaction: .* connection.transaction"):
                call()
        with connection.transaction(force_rollback=True):
            gone = client.start_run("two_steps", connection=connection)
        connection.execute("BEGIN")
        kept = client.start_run("two_steps", connection=connection)
        connection.execute("COMMIT")
    engine = sqlalchemy.create_engine(
        engine_url(beatless_app.settings.database_url), isolation_level="AUTOCOMMIT"
    )
    with engine.begin() as connection, pytest.raises(ValueError, match="in autocommit"):
        client.start_run("two_steps", connection=connection)
    with orm.Session(engine) as session, pytest.raises(ValueError, match="in autocommit"):
        client.start_run("two_steps", connection=session)
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        act(beatless_app, connection)
    engine.dispose()
    assert client.get_run(kept.run_id) == kept
    with pytest.raises(RunNotFound):
        client.get_run(gone.run_id)


def test_a_connection_that_begins_by_our_statement_commits_it(beatless_app: App) -> None:
    with beatless_app.engine.connect() as connection:
        run = beatless_app.client.start_run("two_steps", connection=connection)
        connection.commit()
    assert beatless_app.client.get_run(run.run_id) == run


def test_a_serialization_failure_is_tried_again_and_is_no_absent_server(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    engine = beatless.app.engine.execution_options(isolation_level="SERIALIZABLE")
    tries = 0

    def cancel(connection: sqlalchemy.Connection, conflicts: int) -> Run:
        nonlocal tries
        tries += 1
        beatless.client.get_run(run.run_id, connection=connection)
        if tries <= conflicts:
            postgres.execute("UPDATE runs SET tags = tags")
        return beatless.client.cancel_run(run.run_id, connection=connection)

    with pytest.raises(TransactionConflict), reaching_postgres("here"):
        transact(engine, lambda connection: cancel(connection, 100), twice=True)
    tries = 0
    assert transact(engine, lambda connection: cancel(connection, 1), twice=True).state.final
    assert tries == 2


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_in_another_encoding_is_refused_and_leaves_no_run_running(
    beatless_app: App,
    server: psycopg.Connection,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    encoding: str,
) -> None:
    name = f"t_{uuid.uuid4().hex[:8]}"
    server.execute(
        f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0".encode()
    )
    url = make_url(beatless_app.settings.database_url).set(database=name, query={})
    text = url.render_as_string(hide_password=False)
    app = App(replace(beatless_app.settings, database_url=text, listen_url=text), PLANS)
    kit = Kit(app, directory=tmp_path)
    try:
        with pytest.raises(WrongEncoding, match=f"{name} is in {encoding}.*ENCODING 'UTF8'"):
            migrate(app.engine, app.settings.schema)
        (found,) = Doctor(app).examine(("encoding",))
        assert found.status is Status.PROBLEM
        assert encoding in found.text
        # As one that an older version has made.
        monkeypatch.setattr("beatless.migrations.check_encoding", lambda _: None)
        migrate(app.engine, app.settings.schema)
        runs = [kit.client.start_run(plan) for plan in [plan.name for plan in PLANS]]
        kit.work_until_idle()
        states = [kit.client.get_run(run.run_id).state.value for run in runs]
        if encoding == "LATIN1":
            assert states == ["failed", "failed", "failed", "failed", "completed"]
            errors = [kit.client.get_run(run.run_id).error["message"] for run in runs[:-1]]
            assert all("no equivalent in encoding" in error for error in errors)
            with pytest.raises(WrongEncoding, match="LATIN1"):
                kit.client.start_run("plain", TEXT)
        else:
            assert states == ["completed", "completed", "completed", "failed", "completed"]
    finally:
        kit.close()
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_listeners_of_the_project_to_all_engines_keep_no_call_from_its_connection(
    beatless_app: App,
) -> None:
    """As those of SQLAlchemy's own pages, which leave a transaction open on each new connection."""

    def set_path(connection: psycopg.Connection, _record: Any) -> None:
        connection.execute("SET search_path TO nowhere")

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", set_path)
    try:
        app = App(beatless_app.settings, PLANS)
        try:
            run = app.client.start_run("answers")
            assert app.client.get_run(run.run_id) == replace(run, start=None)
        finally:
            app.close()
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", set_path)


def test_a_connection_in_use_when_its_app_is_closed_is_closed_when_it_is_returned(
    beatless_app: App,
) -> None:
    """As by a thread of the API that outlasts its request; twice, for an app that is used again."""
    app = App(beatless_app.settings, PLANS)
    bounded = app.bounded_engine(lock_s=1, statement_s=1)
    for engine in (app.engine, bounded, app.engine):
        with engine.connect() as connection:
            driver = connection.connection.driver_connection
            app.close()
            assert not driver.closed
        assert driver.closed


def test_a_connection_that_cannot_be_prepared_to_drain_is_closed(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = beatless_app.relay()
    opened: list[psycopg.Connection] = []

    def refuse(connection: psycopg.Connection) -> None:
        opened.append(connection)
        raise psycopg.OperationalError("the server goes away")

    monkeypatch.setattr("beatless.outbox.relay.prepare_to_drain", refuse)
    with pytest.raises(psycopg.OperationalError, match="goes away"):
        relay.drain_once()
    assert [connection.closed for connection in opened] == [True]
    relay.stop()


def test_a_session_is_prepared_in_one_round_trip(beatless_app: App, tmp_path: Path) -> None:
    """A worker opens one each ten seconds."""
    url = libpq_url(beatless_app.settings.database_url)
    with (
        psycopg.connect(url, autocommit=True) as connection,
        (tmp_path / "trace").open("w+") as file,
    ):
        connection.pgconn.trace(file.fileno())
        prepare_session(connection)
        connection.pgconn.untrace()
        file.seek(0)
        assert file.read().count("ReadyForQuery") == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_that_cannot_look_after_its_clients_has_the_other_settings(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr(sessions, "CLIENT_CHECK_INTERVAL", "never")  # refused, as it is there
    url = libpq_url(beatless_app.settings.database_url)

    async def prepared() -> str:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.set_autocommit(True)
            await sessions.prepare_async_session(connection, OWN, options="")
            found = await (await connection.execute("SHOW tcp_user_timeout")).fetchone()
            return str(found and found[0])

    if asynchronous:
        assert asyncio.run(prepared()) == "8000"
        return
    with psycopg.connect(url, autocommit=True) as connection:
        prepare_session(connection, client_check="never")
        assert connection.execute("SHOW tcp_user_timeout").fetchone() == ("8000",)


def test_an_interrupt_leaves_no_connection_in_autocommit_in_the_pool(beatless_app: App) -> None:
    """It strikes when the statement has ended, before the mode is set back."""
    driver = inspect.unwrap(transactions._driver)
    lines, first = inspect.getsourcelines(driver)
    (at,) = (n for n, line in enumerate(lines, first) if "autocommit = False" in line)

    def interrupt(frame: Any, event: str, _: object) -> Any:
        if frame.f_code is driver.__code__ and (event, frame.f_lineno) == ("line", at):
            raise KeyboardInterrupt
        return interrupt

    engine = beatless_app.bounded_engine(lock_s=5, statement_s=5, pool_size=1, max_overflow=0)
    before = sys.gettrace()
    sys.settrace(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            transact_by_driver(
                engine,
                lambda caller: execute(caller, "SELECT 1", {}),
                twice=True,
                each_statement=True,
            )
    finally:
        sys.settrace(before)
    with engine.connect() as connection:
        assert not connection.connection.driver_connection.autocommit
