"""Resets after a fork: open connections, and locks held by threads
that do not exist in it.

Servers that load the application and then fork (gunicorn `--preload`, multiprocessing) copy every
connection. Two processes on one socket read each other's answers, so a child lets go of what it has
inherited before any of its code runs. Nothing is sent: the parent's sessions stay as they are.
"""

import os
import socket
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import psycopg

AnyConnection = psycopg.Connection[object] | psycopg.AsyncConnection[object]

FORK_PATIENCE_S = 1.0
"""Seconds for which a fork waits for threads that are inside `without_forks`."""


class Forkable(Protocol):
    """Has something that must be another in a child."""

    def after_fork(self) -> None:
        """Called in the child, by its only thread, before `fork` returns."""


# Handlers of a fork cannot be unregistered, so there is one for all, and it keeps nothing alive.
_connections: weakref.WeakSet[AnyConnection] = weakref.WeakSet()
_forkables: weakref.WeakSet[Forkable] = weakref.WeakSet()


def own(connection: AnyConnection) -> None:
    """This connection is of no use to children of this process: there it is closed."""
    _connections.add(connection)


def watch(forkable: Forkable) -> None:
    """Call `after_fork` of this object in each child."""
    _forkables.add(forkable)


class _Gate:
    """Held by the thread that forks, or by one that is where no other may fork."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._forks = threading.local()

    def close(self) -> None:
        self._forks.alone = self.lock.acquire(timeout=FORK_PATIENCE_S)

    def open(self) -> None:
        if self._forks.alone:
            self.lock.release()

    def renew(self) -> None:
        self.lock = threading.RLock()


_gate = _Gate()


@contextmanager
def without_forks() -> Iterator[None]:
    """For a thread of a process that forks, while it connects: a fork waits until it is done.

    libpq, OpenSSL and the resolver lock the data that their threads share. A child that is forked
    meanwhile inherits the lock, and waits for ever when it connects itself. A fork waits no longer
    than `FORK_PATIENCE_S`: a server that does not answer must not stop it.
    """
    with _gate.lock:
        yield


def _in_child() -> None:
    inherited = [connection for connection in _connections if not connection.closed]
    _connections.clear()
    if inherited:
        # Not closed: libpq would say goodbye for the parent, and a number that is free again would
        # soon be another file. A holder of the connection finds that its server is gone.
        dead, other = socket.socketpair()
        other.close()
        for connection in inherited:
            with suppress(psycopg.Error, OSError):
                os.dup2(dead.fileno(), connection.fileno(), inheritable=False)
        dead.close()
    for forkable in list(_forkables):
        forkable.after_fork()


os.register_at_fork(before=_gate.close, after_in_parent=_gate.open, after_in_child=_gate.renew)
os.register_at_fork(after_in_child=_in_child)
