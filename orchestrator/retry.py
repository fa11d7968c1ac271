"""The retry policy of a step."""

from dataclasses import dataclass, fields
from typing import Never

from beatless.outbox.backoff import Backoff
from beatless.outbox.times import is_number


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """The attempts of a step, and the seconds between them."""

    max_attempts: int = 1
    backoff: float = 2.0
    initial: float = 1.0
    cap: float = 60.0
    jitter: float = 0.2
    max_crashes: int = 5
    """Deaths of the step's process, while it executes the step, before the run fails."""

    def __post_init__(self) -> None:
        for name in ("max_attempts", "max_crashes"):
            if not is_number(number := getattr(self, name)) or not number >= 1:
                raise ValueError(f"{name} is {number!r:.200}, which is not a number of 1 or more")
        self._delays()

    def _delays(self) -> Backoff:
        return Backoff(initial=self.initial, factor=self.backoff, cap=self.cap, jitter=self.jitter)

    def delay(self, failures: int) -> float | None:
        """Seconds until the next attempt after this many failures, or None to give up."""
        return None if failures >= self.max_attempts else self._delays().delay(failures)


def retry(
    max_attempts: int = 3,
    backoff: float = 2.0,
    initial: float = 1.0,
    cap: float = 60.0,
    jitter: float = 0.2,
    max_crashes: int = 5,
    **others: Never,
) -> Retry:
    """A retry policy: wait `initial` seconds, times `backoff` after each failure, at most `cap`.

    `max_attempts` counts the first attempt too; `jitter` is the share of a wait that is random;
    after `max_crashes` deaths of its process in the step the run fails. Raises ValueError for
    numbers that make no policy, and TypeError for other options, as those of other libraries.

    >>> from beatless import retry
    >>> policy = retry(max_attempts=3, initial=1, backoff=4, jitter=0)
    >>> policy.delay(1), policy.delay(2), policy.delay(3)
    (1.0, 4.0, None)
    """
    if others:
        raise TypeError(
            f"retry has no option {', '.join(others)}: how often a step is tried is max_attempts, "
            f"with the first attempt; it has: {', '.join(each.name for each in fields(Retry))}"
        )
    return Retry(
        max_attempts=max_attempts,
        backoff=backoff,
        initial=initial,
        cap=cap,
        jitter=jitter,
        max_crashes=max_crashes,
    )
