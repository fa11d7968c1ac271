"""Starts processes of a stack again when they have ended."""

from collections.abc import Callable

from beatless.errors import JobsError
from beatless.local.child import Child
from beatless.local.processes import has_exited
from beatless.local.server import Server
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic

STEADY_AFTER_S = 30.0
"""A process that lived so long starts again without delay."""


class Restarter:
    """Starts one process again when it has ended, ever later the more often it ends."""

    def __init__(self, part: Child | Server) -> None:
        self._part = part
        self._backoff = Backoff(initial=0.2, cap=10.0)
        self._failures = 0
        self._began = monotonic()
        self.restart_at: float | None = None

    @property
    def pid(self) -> int:
        return self._part.pid

    def check(self, say: Callable[[str], None]) -> None:
        """Notice that the process has ended, or start it again once it is time."""
        now = monotonic()
        if self.restart_at is None and has_exited(self.pid):
            self._failures = 1 if now - self._began > STEADY_AFTER_S else self._failures + 1
            self._later(f"{self._part.name} (PID {self.pid}) ended", say)
        elif self.restart_at is not None and now >= self.restart_at:
            try:
                self._part.restart()
            except Exception as error:  # any error: the rest of the stack goes on
                self._failures += 1
                ours = isinstance(error, JobsError)
                self._later(str(error) if ours else f"{self._part.name}: {error}", say)
            else:
                self._began, self.restart_at = monotonic(), None
                say(f"{self._part.name} started again, PID {self.pid}")

    def _later(self, what: str, say: Callable[[str], None]) -> None:
        delay = self._backoff.delay(self._failures)
        self.restart_at = monotonic() + delay
        say(f"{what}; starting it again in {delay:.1f} s, its log is {self._part.log}")
