"""Cancels runs: an accepted cancel is before a boundary of its run or after it, never between."""

import json
from collections.abc import Mapping, Sequence

from beatless.orchestrator.events import encode
from beatless.orchestrator.failure import cancel_error
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.records import Run
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, array, execute, int_array
from beatless.outbox.statements import statements


class Cancels:
    """The statement of one schema that cancels runs."""

    def __init__(self, schema: str, *, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._sql = statements(__file__, schema, run_options=OPTION_SQL["run_options"])

    def cancel(
        self,
        connection: Caller,
        run_ids: Sequence[str],
        *,
        reason: str | None,
        undo: Mapping[str, str | None],
        source: str,
        namespace: str | None = None,
    ) -> list[Run]:
        """Store a cancel of runs, of any namespace if none is given; those that it has changed.

        One that has ended, or was cancelled before, is left as it is. `undo` has the name of each
        plan's `on_cancel` step, or None. Waiting runs of a plan that is known to have none end at
        once, unless they have begun a step that is to be undone. `source` is the writer of the
        events.
        """
        error = encode(
            cancel_error(reason), where="the reason of the cancel", limit=self._max_event_bytes
        )
        rows = execute(
            connection,
            self._sql["cancel"],
            {
                "run_ids": array(run_ids),
                "shards": int_array(shard_of(run_id) for run_id in run_ids),
                "namespace": namespace,
                "reason": reason,
                "error": error,
                "undo": json.dumps(dict(undo)),
                "source": source,
            },
        )
        return [Run.from_row(row[:-1]) for row in rows]
