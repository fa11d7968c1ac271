"""The relay's side of the wake-up protocol. Holds sessions; moves no messages.

A writer rings (`queries.doorbell`) only if it cannot get the bell lock of its shard in shared mode.
The relay holds that lock exclusively while it sleeps, so under load no writer sends a NOTIFY:

AWAKE    no lock held, writers are silent; the relay looks again until nothing is left
DROWSY   the exclusive lock is requested and not yet granted; new writers already ring
ASLEEP   the lock is held; every commit rings

Why nothing is lost: a silent writer holds its shared lock until its rows are visible, and the
relay looks once more after the grant. The sessions live and die together: a bell lock that outlived
the listener, or the reverse, would be a sleeper that no writer can wake.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from enum import IntEnum, StrEnum
from typing import Self

import psycopg
from psycopg import pq

from beatless.outbox.clock import monotonic
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.errors import DirectConnectionRequired, SchemaMissing
from beatless.outbox.pending import cancel, finish
from beatless.outbox.queries import Queries
from beatless.outbox.sessions import prepare_to_drain
from beatless.outbox.sockets import Alarm, readable
from beatless.outbox.statements import statements

WATCH_RENEWAL_S = 60.0
"""Seconds that one wait for a leader lock lasts. A statement that waits has a snapshot, and for its
sake VACUUM keeps what has died since, in every table of the database."""

SIBLING_APP_NAME = "beatless relay of "
"""Starts the application name of a relay's other sessions; the pid of the first follows."""

MEMBERS_CHANGED = json.dumps({"relays": "changed"})
"""The message between relays when one came, went or gave shards back."""


SCHEDULES_CHANGED = "schedules"
"""The message of a writer that has stored or changed a schedule, to each relay."""


class State(StrEnum):
    AWAKE = "awake"
    DROWSY = "drowsy"
    ASLEEP = "asleep"


class Ring(IntEnum):
    """What has come since the last look, by the rings of the writers: the more, the larger."""

    NOTHING = 0
    EVENTS = 1
    CLAIM = 2
    """As TIMES: of a run that was claimed, and may soon have more."""
    TIMES = 3
    """Events, and other due times of dispatches of which none is due."""
    ALL = 4
    """Anything. So do writers of an older version ring, and whoever is no writer."""

    def beside(self, other: "Ring") -> "Ring":
        """What both are for: a claim beside anything else is not waited behind."""
        most = max(self, other)
        return Ring.TIMES if most is Ring.CLAIM and Ring.EVENTS in (self, other) else most

    @classmethod
    def of(cls, message: str) -> "Ring":
        """The meaning of a message on the channel: a shard, and a word if it is not all."""
        _, _, word = message.partition(" ")
        if message == SCHEDULES_CHANGED:
            return cls.TIMES
        words = {"events": cls.EVENTS, "claim": cls.CLAIM, "times": cls.TIMES}
        return words.get(word, cls.ALL)


