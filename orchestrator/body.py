"""Calls the body of a step, in its transaction and in this process alone."""

import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.orchestrator.async_context import AsyncStepContext
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.django_connections import around_body, before_async_body
from beatless.orchestrator.errors import BadPayload, DeadlineExceeded, Fatal, StepTimeout
from beatless.orchestrator.failure import is_a
from beatless.orchestrator.loop_thread import LoopThread
from beatless.orchestrator.plan import Step
from beatless.orchestrator.sure_writer import AWAY
from beatless.orchestrator.watchdog import Attempt

TOO_SLOW = (psycopg.errors.IdleInTransactionSessionTimeout, psycopg.errors.TransactionTimeout)
"""How Postgres ends the connection of a transaction that took too long: a failure of the step."""


class NoConnection(Exception):
    """There is none for a transactional step now: its body was not called."""


@contextmanager
def step_transaction(
    step: Step,
    engine: sqlalchemy.Engine,
    within: Callable[[Callable[[], Any]], Any],
) -> Iterator[sqlalchemy.Connection | None]:
    """The transaction of a transactional step, committed at the end; None for other steps.

    `within` makes the connection, and commits: either may have to be waited for.
    Raises NoConnection.
    """
    if not step.transactional:
        yield None
        return
    try:
        connection = within(engine.connect)
    except (exc.DBAPIError, exc.TimeoutError, *AWAY) as error:
        raise NoConnection(str(error)) from error
    with connection, connection.begin() as transaction:
        yield connection
        try:
            within(transaction.commit)
        except BaseException:
            # Else its connection is given back as it is, with what it holds.
            transaction.rollback()
            raise


def call_body(
    step: Step,
    context: StepContext,
    attempt: Attempt,
    loop: LoopThread,
    wait: Callable[[Future[Any]], Any],
) -> Any:
    """Call a body in this thread, or in the loop if it is async: `wait` returns its result."""
    if not isinstance(context, AsyncStepContext):
        value = in_one_process(step, context)
        if inspect.iscoroutine(value):
            value.close()
            raise Fatal(
                f"step {step.name} is an ordinary function that returns a coroutine: perhaps a "
                "decorator hides that it is async; make the function that it gives async def"
            )
        return value

    async def body() -> Any:
        await before_async_body()
        try:
            return await step.function(context)
        finally:
            await context.drained()

    task = loop.begin(body, name=f"{context.run_id} {context.step}", leave_copy=leave_copy)
    attempt.runs_as(task)
    try:
        return wait(task.done)
    finally:
        if not task.done.done():  # a signal ends this process
            task.cancel()


def in_one_process(step: Step, context: StepContext) -> Any:
    """Call a body. A copy of the process that it forks ends with it: the run is not the copy's."""
    pid = os.getpid()
    with around_body():
        try:
            return step.function(context)
        finally:
            if os.getpid() != pid:
                leave_copy(sys.exception())


def leave_copy(error: BaseException | None) -> NoReturn:
    """End as a process whose program is over, without the exit handlers of the one it copies."""
    status: object = 0
    if isinstance(error, SystemExit):
        status = error.code or 0
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)


def check_transaction(step: Step, transaction: sqlalchemy.Connection | None) -> None:
    """Raises the error that the step's own handling of its connection may have hidden."""
    if transaction is None or (transaction.in_transaction() and not transaction.invalidated):
        return
    if transaction.invalidated:
        reason = ConnectionError("the connection was lost, and the step went on")
        raise exc.DBAPIError(None, None, reason, connection_invalidated=True)
    raise Fatal(
        f"step {step.name} ended the transaction of ctx.connection: leave commit and rollback to "
        "beatless, so that they include StepFinished"
    )


def transaction_lost(error: BaseException, transaction: sqlalchemy.Connection | None) -> bool:
    """Whether a body raised because the connection of its transaction broke.

    An error of a statement is the step's: a lock that was not available, a
    deadlock, a limit. So are errors of the step's own connections.
    """
    if transaction is None or not transaction.invalidated:
        return False
    if is_a(error, exc.DBAPIError) and isinstance(getattr(error, "orig", None), TOO_SLOW):
        return False
    return not is_a(error, (Fatal, BadPayload, StepTimeout, DeadlineExceeded))
