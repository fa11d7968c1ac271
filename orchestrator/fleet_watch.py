"""Notices from outside that a whole worker has died, keeper and all, and ends its leases.

The kernel closes the sockets of a process that has ended, and Postgres then ends its sessions and
gives their locks to who waits for them.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psycopg
from psycopg import errors as pg_errors

from beatless.orchestrator.lease import Leases
from beatless.orchestrator.lease_status import HeldLease
from beatless.orchestrator.observer import LeasesEnded
from beatless.outbox.backoff import BACKOFF_CAP_S, Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.pending import cancel, finish
from beatless.outbox.queries import channel_of
from beatless.outbox.statements import statements

logger = logging.getLogger(__name__)

PROOF_S = 0.1
"""Seconds that a worker has to show itself again after the session of its keeper was lost."""

RECHECK_S = 0.03
"""Seconds between two looks for it."""

SUSPECT_S = 5.0
"""Seconds after which one that still has a session of any kind is left to its leases."""

END_TRIES_S = 30.0
"""Seconds for which a row that another transaction holds is tried again."""

RENEWAL_S = 60.0
"""Seconds that one wait lasts: a statement that waits has a snapshot, and rows that die meanwhile
stay where each scan meets them."""

BUSY_XIDS_PER_S = 10.0
"""Transactions per second that write above which a watch looks again and again, and waits for
nothing."""

BUSY_RECHECK_S = 0.5
"""Seconds between two looks then."""

LOAD_S = 1.0
"""Seconds for which much is taken to be written after somebody has said so."""

CLIENT_CHECK_INTERVAL = "200ms"
"""How often Postgres looks whether a keeper whose session waits is still there: the end of one that
waits for nothing it notices at once. Each look costs the server some 40 microseconds."""

MIN_IDLE_S = 600.0
"""Seconds for which a keeper's session outlasts its network at least."""

WORKERS_CHANGED = json.dumps({"workers": "changed"})
"""The message of a worker that has come to the relays."""

KEEPER = "beatless keeper "
WORKER = "beatless worker "
"""Start the application names of a worker's sessions; what names the worker follows."""

OF_KEEPER = f"^{KEEPER}([0-9a-f]+)$"
OF_ANY = f"^(?:{KEEPER}|{WORKER})([0-9a-f]+)$"

ABOVE_ALL = 2**31

NEVER = float("inf")


@dataclass(slots=True, kw_only=True)
class Orphan:
    """A lease of a worker that is proven dead."""

    held: HeldLease
    beside: bool
    """Its worker had others in hand: it is a suspect at most."""
    until: float
    """When to leave it to its time, by the monotonic clock."""


