"""Messages that were given up on, kept until a person decides. Nothing here commits."""

from dataclasses import dataclass
from datetime import datetime

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Caller, channel_of, execute
from beatless.outbox.statements import statements


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An event message that Redis refused, while it accepted others."""

    id: int
    run_id: str
    reason: str
    from_seq: int
    to_seq: int
    created_at: datetime


class LetterStatements:
    """The statements of one schema over dead letters."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, last_shard=SHARDS - 1)
        self._channel = channel_of(schema)

    def list(self, connection: Caller, *, limit: int, after: int = 0) -> list[DeadLetter]:
        """Oldest first, those with an id above `after`."""
        rows = execute(connection, self._sql["list"], {"limit": limit, "after": after})
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
        parameters = {"id": letter_id, "channel": self._channel}
        return bool(execute(connection, self._sql["requeue"], parameters))

    def requeue_some(self, connection: Caller, *, reason: str, limit: int) -> int:
        """Put those back that have this in their reason, oldest first; how many.

        Those of one run are published in the order of its events.
        """
        parameters = {"reason": reason, "limit": limit, "channel": self._channel}
        return len(execute(connection, self._sql["requeue_some"], parameters))

    def discard(self, connection: Caller, letter_id: int) -> bool:
        """Forget the message: its events stay in the journal; False if there is none."""
        return bool(execute(connection, self._sql["discard"], {"id": letter_id}))
