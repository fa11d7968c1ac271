"""The kit's sessions of Postgres go from test to test, and nothing that a test left in one does."""

from collections.abc import Iterator

import psycopg
import pytest

from beatless import App
from beatless.outbox.adapters import ADAPTERS
from beatless.outbox.direct_connection import DirectConnection
from beatless.settings import libpq_url
from beatless.testing.kept_sessions import MOST, KeptSessions
from beatless.testing.servers import Services
from tests.forking import ForkedChild


@pytest.fixture
def kept(beatless_services: Services) -> Iterator[KeptSessions]:
    sessions = KeptSessions(beatless_services.database_url)
    yield sessions
    sessions.close()


@pytest.fixture
def url(beatless_services: Services) -> str:
    return libpq_url(beatless_services.database_url)


def pid_of(connection: psycopg.Connection) -> int:
    return connection.info.backend_pid


def opened_and_closed(kept: KeptSessions, url: str) -> int:
    with kept.connect(psycopg.Connection, url, autocommit=True) as connection:
        return pid_of(connection)


LEFT = """
SELECT current_setting('work_mem'), current_setting('application_name'),
       to_regclass('pg_temp.left_there') IS NULL,
       (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory'),
       (SELECT count(*) FROM pg_prepared_statements), (SELECT count(*) FROM pg_listening_channels())
"""


@pytest.mark.parametrize("ends_in", ["rest", "a transaction", "a transaction that has failed"])
def test_a_session_goes_on_without_anything_that_was_left_in_it(
    kept: KeptSessions, url: str, ends_in: str
) -> None:
    first = kept.connect(psycopg.Connection, f"{url}?application_name=shop", autocommit=True)
    before = first.execute(LEFT).fetchone()
    for statement in (
        "SET work_mem TO '1MB'",
        "SET application_name TO 'mine'",
        "CREATE TEMP TABLE left_there ()",
        "SELECT pg_advisory_lock(42)",
        "LISTEN left_there",
        "NOTIFY left_there",
        "PREPARE left_there AS SELECT 1",
    ):
        first.execute(statement)
    if ends_in != "rest":
        first.autocommit = False
        first.execute("SELECT pg_advisory_xact_lock(43)")
    if ends_in == "a transaction that has failed":
        with pytest.raises(psycopg.errors.DivisionByZero):
            first.execute("SELECT 1 / 0")
    pid = pid_of(first)
    first.close()

    assert first.closed
    with pytest.raises(psycopg.OperationalError, match="closed"):
        first.execute("SELECT 1")
    second = kept.connect(psycopg.Connection, f"{url}?application_name=shop", autocommit=True)
    assert (pid_of(second), second.execute(LEFT).fetchone()) == (pid, before)
    assert list(second.notifies(timeout=0)) == []
    second.close()


def test_a_kept_session_is_opened_as_one_of_its_own_is(kept: KeptSessions, url: str) -> None:
    options = {"context": ADAPTERS, "prepare_threshold": 1}
    for _ in range(2):
        with kept.connect(DirectConnection, url, autocommit=True, **options) as connection:
            assert isinstance(connection, DirectConnection)
            assert connection.adapters is not ADAPTERS.adapters
            oid = psycopg.adapters.types["jsonb"].oid
            for mine, wanted in zip(
                *(
                    [each.adapters.get_loader(oid, form) for form in psycopg.pq.Format]
                    for each in (connection, ADAPTERS)
                ),
                strict=True,
            ):
                assert mine is wanted
            assert (connection.autocommit, connection.prepare_threshold) == (True, 1)


@pytest.mark.parametrize("why", ["ended", "cancelled", "busy", "in a pipeline"])
def test_a_session_that_may_not_go_on_is_closed(
    kept: KeptSessions, url: str, postgres: psycopg.Connection, why: str
) -> None:
    connection = kept.connect(psycopg.Connection, url, autocommit=True)
    pid = pid_of(connection)
    match why:
        case "ended":
            connection.close()
            postgres.execute("SELECT pg_terminate_backend(%s, 60000)", [pid])
        case "cancelled":
            connection.cancel_safe()
            connection.close()
        case "busy":
            with connection.lock:
                connection.close()
        case "in a pipeline":
            connection.pgconn.enter_pipeline_mode()
            connection.close()
    assert connection.closed
    assert opened_and_closed(kept, url) != pid


def test_another_user_database_option_or_environment_has_another_session(
    kept: KeptSessions, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = {opened_and_closed(kept, url), opened_and_closed(kept, f"{url}?options=-cjit%3Doff")}
    monkeypatch.setenv("PGOPTIONS", "-c work_mem=2MB")
    pids.add(opened_and_closed(kept, url))
    assert len(pids) == 3
    monkeypatch.delenv("PGOPTIONS")
    assert opened_and_closed(kept, url) in pids
    elsewhere = kept.connect(psycopg.Connection, f"{url}?dbname=template1", autocommit=True)
    elsewhere.close()
    assert type(elsewhere) is psycopg.Connection


def test_no_more_are_kept_than_one_test_needs(kept: KeptSessions, url: str) -> None:
    for _ in range(2):
        open_now = [kept.connect(psycopg.Connection, url, autocommit=True) for _ in range(MOST + 1)]
        pids = [pid_of(connection) for connection in open_now]
        for connection in open_now:
            connection.close()
    again = {opened_and_closed(kept, url)}
    assert again == {pids[-1]}
    open_now = [kept.connect(psycopg.Connection, url, autocommit=True) for _ in range(MOST + 1)]
    assert len({pid_of(connection) for connection in open_now} & set(pids)) == MOST
    for connection in open_now:
        connection.close()


def test_a_child_opens_its_own(kept: KeptSessions, url: str) -> None:
    pid = opened_and_closed(kept, url)
    with ForkedChild(lambda: opened_and_closed(kept, url)) as child:
        assert child.answer() != pid
    assert opened_and_closed(kept, url) == pid


def test_the_apps_of_tests_go_on_with_each_others_sessions(beatless_app: App) -> None:
    def session() -> int:
        app = App(beatless_app.settings, list(beatless_app.plans.values()))
        with app.engine.connect() as connection:
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        app.close()
        return pid

    assert session() == session()
