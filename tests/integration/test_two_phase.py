"""A caller's two-phase transaction is refused at once, whether a relay sleeps or not."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.orm import Session

from beatless import App
from beatless.local.postgres import EmbeddedPostgres
from beatless.migrations import migrate
from beatless.outbox.message import SHARDS
from beatless.settings import libpq_url
from beatless.testing import Kit


def test_psycopgs_tpc_begin_is_refused(beatless: Kit, beatless_app: App) -> None:
    with psycopg.connect(libpq_url(beatless_app.settings.database_url)) as caller:
        caller.tpc_begin("beatless-test")
        with pytest.raises(ValueError, match="two-phase transaction"):
            beatless.client.start_run("two_steps", connection=caller)
        with pytest.raises(ValueError, match="two-phase transaction"):
            beatless.client.cancel_run("any", connection=caller)
        caller.tpc_rollback()
        beatless.client.start_run("two_steps", connection=caller)


def test_sqlalchemys_two_phase_transactions_are_refused(beatless: Kit, beatless_app: App) -> None:
    with (
        beatless_app.engine.connect() as connection,
        connection.begin_twophase() as transaction,
    ):
        with pytest.raises(ValueError, match="two-phase transaction"):
            beatless.client.start_run("two_steps", connection=connection)
        with connection.begin_nested(), pytest.raises(ValueError, match="two-phase"):
            beatless.client.start_run("two_steps", connection=connection)
        transaction.rollback()
    with Session(beatless_app.engine, twophase=True) as session:
        with pytest.raises(ValueError, match="two-phase transaction"):
            beatless.client.start_run("two_steps", connection=session)
        session.rollback()


@pytest.mark.slow
def test_what_plain_sql_prepares_is_refused_by_postgres_or_a_run_like_any_other(
    beatless_app: App, tmp_path: Path
) -> None:
    settings = {"fsync": "off", "max_prepared_transactions": "1"}
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedPostgres(tmp_path / "postgres", settings=settings))
        app = App(
            replace(beatless_app.settings, database_url=server.url, listen_url=""),
            list(beatless_app.plans.values()),
        )
        stack.callback(app.close)
        migrate(app.engine, app.settings.schema)
        caller, relay = (
            stack.enter_context(psycopg.connect(server.url, autocommit=True)) for _ in range(2)
        )
        shards = f"FROM generate_series(0, {SHARDS - 1}) s"
        relay.execute(f"SELECT pg_advisory_lock({app.queries.bell_key}, s) {shards}")  # it sleeps
        caller.execute("BEGIN")
        app.client.start_run("two_steps", run_id="rung", connection=caller)
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            caller.execute("PREPARE TRANSACTION 'rung'")
        relay.execute("SELECT pg_advisory_unlock_all()")  # it is awake

        caller.execute("BEGIN")
        app.client.start_run("two_steps", run_id="silent", connection=caller)
        caller.execute("PREPARE TRANSACTION 'silent'")
        assert app.client.list_runs() == []
        may_sleep = f"SELECT bool_and(pg_try_advisory_lock({app.queries.bell_key}, s)) {shards}"
        assert relay.execute(may_sleep).fetchone() == (False,), "it would hear no ring"
        caller.execute("COMMIT PREPARED 'silent'")
        assert [run.run_id for run in app.client.list_runs()] == ["silent"]
