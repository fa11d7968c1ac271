"""The end of an attempt whose body has not returned."""

from collections.abc import Callable

from beatless.orchestrator.errors import (
    DeadlineExceeded,
    LeaseLost,
    RunCancelled,
    StepTimeout,
    WorkerStops,
)
from beatless.orchestrator.failure import is_a, text_of
from beatless.orchestrator.plan import Step
from beatless.orchestrator.requests import Cancelled, Raised, Stopped, TransactionLost
from beatless.orchestrator.step_transaction import StepTransaction, transaction_lost
from beatless.orchestrator.watchdog import Attempt


class AttemptEnded(Exception):
    """Leaves the transaction of an attempt whose body has not returned; carries the reply."""

    def __init__(self, reply: Raised | Cancelled | Stopped | TransactionLost) -> None:
        super().__init__(reply)
        self.reply = reply


def end_of_body(
    attempt: Attempt,
    error: BaseException,
    transaction: StepTransaction | None,
    *,
    leaving: Callable[[], bool],
    cancel_requested: Callable[[], bool],
) -> Raised | Cancelled | Stopped | TransactionLost:
    """Interpret an exception of a body. Raises LeaseLost.

    It is the failure of the body, even a SystemExit, with two exceptions: an interrupt or a lost
    lease that the body passes on and has not made up, and an exception that ends this process.
    """
    if is_a(error, LeaseLost) and attempt.lease.lost:
        raise error
    if is_a(error, WorkerStops) and error is attempt.reason:
        return Stopped()
    if is_a(error, RunCancelled) and (
        error is attempt.reason or attempt.lease.cancelled or cancel_requested()
    ):
        return Cancelled()
    if not isinstance(error, Exception) and leaving():
        return Stopped(error)
    if transaction_lost(error, transaction):
        return TransactionLost(text_of(error))
    return Raised(error)


def may_have_struck(step: Step, reply: Raised | Cancelled | Stopped | TransactionLost) -> bool:
    """Whether the watchdog's exception struck in the body: in the middle of a commit, perhaps.

    Not in a task, which is cancelled where it awaits something.
    """
    if step.is_async:
        return False
    match reply:
        case Stopped():
            return True
        case Cancelled():
            return step.terminate_on_cancel
        case Raised(error):
            return is_a(error, (StepTimeout, DeadlineExceeded))
        case TransactionLost():
            return False
