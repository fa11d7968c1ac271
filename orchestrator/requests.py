"""What an `Execution` asks for, and is told: it does no I/O.

It yields requests and is sent their replies:

    ReadJournal   → a CheckpointPage
    RunBody       → Returned, Raised, Cancelled, Stopped, HandedBack or TransactionLost
    Commit        → Committed, or Unstorable;
                    after Returned also Raised, TransactionLost or CommitFailed
    CommitIfQuiet → Committed, or Signalled
    CommitWithSlots → Committed, NoSlot, or Unstorable
    Recover       → Recovered
    BeginBody     → None
    AwaitBody     → BodyEnded, or None after the time
    EndBody       → None

So a driver decides in which thread, on which connection and beside which other runs the work is
done: see `Executor`. A driver that loses the lease, or dies, sends no reply.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from beatless.orchestrator.boundaries import Conclusion, StepFailure
from beatless.orchestrator.child_calls import ChildrenTurn, Tends
from beatless.orchestrator.events import Event
from beatless.orchestrator.limit import RunLimit
from beatless.orchestrator.plan import Step
from beatless.orchestrator.progress import Progress
from beatless.orchestrator.records import Appended, CheckpointPage, NewRun
from beatless.orchestrator.settlement import Settlement


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadJournal:
    """Read a page of the events that give the run's place, behind another page."""

    behind: CheckpointPage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Commit a boundary under the lease, with `children` unless the run was cancelled."""

    settlement: Settlement
    failure: StepFailure | None = None
    """The failed attempt that it ends, to be logged."""
    children: Sequence[NewRun] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitIfQuiet:
    """Commit a boundary unless the run has a signal that was not told, or children that need it."""

    settlement: Settlement
    waits: Sequence[int] = ()
    """The seqs of the open waits, when the run leaves the worker: it is due at the end of one."""
    sleeps: bool = False
    """The run leaves the worker until a time that the boundary says, whatever signals come."""
    tends: Sequence[Tends] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitWithSlots:
    """Commit the start of a step with the slots of its limits, or have the run wait for one."""

    settlement: Settlement
    limits: Sequence[RunLimit]
    """None: those of another step are given back."""
    parked: Settlement
    """Committed instead if a limit has no slot: the run leaves the worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBody:
    """Call the body of a step; its result is committed next, in the transaction of the step.

    `conclude` is part of the call: an exception that it raises is the failure of the body.
    `interrupted` gives the commit for an attempt that must end before its body does, by the reason:
    a StepTimeout, DeadlineExceeded, RunCancelled or WorkerStops. Both read the progress of the run,
    which does not change while the body runs.
    """

    step: Step
    occurrence: str
    key: str
    """Of this occurrence, the same in each attempt."""
    attempt: int
    results: Mapping[str, Any]
    compensating: bool
    """The step undoes a cancelled run: it knows no cancel and no deadline."""
    deaths: int
    """Of processes that executed it beside others, and leases that ran out: see `suspects`."""
    conclude: Callable[[Any], Conclusion]
    interrupted: Callable[[Exception], Commit]


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginBody:
    """Call the body of a step, and go on: see `AwaitBody`. It has no transaction."""

    body: RunBody


@dataclass(frozen=True, slots=True, kw_only=True)
class AwaitBody:
    """Wait until one of the bodies that were begun has ended, or for so many seconds."""

    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndBody:
    """Have a body end early that was begun, if it is async: nothing waits for its result."""

    occurrence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """Find out whether a commit in doubt happened, and keep it from happening later."""


Request = (
    ReadJournal
    | Commit
    | CommitIfQuiet
    | CommitWithSlots
    | RunBody
    | BeginBody
    | AwaitBody
    | EndBody
    | Recover
)


@dataclass(frozen=True, slots=True)
class Committed:
    """The boundary is in the journal."""

    cancelled: bool
    """It is the one for a cancelled run."""
    last_seq: int = 0
    """The seq of its last event."""

    @classmethod
    def of(cls, appended: Appended) -> Self:
        """From the answer of the journal."""
        return cls(cancelled=appended.cancelled, last_seq=appended.last_seq)


@dataclass(frozen=True, slots=True)
class Signalled:
    """Nothing was committed: the run has received signals, or its children need it."""

    events: Sequence[Event]
    """Their SignalReceived."""
    turns: Sequence[ChildrenTurn] = ()
    """Of the children that were to be tended, in their order."""


@dataclass(frozen=True, slots=True)
class NoSlot:
    """The run waits for a slot, or a token, of this limit, and is nobody's."""

    limit: str


class Unstorable(Exception):
    """The reply to a Commit that Postgres refuses for its values."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The body has returned, and `conclude` accepted the result."""

    conclusion: Conclusion


@dataclass(frozen=True, slots=True)
class Raised:
    """The body has failed."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The body noticed the cancel, or was ended by it."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The worker stops, and the body has not returned."""

    error: BaseException | None = None
    """The exception that ends the process: raised again once the run is released."""


@dataclass(frozen=True, slots=True)
class HandedBack:
    """The body was not called: another process shall go on with the run."""


@dataclass(frozen=True, slots=True)
class TransactionLost:
    """The connection of the step's transaction broke, or none was to be had."""

    reason: str
    refused: bool = False
    """There was none to begin it on: the body was not called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyEnded:
    """One of the bodies that were begun has ended. With no occurrence: this process is to end."""

    occurrence: str
    outcome: Returned | Raised | Cancelled | Stopped | TransactionLost


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """Something else was raised after the body had returned: it may have been committed or not.

    By Postgres, which cannot store the step's result; by a listener on commits of SQLAlchemy; by a
    signal that ends this process.
    """

    error: BaseException
    leaving: bool
    """It ends the process."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The fate of the commit in doubt; the lease is still held unless the run has ended."""

    committed: bool
    ended: bool


Reply = (
    CheckpointPage
    | Committed
    | Signalled
    | NoSlot
    | Unstorable
    | Returned
    | Raised
    | Cancelled
    | Stopped
    | HandedBack
    | TransactionLost
    | CommitFailed
    | Recovered
    | BodyEnded
)

Requests = Generator[Request, Reply | None, None]

Part = Generator[Request, Any, Progress | None]
"""Goes on with the progress that it returns; with None the run leaves this worker."""
