"""Rows of unfinished runs that beatless never writes so and no relay can act on. Reads only."""

from dataclasses import dataclass

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One promise that one run breaks."""

    invariant: str
    run_id: str
    problem: str

    def __str__(self) -> str:
        return f"{self.invariant} run {self.run_id}: {self.problem}"


def unfit_rows(connection: Caller, schema: str, *, limit: int | None) -> list[Violation]:
    """Rows of unfinished runs, and of the outbox, that no relay can act on: up to `limit`."""
    parameters = {"run_ids": None, "limit": limit}
    sql = statements(__file__, schema, last_shard=SHARDS - 1)
    return [
        Violation(invariant=invariant, run_id=run_id, problem=problem)
        for invariant, run_id, problem in execute(connection, sql["some"], parameters)
    ]
