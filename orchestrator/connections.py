"""The autocommit connections of an executor, opened when they are first needed."""

import threading
from collections.abc import Callable
from typing import Protocol

from beatless.orchestrator.lease import Connection


class Connections(Protocol):
    """Gives the connection of the calling thread."""

    @property
    def current(self) -> Connection | None:
        """It, open or not; None before the first use."""

    def get(self) -> Connection:
        """It, or a new one if it is closed."""

    def close(self) -> None:
        """Close it; the next use opens another."""


class OneConnection:
    """One connection, of an executor that works in one thread."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None

    @property
    def current(self) -> Connection | None:
        return self._connection

    def get(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ConnectionOfThread:
    """One connection for each thread, of an executor that works in several.

    Those of threads that have ended, as a step's own, are closed when the next one needs its first.
    """

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._threads = threading.local()
        self._mutex = threading.Lock()
        self._all: dict[threading.Thread, OneConnection] = {}

    @property
    def current(self) -> Connection | None:
        return self._own.current

    @property
    def _own(self) -> OneConnection:
        found: OneConnection | None = getattr(self._threads, "own", None)
        if found is None:
            found = self._threads.own = OneConnection(self._connect)
            with self._mutex:
                ended = [
                    self._all.pop(thread) for thread in list(self._all) if not thread.is_alive()
                ]
                self._all[threading.current_thread()] = found
            for each in ended:
                each.close()
        return found

    def get(self) -> Connection:
        return self._own.get()

    def close(self) -> None:
        self._own.close()

    def close_all(self) -> None:
        """Close those of all threads, which use them no more."""
        with self._mutex:
            for each in self._all.values():
                each.close()
