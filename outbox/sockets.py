"""Waiting for sockets. Not by select(), which knows no descriptor above 1,024."""

import select
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
    for socket in sockets:
        descriptor = socket if isinstance(socket, int) else socket.fileno()
        known[descriptor] = socket
        poll.register(descriptor, select.POLLIN)
    limit = None if seconds is None else max(0.0, min(seconds, LONGEST_S)) * 1000
    return [known[descriptor] for descriptor, _ in poll.poll(limit)]
