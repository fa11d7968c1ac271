"""The notes by which a relay wakes runs; the statement that does it is given from outside."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken:
    """The outcome of a look at the notes."""

    done: int
    """Notes whose runs are due now, or did not wait."""
    left: int
    """Notes of runs that another transaction holds: they are looked at again."""


Wake = Callable[[psycopg.Connection[Any], Sequence[int]], Woken]
"""Wakes the noted runs of some shards."""
