"""Transactions of our own, repeated where they were ended for no fault of theirs."""

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.outbox.backoff import Backoff

T = TypeVar("T")

TRIES = 5
"""How often a call is tried that Postgres ends for the sake of another."""

CONFLICTS = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
"""How it says so. A serialization failure needs a session that is not ours to set."""


def transact(
    engine: sqlalchemy.Engine, act: Callable[[sqlalchemy.Connection], T], *, twice: bool
) -> T:
    """Act in a transaction of its own.

    A pooled connection may have died since its last use, and what locks the same rows in another
    order may deadlock. With `twice` it is also repeated when the answer to its commit was lost,
    although it may be stored.
    """
    backoff, pause = Backoff(initial=0.02, cap=0.5), threading.Event()
    for tried in itertools.count(1):
        acted = False
        try:
            with engine.begin() as connection:
                result = act(connection)
                acted = True
            return result
        except exc.DBAPIError as error:
            conflict = isinstance(error.orig, CONFLICTS)
            lost = error.connection_invalidated and tried == 1 and (twice or not acted)
            if not lost and (not conflict or tried == TRIES):
                raise
            if conflict:
                # At once, we would take from the winner what it was just given.
                pause.wait(backoff.delay(tried))
    raise AssertionError("unreachable")
