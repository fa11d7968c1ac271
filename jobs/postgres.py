"""Connections to Postgres: every session of this package is opened here."""

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
import sqlalchemy
import sqlalchemy.event
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from beatless.credentials import Password, ask
from beatless.outbox import forks
from beatless.outbox.adapters import ADAPTERS, Cursor
from beatless.outbox.sessions import (
    CLIENT_CHECK_INTERVAL,
    KEEPALIVE,
    OWN,
    SHARED,
    prepare_async_session,
    prepare_session,
)
from beatless.settings import Settings, engine_url, libpq_url

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

AnyConnection = TypeVar("AnyConnection", bound=psycopg.Connection[Any])


def _open(
    kind: type[AnyConnection],
    url: str,
    name: str,
    *,
    direct: bool,
    session: Mapping[str, str],
    password: Password | None,
    client_check: str = CLIENT_CHECK_INTERVAL,
    **options: Any,
) -> AnyConnection:
    """An autocommit connection in UTF8. `name` is its application name in Postgres."""
    connection = kind.connect(_address(url, name, password), autocommit=True, **options)
    forks.own(connection)
    if direct:  # a pooler's sessions are not ours to set
        prepare_session(connection, session, options=_options(url), client_check=client_check)
    return connection


def _address(url: str, name: str, password: Password | None) -> str:
    # The encoding does not depend on PGCLIENTENCODING, the role or the database: poolers
    # pass this parameter on.
    dsn = make_conninfo(libpq_url(url), application_name=name, client_encoding="UTF8", **KEEPALIVE)
    if password is not None:
        dsn = make_conninfo(dsn, password=ask(password, psycopg.OperationalError))
    return dsn


def _options(url: str) -> str:
    return str(conninfo_to_dict(libpq_url(url)).get("options") or "")


def connect(settings: Settings, name: str) -> psycopg.Connection[Any]:
    """A connection for statements of ours alone."""
    return _open(
        psycopg.Connection,
        settings.database_url,
        name,
        direct=not settings.pooled,
        session=OWN,
        password=settings.password("database"),
        cursor_factory=Cursor,
        prepare_threshold=None if settings.pooled else 5,
    )


def connect_directly(
    settings: Settings, name: str, kind: type[AnyConnection], **options: Any
) -> AnyConnection:
    """A session that no pooler shares with others, of whichever class."""
    return _open(
        kind,
        settings.listen_url,
        name,
        direct=True,
        session=OWN,
        password=settings.password("database"),
        context=ADAPTERS,
        **options,
    )


def engine(
    url: str,
    name: str,
    *,
    direct: bool,
    session: Mapping[str, str] = SHARED,
    password: Password | None = None,
    **options: Any,
) -> sqlalchemy.Engine:
    """An engine whose sessions may run the statements of others too, read by their adapters."""

    def create() -> psycopg.Connection[Any]:
        connection = _open(
            psycopg.Connection,
            url,
            name,
            direct=direct,
            session=session,
            password=password,
            prepare_threshold=5 if direct else None,
        )
        connection.autocommit = False
        return connection

    made = sqlalchemy.create_engine(engine_url(url), creator=create, **options)
    sqlalchemy.event.listen(made, "connect", _end_transaction, insert=True)
    sqlalchemy.event.listen(made, "reset", _end_autocommit)
    return made


def _end_transaction(connection: psycopg.Connection[Any], _record: object) -> None:
    """Keep what listeners of the project to all engines have set: before ours, and SQLAlchemy's.

    They leave a transaction open in which no mode of the connection can be set.
    """
    if connection.pgconn.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        connection.commit()


def _end_autocommit(connection: psycopg.Connection[Any], _record: object, _state: object) -> None:
    """The pool lends none in autocommit, wherever an exception has struck who used it so."""
    if not connection.closed and connection.autocommit:
        connection.autocommit = False


def async_engine(
    url: str, name: str, *, direct: bool, password: Password | None = None, **options: Any
) -> "AsyncEngine":
    """An `engine` for one event loop, in which it is to be disposed of."""
    from sqlalchemy.ext.asyncio import create_async_engine

    async def create() -> psycopg.AsyncConnection[Any]:
        address = await asyncio.to_thread(_address, url, name, password)  # it may ask for that
        connection = await psycopg.AsyncConnection.connect(
            address, autocommit=True, prepare_threshold=5 if direct else None
        )
        forks.own(connection)
        if direct:
            await prepare_async_session(connection, SHARED, options=_options(url))
        await connection.set_autocommit(False)
        return connection

    return create_async_engine(engine_url(url), async_creator=create, **options)


def dispose(engine: sqlalchemy.Engine) -> None:
    """Close the connections of an engine: those in use when their users return them.

    A thread that outlasts its request has one, and its pool is one that nobody closes again.
    """
    pool = engine.pool
    engine.dispose()
    sqlalchemy.event.listen(pool, "checkin", lambda _, record: record.invalidate())
    pool.dispose()  # those that were returned in between
