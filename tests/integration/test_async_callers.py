"""Calls in transactions of asynchronous callers: what `connection=` promises holds there too."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import sqlalchemy
from psycopg.rows import dict_row
from sqlalchemy import orm
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.util import await_only, greenlet_spawn

from beatless import App, Client, RunNotFound, SchemaBehind
from beatless.settings import libpq_url
from beatless.testing import Kit
from tests.integration.test_sessions import HOSTILE, act_by, spoil

Begin = Callable[[App], Any]


class Twins:
    """The calls of a client, each by its asynchronous twin, for code that is ordinary."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        twin = getattr(self._client, f"a{name}")
        return lambda *given, **options: await_only(twin(*given, **options))


async def act(app: App, connection: Any) -> None:
    """What may be done on a caller's connection, by the asynchronous calls."""
    await greenlet_spawn(act_by, Twins(app.client), connection)


@asynccontextmanager
async def plain(app: App, **options: Any) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection of psycopg, in a transaction that is rolled back."""
    url = libpq_url(app.settings.database_url)
    async with (
        await psycopg.AsyncConnection.connect(url, **options) as connection,
        connection.transaction(force_rollback=True),
    ):
        yield connection


@asynccontextmanager
async def of_sqlalchemy(app: App, **options: Any) -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(app.engine.url, **options)
    async with engine.connect() as connection:
        yield connection
    await engine.dispose()


@asynccontextmanager
async def session_of(app: App) -> AsyncIterator[AsyncSession]:
    engine = create_async_engine(app.engine.url)
    async with AsyncSession(engine) as session:
        yield session
    await engine.dispose()


@asynccontextmanager
async def scoped_session_of(app: App) -> AsyncIterator[async_scoped_session[AsyncSession]]:
    engine = create_async_engine(app.engine.url)
    sessions = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
    yield sessions
    await sessions.remove()
    await engine.dispose()


@asynccontextmanager
async def piped(app: App) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    async with plain(app) as connection, connection.pipeline():
        yield connection


KINDS = {
    "psycopg": plain,
    "autocommit": functools.partial(plain, autocommit=True),
    "pipeline": piped,
    "rows": functools.partial(plain, row_factory=dict_row),
    "raw": functools.partial(plain, cursor_factory=psycopg.AsyncRawCursor),
    "client": functools.partial(plain, cursor_factory=psycopg.AsyncClientCursor),
    "prepared": functools.partial(plain, prepare_threshold=0),
    "connection": of_sqlalchemy,
    "session": session_of,
    "scoped": scoped_session_of,
}


def test_every_call_is_made_in_the_transaction_of_an_asynchronous_caller(
    beatless_app: App, subtests: pytest.Subtests
) -> None:
    async def main(begin: Begin) -> None:
        async with begin(beatless_app) as connection:
            await act(beatless_app, connection)
            assert await beatless_app.client.alist_runs(connection=connection)
            assert await beatless_app.client.alist_runs() == []  # nothing is committed
        assert await beatless_app.client.alist_runs() == []

    for kind, begin in KINDS.items():
        with subtests.test(kind):
            asyncio.run(main(begin))


def test_without_a_connection_each_call_is_a_transaction_itself(beatless_app: App) -> None:
    async def main() -> None:
        await act(beatless_app, None)

    asyncio.run(main())
    assert beatless_app.client.list_runs()


@pytest.mark.parametrize("begin", [plain, of_sqlalchemy])
def test_settings_of_an_asynchronous_session_change_nothing(
    beatless_app: App, begin: Begin
) -> None:
    async def execute(connection: Any, statement: str) -> list[Any]:
        if isinstance(connection, AsyncConnection):
            result = await connection.exec_driver_sql(statement)
            return list(result) if result.returns_rows else []
        async with await connection.execute(statement.encode()) as cursor:
            return await cursor.fetchall() if cursor.description else []

    async def main() -> None:
        async with begin(beatless_app) as connection:
            known = "SELECT name FROM pg_settings"
            names = {row[0] for row in await execute(connection, known)}
            changed = {
                name: value
                for name, value in HOSTILE.items()
                # Who forbids to write, or sets a limit of a millisecond, means our statements too.
                if name in names and not name.endswith(("timeout", "read_only"))
            }
            del changed["default_transaction_isolation"]  # of the next transaction
            before = {}
            for name, value in changed.items():
                await execute(connection, f"SET {name} TO '{value}'")
            for name in changed:
                before[name] = await execute(connection, f"SHOW {name}")
            await act(beatless_app, connection)
            for name in changed:
                assert await execute(connection, f"SHOW {name}") == before[name]

    asyncio.run(main())


def test_adapters_of_an_asynchronous_caller_are_not_ours(beatless_app: App) -> None:
    async def main() -> None:
        async with plain(beatless_app) as connection:
            spoil(connection)
            await act(beatless_app, connection)
        engine = create_async_engine(
            beatless_app.engine.url,
            json_deserializer=functools.partial(json.loads, parse_float=Decimal),
        )
        sqlalchemy.event.listen(
            engine.sync_engine, "connect", lambda given, _: spoil(given.driver_connection)
        )
        async with engine.connect() as connection:
            await act(beatless_app, connection)
        await engine.dispose()

    asyncio.run(main())


def test_a_run_is_there_if_the_asynchronous_transaction_commits(beatless: Kit) -> None:
    """In one with the caller's own rows, also from a savepoint that stays."""
    app = beatless.app

    async def main() -> str:
        async with session_of(app) as session, session.begin():
            kept = await app.client.astart_run("two_steps", {"n": 1}, connection=session)
            async with session.begin_nested() as savepoint:
                gone = await app.client.astart_run("two_steps", {"n": 2}, connection=session)
                await savepoint.rollback()
            await app.client.asignal_run(kept.run_id, "paid", connection=session)
            with pytest.raises(RunNotFound):
                await app.client.aget_run(gone.run_id, connection=session)
            with pytest.raises(RunNotFound):
                await app.client.aget_run(kept.run_id)
        return kept.run_id

    run_id = asyncio.run(main())
    assert [run.run_id for run in app.client.list_runs()] == [run_id]
    beatless.work_until_idle()
    assert [event.type for event in app.client.events(run_id)][-1] == "RunFinished"


