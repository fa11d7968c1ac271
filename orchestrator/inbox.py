"""The inbox of runs: signals that were sent, and are not in their journals yet.

Whoever sends one only inserts. Whoever holds the run's lease takes them in, as SignalReceived; so
the journal of a run has one writer, and no open transaction of a sender holds the run's row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from beatless.orchestrator.errors import RunEnded, RunNotFound, SignalConflict
from beatless.orchestrator.events import Event
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.records import NewDecision, NewSignal, SentDecision, SentSignal
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, execute, execute_lazily
from beatless.outbox.statements import statements

NEVER = "9999-01-01Z"
"""When a wait without an end is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The inbox and the waits of a run whose row is locked."""

    events: Sequence[Event]
    """The SignalReceived after the seq that was asked for."""
    last_seq: int
    delay_s: float
    """Seconds until the first of the waits ends."""


class Inbox:
    """The statements of one schema over signals."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, never=NEVER)

    def send(
        self, connection: Caller, new: Sequence[NewSignal], *, namespace: str
    ) -> list[SentSignal]:
        """Store signals in one statement, all or none.

        One whose key was used for its run before, with the same content, is not stored again.
        Raises RunNotFound, RunEnded and SignalConflict.
        """
        text = f"[{','.join(signal.to_json() for signal in new)}]"
        rows = execute(connection, self._sql["send"], {"signals": text, "namespace": namespace})
        for signal, (exists, ended, known, differs, _, _) in zip(new, rows, strict=True):
            if not exists:
                raise RunNotFound(signal.run_id)
            if differs:
                raise SignalConflict(signal.run_id, signal.key)
            if ended and not known:
                raise RunEnded(signal.run_id)
        return [
            SentSignal(run_id=signal.run_id, id=signal.key, new=not known, waits_for=names)
            for signal, (_, _, known, _, names, _) in zip(new, rows, strict=True)
        ]

    def open_waits(self, connection: Caller, run_id: str) -> list[OpenWait]:
        """The waits of a run that have begun and not ended, oldest first."""
        rows = execute(connection, self._sql["open_waits"], {"run_id": run_id})
        return [OpenWait.from_started(step, data, seq=seq) for step, data, seq in rows]

    def decide(
        self, connection: Caller, new: NewDecision, *, namespace: str
    ) -> SentDecision | None:
        """Store the decision of an open approval, as a signal, in one statement.

        None if it is not open, or has a decision, or the key was used for its run before. Of two at
        once one waits for the transaction of the other, whatever their isolation.
        """
        ((decided_at, _),) = execute(
            connection, self._sql["decide"], new.to_row() | {"namespace": namespace}
        )
        return None if decided_at is None else new.sent(decided_at)

    def sent_with(
        self, connection: Caller, run_id: str, key: str
    ) -> tuple[str | None, str | None] | None:
        """The occurrence that a decision with this key was made for, and its form.

        (None, None) if the key is that of another signal of the run, None if it is of none.
        """
        rows = execute(connection, self._sql["sent_with"], {"run_id": run_id, "key": key})
        return tuple(rows[0]) if rows else None

    def decision(
        self, connection: Caller, run_id: str, name: str, data: str, *, exact: bool
    ) -> tuple[str, str, str | None, datetime, bool] | None:
        """The last decision of a name, or the exact one of an occurrence.

        Of which occurrence, by whom, by which link, when.

        And whether its data is this. None if there is none.
        """
        rows = execute(
            connection,
            self._sql["decision"],
            {"run_id": run_id, "name": name, "data": data, "exact": exact},
        )
        return tuple(rows[0]) if rows else None

    def begun(self, connection: Caller, run_id: str, name: str) -> int:
        """The number of occurrences of a wait that a run has begun, but for those with an id."""
        ((number,),) = execute(connection, self._sql["begun"], {"run_id": run_id, "name": name})
        return int(number)

    def open_approvals(
        self, connection: Caller, run_ids: Sequence[str]
    ) -> Iterator[tuple[str, OpenWait]]:
        """The approvals of these runs that are open, and not decided, each with its run.

        In the order of the runs; few are in memory at once.
        """
        rows = execute_lazily(connection, self._sql["open_approvals"], {"run_ids": list(run_ids)})
        return ((run, OpenWait.from_started(step, data, seq=seq)) for run, step, data, seq in rows)

    def send_take_in(self, connection: psycopg.Connection[Any], run_id: str, token: int) -> None:
        """Move the signals of a run into its journal, in the pipeline of the claim of this lease.

        It sees those that were committed until then: the claim has waited for the run's row.
        """
        connection.execute(self._sql["take_in"], _of_lease(run_id, token))

    def behind_lock(
        self,
        connection: psycopg.Connection[Any],
        run_id: str,
        token: int,
        _: Caller,
        statement: str,
        parameters: Mapping[str, Any],
    ) -> list[Any]:
        """The rows of a statement behind the lock of a run under its lease, in one commit.

        It sees all signals that are committed until then. If it had waited for the row itself it
        would not, and a relay may have left those of meanwhile to the worker, which has the run.
        """
        with connection.pipeline():  # one transaction, on an autocommit connection
            connection.execute(self._sql["lock"], _of_lease(run_id, token))
            rows = connection.execute(statement, parameters)
        return rows.fetchall()

    def take_in(
        self,
        connection: psycopg.Connection[Any],
        run_id: str,
        token: int,
        *,
        seen: int,
        waits: Sequence[int] = (),
    ) -> Look | None:
        """Move the signals of a run into its journal, and look; None if the lease is gone.

        In a transaction, which has the run's row locked from then on. `seen` is the seq up to which
        the caller knows the run's signals, `waits` are the seqs of its open waits.
        """
        parameters = _of_lease(run_id, token) | {"seen": seen, "waits": list(waits)}
        with connection.pipeline():
            locked = connection.execute(self._sql["lock"], parameters)
            connection.execute(self._sql["take_in"], parameters)
            looked = connection.execute(self._sql["look"], parameters)
        if locked.fetchone() is None:
            return None
        ((lines, last_seq, delay_s),) = looked.fetchall()
        return Look(
            events=[Event.from_json(line) for line in lines],
            last_seq=last_seq,
            delay_s=max(0.0, delay_s),
        )


def _of_lease(run_id: str, token: int) -> dict[str, Any]:
    return {"run_id": run_id, "token": token, "shard": shard_of(run_id)}
