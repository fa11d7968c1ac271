"""Runs that wait for the end of another one with their dedupe key: the relay's part of it."""

from collections.abc import Sequence
from typing import Any

import psycopg

from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.waking import Woken

BATCH = 200
"""Notes that one statement looks at."""

REST_S = 60.0
"""Until the next look for successors whose notes a relay of an older version took away."""


class Successors:
    """Makes runs due whose predecessors have ended. Its statement waits for no row."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, batch=BATCH)

    def begin(self, connection: psycopg.Connection[Any], shards: Sequence[int]) -> Woken:
        """Have the successors begin that the notes of these shards name, and forget the notes."""
        done = left = 0
        aside: list[str] = []
        while True:
            parameters = {"shards": list(shards), "aside": aside}
            ((found, gone, held, _),) = execute(connection, self._sql["begin"], parameters)
            done, left = done + gone, left + found - gone
            if not held or found < BATCH:
                return Woken(done=done, left=left)
            aside += held  # whose notes may have filled the batch: others stand behind them


class NotesSuccessors:
    """A chore: notes the successors that wait for nothing."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, batch=BATCH)

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Note some of them; seconds until the next step."""
        execute(connection, self._sql["note"], {})
        return REST_S
