"""The exclusive right to execute a run, with a fencing token.

A claim draws a token; every later write of the owner names it, so a worker that was frozen past
its lease writes nothing (Kleppmann, "How to do distributed locking", 2016). A drawn token is never
seen again, not even after a failover that lost the claim it was drawn for. All clocks are the
server's.
"""

import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from beatless.orchestrator.board import Board, Noted
from beatless.orchestrator.journal import Run
from beatless.orchestrator.state import RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.message import shard_of
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

PATIENCE = 1.0
"""Seconds that a claim or a heartbeat waits for a lock: others wait behind it meanwhile."""

AGAIN = 1.0
"""Seconds until a heartbeat that failed is tried again."""


@dataclass(slots=True, kw_only=True)
class Lease:
    """One claim of one run. `cancelled` and `lost` are news that the heartbeat brings."""

    run: Run
    token: int
    next_token: int | None = None
    """What the token is being changed to: while the answer is unknown, the row may have either."""
    cancelled: bool = False
    lost: bool = False
    deadline: float | None = None
    """When the run must have ended, by this process's monotonic clock."""
    waited: float | None = None
    """Seconds that the run was due before this claim; None if it was taken from another worker."""
    age: float = 0.0
    """Seconds from the run's first claim to this one."""
    begun: bool = False
    """Whether the claim has started the first step, as it does for a run that was never claimed."""
    trace_context: Mapping[str, str] | None = None
    """Of the trace that the run was started in: `traceparent`, as W3C Trace Context has it."""
    claimed_at: float = field(default_factory=monotonic)

    @property
    def tokens(self) -> list[int]:
        """Those that the row may have while the lease is held."""
        return [self.token] if self.next_token is None else [self.token, self.next_token]

    @property
    def seconds(self) -> float:
        """Since the run's first claim."""
        return self.age + monotonic() - self.claimed_at

    @property
    def late(self) -> bool:
        """Whether the run has reached its deadline."""
        return self.deadline is not None and monotonic() >= self.deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a look at a run found. Only the owner of the lease writes as a worker."""

    held: bool
    written: bool
    """The owner has written something after the seq that it was sure of."""
    last_seq: int
    state: RunState


class Leases:
    """The statements over leases for one schema."""

    def __init__(self, schema: str, *, seconds: float) -> None:
        self.seconds = seconds
        self.sql = statements(__file__, schema, lock_timeout_ms=round(PATIENCE * 1000))

    def claim(
        self,
        connection: Connection,
        run_id: str,
        *,
        plan: str,
        worker: str,
        first_step: str,
        dispatch: int,
    ) -> Lease | None:
        """Take the run if it waits and is due, or if its lease has run out; else None.

        Who can write to the broker can name any plan and any dispatch: a run of another plan is not
        taken, and no number moves that of the next message by more than one.

        Also None if somebody's transaction holds the run's row for longer than `PATIENCE`: it is
        dispatched again. For a run that was never claimed this also commits StepStarted of
        `first_step`.
        """
        # The fence first, the claim's snapshot after it: a `pause` that was committed before it is
        # seen, one that was not waits for us. It is one round trip all the same.
        parameters = {
            "run_id": run_id,
            "plan": plan,
            "worker": worker,
            "seconds": self.seconds,
            "shard": shard_of(run_id),
            "first": first_step,
            "dispatch": dispatch,
            "token": new_token(),
        }
        try:
            with connection.pipeline(), connection.transaction():
                connection.execute(self.sql["fence"])
                claimed = connection.execute(self.sql["claim"], parameters)
        except psycopg.errors.LockNotAvailable:
            logger.info(
                "run not claimed: another transaction holds its row; it is dispatched again",
                extra={"action": "claim_waited", "run_id": run_id},
            )
            return None
        rows = claimed.fetchall()
        if not rows:
            return None
        *row, token, left, waited, age, trace_context, begun, _ = rows[0]
        run = Run.from_row(row)
        return Lease(
            run=run,
            token=token,
            cancelled=run.cancel_requested_at is not None,
            deadline=None if left is None else monotonic() + left,
            waited=waited,
            age=age,
            trace_context=_carrier(trace_context),
            begun=begun,
        )

    def extend(self, connection: Connection, leases: Sequence[Lease]) -> list[Lease]:
        """Keep leases for their full time from now; those that were not kept.

        These are gone, or somebody's transaction holds their rows at this moment: see `look`.
        """
        by_token = {token: lease for lease in leases for token in lease.tokens}
        kept = self.extend_tokens(
            connection, [(lease.run.run_id, token) for token, lease in by_token.items()]
        )
        for token, cancelled in kept.items():
            by_token[token].cancelled = cancelled
        return [lease for lease in leases if kept.keys().isdisjoint(lease.tokens)]

    def extend_tokens(
        self, connection: Connection, held: Sequence[tuple[str, int]]
    ) -> dict[int, bool]:
        """The same by run id and token: for each that was kept, whether a cancel was asked for."""
        with connection.pipeline(), connection.transaction():
            connection.execute(self.sql["wait_shortly"])
            extended = connection.execute(
                self.sql["extend"],
                {
                    "run_ids": [run_id for run_id, _ in held],
                    "tokens": [token for _, token in held],
                    "seconds": self.seconds,
                },
            )
        return dict(extended.fetchall())

    @contextmanager
    def impatient(self, connection: Connection, seconds: float) -> Iterator[None]:
        """A transaction that waits so long for a lock: else psycopg.errors.LockNotAvailable."""
        with connection.transaction():
            connection.execute(self.sql["wait_for"], {"milliseconds": f"{seconds * 1000:.0f}"})
            yield

    def renew_token(self, connection: Connection, lease: Lease) -> None:
        """Fence off our own write whose answer was lost: it has happened, or never will.

        Its backend may still wait for a lock, or for the disk. This waits for the row behind it,
        and a statement that comes later finds another token. May be repeated if its own answer is
        lost.
        """
        if lease.next_token is None:
            lease.next_token = new_token()
        rows = execute(
            connection,
            self.sql["renew"],
            {"run_id": lease.run.run_id, "tokens": lease.tokens, "next": lease.next_token},
        )
        if rows:
            lease.token, lease.next_token = lease.next_token, None

    def look(self, connection: Connection, lease: Lease, after: int) -> Seen:
        """What has become of a lease and of our writes: the answer to an interrupted commit."""
        rows = execute(connection, self.sql["look"], {"run_id": lease.run.run_id, "after": after})
        if not rows:
            return Seen(held=False, written=False, last_seq=0, state=RunState.CANCELLED)
        token, last_seq, lease.cancelled, state, written = rows[0]
        ours = token in lease.tokens
        return Seen(
            held=ours and state == RunState.RUNNING,
            written=ours and written,
            last_seq=last_seq,
            state=RunState(state),
        )


def new_token() -> int:
    """A fencing token: a number that nobody has drawn before."""
    return secrets.randbits(63)


class Heartbeat:
    """A thread that keeps this process's leases while their steps run.

    1. sleep until a third of the lease time has gone, or until stopped
    2. extend every lease that is held, all at once, and waiting for no row
    3. note on each lease whether it was lost, or a cancel was asked for
    4. if that failed, or a row was held, do it again each second: a lease must not run out for that

    It opens a connection when a step first outlives that third, so short steps cost nothing.
    Nothing that goes wrong ends it.
    """

    def __init__(
        self,
        leases: Leases,
        connect: Callable[[], Connection],
        *,
        board: Board | None = None,
        slots: Sequence[int] = (),
        observer: Observer = ignore,
    ) -> None:
        """What is held is noted in these slots of `board`, as far as they go."""
        self._leases = leases
        self._connect = connect
        self._board = board
        self._free = list(slots)
        self._slots: dict[int, int] = {}
        self._by_id: dict[int, Lease] = {}
        self._changed = threading.Condition()
        self._observer = observer
        self._thread: LastingThread | None = None
        self._resting = False
        self._stopping = False

    def hold(self, lease: Lease) -> None:
        """Keep this lease from now on; again when its token has changed."""
        with self._changed:
            self._by_id[id(lease)] = lease
            self._note(lease)
            if self._thread is None:
                thread = LastingThread("heartbeat", self._run, observer=self._observer)
                thread.start()
                self._thread = thread  # one that could not be started is started with the next
            elif self._resting:
                self._changed.notify()

    def release(self, lease: Lease) -> None:
        """Keep it no longer."""
        with self._changed:
            self._by_id.pop(id(lease), None)
            slot = self._slots.pop(id(lease), None)
            if self._board is not None and slot is not None:
                self._board.clear(slot)
                self._free.append(slot)

    def _note(self, lease: Lease) -> None:
        if self._board is None or id(lease) not in self._by_id:
            return
        if id(lease) not in self._slots:
            if not self._free:
                return
            self._slots[id(lease)] = self._free.pop()
        self._board.write(
            self._slots[id(lease)],
            Noted(
                pid=os.getpid(),
                beat=monotonic(),
                run_id=lease.run.run_id,
                tokens=lease.tokens,
            ),
        )

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def once(self, connection: Connection) -> bool:
        """Extend every lease that is held now; False if somebody's transaction holds a row."""
        with self._changed:
            held = list(self._by_id.values())
        if not held:
            return True
        complete = True
        missed = self._leases.extend(connection, held)
        with self._changed:
            for lease in held:
                if not any(lease is other for other in missed):
                    self._note(lease)
        for lease in missed:
            seen = self._leases.look(connection, lease, 0)
            if seen.held:
                complete = False
                continue
            lease.lost = True
            self.release(lease)
            # With our token still in place, it was this process that ended it or gave it back.
            if not seen.written and not seen.state.final:
                logger.warning(
                    "lease lost while its step runs",
                    extra={
                        "action": "lease_lost",
                        "run_id": lease.run.run_id,
                        "token": lease.token,
                    },
                )
        return complete

    def _run(self, thread: LastingThread) -> None:
        connection: Connection | None = None
        failing = False
        while True:
            with self._changed:
                self._resting = True
                self._changed.wait_for(lambda: self._by_id or self._stopping)
                self._resting = False
                # A lease that comes meanwhile is younger than this wait: it can bear its end.
                every = self._leases.seconds / 3
                self._changed.wait_for(
                    lambda: self._stopping, min(every, AGAIN) if failing else every
                )
                if self._stopping:
                    break
                if not self._by_id:
                    failing = False
                    thread.works()
                    continue
            try:
                if connection is None or connection.closed:
                    connection = self._connect()
                failing = not self.once(connection)
                thread.works()
            except Exception as error:
                failing = True
                thread.failed()
                # Mostly Postgres is away. Whatever it is: the token protects the run.
                logger.warning(
                    "heartbeat failed, will retry",
                    extra={"action": "heartbeat_failed", "reason": str(error)},
                    exc_info=None if isinstance(error, psycopg.Error) else error,
                )
                if connection is not None:
                    connection.close()
        if connection is not None:
            connection.close()


def _carrier(stored: Any) -> Mapping[str, str] | None:
    """The headers that a row carries, unless it holds anything else: the run is worth more."""
    headers = isinstance(stored, dict) and all(isinstance(value, str) for value in stored.values())
    return stored if headers else None
