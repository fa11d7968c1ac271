"""Reports the work on one run: its boundaries and failures, to the observer and the log."""

import logging
from collections.abc import Callable
from typing import Any

from beatless.orchestrator.boundaries import StepFailure
from beatless.orchestrator.events import EventType
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.long_history import MANY_EVENTS, MAX_EVENTS
from beatless.orchestrator.observer import LongHistoryRead, Settled
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import Appended, CheckpointPage
from beatless.orchestrator.settlement import NEVER_S, Settlement
from beatless.orchestrator.state import WAITS, RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer

logger = logging.getLogger("beatless.orchestrator.executor")

ShownError = Callable[[dict[str, Any]], dict[str, Any]]


class RunReport:
    """What is told of one claimed run."""

    def __init__(
        self, plan: Plan, lease: Lease, *, observer: Observer, shown_error: ShownError | None
    ) -> None:
        self._plan = plan
        self._lease = lease
        self._observer = observer
        self._shown_error = shown_error
        self._began: dict[str, float] = {}
        """When the attempts in flight were begun, by the monotonic clock, by occurrence."""
        self._exception: BaseException | None = None
        """The failure of the body, until it is announced."""
        self._events = 0
        """Those of the history that were read."""

    def read(self, page: CheckpointPage, *, first: bool) -> None:
        """A page of the journal was read: tell of a history that is long."""
        events = sum(event.seq > page.restarted_seq for event in page.events)
        self._events = events if first else self._events + events
        if not page.last or self._events < MANY_EVENTS:
            return
        self._observer(LongHistoryRead(lease=self._lease, events=self._events))
        logger.warning(
            "history of the run is long",
            extra={
                "action": "long_history",
                "run_id": self._lease.run.run_id,
                "plan": self._plan.name,
                "events": self._events,
                "limit": MAX_EVENTS,
            },
        )

    def begin(self, occurrence: str) -> None:
        """An attempt of this step is begun."""
        self._began[occurrence] = monotonic()

    def failed(self, failure: StepFailure | None) -> None:
        """Log the failure of an attempt."""
        if failure is None:
            return
        self._exception = failure.error
        extra = {
            "action": "step_failed",
            "run_id": self._lease.run.run_id,
            "step": failure.step,
            "attempt": failure.attempt,
            "retry_in": failure.retry_in,
        }
        shown = failure.facts
        if self._shown_error is not None:
            shown = self._shown_error(failure.facts)
            extra["reason"] = f"{shown.get('type')}: {shown.get('message')}"
        shows_all = shown is failure.facts
        try:
            logger.warning(
                "step failed", extra=extra, exc_info=failure.error if shows_all else None
            )
        except Exception:  # of a handler that looks at the error; it is the user's, and may raise
            extra["reason"] = f"{shown.get('type')}: {shown.get('message')}"
            logger.warning("step failed, with an error that cannot be logged", extra=extra)

    def committed(self, settlement: Settlement, appended: Appended) -> None:
        """Report a committed boundary to observers and the log."""
        boundary = settlement.chosen(cancelled=appended.cancelled)
        ended = (event.step for event in boundary.events if event.type != EventType.STEP_STARTED)
        began = next((self._began.pop(step) for step in ended if step in self._began), None)
        self._observer(
            Settled(
                lease=self._lease,
                events=boundary.events,
                state=boundary.state,
                reason=settlement.reason,
                last_seq=appended.last_seq,
                duration_s=None if began is None else monotonic() - began,
                exception=self._exception,
            )
        )
        self._exception = None
        facts = {
            "run_id": self._lease.run.run_id,
            "plan": self._plan.name,
            "seq": appended.last_seq,
        }
        if boundary.state.final:
            logger.info(
                "run finished",
                extra={
                    "action": "finished",
                    "state": boundary.state.value,
                    "seconds": round(self._lease.seconds, 6),
                    **facts,
                },
            )
        elif boundary.state is RunState.QUEUED:
            reason = "cancel" if appended.cancelled else settlement.reason
            state = RunState.WAITING if reason == WAITS else boundary.state
            logger.info(
                "run waits",
                extra={
                    "action": "waits",
                    "state": state.value,
                    "reason": reason,
                    **({"delay": boundary.delay_s} if boundary.delay_s < NEVER_S else {}),
                    **facts,
                },
            )
