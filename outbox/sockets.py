"""Waiting for sockets. Not by select(), which knows no descriptor above 1,024."""

import select
import socket
from collections.abc import Iterable
from typing import Protocol, TypeVar

LONGEST_S = 86400.0


class HasFileno(Protocol):
    """Objects with a descriptor to wait on."""

    def fileno(self) -> int: ...


S = TypeVar("S", bound=int | HasFileno)


def readable(sockets: Iterable[S], seconds: float | None) -> list[S]:
    """Those with something to read, as soon as there is one; none when so many seconds are over.

    A time that is past is no time. Sockets closed by the other side are returned too.
    """
    poll = select.poll()
    known: dict[int, S] = {}
    for each in sockets:
        descriptor = each if isinstance(each, int) else each.fileno()
        known[descriptor] = each
        poll.register(descriptor, select.POLLIN)
    limit = None if seconds is None else max(0.0, min(seconds, LONGEST_S)) * 1000
    return [known[descriptor] for descriptor, _ in poll.poll(limit)]


class Alarm:
    """Lets another thread, or a signal handler, interrupt a wait on sockets."""

    def __init__(self) -> None:
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    def fileno(self) -> int:
        return self._ear.fileno()

    def ring(self) -> None:
        """Wake the waiter. Never blocks: a full pipe has already woken it."""
        try:
            self._mouth.send(b"!")
        except (BlockingIOError, OSError):
            return

    def quiet(self) -> None:
        """Forget all rings so far."""
        try:
            while self._ear.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._ear.close()
        self._mouth.close()