@pytest.mark.parametrize("begin", [plain, of_sqlalchemy])
def test_a_cancel_of_the_task_ends_the_statement_and_nothing_is_left(
    beatless_app: App, postgres: psycopg.Connection, begin: Begin
) -> None:
    client = beatless_app.client

    async def start(held: asyncio.Event) -> None:
        async with begin(beatless_app) as connection:
            await client.astart_run("two_steps", connection=connection)
            held.set()
            # Waits for the row that another transaction has inserted and not committed.
            await client.astart_run("two_steps", run_id="taken", connection=connection)

    async def main() -> None:
        held = asyncio.Event()
        async with plain(beatless_app) as other:
            await client.astart_run("two_steps", run_id="taken", connection=other)
            task = asyncio.create_task(start(held))
            await held.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert client.list_runs() == []


def test_a_loop_goes_on_while_a_call_waits_for_postgres(beatless_app: App) -> None:
    """The row that the call waits for is freed by a task of the same loop."""
    client = beatless_app.client

    async def start(begun: asyncio.Event) -> None:
        async with of_sqlalchemy(beatless_app) as connection:
            begun.set()
            await client.astart_run("two_steps", run_id="taken", connection=connection)
            await connection.commit()

    async def main() -> None:
        begun = asyncio.Event()
        async with plain(beatless_app) as other:
            await client.astart_run("two_steps", run_id="taken", connection=other)
            task = asyncio.create_task(start(begun))
            await begun.wait()
        await task

    asyncio.run(main())
    assert client.get_run("taken").run_id == "taken"


def test_autocommit_and_two_phase_are_refused_as_in_ordinary_calls(beatless_app: App) -> None:
    client = beatless_app.client
    url = libpq_url(beatless_app.settings.database_url)

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
            for call in (
                lambda: client.astart_run("two_steps", connection=connection),
                lambda: client.acancel_run("any", connection=connection),
                lambda: client.asignal_run("any", "paid", connection=connection),
            ):
                with pytest.raises(ValueError, match="in autocommit and in no transaction"):
                    await call()
        async with of_sqlalchemy(beatless_app, isolation_level="AUTOCOMMIT") as connection:
            with pytest.raises(ValueError, match="in autocommit"):
                await client.astart_run("two_steps", connection=connection)
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.tpc_begin("beatless-test")
            with pytest.raises(ValueError, match="two-phase transaction"):
                await client.astart_run("two_steps", connection=connection)
            await connection.tpc_rollback()
        engine = create_async_engine(beatless_app.engine.url)
        async with AsyncSession(engine, twophase=True) as session:
            with pytest.raises(ValueError, match="two-phase transaction"):
                await client.astart_run("two_steps", connection=session)
        await engine.dispose()

    asyncio.run(main())
    assert client.list_runs() == []


def test_each_kind_of_call_refuses_the_connections_of_the_other(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    client = beatless_app.client

    async def refused(call: Callable[[], Coroutine[Any, Any, Any]], why: str) -> None:
        with pytest.raises(TypeError, match=why):
            await call()

    async def main() -> None:
        for begin, kind in (
            (plain, "psycopg AsyncConnection"),
            (of_sqlalchemy, "sqlalchemy AsyncConnection"),
            (session_of, "sqlalchemy AsyncSession"),
            (scoped_session_of, "sqlalchemy async_scoped_session"),
        ):
            async with begin(beatless_app) as connection:
                with pytest.raises(TypeError, match=rf"takes no {kind}: await .*\.astart_run\("):
                    client.start_run("two_steps", connection=connection)
        with orm.Session(beatless_app.engine) as session:
            for given in (postgres, session, "postgresql://"):
                await refused(
                    functools.partial(client.astart_run, "two_steps", connection=given),
                    f"not {type(given).__name__}, for which .* without the a before its name",
                )
        engine = sqlalchemy.create_engine("sqlite://")
        with engine.connect() as given:
            await refused(
                functools.partial(client.aget_run, "any", connection=given), "not Connection"
            )
        engine.dispose()

    asyncio.run(main())


def test_an_asynchronous_connection_to_a_database_without_our_tables_names_that(
    beatless_app: App,
) -> None:
    app = App(
        replace(beatless_app.settings, schema="nowhere"),
        list(beatless_app.plans.values()),
    )

    async def main() -> None:
        for begin in (plain, of_sqlalchemy):
            async with begin(app) as connection:
                with pytest.raises(SchemaBehind, match="or pass a connection= of the database"):
                    await app.client.astart_run("two_steps", connection=connection)

    asyncio.run(main())
    app.close()
