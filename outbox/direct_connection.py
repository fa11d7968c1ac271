"""A connection that ends statements without an answer. Goes to Postgres itself, not to a pooler."""

import inspect
from collections.abc import Generator
from typing import Any, TypeVar, cast

import psycopg
from psycopg import errors as pg_errors

from beatless.outbox.clock import monotonic

RV = TypeVar("RV")

STATEMENT_TIMEOUT_S = 10.0
"""Seconds that one statement of the relay may take before its session counts as dead."""

WAIT_TAKES_TIMEOUT = "timeout" in inspect.signature(psycopg.Connection.wait).parameters
"""Since psycopg 3.3.6."""


class DirectConnection(psycopg.Connection[Any]):
    """A connection whose statements cannot hang: a proxy may hold a dead socket open for ever."""

    def wait(
        self,
        gen: Generator[Any, Any, RV],
        interval: float = 0.1,
        timeout: float | None = None,
    ) -> RV:
        seconds = timeout or STATEMENT_TIMEOUT_S
        if WAIT_TAKES_TIMEOUT:
            return super().wait(gen, interval=interval, timeout=seconds)
        return super().wait(_ended_by(monotonic() + seconds, gen), interval=interval)


def _ended_by(deadline: float, gen: Generator[Any, Any, RV]) -> Generator[Any, Any, RV]:
    """The generator, which raises OperationalError if it is still at work after the deadline.

    psycopg sends it nothing after each interval.
    """
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and monotonic() > deadline:
                raise pg_errors.OperationalError("wait timeout expired")
            wanted = gen.send(ready)
    except StopIteration as ended:
        return cast("RV", ended.value)
