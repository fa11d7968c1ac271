"""The length of a run's history: what a claim reads of its journal, and when that is too much."""

from collections.abc import Sequence

from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.progress import SNOOZED

MANY_EVENTS = 10_000
"""Events from which on a history is told as long: by a log line of each claim, a metric, `explain`
and `doctor`."""

MAX_EVENTS = 50_000
"""Events at which a run fails instead of going on. Temporal: 51,200, and a warning at 10,240."""

READ_TYPES = tuple(
    each for each in EventType if each not in (EventType.DEBUG_TRACE, EventType.STEP_OUTPUT)
)
"""The events that count. What steps trace and emit is not read by a claim."""


class HistoryTooLong(Exception):
    """The history of a run has too many events."""

    def __init__(self, *, of_function: bool) -> None:
        """`of_function`: whether its plan is one."""
        super().__init__(of_function)
        self.of_function = of_function

    def __str__(self) -> str:
        shorter = "return run.again(…) before"
        if not self.of_function:
            shorter = "make the plan a function, and return run.again(…) before"
        return (
            f"the history of the run has {MAX_EVENTS:,} events, and its plan asks for a further "
            f"step: {shorter}, or start another run for the rest of the work"
        )


def length(events: Sequence[Event]) -> int:
    """The length of the history in all events of a run: since its function last began again."""
    count = 0
    for event in events:
        if event.type == EventType.RUN_RESTARTED:
            count = 0
        elif event.type in READ_TYPES:
            count += 1
        elif event.type == EventType.DEBUG_TRACE and (event.data or {}).get("name") == SNOOZED:
            count -= 1  # of many turns that ended so, one is read
    return count
