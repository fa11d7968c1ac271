"""Events that only SQL can have written so: the place of a run cannot be folded from them. Pure.

A member of another type, as `reused: 7`, would fail each claim of its run for ever. The run ends
with the name of the event instead, as for one that nobody can read.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from beatless.orchestrator.events import Event

T = TypeVar("T")

UNFIT = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a fold raises on a value that beatless never writes."""


class Unread(Exception):
    """What a run has done is unknown."""


class UnreadableEvent(Unread):
    """Nobody can read this event of the run, or it has a member of another type."""

    def __init__(self, event: Event, problem: str = "") -> None:
        super().__init__(event, problem)
        self.event = event
        self.problem = problem

    def __str__(self) -> str:
        why = "is no object, is nested too deeply, or has a number that is too long"
        if self.problem:
            why = f"has a member of another type or value ({self.problem})"
        return (
            f"the data of event {self.event.seq} ({self.event.type}) of the run's journal {why}, "
            "as SQL can write it: what the run has done is unknown"
        )


class UnfitRow(Unread):
    """The row of a run contradicts its journal, in a column."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.problem}, as SQL can write it: what the run has done is unknown"


def folded(fold: Callable[[Sequence[Event]], T], events: Sequence[Event]) -> T:
    """The fold of these events. Raises UnreadableEvent with the one that cannot be folded."""
    try:
        return fold(events)
    except UNFIT as error:
        raise UnreadableEvent(_unfit_one(fold, events), problem_of(error)) from error


def problem_of(error: Exception) -> str:
    """As the error of the run has it."""
    return f"{type(error).__name__}: {error}"


def _unfit_one(fold: Callable[[Sequence[Event]], object], events: Sequence[Event]) -> Event:
    """One with which the fold fails, and with those before it does not."""
    good, bad = 0, len(events)
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            fold(events[:middle])
            good = middle
        except UNFIT:
            bad = middle
    return events[bad - 1]
