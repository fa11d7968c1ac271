"""The argument of a step: input, earlier results, and calls for traces, progress and cancels."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy

from beatless.orchestrator.errors import LeaseLost, RunCancelled, StepEnded
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.step_output import StepOutput
from beatless.outbox.clock import monotonic

PROGRESS_INTERVAL_S = 0.25
"""Seconds between two progress events of a step: a tight loop cannot flood the journal."""

CANCEL_CHECK_INTERVAL_S = 0.25
"""Seconds between two looks of `raise_if_cancelled` at Postgres."""


class StepContext:
    """One attempt of one step: its input, earlier results, and the calls that it may make.

    The executor makes it. A unit test of a step gives anything that has the attributes.

    >>> from types import SimpleNamespace
    >>> from beatless import StepContext, step
    >>> @step
    ... def charge(ctx: StepContext):
    ...     return {"order": ctx.input["order"], "key": ctx.key}
    >>> charge(SimpleNamespace(input={"order": 7}, key="run-1:charge"))
    {'order': 7, 'key': 'run-1:charge'}
    """

    def __init__(
        self,
        *,
        lease: Lease,
        step: str,
        attempt: int,
        results: Mapping[str, Any],
        journal: Journal,
        append: Callable[[NewEvent], None],
        output: StepOutput,
        check_cancel: Callable[[], bool],
        connection: Any,
        cancellable: bool = True,
        traceparent: str | None = None,
        key: str | None = None,
    ) -> None:
        self.run_id = lease.run.run_id
        self.plan = lease.run.plan
        self.input = lease.run.input
        self.tags = lease.run.tags
        self.queue = lease.run.queue
        self.priority = lease.run.priority
        self.tick = lease.run.tick
        """The tick of the schedule that has started the run, in UTC; None if none has."""
        self.worker = lease.run.worker
        """The process that executes this attempt."""
        self.step = step
        """The occurrence: `name`, then `name#2` when a route returns to the step."""
        self.key = key or f"{self.run_id}:{step}"
        """Idempotency key of this step occurrence: the same in every attempt. Pass it to others."""
        self.attempt = attempt
        self.results = results
        """Results of finished steps: each occurrence's, and the latest under the step's name."""
        self.traceparent = traceparent
        """Of this attempt, as W3C Trace Context has it, for calls of others; None if untraced."""
        self._pid = os.getpid()
        self._lease = lease
        self._journal = journal
        self._append = append
        self._output = output
        self._check_cancel = check_cancel
        self._connection = connection
        self._cancellable = cancellable
        self._next_progress = 0.0
        self._next_cancel_check = 0.0

    @property
    def connection(self) -> sqlalchemy.Connection:
        """The transaction that also commits this step's StepFinished: transactional steps only.

        Raises RuntimeError in other steps.
        """
        found: sqlalchemy.Connection = self._given_connection()
        return found

    def _given_connection(self) -> Any:
        if self._connection is None:
            raise RuntimeError(
                f"step {self.step} has no connection: declare it @step(transactional=True)"
            )
        return self._connection

    def trace(self, name: str, /, **data: Any) -> None:
        """Commit a DebugTrace event now. Threads of a step may trace at the same time.

        Raises BadPayload, LeaseLost if the run was taken, StepEnded after the end of the step and
        in a copy of the process, which a body has forked.
        """
        self._append(self._trace_event(name, data))

    def emit(self, piece: Any, /) -> None:
        """Add a piece to the output of the step: text, as a token of a model, or any JSON.

        It returns at once: pieces are stored together, 25 ms after the first of them or as soon as
        there are 64, in an event StepOutput. They are in the journal before a later trace, and
        before the end of the step. A step that emits faster than Postgres stores waits here while
        1,024 pieces do. Each attempt begins anew; what an earlier one has emitted stays.
        Threads of a step may emit at the same time.

        Raises BadPayload for what is no JSON or is too large, LeaseLost if the run was taken,
        StepEnded after the end of the step, and the error of Postgres if it refuses a piece.

        >>> from beatless import StepContext, step
        >>> @step
        ... def answer(ctx: StepContext):
        ...     for token in ["Hel", "lo"]:
        ...         ctx.emit(token)
        """
        self._speak()
        if self._output.add(piece):
            self._output.write()

    def progress(self, pct: float, note: str | None = None) -> None:
        """Trace the progress of the step, in percent. At most four a second are stored."""
        if self._progress_is_due():
            self.trace("progress", pct=in_percent(pct), note=note)

    def raise_if_cancelled(self) -> None:
        """Raise RunCancelled if a cancel was requested. Cheap enough for every turn of a loop.

        Raises LeaseLost if the run was taken from this worker, and StepEnded after the end of the
        step. In a plan's `on_cancel` step the
        cancel is no news.
        """
        self._speak()
        if not self._cancellable:
            return
        now = monotonic()
        if not self._lease.cancelled and now >= self._next_cancel_check:
            self._next_cancel_check = now + CANCEL_CHECK_INTERVAL_S
            self._look_for_cancel()
        if self._lease.cancelled:
            raise RunCancelled(self.run_id)

    def _look_for_cancel(self) -> None:
        self._lease.cancelled = self._check_cancel()

    def _speak(self) -> None:
        """Raise LeaseLost if the run is another worker's, StepEnded if it is another process's.

        A copy that a body has forked has none of the threads by which its parent keeps the lease.
        """
        if os.getpid() != self._pid:
            raise StepEnded(self.run_id, self.step, in_copy=True)
        if self._lease.lost:
            raise LeaseLost(self.run_id, self._lease.token)

    def _trace_event(self, name: str, data: Mapping[str, Any]) -> NewEvent:
        if os.getpid() != self._pid:
            raise StepEnded(self.run_id, self.step, in_copy=True)
        if "name" in data:
            raise TypeError("a trace has its name already: call the datum something else")
        return self._journal.new_event(
            EventType.DEBUG_TRACE,
            step=self.step,
            attempt=self.attempt,
            where=f"step {self.step}: trace {name!r}",
            data={"name": name, **data},
        )

    def _progress_is_due(self) -> bool:
        now = monotonic()
        if now < self._next_progress:
            return False
        self._next_progress = now + PROGRESS_INTERVAL_S
        return True


def in_percent(pct: float) -> float:
    """A progress as it is stored."""
    return max(0.0, min(100.0, float(pct)))
