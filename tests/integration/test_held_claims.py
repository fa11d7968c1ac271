"""Claims of runs whose rows another transaction holds."""

import psycopg
import pytest

from beatless import App, Plan, StepContext, step
from beatless.orchestrator import lease as leasing
from beatless.orchestrator.lease import Lease, Leases
from beatless.testing import Kit


@step
def only(ctx: StepContext) -> None:
    pass


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("job", [only])]


def test_a_claim_that_waited_in_vain_leaves_a_connection_that_claims(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also the one in which its statements are prepared, those behind the failure as well."""

    def claimed(connection: psycopg.Connection, run_id: str) -> list[Lease]:
        return leases.claim_with_others(
            connection,
            run_id,
            plan="job",
            worker="w",
            first_steps={"job": "only"},
            dispatch=1,
            places=2,
        )

    monkeypatch.setattr(leasing, "LOCK_TIMEOUT_S", 0.01)
    leases = Leases(beatless_app.settings.schema, seconds=30.0)
    with beatless_app.executors.connect() as connection:
        threshold = connection.prepare_threshold
        assert threshold
    for claims_before in range(threshold + 2):
        held = beatless.start_run("job").run_id
        with beatless_app.executors.connect() as connection:
            with postgres.transaction():
                postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (held,))
                for _ in range(claims_before):
                    claimed(connection, "none")
                assert claimed(connection, held) == []
            assert [lease.run.run_id for lease in claimed(connection, held)] == [held]
