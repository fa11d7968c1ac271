"""A caller's two-phase transaction is refused at once, whether a relay sleeps or not."""

import psycopg
import pytest
from sqlalchemy.orm import Session

from beatless import App
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