class FleetWatch:
    """One of those that watch over workers: in the keeper of each, and in each relay.

    1. a keeper takes the lock of a number above all others, and tells the relays
    2. a keeper awaits the lock of the next number below its own, a relay that of the highest: so
       each worker is awaited by the one that came after it, and no two await each other. While
       much is written they look twice a second instead: see `BUSY_XIDS_PER_S`. A relay that has
       much to do ends the waits of all
    3. a lock that is granted means that its session is gone, or was ended: its worker is suspected,
       and so is every other one that was there before and is not any more
    4. a suspect is dead if after `PROOF_S` it has no session at all: neither its keeper, which
       connects again at once if it lives, nor any process that could execute a run
    5. the leases that a dead worker held before that look are ended, by their tokens. That is a
       crash of a run that was alone in its worker, or a suspect that had noted that it was; the
       others are suspects from then on, if their bodies may have been called

    A session of its own that is lost proves nothing about others: who was seen before is forgotten.
    The sessions of a host that is cut off, or stands still, outlast its leases. Has one session;
    a relay has none while there is no worker. Loops nowhere: `once` does what is due.
    """

    def __init__(
        self,
        schema: str,
        leases: Leases,
        connect: Callable[[str], DirectConnection],
        *,
        worker: str = "",
        observer: Observer = ignore,
    ) -> None:
        """`worker` names the one whose keeper this is; of a relay it is empty.

        `connect` opens a session of its own, by its application name, never through a pooler, with
        this `CLIENT_CHECK_INTERVAL`.
        """
        self._schema = schema
        self._leases = leases
        self._sql = statements(__file__, schema)
        self._connect = connect
        self._worker = worker
        self._observer = observer
        self._connection: DirectConnection | None = None
        self._number = ABOVE_ALL
        self._awaited: int | None = None
        self._known: set[str] = set()
        self._suspects: dict[str, float] = {}
        """Since when they are, by the monotonic clock."""
        self._orphans: dict[int, Orphan] = {}
        """By token."""
        self._look_at = 0.0
        self._load_until = 0.0
        self._ends_waits = False
        """There is news of load, of which those that wait do not know."""
        self._next_xid, self._read_at = 0, NEVER
        """At the last look: the next transaction id, and the time by the monotonic clock."""
        self._failures = 0
        self._backoff = Backoff(initial=0.05, cap=BACKOFF_CAP_S)

    def descriptors(self) -> list[int]:
        """Those whose being readable is a reason for `once`."""
        return [] if self._connection is None else [self._connection.fileno()]

    def patience(self) -> float:
        """Seconds until there is something to do without that."""
        return max(0.0, self._look_at - monotonic())

    def look_soon(self) -> None:
        """Have the next `once` look at the workers that are there. Safe from any thread."""
        self._look_at = 0.0

    def note_load(self) -> bool:
        """Much is being written; whether that is news, and a reason for `once`.

        Safe from any thread.
        """
        now = monotonic()
        is_news = now >= self._load_until
        self._load_until = now + LOAD_S
        if is_news:
            self._ends_waits = True
            self._look_at = 0.0
        return is_news

    def once(self) -> bool:
        """Do what is due; False if the session was lost, and is opened again a little later."""
        try:
            self._step()
        except pg_errors.QueryCanceled:  # meant for a wait that had just ended: nothing is lost
            self._look_at = monotonic() + RECHECK_S
            return True
        except psycopg.Error as error:
            self.close()
            self._failures += 1
            # The first time at once: whoever waited for our lock asks whether we live.
            delay = self._backoff.delay(self._failures - 1) if self._failures > 1 else 0.0
            self._look_at = monotonic() + delay
            logger.warning(
                "the watch over workers lost its session, will reconnect",
                extra={"action": "watch_restart", "retry_in": delay, "reason": str(error)},
            )
            return False
        if self._connection is not None:
            self._failures = 0
        return True

    def close(self) -> None:
        """Close the session. Who was known is forgotten."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._awaited = None, None
        self._known.clear()
        self._suspects.clear()

    def _step(self) -> None:
        if self._connection is not None:
            self._connection.pgconn.consume_input()
            if self._awaited is not None and not self._connection.pgconn.is_busy():
                self._look_at = 0.0
        if monotonic() < self._look_at:
            return
        self._look_at = NEVER  # one who asks meanwhile is heard
        if self._connection is None:
            self._connection = self._open()
        wait_s = self._look(self._connection)
        self._look_at = min(self._look_at, monotonic() + wait_s)

    def _open(self) -> DirectConnection:
        connection = self._connect(f"{KEEPER}{self._worker}" if self._worker else "beatless watch")
        if not self._worker:
            return connection
        try:
            idle_s = max(MIN_IDLE_S, 2 * self._leases.seconds)
            connection.execute(self._sql["outlast"].encode(), {"idle_s": f"{idle_s:.0f}"})
            members, _ = self._members(connection)
            self._number = max(members, default=0) + 1
            while not _granted(connection, self._sql["take_number"], self._number):
                self._number += 1
            message = {"channel": channel_of(self._schema), "message": WORKERS_CHANGED}
            connection.execute(self._sql["announce"].encode(), message)
        except BaseException:
            connection.close()
            raise
        self._load_until = monotonic() + LOAD_S  # a burst may have begun before it came
        return connection

    def _look(self, connection: DirectConnection) -> float:
        """See who is there, and await the next one; seconds until to look again."""
        self._stop_waiting(connection)
        members, next_xid = self._members(connection)
        here = set(members.values()) - {self._worker}
        now = monotonic()
        if self._ends_waits:
            connection.execute(self._sql["end_waits"].encode())
            self._ends_waits = False
        written, seconds = next_xid - self._next_xid, now - self._read_at
        is_busy = now < self._load_until or (seconds > 0 and written > BUSY_XIDS_PER_S * seconds)
        self._next_xid, self._read_at = next_xid, now
        for worker in self._known - here:
            self._suspects.setdefault(worker, now)
        self._known = here
        self._suspects = {
            worker: since
            for worker, since in self._suspects.items()
            if worker not in here and now - since < SUSPECT_S
        }
        self._judge(connection, now)
        self._end_orphans(connection, now)
        if self._suspects or self._orphans:
            return RECHECK_S
        below = max((number for number in members if number < self._number), default=None)
        if below is not None and is_busy:
            return BUSY_RECHECK_S
        if below is not None:
            connection.pgconn.send_query(self._await_text(below))
            connection.pgconn.flush()
            self._awaited = below
            return RENEWAL_S
        if not self._worker:
            self.close()
        return NEVER

    def _judge(self, connection: DirectConnection, now: float) -> None:
        """Find the dead among the suspects, and what they held."""
        accused = [worker for worker, since in self._suspects.items() if now - since >= PROOF_S]
        if not accused:
            return
        # In this order: a run that is claimed after it was looked for is none of ours.
        held = self._leases.held_by(connection, accused)
        rows = connection.execute(self._sql["sessions"].encode(), {"any": OF_ANY}).fetchall()
        dead = set(accused) - {worker for (worker,) in rows}
        number = Counter(each.worker for each in held)
        for each in held:
            if each.worker in dead:
                beside = number[each.worker] > 1 and not each.alone
                self._orphans[each.token] = Orphan(
                    held=each, beside=beside, until=now + END_TRIES_S
                )
        for worker in dead:
            del self._suspects[worker]

    def _end_orphans(self, connection: DirectConnection, now: float) -> None:
        if not self._orphans:
            return
        orphans = {token: each.held for token, each in self._orphans.items()}
        beside = {token for token, each in self._orphans.items() if each.beside}
        uncalled = {token for token, each in orphans.items() if each.uncalled}
        found = self._leases.end(
            connection,
            [(each.run_id, token) for token, each in orphans.items()],
            uncalled=beside | uncalled,
            beside=beside - uncalled,
        )
        self._orphans = {
            token: each
            for token, each in self._orphans.items()
            if found.get(token) is False and now < each.until
        }
        for token, ended in found.items():
            if ended:
                self._observer(LeasesEnded(cause="worker_died", leases=1))
                logger.warning(
                    "the worker of a run has died: its lease is ended, the run goes on at once",
                    extra={
                        "action": "lease_ended",
                        "run_id": orphans[token].run_id,
                        "worker": orphans[token].worker,
                        "cause": "worker_died",
                    },
                )

    def _stop_waiting(self, connection: DirectConnection) -> None:
        if self._awaited is None:
            return
        number, self._awaited = self._awaited, None
        was_busy = connection.pgconn.is_busy()
        if was_busy:
            granted = cancel(connection)
        else:
            granted = finish(connection, ignore=pg_errors.QueryCanceled)
        if not granted and not was_busy:  # a relay has ended it
            self._load_until = monotonic() + LOAD_S
        while granted:  # the number of a dead worker stays nobody's, whatever cancels this
            with suppress(pg_errors.QueryCanceled):
                _granted(connection, self._sql["give_number"], number)
                granted = False

    def _members(self, connection: DirectConnection) -> tuple[dict[int, str], int]:
        """What names the worker of each number; and the next transaction id."""
        rows = connection.execute(self._sql["members"].encode(), {"keeper": OF_KEEPER}).fetchall()
        members = {number: worker for number, worker, _ in rows if number is not None}
        return members, rows[0][2]

    def _await_text(self, number: int) -> bytes:
        return re.sub(r"%\(number\)s", str(number), self._sql["await_number"]).encode()


def _granted(connection: DirectConnection, statement: str, number: int) -> bool:
    row = connection.execute(statement.encode(), {"number": number}).fetchone()
    return bool(row and row[0])
