"""Everything that can go wrong with a run.

OrchestratorError
├── BadPayload          a value is not JSON, too large, or has text that Postgres cannot store
├── RunConflict         the key or id was used before, with other content
├── EventsPruned        the run ended long ago: its first events, or all, are not kept any more
├── RunIsActive         a worker has the run
├── RunNotFound         no run has this id
├── RunEnded            the run has ended: it receives nothing any more
├── SignalConflict      the key of a signal was used for its run before, with other content
├── ApprovalNotOpen     the run does not wait for this approval
├── AlreadyDecided      the approval has a decision
├── ScheduleNotFound    no schedule has this name
├── ScheduleConflict    the name belongs to another schedule, or to an app that declares it
├── CannotRetry         the run has not ended, or there is no such step to retry from
├── LeaseLost           another worker took the run over: nothing may be written any more
├── StepEnded           a thread outlived its step, or a copy of its process speaks for it
├── RunCancelled        raised inside a step by ctx.raise_if_cancelled()
├── WorkerStops         the worker's grace has ended within a step: the run is given back
├── StepFailed          raised in a plan's function: the step has failed and is not tried again
├── ChildFailed         raised in a plan's function: a child run has failed, or was cancelled
├── StepTimeout         an attempt took longer than its step may; it counts as a failure
├── DeadlineExceeded    the run took longer than `deadline` allows: it ends as failed
└── Fatal               raised by a step: fail the run now, no retry
"""

from collections.abc import Sequence


class OrchestratorError(Exception):
    """Base of this package's errors."""


class BadPayload(OrchestratorError):
    """A value cannot be stored in the journal."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where} {self.reason}"


class RunConflict(OrchestratorError):
    """The same key or run id was used before with other content."""

    def __init__(self, run_id: str, field: str, differs: str) -> None:
        super().__init__(run_id, field, differs)
        self.run_id = run_id
        self.field = field
        self.differs = differs

    def __str__(self) -> str:
        return (
            f"run {self.run_id} already has this {self.field} but another {self.differs}: "
            f"use another {self.field}, or start it with the same content"
        )


class RunIsActive(OrchestratorError):
    """A worker has the run."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"run {self.run_id} is running: cancel it and wait for its end"


class RunNotFound(OrchestratorError):
    """No run has this id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"no run has id {self.run_id!r:.200}"


class RunEnded(OrchestratorError):
    """The run has ended: it receives no signal any more."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"run {self.run_id} has ended: it receives no signal any more"


class SignalConflict(OrchestratorError):
    """The key of a signal was used for its run before, with other content."""

    def __init__(self, run_id: str, key: str) -> None:
        super().__init__(run_id, key)
        self.run_id = run_id
        self.key = key

    def __str__(self) -> str:
        return (
            f"run {self.run_id} has received another signal with the key {self.key!r}: "
            "use another key, or send the same name and data"
        )


class ApprovalNotOpen(OrchestratorError):
    """The run does not wait for this approval: it has ended, was not reached, or is no approval."""

    def __init__(self, run_id: str, name: str, opened: Sequence[str]) -> None:
        super().__init__(run_id, name, opened)
        self.run_id = run_id
        self.name = name
        self.opened = opened
        """The approvals that are open."""

    def __str__(self) -> str:
        opened = " and ".join(self.opened) or "none"
        return (
            f"run {self.run_id} does not wait for an approval {self.name!r:.200}: open are {opened}"
        )


class AlreadyDecided(OrchestratorError):
    """The approval has a decision: only the first one counts."""

    def __init__(self, run_id: str, occurrence: str, by: str, at: str) -> None:
        super().__init__(run_id, occurrence, by, at)
        self.run_id = run_id
        self.occurrence = occurrence
        self.by = by
        self.at = at
        """In ISO 8601."""

    def __str__(self) -> str:
        return (
            f"approval {self.occurrence} of run {self.run_id} was decided by {self.by}, {self.at}"
        )


class ScheduleNotFound(OrchestratorError):
    """No schedule has this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"no schedule is called {self.name!r:.200}"


class ScheduleConflict(OrchestratorError):
    """The name belongs to another schedule, or to an app that declares it."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(name, problem)
        self.name = name
        self.problem = problem

    def __str__(self) -> str:
        return f"schedule {self.name} {self.problem}"


class EventsPruned(OrchestratorError):
    """The run ended longer ago than events are kept."""

    def __init__(self, run_id: str, after: int, oldest: int | None) -> None:
        super().__init__(run_id, after, oldest)
        self.run_id = run_id
        self.after = after
        self.oldest = oldest
        """The first seq that is kept, or None if none is."""

    def __str__(self) -> str:
        kept = "no event is" if self.oldest is None else f"events from {self.oldest} on are"
        return (
            f"the events after {self.after} of run {self.run_id} were removed after the retention "
            f"time: {kept} kept, beside the run's state, result and error"
        )


