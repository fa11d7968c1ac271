"""The end of an attempt whose body has not returned."""

from beatless.orchestrator.errors import DeadlineExceeded, StepTimeout
from beatless.orchestrator.execution import Cancelled, Raised, Stopped, TransactionLost
from beatless.orchestrator.failure import is_a
from beatless.orchestrator.plan import Step


class AttemptEnded(Exception):
    """Leaves the transaction of an attempt whose body has not returned; carries the reply."""

    def __init__(self, reply: Raised | Cancelled | Stopped | TransactionLost) -> None:
        super().__init__(reply)
        self.reply = reply


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
