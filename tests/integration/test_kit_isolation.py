"""The test kit's isolation: what a test has for itself, and who is told of what it left."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest
import redis
import sqlalchemy
from sqlalchemy import make_url

from beatless.auth import api_tokens
from beatless.errors import BadSetting
from beatless.local.valkey import EmbeddedValkey
from beatless.settings import Settings, engine_url, libpq_url
from beatless.testing import Kit
from beatless.testing.broker_guard import Guard
from beatless.testing.fixtures import beatless_app, explanation
from beatless.testing.isolation import Isolation
from beatless.testing.schemas import search
from beatless.testing.servers import Services
from tests.valkeys import until


def test_what_the_url_sets_for_its_sessions_stays(beatless_services: Services) -> None:
    given = make_url(beatless_services.database_url).update_query_dict(
        {"options": "-c statement_timeout=5000", "application_name": "the shop"}
    )
    url = search(given.render_as_string(hide_password=False), "pg_catalog")

    engine = sqlalchemy.create_engine(engine_url(url))
    with engine.connect() as one, psycopg.connect(libpq_url(url)) as other:
        for name, value in (
            ("statement_timeout", "5s"),
            ("search_path", "pg_catalog"),
            ("application_name", "the shop"),
        ):
            assert one.exec_driver_sql(f"SHOW {name}").scalar() == value
            assert other.execute(f"SHOW {name}".encode()).fetchone() == (value,)
    engine.dispose()


PROJECT = """
from dataclasses import replace

import pytest
import sqlalchemy
from beatless import Plan, step
from beatless.migrations import migrate
from beatless.settings import engine_url
from sqlalchemy import make_url

@pytest.fixture(scope="session")
def beatless_services(beatless_services):
    engine = sqlalchemy.create_engine(engine_url(beatless_services.database_url))
    migrate(engine, "beatless")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE EXTENSION citext SCHEMA public")
    engine.dispose()
    broker_url = make_url(beatless_services.redis_url).set(database="1")
    return replace(
        beatless_services, broker_url=broker_url.render_as_string(hide_password=False)
    )

@pytest.fixture
def beatless_plans():
    return [Plan("greet", [step(name="hello")(lambda ctx: "hello")])]
