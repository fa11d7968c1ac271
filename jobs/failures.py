"""Calls the user's `on_failure` for each final failure: once, in the process that wrote it."""

import contextvars
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from beatless.orchestrator.events import EventType
from beatless.orchestrator.observer import Settled
from beatless.orchestrator.state import RunState
from beatless.outbox.observer import DeadLettered, DeadlinesExpired, Signal
from beatless.worker import canary

logger = logging.getLogger(__name__)

ON_FAILURE_S = 5.0
"""How long a process waits for `on_failure`. Then it goes on, and may end before it returns."""

MAX_HANGING = 64
"""Calls of `on_failure` that have not returned in time; while there are so many, none is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run that has failed for good, or a message that became a dead letter.

    >>> from beatless import App, Failure
    >>> def page_an_operator(failure: Failure) -> None:
    ...     print(f"{failure.kind} of {failure.plan}: {failure.error['message']}")
    >>> app = App(app.settings, plans=[], on_failure=page_an_operator)
    >>> app.close()
    """

    kind: str
    """`run`, or `dead letter`."""
    run_id: str
    plan: str | None = None
    """None for a dead letter."""
    queue: str | None = None
    step: str | None = None
    """The occurrence that failed; None if no step did, as at a deadline without a worker."""
    attempt: int | None = None
    error: Mapping[str, Any]
    """The stored error: `type` and `message`, and of a step `step` and `traceback`."""
    exception: BaseException | None = None
    """The exception of the step, where it is known: not after its process had died."""
    tags: Mapping[str, str] = field(default_factory=dict)


OnFailure = Callable[[Failure], object]


def failures_of(signal: Signal) -> Iterator[Failure]:
    """The failures of a signal; a canary's is none."""
    match signal:
        case Settled(state=RunState.FAILED, lease=lease) if lease.run.plan != canary.NAME:
            yield _failed_run(signal)
        case DeadlinesExpired(runs=runs):
            for run_id, plan, queue in runs:
                message = f"run {run_id} did not end before its deadline"
                error = {"type": "DeadlineExceeded", "message": message}
                yield Failure(kind="run", run_id=run_id, plan=plan, queue=queue, error=error)
        case DeadLettered(run_id=run_id, reason=reason):
            error = {"type": "DeadLetter", "message": reason}
            yield Failure(kind="dead letter", run_id=run_id, error=error)


def _failed_run(settled: Settled) -> Failure:
    run, events = settled.lease.run, settled.events
    attempts = [event.attempt for event in events if event.type == EventType.STEP_FAILED]
    error = json.loads(events[-1].data or "{}")["error"]
    return Failure(
        kind="run",
        run_id=run.run_id,
        plan=run.plan,
        queue=run.queue,
        step=error.get("step"),
        attempt=attempts[-1] if attempts else None,
        error=error,
        exception=settled.exception,
        tags=run.tags,
    )


class Failures:
    """The observer of executors and relays that calls `on_failure`."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure
        self._hanging: list[threading.Thread] = []

    def __call__(self, signal: Signal) -> None:
        for failure in failures_of(signal):
            self._call(failure)

    def _call(self, failure: Failure) -> None:
        """In a thread of its own: one that hangs holds up neither this run's worker nor a relay.

        While one hangs, no other is waited for: a relay reports many runs at a time.
        """
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= MAX_HANGING:
            logger.error(
                "on_failure was not called: too many calls of it have not returned",
                extra={"action": "on_failure_failed", "run_id": failure.run_id},
            )
            return
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(self._tell, failure), name="beatless-on-failure", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # there are too many; who wrote that the run has failed goes on
            logger.exception(
                "on_failure was not called",
                extra={"action": "on_failure_failed", "run_id": failure.run_id},
            )
            return
        if not self._hanging:
            thread.join(ON_FAILURE_S)
        if thread.is_alive():
            self._hanging.append(thread)
            logger.warning(
                "on_failure has not returned, and is not waited for any longer",
                extra={"action": "on_failure_hangs", "run_id": failure.run_id},
            )

    def _tell(self, failure: Failure) -> None:
        try:
            self._on_failure(failure)
        except BaseException:  # it is the user's, and a thread of ours ends here
            logger.exception(
                "on_failure raised an error",
                extra={"action": "on_failure_failed", "run_id": failure.run_id},
            )
