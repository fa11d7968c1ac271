"""Finds the step that ends its process among many that run at once in one.

A death counts as a crash only of a body that was alone in its process. The others that ran are
suspects: with each death in the same step, a body has fewer beside it, and at last none. So a step
that exhausts the memory fails after some deaths, and those beside it go on. A body that ends is a
suspect no more, and one that has waited for its turn was none: or hundreds would go one by one.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease

MOST_BESIDE = (64, 16, 4)
"""How many bodies a process has at once, after the first deaths with one of them; then one."""


@dataclass(slots=True, kw_only=True, eq=False)
class Body:
    """One that runs, or waits for those that run to be few enough."""

    lease: Lease
    most: float
    """How many may run at once, it included."""
    may_run: Future[None] = field(default_factory=Future)


class BodiesInFlight:
    """The bodies of a process, of one thread. Notes who is alone, for whoever notices its death."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._running: dict[int, Body] = {}
        self._waiting: deque[Body] = deque()

    def enter(self, lease: Lease, deaths: int) -> Future[None]:
        """A body is to run whose process has died so often; the future is done when it may."""
        body = Body(lease=lease, most=most_beside(deaths))
        self._waiting.append(body)
        self._admit()
        return body.may_run

    def leave(self, lease: Lease) -> None:
        """It has ended."""
        self._running.pop(id(lease), None)
        self._heartbeat.note_uncalled(lease, uncalled=True)
        self._admit()
        self._note_alone()

    def blame(self, task: str) -> None:
        """The body of this task (the run's id, and its step) is what the process dies of.

        May be called in another thread: the process is about to end.
        """
        for each in list(self._running.values()):
            if task.partition(" ")[0] == each.lease.run.run_id:
                self._heartbeat.note_uncalled(each.lease, uncalled=False)

    def _admit(self) -> None:
        """Let those run that may, in their order: a suspect is not passed by for ever."""
        while self._waiting:
            body = self._waiting[0]
            most = min([body.most, *(each.most for each in self._running.values())])
            if self._running and len(self._running) >= most:
                return
            self._waiting.popleft()
            self._running[id(body.lease)] = body
            self._heartbeat.note_uncalled(body.lease, uncalled=True, beside=True)
            self._note_alone()
            body.may_run.set_result(None)

    def _note_alone(self) -> None:
        if len(self._running) <= 2:
            alone = len(self._running) == 1
            for each in self._running.values():
                self._heartbeat.note_uncalled(each.lease, uncalled=not alone, beside=not alone)


def most_beside(deaths: int) -> float:
    """How many bodies may run at once, one of which was there at so many deaths."""
    if deaths == 0:
        return float("inf")
    return MOST_BESIDE[deaths - 1] if deaths <= len(MOST_BESIDE) else 1
