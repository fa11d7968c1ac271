"""Commits of several runs in one statement: their boundaries, or the output of their steps."""

from collections.abc import Sequence
from typing import Any

from beatless.orchestrator.records import Appended
from beatless.orchestrator.settlement import Proposal
from beatless.orchestrator.step_output import Portion
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, array, execute
from beatless.outbox.statements import statements

MAX_RUNS = 100
"""Runs of one statement, also of a claim."""

OF_RUNS = (
    *("run_ids", "shards", "tokens", "afters", "ns", "states"),
    *("results", "errors", "delays", "reasons"),
)
"""The parameters of `settle_many` with a value for each run."""

OF_EVENTS = ("places", "types", "steps", "attempts", "datas")
"""Those with a value for each event; the place is the run's, from 1."""


class GroupCommit:
    """The statement of one schema, as `Journal` has those over one run."""

    def __init__(self, schema: str) -> None:
        self.sql = statements(__file__, schema)

    def settle(
        self, connection: Caller, proposals: Sequence[Proposal]
    ) -> dict[str, Appended | None]:
        """Commit the boundaries of several runs, all at once; those that were written, by run id.

        None for a run that is cancelled: nothing was written, it is to be settled by itself. So
        the other way that each boundary could go is not sent. A run is missing whose lease is gone,
        or whose row another transaction holds at this moment: it is waited for by none of the
        others. Raises psycopg.DataError if any of the values cannot be stored: then nothing was
        written.
        """
        runs = [
            (
                each.run_id,
                shard_of(each.run_id),
                each.token,
                each.after,
                len(normal.events),
                normal.state.value,
                normal.result,
                normal.error,
                normal.delay_s,
                each.settlement.reason,
            )
            for each in proposals
            for normal in [each.settlement.normal]
        ]
        events = [
            (place, event.type.value, event.step, event.attempt, event.data)
            for place, each in enumerate(proposals, 1)
            for event in each.settlement.normal.events
        ]
        literals = _columns(OF_RUNS, runs) | _columns(OF_EVENTS, events)
        literals["branches"] = array([False] * len(events))
        rows = execute(connection, self.sql["settle_many"], literals)
        return {
            run_id: None
            if cancelled
            else Appended(last_seq=last_seq, cancelled=False, signalled=signalled)
            for run_id, last_seq, cancelled, signalled, _ in rows
        }

    def append(self, connection: Caller, portions: Sequence[Portion]) -> dict[int, Appended]:
        """Commit the output of several steps, all at once; what was written, by token.

        One is missing as in `settle`, and the same is raised.
        """
        names = ("run_ids", "shards", "tokens", "afters", "ns")
        rows = [
            (each.run_id, shard_of(each.run_id), each.token, each.after, len(each.events))
            for each in portions
        ]
        literals = {
            name: array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        events = [(place, event) for place, each in enumerate(portions, 1) for event in each.events]
        literals |= {
            "places": array(place for place, _ in events),
            "types": array(event.type.value for _, event in events),
            "steps": array(event.step for _, event in events),
            "attempts": array(event.attempt for _, event in events),
            "datas": array(event.data for _, event in events),
        }
        found = execute(connection, self.sql["append_many"], literals)
        return {
            token: Appended(last_seq=last_seq, cancelled=cancelled)
            for token, last_seq, cancelled, _ in found
        }


def _columns(names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """Each column of some rows as an array."""
    columns = zip(*rows, strict=True) if rows else ((),) * len(names)
    return {name: array(column) for name, column in zip(names, columns, strict=True)}
