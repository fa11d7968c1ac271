"""Tables, functions and types of the code under test are each test's own, and go with it."""

import psycopg
import pytest

from jobs.settings import libpq_url
from jobs.testing import Kit


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
