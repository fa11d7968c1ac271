"""Tables, functions and types of the code under test are each test's own, and go with it."""

from collections.abc import Callable
from contextlib import closing

import psycopg
import pytest
import sqlalchemy

from beatless.settings import libpq_url
from beatless.testing import Kit
from beatless.testing.isolation import Isolation
from beatless.testing.names import own_tables
from beatless.testing.servers import Services


@pytest.mark.parametrize("_turn", [1, 2])
def test_what_a_test_makes_without_a_schema_is_gone_in_the_next(beatless: Kit, _turn: int) -> None:
    """Twice in one worker, that is in the same recycled schema: making it again must work."""
    with beatless.app.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (id int)")
        connection.exec_driver_sql("CREATE TYPE mood AS ENUM ('good')")
        connection.exec_driver_sql("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
        found = connection.exec_driver_sql(
            "SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = 'things'::regclass"
        ).scalar()
    assert found == f"{beatless.app.settings.schema}_own"


def test_transactional_steps_and_sessions_of_the_url_find_the_tests_own_tables(
    beatless: Kit,
) -> None:
    with beatless.app.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE things (key text)")
    run = beatless.start_run("transactional", {"table": "things"})

    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == "done"
    with psycopg.connect(libpq_url(beatless.app.settings.database_url)) as connection:
        assert connection.execute("SELECT count(*) FROM things").fetchone() == (1,)


METADATA = sqlalchemy.MetaData()
SHELVES = sqlalchemy.Table(
    "shelves", METADATA, sqlalchemy.Column("id", sqlalchemy.Integer, primary_key=True)
)
sqlalchemy.Table(
    "things",
    METADATA,
    sqlalchemy.Column("id", sqlalchemy.Integer, sqlalchemy.Identity(), primary_key=True),
    sqlalchemy.Column("shelf", sqlalchemy.ForeignKey(SHELVES.c.id)),
)


class TestTablesOfTheProject:
    @pytest.fixture
    def beatless_tables(self) -> Callable[[sqlalchemy.Connection], None]:
        return METADATA.create_all

    @pytest.mark.parametrize(
        "change",
        ["SELECT 1", "ALTER TABLE things ADD COLUMN colour text", "DROP TABLE things", "SELECT 2"],
    )
    def test_they_are_there_and_empty(self, beatless: Kit, change: str) -> None:
        with beatless.app.engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO shelves VALUES (1)")
            connection.exec_driver_sql("INSERT INTO things (shelf) VALUES (1)")
            assert connection.exec_driver_sql("SELECT * FROM things").all() == [(1, 1)]
            connection.exec_driver_sql(change)


@pytest.mark.slow
def test_they_are_made_once_and_only_for_those_who_ask(beatless_services: Services) -> None:
    made = []

    def count(connection: sqlalchemy.Connection) -> None:
        made.append(1)
        METADATA.create_all(connection)

    with closing(Isolation(beatless_services, "tables")) as isolation:
        connection, schemas = isolation.connection, isolation.schemas
        plain = schemas.take()
        first = schemas.take(count)
        table = f"{own_tables(first)}.things"
        connection.execute(f"INSERT INTO {table} DEFAULT VALUES")
        assert schemas.give_back(first) == []
        assert schemas.take(count) == first
        assert made == [1]
        rows = connection.execute(f"INSERT INTO {table} DEFAULT VALUES RETURNING id")
        assert rows.fetchall() == [(1,)]
        assert schemas.give_back(first) == schemas.give_back(plain) == []

        assert schemas.take() == plain  # for whoever asks for none, and
        assert schemas.take() == first  # so is this one
        found = f"SELECT to_regclass('{table}')"
        assert connection.execute(found).fetchone() == (None,)

        assert schemas.give_back(first) == []
        with pytest.raises(ZeroDivisionError):
            schemas.take(lambda _: 1 / 0)
        assert schemas.take() != first
