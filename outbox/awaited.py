"""Connections of asynchronous callers: ordinary code that uses them awaits each statement.

As SQLAlchemy's own `run_sync` does it: the code runs in a greenlet, which hands whatever is to be
awaited to the caller's task and goes on when that is done. So there is one write path, and neither
a thread nor the loop is blocked. A cancel of the task is raised in the statement.
"""

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, Union

import psycopg
from psycopg import pq
from sqlalchemy.util import await_only, greenlet_spawn

from beatless.outbox.adapters import AsyncCursor

if TYPE_CHECKING:
    from sqlalchemy.ext import asyncio

T = TypeVar("T")

AsyncCaller = Union[
    psycopg.AsyncConnection[Any],
    "asyncio.AsyncConnection",
    "asyncio.AsyncSession",
    "asyncio.async_scoped_session[asyncio.AsyncSession]",
]


class Awaited:
    """A psycopg AsyncConnection in the hands of code that `awaiting` has called."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self.connection = connection

    def run(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        """Execute a statement and return its rows as tuples."""
        rows: list[Any] = await_only(self._run(statement, parameters))
        return rows

    async def _run(self, statement: str, parameters: Mapping[str, Any]) -> list[Any]:
        connection = self.connection
        async with AsyncCursor(connection) as cursor:
            if connection.pgconn.pipeline_status == pq.PipelineStatus.OFF:
                await cursor.execute(statement.encode(), parameters)
            else:
                async with connection.pipeline():  # at its end the answers have come
                    await cursor.execute(statement.encode(), parameters)
            return [] if cursor.rownumber is None else await cursor.fetchall()


def is_asynchronous(connection: Any) -> bool:
    """Whether it is of a kind that `awaiting` takes, or of SQLAlchemy's other asynchronous ones."""
    kind = type(connection)
    return isinstance(connection, psycopg.AsyncConnection) or any(
        each.__module__.startswith("sqlalchemy.ext.asyncio") for each in kind.__mro__
    )


async def awaiting(connection: AsyncCaller, act: Callable[[Any], T]) -> T:
    """Act on what stands for the connection in ordinary code; the act may use it and nothing else.

    Raises TypeError for anything but an asynchronous connection or session.
    """
    if isinstance(connection, psycopg.AsyncConnection):
        return await greenlet_spawn(act, Awaited(connection))
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")  # who has such an object has imported it
    if asyncio is not None:
        if isinstance(connection, asyncio.async_scoped_session):
            connection = connection()
        if isinstance(connection, asyncio.AsyncSession | asyncio.AsyncConnection):
            found: T = await connection.run_sync(act)
            return found
    raise TypeError(_refusal(connection))


def _refusal(connection: Any) -> str:
    kind = type(connection)
    if kind.__module__.startswith("asyncpg"):
        return (
            "connection= takes no connection of asyncpg: use a psycopg AsyncConnection, or "
            'SQLAlchemy\'s create_async_engine("postgresql+psycopg://…"); psycopg is there already'
        )
    return (
        "connection= of this call takes an SQLAlchemy AsyncConnection or AsyncSession, or a "
        f"psycopg AsyncConnection; not {kind.__name__}, for which there is the same call without "
        "the a before its name"
    )
