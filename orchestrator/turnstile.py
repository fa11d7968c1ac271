"""Lets few threads of a process execute groups of very short bodies at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GROUPS_AT_ONCE = 4
"""Groups of very short bodies that the threads of a process execute at once."""


class Turnstile:
    """Lets a few threads of a process execute groups of very short bodies at once, not all.

    More would not execute more: they take the interpreter from one another, in the middle of what
    others wait for. Threads whose bodies wait, for which a worker has many, do not come here.
    """

    def __init__(self) -> None:
        self._free = threading.Semaphore(GROUPS_AT_ONCE)

    @contextmanager
    def passed(self, *, by: bool) -> Iterator[Callable[[], None]]:
        """In this block this thread is one of them, unless it goes `by`.

        It waits until it may. A call of what the block gets lets the next one in at once.
        """
        if by:
            yield lambda: None
            return
        self._free.acquire()
        inside = threading.Lock()

        def leave() -> None:
            if inside.acquire(blocking=False):
                self._free.release()

        try:
            yield leave
        finally:
            leave()
