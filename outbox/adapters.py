"""Adapters of our own statements, for their parameters and rows.

Independent of the adapters of a caller's connection or of the process: a JSON reader that makes
Decimals, a dumper that sends str as varchar, a row factory, cursors that want `$1`. And of its
session's formats of values: results are binary, so that DateStyle, TimeZone, IntervalStyle,
bytea_output and extra_float_digits are never asked.
"""

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import postgres, pq
from psycopg.abc import Buffer
from psycopg.adapt import AdaptersMap, Loader
from psycopg.rows import tuple_row
from psycopg.types import array
from psycopg.types.json import set_json_loads

from beatless.outbox.message import UNREADABLE
from beatless.outbox.times import FIRST_YEAR, LAST_YEAR

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""Postgres counts from here."""

EARLIEST = datetime(FIRST_YEAR, 1, 1, tzinfo=UTC)
LATEST = datetime(LAST_YEAR, 12, 31, tzinfo=UTC)
FIRST = (EARLIEST - EPOCH) // timedelta(microseconds=1)
LAST = (LATEST - EPOCH) // timedelta(microseconds=1)


class UtcLoader(Loader):
    """A timestamptz in UTC: psycopg's own is in the time zone of the session.

    Postgres has times before and after all that Python has, and infinities: one that a caller
    writes with SQL must not have the lists fail that it stands in.
    """

    format = pq.Format.BINARY

    def load(self, data: Buffer) -> datetime:
        microseconds: int = struct.unpack("!q", data)[0]
        if FIRST <= microseconds <= LAST:
            return EPOCH + timedelta(microseconds=microseconds)
        return EARLIEST if microseconds < FIRST else LATEST


_DECODER = json.JSONDecoder()


def _load_json(data: bytes | str) -> Any:
    try:
        return _DECODER.decode(
            data if isinstance(data, str) else data.decode("utf-8", "surrogatepass")
        )
    except (RecursionError, ValueError):  # of more digits than Python makes a number of
        return dict(UNREADABLE)


def _adapters() -> AdaptersMap:
    own = AdaptersMap()
    postgres.register_default_types(own.types)
    postgres.register_default_adapters(own)
    array.register_all_arrays(own)
    # Without a context psycopg changes the reader of all maps, ours too.
    set_json_loads(_load_json, own)
    own.register_loader("timestamptz", UtcLoader)
    return own


ADAPTERS = _adapters()
"""psycopg's defaults, which no other code can change."""


class Cursor(psycopg.Cursor[tuple[Any, ...]]):
    """A cursor of ours on any connection."""

    def __init__(self, connection: psycopg.Connection[Any], **_: Any) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self.format = pq.Format.BINARY

    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS


class ServerCursor(psycopg.ServerCursor[tuple[Any, ...]]):
    """A server-side `Cursor`."""

    def __init__(self, connection: psycopg.Connection[Any], name: str, **_: Any) -> None:
        super().__init__(connection, name, row_factory=tuple_row)
        self.format = pq.Format.BINARY

    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS


class AsyncCursor(psycopg.AsyncCursor[tuple[Any, ...]]):
    """A `Cursor` of an asynchronous connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], **_: Any) -> None:
        super().__init__(connection, row_factory=tuple_row)
        self.format = pq.Format.BINARY

    @property
    def adapters(self) -> AdaptersMap:
        return ADAPTERS


@contextmanager
def our_cursors(connection: Any) -> Iterator[None]:
    """In this block SQLAlchemy executes with our cursors on its driver's connection."""
    if isinstance(connection, psycopg.Connection):
        given = connection.cursor_factory, connection.server_cursor_factory
        connection.cursor_factory = Cursor
        connection.server_cursor_factory = ServerCursor
        try:
            yield
        finally:
            connection.cursor_factory, connection.server_cursor_factory = given
    elif isinstance(connection, psycopg.AsyncConnection):
        factory = connection.cursor_factory
        connection.cursor_factory = AsyncCursor
        try:
            yield
        finally:
            connection.cursor_factory = factory
    else:
        yield
