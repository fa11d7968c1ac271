"""Exponential backoff. Does no waiting itself."""

import random
from dataclasses import dataclass

from beatless.outbox.times import is_number, problem_with_seconds

MOST_FACTOR = 1000
"""Its 64th power is a float still."""

BACKOFF_CAP_S = 2.0
"""The most seconds between two tries of a server that is away, and so of its waiters."""

BACKOFF_RESET_S = 5.0
"""Seconds of work after which the next failure of a process counts as its first again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential delays with a cap and jitter, in seconds.

    Jitter takes away up to the given share of a delay, so that many waiters do not come back at
    once ("equal jitter", AWS Architecture Blog, 2015).
    """

    initial: float = 0.1
    factor: float = 2.0
    cap: float = 15.0
    jitter: float = 0.2

    def __post_init__(self) -> None:
        for name in ("initial", "cap"):
            if problem := problem_with_seconds(getattr(self, name)):
                raise ValueError(f"need initial >= 0 and cap >= 0: {name} {problem}")
        if not (
            (is_number(self.factor) and 1 <= self.factor <= MOST_FACTOR)
            and (is_number(self.jitter) and 0 <= self.jitter <= 1)
        ):
            raise ValueError(
                f"need initial >= 0, cap >= 0, 1 <= factor <= {MOST_FACTOR} and 0 <= jitter <= 1, "
                f"not a factor (backoff) of {self.factor!r} and a jitter of {self.jitter!r}"
            )

    def delay(self, failures: int) -> float:
        """Seconds to wait after this many failures in a row (1 is the first)."""
        exponent = min(failures - 1, 64)  # beyond that a float power overflows, the cap rules
        full = min(self.cap, self.initial * self.factor**exponent)
        return full * (1 - self.jitter * random.random())  # noqa: S311 - spread, not secrecy
