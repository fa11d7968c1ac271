"""Messages that were given up on, kept until a person decides. Nothing here commits."""

from dataclasses import dataclass
from datetime import datetime

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Caller, channel_of, execute

INT4 = (-(2**31), 2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event message that its door refused, while it took others."""

    id: int
    run_id: str
    reason: str
    from_seq: int
    to_seq: int
    created_at: datetime


class LetterStatements:
    """The statements of one schema over dead letters."""

    def __init__(self, schema: str) -> None:
        s = schema
        self._channel = channel_of(schema)
        # Whatever a letter holds, it must not have the others fail that it stands among.
        shard = _whole("shard", 0, SHARDS - 1)
        from_seq, to_seq = _whole("from_seq", *INT4), _whole("to_seq", *INT4)
        fit = f"{shard} IS NOT NULL AND {from_seq} IS NOT NULL AND {to_seq} IS NOT NULL"
        self._list = f"""
SELECT id, run_id, reason, coalesce({from_seq}, 0), coalesce({to_seq}, 0), created_at
  FROM {s}.dead_letters WHERE id > %(after)s ORDER BY id LIMIT %(limit)s"""
        self._requeue = f"""
WITH gone AS (DELETE FROM {s}.dead_letters WHERE {{which}} AND {fit} RETURNING run_id, message)
INSERT INTO {s}.run_outbox (shard, run_id, from_seq, to_seq)
SELECT {shard}, run_id, {from_seq}, {to_seq} FROM gone ORDER BY {from_seq}
RETURNING run_id, pg_notify(%(channel)s, '')"""
        self._some = f"""id IN (
  SELECT id FROM {s}.dead_letters WHERE strpos(lower(reason), lower(%(reason)s)) > 0 AND {fit}
   ORDER BY id LIMIT %(limit)s FOR UPDATE SKIP LOCKED)"""
        self._discard = f"DELETE FROM {s}.dead_letters WHERE id = %(id)s RETURNING id"

    def list(self, connection: Caller, *, limit: int, after: int = 0) -> list[DeadLetter]:
        """Oldest first, those with an id above `after`."""
        rows = execute(connection, self._list, {"limit": limit, "after": after})
        return [
            DeadLetter(
                id=row[0],
                run_id=row[1],
                reason=row[2],
                from_seq=row[3],
                to_seq=row[4],
                created_at=row[5],
            )
            for row in rows
        ]

    def requeue(self, connection: Caller, letter_id: int) -> bool:
        """Put the message back into the outbox and wake a relay; False if there is none."""
        statement = self._requeue.replace("{which}", "id = %(id)s")
        return bool(execute(connection, statement, {"id": letter_id, "channel": self._channel}))

    def requeue_some(self, connection: Caller, *, reason: str, limit: int) -> int:
        """Put those back that have this in their reason, oldest first; how many.

        Those of one run are published in the order of its events.
        """
        parameters = {"reason": reason, "limit": limit, "channel": self._channel}
        statement = self._requeue.replace("{which}", self._some)
        return len(execute(connection, statement, parameters))

    def discard(self, connection: Caller, letter_id: int) -> bool:
        """Forget the message: its events stay in the journal; False if there is none."""
        return bool(execute(connection, self._discard, {"id": letter_id}))


def _whole(name: str, least: int, most: int) -> str:
    """SQL of a number in a message; NULL unless it is one, between these two."""
    text = f"CASE jsonb_typeof(message -> '{name}') WHEN 'number' THEN message ->> '{name}' END"
    number = f"({text})::numeric"
    return f"CASE WHEN {number} BETWEEN {least} AND {most} THEN {number}::int END"