class Sessions:
    """The relay's three direct sessions.

    1. `work` runs every statement, hears the notifications and holds the leader locks
    2. `bell` holds or awaits the bell locks
    3. `watch` holds nothing and awaits a leader lock of another relay, to notice its death

    Any failure of any of them raises: the caller closes all and opens new ones.
    """

    def __init__(
        self,
        queries: Queries,
        connect: Callable[[], DirectConnection],
        on_message: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`on_message` receives messages on the channel that are not for a relay."""
        self._on_message = on_message
        self.queries = queries
        self._sql = statements(__file__, queries.schema)
        self.state = State.AWAKE
        self.rung = Ring.NOTHING
        self.members_changed = False
        self.schedules_changed = False
        """Heard in any state, for an earlier tick than the known ones may have come."""
        self.watch_granted = False
        self._ping = ""
        self._ponged = False
        self._watching: int | None = None
        self._watching_since = 0.0
        self._failing: tuple[str, ...] = ()
        opened: list[DirectConnection] = []
        try:
            # A failing one leaves those before it in the list, to be closed.
            opened.extend(connect() for _ in range(3))
            self.work, self.bell, self.watch = opened
            self._prepare()
        except BaseException:
            for connection in opened:
                connection.close()
            raise

    def _prepare(self) -> None:
        found = self.work.execute(
            "SELECT to_regclass(%s)", (f"{self.queries.schema}.dispatches",)
        ).fetchone()
        if not found or found[0] is None:
            raise SchemaMissing(self.queries.schema)
        prepare_to_drain(self.work)
        found = self.work.execute("SELECT pg_backend_pid()").fetchone()
        # Not libpq's number: that may be a pooler's invention. The other two name the first.
        self.pid = int(found[0]) if found else 0
        name = f"{SIBLING_APP_NAME}{self.pid}"
        for connection in (self.bell, self.watch):
            connection.execute("SELECT set_config('application_name', %s, false)", (name,))
        self.work.add_notify_handler(self._heard)
        self.work.execute(f'LISTEN "{self.queries.channel}"')
        self.work.execute(f"SELECT pg_advisory_lock_shared({self.queries.leader_key}, -1)")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in (self.watch, self.bell, self.work):
            connection.close()

    def prove_listening(self, seconds: float = 3.0) -> None:
        """Send ourselves a NOTIFY and wait for it.

        Raises DirectConnectionRequired when it does not come back: PgBouncer in transaction mode
        accepts LISTEN and never delivers.
        """
        self.ping()
        deadline = monotonic() + seconds
        while not self.pong():
            if monotonic() >= deadline:
                raise DirectConnectionRequired(seconds)
            self.wait(deadline - monotonic())

    def ping(self) -> None:
        """Request a notification through the bell session; `pong` returns whether it came."""
        self._ping, self._ponged = json.dumps({"ping": secrets.token_hex(8)}), False
        self.bell.pgconn.send_query_params(
            b"SELECT pg_notify($1, $2)", [self.queries.channel.encode(), self._ping.encode()]
        )
        self.bell.pgconn.flush()

    def pong(self) -> bool:
        """Whether the notification of the last ping has come."""
        if not self._ponged:
            return False
        self._ponged = False
        finish(self.bell)
        return True

    def announce(self) -> None:
        """Notify the other relays that one came, went or gave shards back."""
        self.work.execute("SELECT pg_notify(%s, %s)", (self.queries.channel, MEMBERS_CHANGED))

    def end_silent(self, seconds: float) -> list[int]:
        """End the sessions of relays that sent no statement for so long; the pids they go by.

        A frozen process keeps its locks for as long as its kernel answers for it. A relay whose
        sessions are ended starts over when it wakes, and can mark none of its messages in flight.
        """
        rows = self.work.execute(
            self._sql["end_silent"].encode(),
            {"seconds": seconds, "sibling": f"^{SIBLING_APP_NAME}([0-9]+)$"},
        ).fetchall()
        return sorted({pid for pid, _ in rows})

    def _heard(self, notification: psycopg.Notify) -> None:
        # Any client of the database can send anything.
        payload = notification.payload
        if payload == MEMBERS_CHANGED:
            self.members_changed |= notification.pid != self.pid
        elif payload.startswith("{"):  # a ping: ours, another relay's or an invented one
            self._ponged |= payload == self._ping
            self._on_message(payload)
            return
        self.schedules_changed |= payload == SCHEDULES_CHANGED
        self.rung = self.rung.beside(Ring.of(payload))

    def doze(self, shards: Sequence[int]) -> None:
        """AWAKE to DROWSY: ask for the bell locks without waiting for them."""
        keys = ",".join(map(str, shards))
        self.bell.pgconn.send_query(
            f"SELECT pg_advisory_lock({self.queries.bell_key}, s) "
            f"FROM unnest('{{{keys}}}'::int[]) AS s".encode()
        )
        self.bell.pgconn.flush()
        self.state = State.DROWSY

    def granted(self) -> bool:
        """Whether the bell locks have come; then the caller must look once more and may sleep."""
        self.bell.pgconn.consume_input()
        if self.bell.pgconn.is_busy():
            return False
        finish(self.bell)
        self.state = State.ASLEEP
        return True

    def rouse(self) -> None:
        """To AWAKE: give the bell locks back, or stop requesting them, so that no writer rings."""
        if self.state is State.DROWSY:
            cancel(self.bell)
        else:
            finish(self.bell)
        self.bell.execute("SELECT pg_advisory_unlock_all()")
        self.state = State.AWAKE

    def watch_shard(self, shard: int | None) -> None:
        """Await the leader lock of this shard, which another relay holds, instead of the last."""
        if self._watching is not None:
            # Granted in the same moment is news all the same: the others may not have noticed.
            self.watch_granted |= cancel(self.watch)
            self.watch.execute("SELECT pg_advisory_unlock_all()")
        self._watching, self._watching_since = shard, monotonic()
        if shard is not None:
            self.watch.pgconn.send_query(
                f"SELECT pg_advisory_lock({self.queries.leader_key}, {shard})".encode()
            )
            self.watch.pgconn.flush()

    def unwatch(self) -> bool:
        """Await no lock any more, which takes a snapshot; whether one was awaited."""
        was_watching = self._watching is not None
        self.watch_shard(None)
        self.members_changed |= self.watch_granted
        return was_watching

    def renew_watch(self) -> None:
        """Begin the wait for the other relay's lock anew, if it has lasted for WATCH_RENEWAL_S."""
        if self._watching is not None and monotonic() - self._watching_since >= WATCH_RENEWAL_S:
            self.watch_shard(self._watching)
            self.members_changed |= self.watch_granted

    def show_failing(self, threads: Sequence[str]) -> None:
        """Name the threads of this relay that fail in pg_stat_activity, if they are others now."""
        if tuple(threads) != self._failing:
            self.work.execute(self._sql["show_failing"].encode(), {"threads": ", ".join(threads)})
            self._failing = tuple(threads)

    def wait(self, timeout: float | None, *others: Alarm) -> None:
        """Return when a notification, a lock, an alarm or the end of a session came, or in time.

        Raises OperationalError when a session is gone.
        """
        sockets: list[DirectConnection | Alarm] = [self.work, self.bell, self.watch, *others]
        ready = readable(sockets, timeout)
        for connection in (self.work, self.bell, self.watch):
            if connection in ready:
                connection.pgconn.consume_input()
                if connection.pgconn.status != pq.ConnStatus.OK:
                    raise psycopg.OperationalError("a session of the relay was closed")
        while notification := self.work.pgconn.notifies():
            self._heard(
                psycopg.Notify(
                    notification.relname.decode(), notification.extra.decode(), notification.be_pid
                )
            )
        if self._watching is not None and not self.watch.pgconn.is_busy():
            self.members_changed = self.watch_granted = True
