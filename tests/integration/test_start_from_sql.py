"""Runs that `SELECT beatless.start_run(…)` starts, and signals that `signal_run` sends.

Each is compared with what the Python client stores, row by row in every table.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql

from beatless import App, BadPayload, BadRequest, Limit, Plan, RunConflict, plan, step, wait
from beatless.client.requests import EXAMPLE_TRACE
from beatless.migrations import statements
from beatless.orchestrator.records import new_run_id
from beatless.orchestrator.tables import runs
from beatless.outbox.message import SHARDS, shard_of
from beatless.schema import VERSIONS
from beatless.settings import libpq_url
from beatless.testing import Kit

LATER = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
DELAY, DEADLINE = timedelta(minutes=90), timedelta(hours=7)


@dataclass
class Order:
    number: int


@step
def one(ctx: Any) -> Any:
    return ctx.input


@plan("typed", input=Order)
def typed(run: Any) -> None:
    run.step(one)


@plan("untyped", version=3, queue="mail")
def untyped(run: Any) -> None:
    run.step(one)


LIMITS = [Limit("ten", at_once=1, key="all"), Limit("Rate", rate="5/min"), Limit("a", at_once=2)]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("checkout", [one]),
        Plan("defaults", [one], queue="mail", default_input={"size": 1.50}),
        Plan("limited", [one], limits=LIMITS),
        Plan("keyed", [one], limits=[Limit("stripe", key=lambda i: i["account"], at_once=1)]),
        Plan("waiting", [wait("paid")]),
        typed,
        untyped,
    ]


@pytest.fixture
def session(beatless: Kit) -> Iterator[psycopg.Connection]:
    """A session of another program, whose search path is its own."""
    beatless.apply_plans()
    with psycopg.connect(libpq_url(beatless.app.settings.database_url)) as found:
        yield found
        found.rollback()


def call(app: App, function: str, *given: Any, **named: Any) -> sql.Composed:
    values = [sql.Literal(json.dumps(v) if isinstance(v, dict | list) else v) for v in given]
    values += [
        sql.SQL("{} => {}").format(
            sql.Identifier(name), sql.Literal(json.dumps(v) if isinstance(v, dict | list) else v)
        )
        for name, v in named.items()
    ]
    name = sql.Identifier(app.settings.schema, function)
    return sql.SQL("SELECT {}({})").format(name, sql.SQL(", ").join(values))


def start(session: psycopg.Connection, app: App, *given: Any, **named: Any) -> str:
    return session.execute(call(app, "start_run", *given, **named)).fetchone()[0]


def clock(session: psycopg.Connection) -> datetime:
    return session.execute("SELECT clock_timestamp()").fetchone()[0]


def stored(
    session: psycopg.Connection, app: App, between: tuple[datetime, datetime]
) -> dict[str, list[Any]]:
    """All rows of all tables, as the session sees them; a time by what it was counted from."""
    since, until = between

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: named(each) for name, each in value.items()}
        if isinstance(value, int) and value > 10**12:  # milliseconds
            value = datetime.fromtimestamp(value / 1000, UTC) + timedelta(milliseconds=1)
        for name, offset in (("now", timedelta()), ("delay", DELAY), ("deadline", DEADLINE)):
            latest = until + offset + timedelta(milliseconds=2)  # one that Postgres rounded up
            if isinstance(value, datetime) and since + offset <= value <= latest:
                return name
        return value

    found = {}
    for table in runs.metadata.sorted_tables:
        columns = [column.name for column in table.columns if column.identity is None]
        rows = session.execute(
            sql.SQL("SELECT {} FROM {}").format(
                sql.SQL(", ").join(map(sql.Identifier, columns)),
                sql.Identifier(app.settings.schema, table.name),
            )
        ).fetchall()
        members = [dict(zip(columns, map(named, row), strict=True)) for row in rows]
        found[table.name] = sorted(members, key=repr)
    return found


def both(
    app: App,
    session: psycopg.Connection,
    by_python: Callable[[psycopg.Connection], Any],
    by_sql: Callable[[psycopg.Connection], Any],
) -> list[dict[str, list[Any]]]:
    """The rows of all tables after the one, and after the other; both are taken back."""
    found = []
    for way in (by_python, by_sql):
        since = clock(session)
        way(session)
        found.append(stored(session, app, (since, clock(session))))
        session.rollback()
    return found


OPTIONS: list[dict[str, Any]] = [
    {},
    {"input": {"order": 1, "text": "é\n\u2028", "list": [1.5, None, {"a": []}]}},
    {"input": [1], "key": "order:1", "priority": 7, "tags": {"shop": "berlin", "ä": ""}},
    {"delay": DELAY, "deadline": DEADLINE},
    {"not_before": LATER, "queue": "mail"},
    {"dedupe_key": "customer:7", "while_unfinished": "skip", "deadline": DEADLINE},
    {"group": "tenant/7", "priority": 3},
    {"traceparent": EXAMPLE_TRACE},
    {"traceparent": "unreadable"},
]


@pytest.mark.parametrize("name", ["checkout", "defaults", "limited", "untyped"])
def test_all_rows_are_those_of_the_python_client(
    beatless: Kit, session: psycopg.Connection, subtests: pytest.Subtests, name: str
) -> None:
    for options in OPTIONS:
        with subtests.test(",".join(options) or "none"):
            check_rows(beatless.app, session, name, options)


def check_rows(app: App, session: psycopg.Connection, name: str, options: dict[str, Any]) -> None:
    """A run that Python starts has the rows of one that SQL starts."""
    run_id = new_run_id()
    python, sql_ = both(
        app,
        session,
        lambda connection: app.client.start_run(
            name, run_id=run_id, connection=connection, **options
        ),
        lambda connection: start(connection, app, name, run_id=run_id, **options),
    )
    assert sql_ == python
    tables = ("runs", "run_events", "run_outbox", "dispatches")
    assert [len(python[table]) for table in tables] == [1] * 4


def test_runs_that_find_their_limit_full_wait_as_those_of_the_python_client(
    beatless: Kit, session: psycopg.Connection
) -> None:
    app, ids = beatless.app, [new_run_id() for _ in range(3)]

    def by_python(connection: psycopg.Connection) -> None:
        for run_id in ids:
            app.client.start_run("limited", run_id=run_id, connection=connection)

    def by_sql(connection: psycopg.Connection) -> None:
        for run_id in ids:
            start(connection, app, "limited", run_id=run_id)

    python, sql_ = both(app, session, by_python, by_sql)
    assert sql_ == python
    assert sorted(row["reason"] for row in python["dispatches"]) == ["limit", "limit", "start"]


def test_a_run_of_another_namespace_has_its_prefix(
    beatless: Kit, session: psycopg.Connection
) -> None:
    app = beatless.app
    options = {"run_id": "order-1", "key": "k", "dedupe_key": "d", "group": "tenant-7"}
    python, sql_ = both(
        app,
        session,
        lambda connection: app.client_for("acme").start_run(
            "limited", **options, connection=connection
        ),
        lambda connection: start(connection, app, "limited", **options, namespace="acme"),
    )
    assert sql_ == python
    assert python["runs"][0]["run_id"] == "acme~order-1"
    assert python["dispatches"][0]["group_id"] == "acme/tenant-7"


def test_a_run_is_executed_when_its_transaction_has_committed(
    beatless: Kit, session: psycopg.Connection
) -> None:
    lost = start(session, beatless.app, "checkout", {"order": 1})
    session.rollback()
    run_id = start(session, beatless.app, "checkout", {"order": 2})
    other = start(session, beatless.app, "limited", {"order": 3})
    session.commit()
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).result == {"order": 2}
    assert beatless.client.get_run(other).result == {"order": 3}
    assert {run.run_id for run in beatless.client.list_runs()} == {run_id, other} - {lost}
    assert beatless.verify() is None


def statements_of(revision: str) -> list[str]:
    return [
        each for file in VERSIONS.glob(f"{revision}_*.sql") for each in statements(file.read_text())
    ]


@pytest.fixture
def before_groups(beatless: Kit, session: psycopg.Connection) -> psycopg.Connection:
    """The session, in a schema as before runs from SQL had groups."""
    session.execute(
        sql.SQL("SET search_path TO {}").format(sql.Identifier(beatless.app.settings.schema))
    )
    session.execute("DROP FUNCTION start_run")
    session.commit()
    for statement in statements_of("0020"):
        session.execute(statement)
    session.commit()
    return session


def test_what_calls_the_function_of_before_goes_on_after_an_upgrade(
    beatless: Kit, before_groups: psycopg.Connection
) -> None:
    """A function that depends on it, one that names it, and a statement that is under way."""
    app, session = beatless.app, before_groups
    schema = app.settings.schema
    session.execute(
        "CREATE FUNCTION bound(k text) RETURNS text LANGUAGE sql "
        "RETURN start_run('checkout', key => k, namespace => 'acme');"
        "CREATE FUNCTION named(k text) RETURNS text LANGUAGE plpgsql AS "
        "$$ BEGIN RETURN start_run('checkout', key => k); END $$"
    )
    session.execute("SELECT named('a'), bound('b')")
    session.commit()
    url = libpq_url(app.settings.database_url)
    with psycopg.connect(url, options=f"-c search_path={schema}") as other:
        under_way = "SELECT start_run('checkout', key => n::text) FROM generate_series(1, 2) n"
        other.execute(f"DECLARE c CURSOR FOR {under_way}")
        assert len(other.execute("FETCH 1 FROM c").fetchall()) == 1
        for _ in range(2):  # as one that was interrupted
            for statement in statements_of("0022"):
                session.execute(statement)
            session.commit()
        assert len(other.execute("FETCH 1 FROM c").fetchall()) == 1
    session.execute("SELECT named('c'), bound('d')")
    grouped = start(session, app, "checkout", group="tenant-7")
    session.commit()
    keys = "SELECT key FROM runs ORDER BY key"
    assert [k for (k,) in session.execute(keys)] == ["1", "2", "a", "b", "c", "d", None]
    assert beatless.client.get_run(grouped).group == "tenant-7"
    assert [run.key for run in app.client_for("acme").list_runs()] == ["d", "b"]
    beatless.work_until_idle()
    assert beatless.verify() is None


@pytest.fixture
def roles(beatless: Kit, before_groups: psycopg.Connection) -> Iterator[list[str]]:
    found = [
        f"{beatless.app.settings.schema}_{name}" for name in ("owner", "caller", "giver", "any")
    ]
    for role in found:
        before_groups.execute(f"CREATE ROLE {role}")
    before_groups.commit()
    yield found
    before_groups.rollback()
    for role in found:
        before_groups.execute(f"DROP OWNED BY {role} CASCADE")
        before_groups.execute(f"DROP ROLE {role}")
    before_groups.commit()


def test_the_function_has_the_owner_and_the_grants_of_the_one_before(
    beatless: Kit, before_groups: psycopg.Connection, roles: list[str]
) -> None:
    session, schema = before_groups, beatless.app.settings.schema
    owner, caller, giver, anyone = roles
    session.execute(
        f"REVOKE EXECUTE ON FUNCTION start_run FROM PUBLIC;"
        f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {owner};"
        f"GRANT EXECUTE ON FUNCTION start_run TO {caller};"
        f"GRANT EXECUTE ON FUNCTION start_run TO {giver} WITH GRANT OPTION;"
        f"ALTER FUNCTION start_run OWNER TO {owner};"
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT EXECUTE ON FUNCTIONS TO {anyone}"
    )
    facts = (
        "SELECT proname, pronargs, proowner::regrole::text, proconfig,"
        " ARRAY(SELECT unnest(proacl)::text ORDER BY 1) FROM pg_proc"
        " WHERE pronamespace = current_schema()::regnamespace AND proname LIKE 'start_run%'"
        " ORDER BY 1"
    )
    [(_, _, *before)] = session.execute(facts).fetchall()
    session.commit()
    for statement in statements_of("0022"):
        session.execute(statement)
    session.commit()
    [new, old] = session.execute(facts).fetchall()
    assert new == ("start_run", 15, *before)
    assert old[:3] == ("start_run_0020", 14, owner)
    assert old[4] == before[2]


def test_a_new_schema_has_one_function_alone(beatless: Kit, postgres: psycopg.Connection) -> None:
    assert postgres.execute(
        "SELECT proname::text, pronargs FROM pg_proc WHERE proname LIKE 'start_run%'"
        " AND pronamespace = current_schema()::regnamespace"
    ).fetchall() == [("start_run", 15)]


def test_ids_are_ordered_by_time_as_those_of_python(
    beatless: Kit, session: psycopg.Connection
) -> None:
    rows = session.execute(
        sql.SQL(
            "SELECT clock_timestamp(), {}('checkout'), clock_timestamp() FROM generate_series(1, 9)"
        ).format(sql.Identifier(beatless.app.settings.schema, "start_run"))
    ).fetchall()
    for before, run_id, after in rows:
        stamp = int(run_id.replace("-", "")[:12], 16)
        assert int(before.timestamp() * 1000) <= stamp <= int(after.timestamp() * 1000) + 1
        assert run_id[14] == "7"
        assert run_id[19] in "89ab"
    assert len({run_id for _, run_id, _ in rows}) == 9


def test_the_shard_of_any_id_is_that_of_python(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    ids = ["", "a", "acme~order-1", "é", *(new_run_id() for _ in range(100))]
    found = postgres.execute("SELECT shard_of(id) FROM unnest(%s::text[]) id", [ids]).fetchall()
    assert [shard for (shard,) in found] == [shard_of(each) for each in ids]


def test_a_relay_that_sleeps_is_rung(beatless: Kit, postgres: psycopg.Connection) -> None:
    app = beatless.app
    beatless.apply_plans()
    postgres.execute(f"LISTEN {app.queries.channel}")
    for shard in range(SHARDS):
        postgres.execute("SELECT pg_advisory_lock('run_outbox'::regclass::oid::int4, %s)", [shard])
    with psycopg.connect(libpq_url(app.settings.database_url)) as session:
        run_id = start(session, app, "checkout")
    [notice] = postgres.notifies(timeout=60, stop_after=1)
    assert notice.payload == str(shard_of(run_id))
    with psycopg.connect(libpq_url(app.settings.database_url)) as session:
        session.execute(call(app, "signal_run", run_id, "paid"))
    [notice] = postgres.notifies(timeout=60, stop_after=1)
    assert notice.payload == str(shard_of(run_id))


FOUND = [
    ({"key": "k"}, {"key": "k"}),
    ({"run_id": "r"}, {"run_id": "r"}),
    ({"key": "k", "input": {"n": 1}}, {"key": "k", "input": {"n": 1.0}, "priority": 9}),
    ({"key": "k", "dedupe_key": "d"}, {"key": "k"}),
    ({"key": "k", "dedupe_key": "d"}, {"key": "k", "dedupe_key": "e"}),
    ({"dedupe_key": "d"}, {"dedupe_key": "d", "input": {"n": 2}}),
    ({"dedupe_key": "d"}, {"dedupe_key": "d", "key": "k", "while_unfinished": "skip"}),
]

CONFLICTS = [
    ({"key": "k"}, {"key": "k", "input": {"n": 1}}, "key is used by .* with another input"),
    ({"key": "k", "input": {"n": 1}}, {"key": "k"}, "key is used by .* with another input"),
    ({"key": "k", "queue": "mail"}, {"key": "k"}, "another queue"),
    ({"key": "k"}, {"key": "k", "queue": "default"}, None),
    ({"run_id": "r"}, {"run_id": "r", "key": "k"}, "run id is used by run r with another key"),
    ({"key": "k", "dedupe_key": "d"}, {"key": "k", "input": {"n": 1}, "dedupe_key": "d"}, "input"),
]


@pytest.mark.parametrize(("first", "second"), FOUND)
def test_a_start_that_finds_a_run_returns_it(
    beatless: Kit, session: psycopg.Connection, first: dict, second: dict
) -> None:
    run_id = beatless.client.start_run("checkout", **first).run_id
    assert beatless.client.start_run("checkout", **second).run_id == run_id
    assert start(session, beatless.app, "checkout", **second) == run_id
    assert start(session, beatless.app, "checkout", **first) == run_id
    session.commit()
    assert [run.run_id for run in beatless.client.list_runs()] == [run_id]


@pytest.mark.parametrize(("first", "second", "message"), CONFLICTS)
def test_a_key_with_another_content_is_a_conflict(
    beatless: Kit, session: psycopg.Connection, first: dict, second: dict, message: str | None
) -> None:
    run_id = start(session, beatless.app, "checkout", **first)
    session.commit()
    if message is None:
        assert beatless.client.start_run("checkout", **second).run_id == run_id
        assert start(session, beatless.app, "checkout", **second) == run_id
        return
    with pytest.raises(RunConflict):
        beatless.client.start_run("checkout", **second)
    with pytest.raises(errors.UniqueViolation, match=message):
        start(session, beatless.app, "checkout", **second)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("name", ["key", "dedupe_key", "run_id"])
def test_a_start_that_does_not_see_the_run_with_its_key_is_to_be_tried_again(
    beatless: Kit, session: psycopg.Connection, name: str, isolation: str
) -> None:
    session.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}".encode())
    session.execute("SELECT count(*) FROM pg_class")  # its snapshot
    there = beatless.start_run("checkout", {"n": 1}, **{name: "one"})

    with pytest.raises(errors.SerializationFailure):
        start(session, beatless.app, "checkout", {"n": 1}, **{name: "one"})

    session.rollback()
    again = start(session, beatless.app, "checkout", {"n": 1}, **{name: "one"})
    assert again == there.run_id


def test_a_deploy_that_changes_the_defaults_makes_no_conflict(
    beatless: Kit, session: psycopg.Connection
) -> None:
    run_id = start(session, beatless.app, "defaults", key="k")
    session.commit()
    after = App(beatless.app.settings, [Plan("defaults", [one], queue="red", default_input=2)])
    after.client.apply_plans()
    assert start(session, after, "defaults", key="k") == run_id
    new = start(session, after, "defaults")
    session.commit()
    assert (after.client.get_run(new).queue, after.client.get_run(new).input) == ("red", 2)
    after.close()


def test_two_starts_with_one_dedupe_key_are_one_after_the_other(
    beatless: Kit, session: psycopg.Connection
) -> None:
    app = beatless.app
    run_id = start(session, app, "checkout", dedupe_key="d")
    url = libpq_url(app.settings.database_url)
    with psycopg.connect(url, options="-c lock_timeout=1") as second:
        with pytest.raises(errors.LockNotAvailable) as waited:  # for the first one's transaction
            start(second, app, "checkout", dedupe_key="d")
        assert "pg_advisory_xact_lock" in waited.value.diag.context
        second.rollback()
        session.commit()
        assert start(second, app, "checkout", dedupe_key="d") == run_id


def test_the_locks_of_a_start_are_those_of_the_python_client(
    beatless: Kit, session: psycopg.Connection
) -> None:
    app, run_id, found = beatless.app, new_run_id(), []
    held = (
        "SELECT classid, objid, objsubid, mode FROM pg_locks"
        " WHERE pid = pg_backend_pid() AND locktype = 'advisory' ORDER BY 1, 2"
    )
    for namespace in ("default", "acme"):
        given: dict[str, Any] = {"run_id": run_id, "dedupe_key": "d/é"}
        client = app.client_for(namespace)
        client.start_run("checkout", connection=session, **given)
        found.append(session.execute(held).fetchall())
        session.rollback()
        start(session, app, "checkout", namespace=namespace, **given)
        assert session.execute(held).fetchall() == found[-1]
        session.rollback()
    assert [len(locks) for locks in found] == [2, 2]  # that of the key, and that of the doorbell
    assert found[0] != found[1]


REFUSED = [
    ("typed", errors.FeatureNotSupported, "its input has a type"),
    ("keyed", errors.FeatureNotSupported, "the key of its limit stripe is a function of Python"),
    ("unknown", errors.UndefinedObject, "no plan 'unknown' is registered"),
    (None, errors.UndefinedObject, "no plan NULL is registered"),
]


@pytest.mark.parametrize(("name", "error", "message"), REFUSED)
def test_a_plan_that_only_python_can_start_is_refused(
    beatless: Kit,
    session: psycopg.Connection,
    name: str | None,
    error: type[psycopg.Error],
    message: str,
) -> None:
    with pytest.raises(error, match=message) as refused:
        start(session, beatless.app, name, {"number": 1})
    assert refused.value.diag.message_hint


def test_a_plan_that_is_declared_no_more_is_refused_until_it_is_declared_again(
    beatless: Kit, session: psycopg.Connection
) -> None:
    without = App(beatless.app.settings, [Plan("other", [one])])
    assert without.client.apply_plans() == sorted(beatless.app.plans)
    assert without.client.apply_plans() == []
    with pytest.raises(errors.UndefinedObject, match="declared no more by the app"):
        start(session, beatless.app, "checkout")
    session.rollback()
    beatless.apply_plans()
    assert start(session, beatless.app, "checkout")
    without.close()


def test_of_two_apps_with_one_plan_the_last_deploy_counts(
    beatless: Kit, session: psycopg.Connection
) -> None:
    app = beatless.app
    second = App(app.settings, [Plan("checkout", [one], queue="second")], name="second")
    assert second.client.apply_plans() == []
    queue = f"SELECT queue FROM {app.settings.schema}.runs WHERE run_id = %s"

    def queue_of(run_id: str) -> str:
        return session.execute(queue, [run_id]).fetchone()[0]

    assert queue_of(start(session, app, "checkout")) == "second"
    session.commit()
    last = App(app.settings, [Plan("other", [one])], name="second")
    assert last.client.apply_plans() == ["checkout"]
    assert queue_of(start(session, app, "checkout")) == "default"
    session.commit()
    second.close()
    last.close()


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


BAD: list[tuple[dict[str, Any], str]] = [
    ({"key": ""}, "key must have 1 to 256"),
    ({"key": "k" * 257}, "key must have 1 to 256"),
    ({"dedupe_key": ""}, "dedupe_key must"),
    ({"group": ""}, "group must have 1 to 256"),
    ({"group": "g" * 257}, "group must have 1 to 256"),
    ({"priority": 10}, "priority must be 0 to 9"),
    ({"priority": -1}, "priority must be 0 to 9"),
    ({"tags": {"a": 1}}, "tags must be an object"),
    ({"tags": ["a"]}, "tags must be an object"),
    ({"tags": {"a": "x" * 16_384}}, "tags are longer"),
    ({"delay": timedelta(seconds=-1)}, "delay must be"),
    ({"deadline": timedelta(days=4000)}, "deadline must be"),
    ({"deadline": timedelta()}, "deadline is before"),
    ({"deadline": DELAY, "delay": DELAY}, "deadline is before"),
    ({"delay": DELAY, "not_before": LATER}, "cannot both be given"),
    ({"not_before": datetime(9999, 1, 1, tzinfo=UTC)}, "not_before must be"),
    ({"run_id": ".."}, "run_id must match"),
    ({"run_id": "a b"}, "run_id must match"),
    ({"while_unfinished": "join"}, "needs a dedupe_key"),
    ({"while_unfinished": "never", "dedupe_key": "d"}, "must be join or skip"),
    ({"input": "x" * 300_000}, "input is 300002 bytes as JSON, the limit is 262144"),
    ({"input": nested(101)}, "input is nested deeper"),
]


def test_an_option_that_python_refuses_is_refused(
    beatless: Kit, session: psycopg.Connection, subtests: pytest.Subtests
) -> None:
    for number, (options, message) in enumerate(BAD):
        with subtests.test(message, number=number):
            with pytest.raises((BadRequest, BadPayload)):
                beatless.client.start_run("checkout", connection=session, **options)
            given = options.get("input")
            as_json = {"input": f'"{given}"'} if isinstance(given, str) else options
            with pytest.raises(errors.InvalidParameterValue, match=message):
                start(session, beatless.app, "checkout", **as_json)
        session.rollback()


def test_the_deepest_input_is_that_of_python(beatless: Kit, session: psycopg.Connection) -> None:
    beatless.client.start_run("checkout", nested(100), connection=session)
    assert start(session, beatless.app, "checkout", nested(100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue": "red"}, "queue is 'red', which no registered plan has: take one of "),
        ({"namespace": "A"}, "namespace must match"),
        ({"namespace": None}, "namespace must match"),
        ({"priority": None}, "priority must be 0 to 9"),
        ({"not_before": "infinity"}, "not_before must be"),
        ({"while_unfinished": "replace", "dedupe_key": "d"}, "start it by the Python client"),
        ({"input": "1" + "0" * 4300}, "more than 4300 digits"),
        ({"input": "[-1e4300]"}, "more than 4300 digits"),
    ],
)
def test_an_option_that_sql_cannot_have_is_refused(
    beatless: Kit, session: psycopg.Connection, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.InvalidParameterValue, match=message):
        start(session, beatless.app, "checkout", **options)


def test_a_long_number_that_python_reads_is_taken(
    beatless: Kit, session: psycopg.Connection
) -> None:
    run_id = start(session, beatless.app, "checkout", "[1e4298, 1e-4400]")
    session.commit()
    assert beatless.client.get_run(run_id).input == [10**4298, 0.0]


def test_temporary_tables_and_functions_of_the_session_are_not_taken_for_ours(
    beatless: Kit, session: psycopg.Connection
) -> None:
    for table in (
        "runs",
        "declared_plans",
        "run_events",
        "run_outbox",
        "dispatches",
        "limit_slots",
    ):
        session.execute(f"CREATE TEMPORARY TABLE {table} (nothing int) ON COMMIT DROP")
    session.execute("SET LOCAL search_path TO pg_temp")
    run_id = start(session, beatless.app, "limited", {"order": 1})
    session.execute(call(beatless.app, "signal_run", run_id, "paid"))
    session.commit()
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).result == {"order": 1}


@pytest.mark.parametrize("options", [{}, {"data": {"n": [1]}}, {"key": "psp:42", "data": "1"}])
def test_a_signal_is_stored_as_by_the_python_client(
    beatless: Kit, session: psycopg.Connection, options: dict[str, Any]
) -> None:
    app = beatless.app
    run_id = start(session, app, "waiting")
    session.commit()
    data = {**options, "data": 1} if options.get("data") == "1" else options
    python, sql_ = both(
        app,
        session,
        lambda connection: app.client.signal_run(run_id, "paid", connection=connection, **data),
        lambda connection: connection.execute(call(app, "signal_run", run_id, "paid", **options)),
    )
    if "key" not in options:
        assert python["signals"][0].pop("key") != sql_["signals"][0].pop("key")
    assert sql_ == python
    assert [len(python[table]) for table in ("signals", "wakes")] == [1, 1]


def test_a_signal_ends_a_wait_and_is_sent_once(beatless: Kit, session: psycopg.Connection) -> None:
    app = beatless.app
    run_id = start(session, app, "waiting")
    session.commit()
    beatless.work_until_idle()

    def send(name: str, **options: Any) -> str:
        return session.execute(call(app, "signal_run", run_id, name, **options)).fetchone()[0]

    for _ in range(2):
        assert send("paid", data={"n": 1}, key="psp:42") == "psp:42"
        session.commit()
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).state.value == "completed"
    assert beatless.event_types(run_id).count("SignalReceived") == 1
    assert send("paid", data={"n": 1}, key="psp:42") == "psp:42"
    for error, message, name, options in (
        (errors.UniqueViolation, "used by another signal", "paid", {"key": "psp:42"}),
        (
            errors.UniqueViolation,
            "used by another signal",
            "x",
            {"key": "psp:42", "data": {"n": 1}},
        ),
        (errors.ObjectNotInPrerequisiteState, "has ended: it is completed", "paid", {}),
        (errors.InvalidParameterValue, "name must match", "a b", {}),
        (errors.InvalidParameterValue, "key must have", "paid", {"key": ""}),
    ):
        with pytest.raises(error, match=message):
            send(name, **options)
        session.rollback()
    with pytest.raises(errors.NoDataFound, match="there is no run 'gone'"):
        session.execute(call(app, "signal_run", "gone", "paid"))
