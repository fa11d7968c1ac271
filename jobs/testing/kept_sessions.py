"""Sessions of Postgres that stay open from test to test, so that a test does not wait for new ones.

A new session knows no table yet: its first statements take ten times the processor time of those of
one that has worked. What a test leaves in a session goes with DISCARD ALL, as behind a pooler
(ADR 0096).
"""

import os
import threading
from typing import Any

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_to_dict

from beatless.outbox import forks
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.sockets import readable
from beatless.postgres import AnyConnection
from beatless.settings import libpq_url

MOST = 8
"""Sessions that are kept; the one that was used longest ago is closed."""

CLEANING = (b"ROLLBACK", b"DISCARD ALL", b"SET application_name TO 'kept by a test kit'")
"""What ends all that a test has begun in a session. ROLLBACK warns if there is no transaction."""

AT_REST = (
    pq.TransactionStatus.IDLE,
    pq.TransactionStatus.INTRANS,
    pq.TransactionStatus.INERROR,
)
"""States of a session that executes no statement."""


Way = tuple[str, tuple[tuple[str, str], ...]]
"""How a session was opened: the URL, and the variables that libpq reads."""


class Kept(psycopg.Connection[Any]):
    """A connection whose session another one continues when it is closed."""

    keeper: "tuple[KeptSessions, Way] | None" = None
    """Who keeps the session, and how it was opened."""

    kept_adapters: AdaptersMap | None = None

    @property
    def adapters(self) -> AdaptersMap:
        return self.kept_adapters or super().adapters

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        self.keeper = None  # it may come late, to a statement of the next test
        super().cancel_safe(timeout=timeout)

    def close(self) -> None:
        keeper, self.keeper = self.keeper, None
        if keeper is not None and not self.closed and (over := keeper[0].keep(self, keeper[1])):
            self._closed = True
            self.pgconn = over
        else:
            super().close()


class KeptDirect(Kept, DirectConnection):
    """`Kept`, for the relay."""


KINDS: dict[type[psycopg.Connection[Any]], type[Kept]] = {
    psycopg.Connection: Kept,
    DirectConnection: KeptDirect,
}


class KeptSessions:
    """Opens the connections of one process, with the sessions of those that were closed."""

    def __init__(self, database_url: str) -> None:
        """Those of other servers, or as another user, are opened and closed as always."""
        self._server = server_of(libpq_url(database_url))
        self._lock = threading.Lock()
        self._kept: list[tuple[Way, pq.abc.PGconn]] = []
        self._over: pq.abc.PGconn | None = None
        forks.watch(self)

    def connect(self, kind: type[AnyConnection], dsn: str, **options: Any) -> AnyConnection:
        """`kind.connect`. Raises as it does."""
        ours = KINDS.get(kind)
        if ours is None or server_of(dsn) != self._server:
            return kind.connect(dsn, **options)
        way = (dsn, tuple((name, os.environ[name]) for name in os.environ if name[:2] == "PG"))
        session = self._take(way)
        found = ours.connect(dsn, **options) if session is None else again(ours, session, **options)
        found.keeper = (self, way)
        return found  # type: ignore[return-value]  # a subclass of `kind`, by the table

    def keep(self, connection: Kept, way: Way) -> pq.abc.PGconn | None:
        """Keep its session, if it can be cleaned, and give back one that is closed in its place."""
        session = connection.pgconn
        # A thread that is at work with it notices that it is closed.
        if not connection.lock.acquire(blocking=False):
            return None
        try:
            if not cleaned(session):
                return None
        finally:
            connection.lock.release()
        session.notice_handler = session.notify_handler = None
        with self._lock:
            if self._over is None:
                self._over = pq.PGconn.connect_start(b"host=127.0.0.1 port=1")
                self._over.finish()
            self._kept.append((way, session))
            surplus = self._kept[:-MOST]
            del self._kept[:-MOST]
        for _, each in surplus:
            each.finish()
        return self._over

    def _take(self, way: Way) -> pq.abc.PGconn | None:
        """A kept session that was opened in this way, and lives."""
        while True:
            with self._lock:
                places = [number for number, (each, _) in enumerate(self._kept) if each == way]
                if not places:
                    return None
                _, session = self._kept.pop(places[-1])
            # It says nothing by itself, but that it was ended.
            if not readable([session.socket], 0) and done(session, b"RESET application_name"):
                return session
            session.finish()

    def after_fork(self) -> None:
        """In a child: the sessions are those of its parent."""
        self._lock = threading.Lock()
        self._kept = []

    def close(self) -> None:
        """Close the sessions that are kept."""
        with self._lock:
            closing, self._kept = self._kept, []
        for _, session in closing:
            session.finish()


def again(
    kind: type[Kept],
    session: pq.abc.PGconn,
    *,
    autocommit: bool,
    prepare_threshold: int | None = 5,
    context: AdaptContext | None = None,
    cursor_factory: type[psycopg.Cursor[Any]] | None = None,
) -> Kept:
    """What `kind.connect` would return, with this session."""
    connection = kind(session)
    connection.autocommit = autocommit
    connection.prepare_threshold = prepare_threshold
    if context is not None:
        connection.kept_adapters = AdaptersMap(context.adapters)
    if cursor_factory is not None:
        connection.cursor_factory = cursor_factory
    return connection


def cleaned(session: pq.abc.PGconn) -> bool:
    """End all that was begun in the session; whether it can go on."""
    if session.status != pq.ConnStatus.OK or session.pipeline_status != pq.PipelineStatus.OFF:
        return False
    if session.transaction_status not in AT_REST:
        return False
    session.notice_handler = None
    begun = session.transaction_status != pq.TransactionStatus.IDLE
    if not all(done(session, statement) for statement in CLEANING[0 if begun else 1 :]):
        return False
    while session.notifies():  # of before
        pass
    return True


def done(session: pq.abc.PGconn, statement: bytes) -> bool:
    """Execute a statement; whether it has succeeded."""
    return session.exec_(statement).status == pq.ExecStatus.COMMAND_OK


def server_of(dsn: str) -> tuple[object, ...]:
    """The server, the database and the user."""
    parts = conninfo_to_dict(dsn)
    return tuple(parts.get(name) for name in ("host", "hostaddr", "port", "dbname", "user"))
