"""Wakes runs that wait, for a relay. Senders of signals note which runs are to be woken."""

from collections.abc import Sequence
from typing import Any

import psycopg

from beatless.orchestrator.state import WAITS
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.waking import Woken

BATCH = 200
"""Notes of one shard that one statement looks at."""


class Wakes:
    """Wakes the runs of a relay's shards. One statement, which waits for no row."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, batch=BATCH, reason=WAITS)

    def wake(self, connection: psycopg.Connection[Any], shards: Sequence[int]) -> Woken:
        """Make the runs due that wait and were to be woken."""
        ((found, gone),) = execute(connection, self._sql["wake"], {"shards": list(shards)})
        return Woken(done=gone, left=found - gone)
