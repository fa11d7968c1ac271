"""Rows of unfinished runs that beatless never writes so and no relay can act on. Reads only."""

from dataclasses import dataclass

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import LAST_ATTEMPT, Caller, execute


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """One promise that one run breaks."""

    invariant: str
    run_id: str
    problem: str

    def __str__(self) -> str:
        return f"{self.invariant} run {self.run_id}: {self.problem}"


def unfit_rows(connection: Caller, schema: str, *, limit: int) -> list[Violation]:
    """Some of the rows of unfinished runs, and of the outbox, that no relay can act on."""
    parameters = {"run_ids": None, "limit": limit}
    statement = f"SELECT * FROM ({unfit(schema)}) AS unfit LIMIT %(limit)s"
    return [
        Violation(invariant=invariant, run_id=run_id, problem=problem)
        for invariant, run_id, problem in execute(connection, statement, parameters)
    ]


def unfit(s: str) -> str:
    """Values that the columns can hold and beatless never writes."""
    return f"""
SELECT 'I7', run_id, format('its dispatch is in shard %%s, which no relay leads', shard)
  FROM {s}.dispatches WHERE shard NOT BETWEEN 0 AND {SHARDS - 1}
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch is due at %%s: nothing will look at it', due_at)
  FROM {s}.dispatches WHERE due_at >= '10000-01-01Z'
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch counts %%s messages', attempts)
  FROM {s}.dispatches WHERE (attempts < 0 OR attempts >= {LAST_ATTEMPT - 1})
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, format('its dispatch names plan %%s, the run is of plan %%s', d.task, r.plan)
  FROM {s}.dispatches d JOIN {s}.runs r USING (run_id) WHERE d.task <> r.plan
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I7', run_id, 'one of its counters has reached its end: no worker can take it'
  FROM {s}.dispatches d JOIN {s}.runs r USING (run_id)
 WHERE (r.attempt = {LAST_ATTEMPT} OR r.last_seq >= {LAST_ATTEMPT - 1}
        OR r.lease_token = {2**63 - 1})
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))
UNION ALL
SELECT 'I8', run_id, format('outbox row %%s is in shard %%s, which no relay leads', id, shard)
  FROM {s}.run_outbox WHERE shard NOT BETWEEN 0 AND {SHARDS - 1}
   AND (%(run_ids)s::text[] IS NULL OR run_id = ANY(%(run_ids)s))"""
