"""The transaction of a transactional step, which also stores the step's end.

That of an ordinary step is used in the threads that call it and settle it. That of an `async def`
step belongs to the loop: there it is begun, used by the body, settled and committed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.orchestrator.errors import BadPayload, DeadlineExceeded, Fatal, StepTimeout
from beatless.orchestrator.failure import is_a
from beatless.orchestrator.loop_thread import LoopThread
from beatless.orchestrator.plan import Step
from beatless.orchestrator.sure_writer import AWAY
from beatless.outbox.clock import monotonic

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")

TOO_SLOW = (psycopg.errors.IdleInTransactionSessionTimeout, psycopg.errors.TransactionTimeout)
"""How Postgres ends the connection of a transaction that took too long: a failure of the step."""

UNREACHABLE = (exc.DBAPIError, exc.TimeoutError, *AWAY)
"""Errors for which a connection cannot be made."""


ACTIVE = psycopg.pq.TransactionStatus.ACTIVE
"""A statement is in flight."""

CANCEL_AGAIN_S = 0.01
"""Seconds between two cancels of one statement."""

CANCEL_S = 5.0
"""Seconds for asking Postgres to end a statement."""


class NoConnection(Exception):
    """There is none for a transactional step now: its body was not called."""


class StepTransaction(Protocol):
    """A transaction that is open while the body of a step is called."""

    @property
    def connection(self) -> Any:
        """What the body gets."""

    @property
    def ordinary(self) -> sqlalchemy.Connection:
        """The same for looking at its state."""

    @property
    def lost(self) -> bool:
        """Whether its connection is lost, by no doing of the step."""

    @property
    def busy(self) -> bool:
        """Whether a statement of the step is in flight: all would wait for its end."""

    def act(self, act: Callable[[sqlalchemy.Connection], T]) -> T:
        """Execute statements in it."""


class _Ordinary:
    def __init__(
        self, connection: sqlalchemy.Connection, within: Callable[[Callable[[], Any]], Any]
    ) -> None:
        self.connection = self.ordinary = connection
        self._within = within

    @property
    def lost(self) -> bool:
        return self.connection.invalidated

    @property
    def busy(self) -> bool:
        return False  # a body waits for its threads

    def act(self, act: Callable[[sqlalchemy.Connection], T]) -> T:
        found: T = self._within(partial(act, self.connection))
        return found


class _Asynchronous:
    def __init__(
        self, connection: "AsyncConnection", loop: LoopThread, wait: Callable[[Future[Any]], Any]
    ) -> None:
        assert connection.sync_connection is not None  # noqa: S101 - it has begun
        self.connection = connection
        self.ordinary = connection.sync_connection
        self._driver: Any = self.ordinary.connection.driver_connection
        self._loop = loop
        self._wait = wait
        self._turn = asyncio.Lock()

    @property
    def lost(self) -> bool:
        # SQLAlchemy closes the connection of a statement that is cancelled; a lost one is broken.
        return self.ordinary.invalidated and bool(getattr(self._driver, "broken", True))

    def act(self, act: Callable[[sqlalchemy.Connection], T]) -> T:
        found: T = self.perform(lambda: self.connection.run_sync(act))
        return found

    @property
    def busy(self) -> bool:
        return bool(self._driver.pgconn.transaction_status == ACTIVE)

    async def close(self) -> None:
        """Take back what is not committed.

        A statement of a task that the body has left behind is ended: it may wait for ever. A cancel
        that reaches its backend before the statement does ends nothing, and is sent again.
        """
        begun = monotonic()
        while self.busy and monotonic() - begun < CANCEL_S:
            with suppress(psycopg.Error):
                await self._driver.cancel_safe(timeout=CANCEL_S)
            await asyncio.sleep(CANCEL_AGAIN_S)  # its task takes the answer meanwhile
        await self.connection.close()

    def perform(self, act: Callable[[], Awaitable[Any]]) -> Any:
        """Do this in the loop, after what was begun before: a signal may end the wait for that."""

        async def in_turn() -> Any:
            async with self._turn:
                return await act()

        return self._wait(self._loop.submit(in_turn))


class Waits(Protocol):
    """How the thread of a run waits, for whose sake others may go on."""

    def within(self, act: Callable[[], T]) -> T:
        """Do what may have to be waited for, and cannot be done again."""

    def wait(self, future: Future[T]) -> T:
        """The result of a future."""


class Transactions:
    """Begins the transactions of transactional steps, on two engines."""

    def __init__(
        self, engine: sqlalchemy.Engine, of_loop: Callable[[], "AsyncEngine"], loop: LoopThread
    ) -> None:
        """`of_loop` gives the engine of this process' loop."""
        self.engine = engine
        self._of_loop = of_loop
        self._loop = loop

    def of(self, step: Step, waits: Waits) -> AbstractContextManager[StepTransaction | None]:
        """That of a transactional step, committed at the end; None for other steps.

        Raises NoConnection.
        """
        if not step.transactional:
            return nullcontext()
        if step.is_async:
            return _asynchronous(self._of_loop(), self._loop, waits.wait)
        return _ordinary(self.engine, waits.within)