class CannotRetry(OrchestratorError):
    """A run cannot be retried, or not from there."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(run_id, reason)
        self.run_id = run_id
        self.reason = reason

    def __str__(self) -> str:
        return f"run {self.run_id} cannot be retried: {self.reason}"


class LeaseLost(OrchestratorError):
    """Another worker holds the run, or it has ended; this one wrote nothing."""

    def __init__(self, run_id: str, token: int) -> None:
        super().__init__(run_id, token)
        self.run_id = run_id
        self.token = token

    def __str__(self) -> str:
        return f"the lease {self.token} on run {self.run_id} is gone: nothing was written"


class StepEnded(OrchestratorError):
    """A step has ended, and one of its threads still speaks through its context.

    `in_copy`: a copy of its process speaks, which the body has forked.
    """

    def __init__(self, run_id: str, step: str, in_copy: bool = False) -> None:
        super().__init__(run_id, step, in_copy)
        self.run_id = run_id
        self.step = step
        self.in_copy = in_copy

    def __str__(self) -> str:
        if self.in_copy:
            return (
                f"step {self.step} of run {self.run_id} is executed by another process, of which "
                "this is a copy: nothing was written. Let the copy hand over what it has to tell, "
                "as by a pipe or multiprocessing, and the step itself speak"
            )
        return (
            f"step {self.step} of run {self.run_id} has ended: nothing was written. "
            "Let a step wait for its threads before it returns"
        )


class RunCancelled(OrchestratorError):
    """The run was asked to stop. Let it pass through: the run then ends as cancelled."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"run {self.run_id} was asked to stop"


class WorkerStops(OrchestratorError):
    """The worker was asked to stop, and its grace has ended: another one begins the step again."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return (
            f"worker is shutting down; run {self.run_id} was released and its step will be retried "
            "elsewhere"
        )


class ChildFailed(OrchestratorError):
    """Raised in the function of a plan: a run that it has started has failed, or was cancelled.

    By `.result()` of a child, by `run.map` with `failure="fail"`, and an element of the results of
    one with `failure="collect"`. A function that lets it through fails its run.

    >>> from beatless import ChildFailed
    >>> failed = ChildFailed("order-1", "ValueError", "declined")
    >>> failed.run_id, failed.type, failed.message
    ('order-1', 'ValueError', 'declined')
    """

    def __init__(self, run_id: str, type: str, message: str) -> None:
        super().__init__(run_id, type, message)
        self.run_id = run_id
        """Of the child."""
        self.type = type
        """The name of the class of its error, as it is stored; of a cancelled one RunCancelled, of
        one that was removed RunNotFound."""
        self.message = message

    def __str__(self) -> str:
        return f"child {self.run_id} failed: {self.type}: {self.message}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChildFailed) and self.args == other.args

    def __hash__(self) -> int:
        return hash(self.args)


class StepFailed(OrchestratorError):
    """Raised in the function of a plan by `run.step`: the step has failed for good.

    The same when it happens and when the function is called again later. A function that lets it
    through fails its run with the step's error.

    >>> from beatless import RunContext, StepFailed, plan, step
    >>> @step
    ... def charge(ctx, amount): ...
    >>> @step
    ... def release(ctx): ...
    >>> @plan("purchase")
    ... def purchase(run: RunContext):
    ...     try:
    ...         return run.step(charge, 30)
    ...     except StepFailed as failed:
    ...         run.step(release)
    ...         return {"refused": failed.message}
    """

    def __init__(self, step: str, type: str, message: str) -> None:
        super().__init__(step, type, message)
        self.step = step
        """The occurrence."""
        self.type = type
        """The name of the class of the error, as it is stored."""
        self.message = message

    def __str__(self) -> str:
        return f"step {self.step} failed: {self.type}: {self.message}"


class StepTimeout(OrchestratorError):
    """An attempt took longer than its step's `timeout`."""

    def __init__(self, step: str, seconds: float) -> None:
        super().__init__(step, seconds)
        self.step = step
        self.seconds = seconds

    def __str__(self) -> str:
        return f"step {self.step} took longer than its timeout of {self.seconds:g} s"


class DeadlineExceeded(OrchestratorError):
    """The run has reached the deadline that it was started with."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id

    def __str__(self) -> str:
        return f"run {self.run_id} did not end before its deadline"


class Fatal(OrchestratorError):
    """Raise it in a step when trying again cannot help: the run fails at once.

    >>> from beatless import Fatal, step
    >>> @step
    ... def charge(ctx):
    ...     if ctx.input["amount"] <= 0:
    ...         raise Fatal(f"nothing to charge: {ctx.input['amount']}")
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return str(self.message)