"""


@pytest.mark.slow
def test_what_others_have_and_what_a_test_did_to_its_own(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a schema `beatless` that is somebody's, and a Redis of its own as broker."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nbeatless_allowed_keys = cache:*")
    pytester.makeconftest(PROJECT)
    pytester.makepyfile(
        """
        from dataclasses import replace

        import pytest
        import redis
        from beatless import App

        kept = []

        def test_writes_to_the_schema_of_the_developer(beatless):
            kept.append(beatless.app.settings.schema)
            settings = replace(beatless.app.settings, schema="beatless")
            app = App(settings, list(beatless.app.plans.values()))
            app.client.start_run("greet")
            app.close()

        def test_writes_to_the_schema_of_a_test_before(beatless):
            before = App(replace(beatless.app.settings, schema=f"{kept[0]}0"), [])
            with before.engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE SCHEMA {before.settings.schema}")
                table = f"{before.settings.schema}.run_outbox"
                connection.exec_driver_sql(f"CREATE TABLE {table} ()")
                connection.exec_driver_sql(f"INSERT INTO {table} DEFAULT VALUES")
            before.close()

        def test_publishes_as_no_test_would(beatless):
            for channel in ("t_shop", "t_gallery:x", "t_market:x", "cache:x"):
                beatless.app.redis().publish(channel, "x")
            beatless.app.redis().set("cache:y", "x")

        def test_changes_its_own_schema(beatless):
            schema = beatless.app.settings.schema
            with beatless.app.engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE TABLE {schema}.junk ()")

        @pytest.mark.parametrize(
            "change",
            [
                "DROP INDEX {}.dispatches_out",
                "ALTER TABLE {}.runs ALTER priority SET DEFAULT 5",
                "UPDATE {}.beatless_version SET version_num = '0001'",
                "DROP SCHEMA {} CASCADE",
                "DROP SCHEMA {}_own CASCADE",
                "SELECT 1",
            ],
        )
        def test_has_the_schema_as_it_was_made(beatless, change):
            schema = beatless.app.settings.schema
            with beatless.app.engine.begin() as connection:
                found = connection.exec_driver_sql(
                    "SELECT to_regclass('{0}.junk'), to_regclass('{0}.dispatches_out') IS NULL, "
                    "(SELECT version_num FROM {0}.beatless_version) = '0001', "
                    "to_regnamespace('{0}_own') IS NULL, (SELECT count(*) FROM "
                    "information_schema.columns WHERE table_schema = '{0}' "
                    "AND column_default = '5')".format(schema)
                ).one()
                assert list(found) == [None, False, False, False, 0]
                connection.exec_driver_sql(change.format(schema))

        def test_leaves_a_message_with_the_broker(beatless):
            beatless.start_run("greet")
            beatless.drain_outbox_once()

        def test_finds_none_of_another_test(beatless):
            with redis.Redis.from_url(beatless.app.settings.broker_url) as broker:
                assert broker.info("keyspace").get("db1") is None
                broker.set("left:behind", "x")

        def test_finds_extensions(beatless):
            with beatless.app.engine.begin() as connection:
                connection.exec_driver_sql("CREATE TABLE people (name citext)")
                assert connection.exec_driver_sql(
                    "SELECT to_regclass('people')::text"
                ).scalar() == "people"
                connection.exec_driver_sql("CREATE TABLE public.strays ()")

        def test_has_servers_in_the_folder_that_was_named(beatless, pytestconfig):
            with beatless.app.engine.connect() as connection:
                data = connection.exec_driver_sql("SHOW data_directory").scalar()
            assert data.startswith(pytestconfig.getoption("--beatless-directory"))
        """
    )

    servers = f"--beatless-directory={pytester.mkdir('servers')}"
    result = pytester.runpytest_subprocess("-p", "beatless", "-p", "no:cacheprovider", servers)

    result.assert_outcomes(passed=14, errors=5)
    assert list(pytester.path.glob("servers/*")) == []
    told = [line.strip() for line in result.outlines if line.startswith("  ")]
    assert [line for line in told if line.startswith(("a ", "the "))] == [
        "a write to the runs in the schema beatless",
        "a write to the runs in the schema s_main_10",
        "a message on t_gallery:x",
        "a message on t_market:x",
        "a message on t_shop",
        "the Redis key left:behind",
        "the table public.strays",
    ]


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """What is left in it is seen by nobody else."""
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def private(beatless_services: Services, valkey: EmbeddedValkey) -> Services:
    broker_url = valkey.url.removesuffix("0") + "1"
    return replace(beatless_services, redis_url=valkey.url, broker_url=broker_url, ours=True)


def keys(problems: list[str]) -> list[str]:
    return [problem for problem in problems if problem.startswith("the Redis key")]


def test_what_a_killed_session_has_left_is_gone_before_the_first_test(private: Services) -> None:
    with (
        closing(redis.Redis.from_url(private.redis_url)) as events,
        closing(redis.Redis.from_url(private.broker_url)) as broker,
    ):
        for client in (events, broker):
            client.mset({"t_killed_9:x": "x", "t_killed_1.default": "x", "t_killeds_1:x": "x"})
        with closing(Isolation(private, "killed")):
            assert events.keys() == broker.keys() == [b"t_killeds_1:x"]


def test_two_databases_with_one_redis_take_different_names(
    beatless: Kit, beatless_services: Services, postgres: psycopg.Connection
) -> None:
    other = f"{beatless.app.settings.prefix}_other"
    postgres.execute(f"CREATE DATABASE {other}")
    url = make_url(beatless_services.database_url).set(database=other)
    elsewhere = replace(beatless_services, database_url=url.render_as_string(hide_password=False))
    try:
        with closing(Isolation(beatless_services, "twice")) as one:
            with closing(Isolation(elsewhere, "twice")) as two:
                assert (one.name.worker, two.name.worker) == ("twice", "twicex2")
                # Nobody has tables in public there.
                assert f"{two.schemas.url('s')}".endswith("s_own%2Cpublic")
                two.connection.execute("CREATE TABLE public.orders ()")
            with closing(Isolation(elsewhere, "twice")) as two:
                assert f"{two.schemas.url('s')}".endswith("s_own")
        with closing(Isolation(elsewhere, "twice")) as two:
            assert two.name.worker == "twice"
    finally:
        postgres.execute(f"DROP DATABASE {other} WITH (FORCE)")


def test_one_redis_under_two_names_is_claimed_once(private: Services) -> None:
    """By a host of another name, and without the number of the database, which is 0."""
    events = private.redis_url.replace("127.0.0.1", "localhost")
    twice = replace(private, redis_url=events, broker_url=private.redis_url.removesuffix("/0"))
    with (
        closing(Isolation(twice, "names")) as one,
        closing(Isolation(replace(private, broker_url=events), "names")) as two,
    ):
        assert (one.name.worker, two.name.worker) == ("names", "namesx2")


@pytest.mark.slow
def test_a_set_up_that_fails_gives_back_what_it_took(beatless_services: Services) -> None:
    shared = replace(beatless_services, ours=False)
    with (
        closing(Isolation(shared, "fails", session="s2")) as isolation,
        closing(Isolation(shared, "looks", session="s2")) as beside,
    ):
        make = partial(
            beatless_app,
            "test",
            isolation,
            named=None,
            plans=[],
            tables=None,
            guard=Guard(),
            allowed_brokers=(),
        )
        for _ in range(2):
            with pytest.raises(BadSetting), make(settings={"lease_seconds": -1}):
                ...
        assert beside.neighbours.running() == []

        with make(settings={}) as app:
            assert app.settings.schema == f"s_{isolation.name.worker}_1"
            assert beside.neighbours.running() == ["test"]
        assert isolation.take() != isolation.take()  # one that did not fail gives it back once


def test_a_session_that_ends_a_statement_in_the_schema_as_it_is_emptied_is_waited_for(
    beatless_services: Services,
) -> None:
    """Its process was killed; each of the two holds a lock that the other wants."""
    url = libpq_url(beatless_services.database_url)
    with (
        closing(Isolation(beatless_services, "ending")) as isolation,
        psycopg.connect(url) as ending,
        psycopg.connect(url) as gate,
        psycopg.connect(url, autocommit=True) as postgres,
        ThreadPoolExecutor(2) as beside,
    ):

        def wait_until_somebody_waits_for(blocker: psycopg.Connection) -> None:
            waits = "SELECT FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
            pid = blocker.info.backend_pid
            until(lambda: postgres.execute(waits, (pid,)).fetchone() is not None, 60)

        emptier, schema = isolation.connection, isolation.schemas.take()
        first, *others, last = (table.name for table in api_tokens.metadata.sorted_tables)
        emptier.execute("SET deadlock_timeout TO '10ms'")
        ending.execute("SET deadlock_timeout TO '1h'")
        share = f"LOCK TABLE {schema}.{{}} IN ROW SHARE MODE"
        ending.execute(share.format(last))
        gate.execute(share.format(others[0]))
        found = beside.submit(isolation.schemas.give_back, schema)
        wait_until_somebody_waits_for(gate)
        statement = beside.submit(ending.execute, f"{share.format(first)}; COMMIT")
        wait_until_somebody_waits_for(emptier)
        gate.rollback()

        assert found.result(60) == []
        statement.result(60)
        assert isolation.schemas.take() == schema


def test_a_leak_is_told_once_with_whom_else_it_may_be_of(private: Services) -> None:
    with (
        closing(Isolation(private, "one", session="s1")) as one,
        closing(Isolation(private, "two", session="s1")) as two,
        closing(Isolation(private, "three")) as alone,
    ):
        prefix = one.begin("test_innocent")
        two.begin("test_culprit")
        two.stores.events.set("stray", "x")
        two.stores.events.publish("stray", "x")

        told = [problem for problem in one.leaks.left_outside(prefix) if "stray" in problem]

        assert told == ["a message on stray", "the Redis key stray"]
        assert one.neighbours.running() == ["test_culprit"]
        assert not keys(two.leaks.left_outside("t_two_1"))
        two.end()
        assert one.neighbours.running() == []
        # A session of its own tells it too.
        assert keys(alone.leaks.left_outside(alone.begin("test"))) == ["the Redis key stray"]
        assert alone.neighbours.running() == []


def test_a_broker_of_the_tests_own_is_left_empty(
    beatless_services: Services, valkey: EmbeddedValkey
) -> None:
    with (
        closing(Isolation(beatless_services, "own")) as isolation,
        closing(redis.Redis.from_url(valkey.url)) as broker,
    ):
        prefix = isolation.begin("test")
        settings = Settings(
            database_url=beatless_services.database_url,
            redis_url=beatless_services.redis_url,
            broker_url=valkey.url,
            prefix=prefix,
        )
        broker.mset({f"{prefix}:x": "x", f"{prefix}.x": "x", f"{prefix}0:x": "x"})
        isolation.stores.clean_own_broker(settings)
        assert broker.keys() == [f"{prefix}0:x".encode()]
        valkey.stop()
        isolation.stores.clean_own_broker(settings)  # one that is away says nothing


def test_queues_of_another_celery_are_told_with_what_keeps_its_messages_in_the_test() -> None:
    told = explanation(["the Redis key _kombu.binding.old", "the Redis key old"], [])
    assert "queues of another Celery app" in told
    assert told.endswith("at the top of conftest.py")
    assert "CELERY_BROKER_URL" not in explanation(["the Redis key old"], [])


def test_keys_that_are_allowed_are_nobodys_fault(private: Services) -> None:
    with closing(Isolation(private, "one", allowed=["shop:*"])) as isolation:
        isolation.stores.events.mset({"shop:cart": "x", "shops:cart": "x"})
        assert keys(isolation.leaks.left_outside(isolation.begin("test"))) == [
            "the Redis key shops:cart"
        ]


def test_a_test_that_publishes_more_than_redis_keeps_for_a_listener_is_not_its_last(
    private: Services,
) -> None:
    with closing(Isolation(private, "one", allowed=[])) as isolation:
        events = isolation.stores.events
        isolation.leaks._ear.connection._sock.shutdown(socket.SHUT_RDWR)  # as the server does
        assert isolation.leaks.left_outside(isolation.begin("test")) == []
        events.publish("stray", "behind")
        assert isolation.leaks.left_outside(isolation.begin("other")) == ["a message on stray"]


@pytest.mark.long
def test_workers_tell_a_leak_once_and_name_the_tests_that_ran_beside(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]\nbeatless_app = shop:app")
    pytester.makepyfile(
        shop="""
        from beatless import App, Plan, Settings, step
        app = App(Settings.from_env(), [Plan("greet", [step(name="hello")(lambda ctx: 1)])])
        """,
        test_one="""
        import redis

        def test_culprit(beatless):
            with redis.Redis.from_url(beatless.app.settings.redis_url, socket_timeout=None) as met:
                met.set("stray", "x")
                met.rpush("t_met_1:go", "x")
                assert met.blpop("t_met_1:told", 300)
        """,
        test_other="""
        import redis

        def test_innocent(beatless):
            with redis.Redis.from_url(beatless.app.settings.redis_url, socket_timeout=None) as met:
                assert met.blpop("t_met_1:go", 300)

        def test_after_it(beatless):
            beatless.app.redis().rpush("t_met_1:told", "x")

        def test_that_xdist_keeps_until_the_others_have_ended():
            pass
        """,
    )

    result = pytester.runpytest_subprocess(
        *("-p", "beatless", "-p", "xdist", "-p", "no:cacheprovider", "-n", "2"),
        "--dist=loadfile",
    )

    result.assert_outcomes(passed=4, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_innocent*",
            "this test, or one that ran beside it, left something outside of its own names:",
            "  the Redis key stray",
            "  beside it ran test_one.py::test_culprit",
        ]
    )


def test_on_servers_of_others_their_keys_are_gone_through_once(private: Services) -> None:
    with (
        closing(Isolation(replace(private, ours=False), "guest")) as isolation,
        closing(redis.Redis.from_url(private.redis_url)) as client,
    ):
        client.mset({f"others:{number}": "x" for number in range(5_000)})
        prefix = isolation.begin("test")
        client.mset({f"{prefix}:x": "x", f"{prefix}.x": "x"})
        client.config_resetstat()

        assert keys(isolation.leaks.left_outside(prefix)) == []

        assert client.info("commandstats")["cmdstat_scan"]["calls"] == 2  # events, and broker
        assert client.dbsize() == 5_000
