"""Finds the step that ends its process among many that run at once in one.

A death counts as a crash only of a body that was alone in its process. The others that ran are
suspects: with each death in the same step, a body has fewer beside it, and at last none. So a step
that exhausts the memory fails after some deaths, and those beside it go on. A body that ends is a
suspect no more, and one that has waited for its turn was none: or hundreds would go one by one.

While a suspect waits for those that run to become few, others are held back and let in by turns,
for 1 s, 2 s, 4 s …: they lose half of the time at most, and the suspect has its turn after at most
five times as long as the longest of them takes. They are held back for ten minutes at most: if some
of them take longer, the suspect waits for a gap, and costs the others less and less.
"""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf

from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease
from beatless.outbox.clock import monotonic

MOST_BESIDE = (64, 16, 4)
"""How many bodies a process has at once, after the first deaths with one of them; then one."""

HOLD_S = 1.0
"""Seconds for which a suspect that waits holds others back at first, and then lets them pass."""

HOLD_MOST_S = 600.0
"""Seconds for which it holds others back at most."""

PASS_MOST_S = 3600.0
"""Seconds for which it lets them pass at most."""


@dataclass(slots=True, kw_only=True, eq=False)
class Body:
    """One that runs, or waits for those that run to be few enough."""

    lease: Lease
    most: float
    """How many may run at once, it included."""
    since: float
    """When it began to wait."""
    may_run: Future[None] = field(default_factory=Future)


class BodiesInFlight:
    """The bodies of a process, of one thread. Notes who is alone, for whoever notices its death."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._running: dict[int, Body] = {}
        self._waiting: deque[Body] = deque()
        self._change_at: float | None = None
        """When others may pass a suspect that waits, or are held back again."""

    def tick(self) -> float | None:
        """Let those run that may by now; seconds until the next look, if any is needed."""
        if self._change_at is None:
            return None
        if monotonic() >= self._change_at:
            self._admit()
        return None if self._change_at is None else max(0.0, self._change_at - monotonic())

    def enter(self, lease: Lease, deaths: int) -> Body:
        """A body is to run whose process has died so often: when it `may_run`."""
        body = Body(lease=lease, most=most_beside(deaths), since=monotonic())
        self._waiting.append(body)
        self._admit()
        return body

    def leave(self, body: Body) -> None:
        """It has ended."""
        self._running.pop(id(body), None)
        if not any(each.lease is body.lease for each in self._running.values()):
            self._heartbeat.note_uncalled(body.lease, uncalled=True)
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
        """Let those run that may, in their order. A suspect is passed by, but not for ever."""
        now, passing = monotonic(), False
        self._change_at = None
        for body in list(self._waiting):
            if passing and body.most < inf:
                continue  # suspects keep their order
            if not self._has_room(body):
                if self._change_at is None:
                    passing, left_s = turn_of_others(now - body.since)
                    self._change_at = now + left_s
                if not passing:
                    return
                continue
            self._waiting.remove(body)
            self._running[id(body)] = body
            body.lease.alone = body.most == 1
            self._heartbeat.note_uncalled(body.lease, uncalled=True, beside=True)
            self._note_alone()
            body.may_run.set_result(None)

    def _has_room(self, body: Body) -> bool:
        most = min([body.most, *(each.most for each in self._running.values())])
        return not self._running or len(self._running) < most

    def _note_alone(self) -> None:
        if len(self._running) <= 2:
            alone = len(self._running) == 1
            for each in self._running.values():
                self._heartbeat.note_uncalled(each.lease, uncalled=not alone, beside=not alone)


def most_beside(deaths: int) -> float:
    """How many bodies may run at once, one of which was there at so many deaths."""
    if deaths == 0:
        return inf
    return MOST_BESIDE[deaths - 1] if deaths <= len(MOST_BESIDE) else 1


def turn_of_others(waited_s: float) -> tuple[bool, float]:
    """Whether others may pass a suspect that has waited for so long, and how long that holds."""
    hold_s = pass_s = HOLD_S
    while waited_s >= hold_s + pass_s:
        waited_s -= hold_s + pass_s
        hold_s, pass_s = min(2 * hold_s, HOLD_MOST_S), min(2 * pass_s, PASS_MOST_S)
    passes = waited_s >= hold_s
    return passes, (hold_s + pass_s if passes else hold_s) - waited_s