@contextmanager
def _ordinary(
    engine: sqlalchemy.Engine, within: Callable[[Callable[[], Any]], Any]
) -> Iterator[StepTransaction]:
    try:
        connection = within(engine.connect)
    except UNREACHABLE as error:
        raise NoConnection(str(error)) from error
    with connection, connection.begin() as transaction:
        yield _Ordinary(connection, within)
        try:
            within(transaction.commit)
        except BaseException:
            # Else its connection is given back as it is, with what it holds.
            transaction.rollback()
            raise


@contextmanager
def _asynchronous(
    engine: "AsyncEngine", loop: LoopThread, wait: Callable[[Future[Any]], Any]
) -> Iterator[StepTransaction]:
    async def begin() -> "AsyncConnection":
        connection = await engine.connect()
        try:
            await connection.begin()
        except BaseException:
            await connection.close()
            raise
        return connection

    try:
        connection = wait(loop.submit(begin))
    except UNREACHABLE as error:
        raise NoConnection(str(error)) from error
    transaction = _Asynchronous(connection, loop, wait)
    try:
        yield transaction
        transaction.perform(connection.commit)
    finally:
        transaction.perform(transaction.close)


def check_transaction(step: Step, transaction: StepTransaction | None) -> None:
    """Raises the error that the step's own handling of its connection may have hidden."""
    if transaction is None:
        return
    if transaction.busy:
        raise RuntimeError(
            f"step {step.name} returned while a statement of ctx.connection was in flight: await "
            "the tasks that it begins, or cancel and then await them"
        )
    connection = transaction.ordinary
    if connection.in_transaction() and not connection.invalidated:
        return
    if transaction.lost:
        reason = ConnectionError("the connection was lost, and the step went on")
        raise exc.DBAPIError(None, None, reason, connection_invalidated=True)
    if connection.invalidated:
        raise RuntimeError(
            f"step {step.name} cancelled a statement of ctx.connection and went on: the connection "
            "is closed, and its transaction gone; let the cancel or TimeoutError leave the step, "
            "or have Postgres end the statement (SET LOCAL statement_timeout, in a begin_nested())"
        )
    raise Fatal(
        f"step {step.name} ended the transaction of ctx.connection: leave commit and rollback to "
        "beatless, so that they include StepFinished"
    )


def transaction_lost(error: BaseException, transaction: StepTransaction | None) -> bool:
    """Whether a body raised because the connection of its transaction broke.

    An error of a statement is the step's: a lock that was not available, a
    deadlock, a limit. So are errors of the step's own connections.
    """
    if transaction is None or not transaction.lost:
        return False
    if is_a(error, exc.DBAPIError) and isinstance(getattr(error, "orig", None), TOO_SLOW):
        return False
    return not is_a(error, (Fatal, BadPayload, StepTimeout, DeadlineExceeded))
