"""When a failed step is tried again."""

from dataclasses import dataclass

from beatless.outbox.backoff import Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often a step may fail, and how long to wait in between. Times are seconds."""

    max_attempts: int = 1
    backoff: float = 2.0
    initial: float = 1.0
    cap: float = 60.0
    jitter: float = 0.2
    max_crashes: int = 5
    """How often the step's process may die in it before the run fails: a poison step."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.max_crashes < 1:
            raise ValueError("a step has at least one attempt: max_attempts and max_crashes >= 1")
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
) -> Retry:
    """A retry policy: wait `initial` seconds, times `backoff` after each failure, at most `cap`."""
    return Retry(
        max_attempts=max_attempts,
        backoff=backoff,
        initial=initial,
        cap=cap,
        jitter=jitter,
        max_crashes=max_crashes,
    )
