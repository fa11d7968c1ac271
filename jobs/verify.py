"""Checks the promises of docs/guarantees.md on the stored data. Reads only."""

from collections.abc import Sequence

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements
from beatless.unfit_rows import Violation

PUBLISH_GRACE_S = 60.0
"""Seconds after the end of a run in which a relay publishes its events, if there is one."""


def verify(
    connection: Caller,
    schema: str,
    run_ids: Sequence[str] | None = None,
    *,
    patience: float = PUBLISH_GRACE_S,
) -> list[Violation]:
    """Every violation in these runs, or in all that are stored. Safe while runs are running.

    `patience` is how many seconds after its end a run's events may wait to be published.
    """
    sql = statements(__file__, schema, last_shard=SHARDS - 1)
    parameters = {
        "run_ids": None if run_ids is None else list(run_ids),
        "patience": patience,
    }
    return [
        Violation(invariant=invariant, run_id=run_id, problem=problem)
        for invariant, run_id, problem in execute(connection, sql["violations"], parameters)
    ]
