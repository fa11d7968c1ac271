"""Threads that many runs share for their writes: none of them waits for a row for long."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

HELD_ROW_WAIT_S = 0.05
"""Seconds that a row is waited for by a thread that others need too."""

GIVES_WAY: ContextVar[bool] = ContextVar("beatless_gives_way", default=False)
"""Whether this is such a thread: RowHeld is raised, and the same is tried again a little later."""


class RowHeld(Exception):
    """Another transaction holds the run's row, or another thread writes: nothing was written."""


def giving_way(act: Callable[[], T]) -> T:
    """Do this with `GIVES_WAY`, in a context of its own."""
    GIVES_WAY.set(True)
    return act()
