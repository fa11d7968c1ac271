"""The states of a run and which may follow which. Pure."""

from beatless.orchestrator.open_enum import OpenEnum


class RunState(OpenEnum):
    """The state of a run; one that a newer version has written is shown, and its run left alone.

    >>> from beatless import RunState
    >>> RunState("failed") is RunState.FAILED, RunState.FAILED.final
    (True, True)
    """

    QUEUED = "queued"
    """Waits: for a worker, for its start time, or for the next attempt (`not_before`)."""
    WAITING = "waiting"
    """Holds no worker until a signal or a time comes. Stored as queued, which older processes know:
    its dispatch says so, see `WAITS`."""
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in FINAL


def stored(state: str | None) -> str | None:
    """The state as it is stored: a run that waits is queued, see `WAITS`."""
    return RunState.QUEUED.value if state == RunState.WAITING else state


FINAL = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})

WAITS = "wait"
"""The reason of the dispatch of a run that waits."""

SUCCEEDS = "next"
"""The reason of the dispatch of a run that waits for the end of another one with its dedupe key.

And of the note by which it begins."""

UNDOING = "undo"
"""The reason of the dispatch of a run that has failed, whose steps are undone before it ends."""

TRANSITIONS = {
    RunState.QUEUED: frozenset({RunState.RUNNING, RunState.CANCELLED, RunState.FAILED}),
    RunState.WAITING: frozenset({RunState.QUEUED, RunState.CANCELLED, RunState.FAILED}),
    RunState.RUNNING: frozenset({RunState.RUNNING, RunState.QUEUED, RunState.WAITING}) | FINAL,
    RunState.COMPLETED: frozenset[RunState](),
    RunState.FAILED: frozenset[RunState](),
    RunState.CANCELLED: frozenset[RunState](),
}


def allowed(before: RunState, after: RunState) -> bool:
    """Whether a run may go from one state to the other."""
    return after in TRANSITIONS.get(before, ())
