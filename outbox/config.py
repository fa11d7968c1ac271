"""The parts and times that a relay is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from beatless.outbox.backoff import BACKOFF_CAP_S, Backoff
from beatless.outbox.chores import Chore
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.due_schedules import Fire
from beatless.outbox.faults import CrashPoints
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.overdue import EndOverdue
from beatless.outbox.publishers import EventPublisher, TaskPublisher
from beatless.outbox.queries import Queries
from beatless.outbox.waking import Wake


class Companion(Protocol):
    """Something that works beside a relay, in a thread of its own."""

    def start(self) -> None:
        """The relay has its sessions; called again when it has new ones."""

    def heard(self, message: str) -> None:
        """A message on the relay's channel that is not the relay's own. Must be quick.

        Any client of the database can send anything.
        """

    def note_load(self) -> None:
        """The relay has much to do; called again and again while it has. Must be quick."""

    def stop(self) -> None:
        """The relay ends. May be called more than once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """The parts a relay works with, and its times in seconds."""

    connect: Callable[[], DirectConnection]
    """Opens a session of its own; called again whenever one is lost."""
    queries: Queries
    events: EventPublisher
    tasks: TaskPublisher
    redispatch: float = 15.0
    """Time that a sent message may stay unclaimed."""
    linger: float = 0.003
    """Time for which the relay stays awake after the last message."""
    nap: float = 0.0003
    """Pause between two looks of a relay that is awake and finds nothing."""
    watchdog: float = 15.0
    """Between two proofs that a NOTIFY still arrives, and that the other relays are not frozen."""
    overdue: EndOverdue | None = None
    """Ends runs that have reached their deadline and that no worker has."""
    fire: Fire | None = None
    """Fires the ticks of schedules that are due."""
    wake: Wake | None = None
    """Makes runs due that wait, and have received what they wait for."""
    chores: Sequence[Chore] = ()
    """Done beside the drains, by one relay at a time."""
    companions: Sequence[Companion] = ()
    """Started and stopped with the relay, in each one."""
    chores_after: float = 60.0
    """Time from the start to the first step of a chore."""
    backoff: Backoff = field(default_factory=lambda: Backoff(cap=BACKOFF_CAP_S))
    """Between two tries of a publisher that fails, and of a relay that lost its sessions."""
    failing: Callable[[], Sequence[str]] = tuple
    """Names of the relay's threads that fail now, which it shows in pg_stat_activity."""
    faults: CrashPoints = field(default_factory=CrashPoints)
    observer: Observer = ignore
