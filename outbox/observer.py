"""Signals: announcements of the library's parts while they work, one type for each.

An observer is called by the thread that emits the signal, at once: it must be quick, and what it
raises is raised there. Counters, spans, `on_failure` and tests are observers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from beatless.outbox.message import PickedEvents, TaskMessage


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """Something that happened in this process."""


Observer = Callable[[Signal], None]

PublisherName = Literal["Redis", "broker"]

WakeSource = Literal["notify", "timer", "broker"]
"""A notification, the time of the next message, or the end of a batch that the broker had."""


def ignore(_signal: Signal) -> None:
    """The observer that ignores all signals."""


class FanOut:
    """An observer that passes each signal to several, in order."""

    __slots__ = ("targets",)

    def __init__(self, targets: Sequence[Observer]) -> None:
        self.targets = targets

    def __call__(self, signal: Signal) -> None:
        for observer in self.targets:
            observer(signal)


def fan_out(*observers: Observer | None) -> Observer:
    """One observer that passes each signal to all of these, in order. None is left out.

    Of observers that are made so themselves it has the targets: each signal goes one way.
    """
    targets: list[Observer] = []
    for observer in observers:
        if isinstance(observer, FanOut):
            targets += observer.targets
        elif observer is not None and observer is not ignore:
            targets.append(observer)
    return targets[0] if len(targets) == 1 else FanOut(tuple(targets))


# Threads


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadFailed(Signal):
    """Something went wrong in a thread that goes on."""

    thread: str
    first: bool
    """Whether it worked until then: false from the second failure in a row on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadRecovered(Signal):
    """A thread that had failed works again."""

    thread: str


# The relay


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStarted(Signal):
    """A relay has its sessions and hears notifications; again after each `RelayFailed`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayFailed(Signal):
    """A relay lost its sessions, and will open others."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStopped(Signal):
    """A relay has ended, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardsAssigned(Signal):
    """The relays have shared the shards out, perhaps as before."""

    shards: Sequence[int]
    """Those that this relay leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayAsleep(Signal):
    """Nothing is left to do, and the next writer will wake this relay."""

    shards: Sequence[int]
    """Those that it leads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayWoke(Signal):
    """A sleeping relay has drained, because of this."""

    source: WakeSource


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchdogRan(Signal):
    """A relay has proved that it hears notifications, and looked for stalled ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StalledRelayEnded(Signal):
    """The sessions of another relay, which was silent for too long, were terminated."""

    pid: int
    """The Postgres backend of its working session."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained(Signal):
    """One drain has published something."""

    events: int
    """Outbox rows, each the events of one append."""
    tasks: int
    rows: Sequence[PickedEvents]
    messages: Sequence[TaskMessage]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFailed(Signal):
    """A publisher did not take a batch: it is published later."""

    publisher: PublisherName
    failures: int
    """In a row, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRefused(Signal):
    """The broker did not accept the messages of one queue, which is left alone for a while."""

    queue: str
    messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSetAside(Signal):
    """Postgres or Redis could not take this run's rows: the others are drained without it."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLettered(Signal):
    """A message was given up on, and is kept as a dead letter."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinesExpired(Signal):
    """Runs that no worker had were ended at their deadline."""

    runs: Sequence[tuple[str, str, str]]
    """Of each its id, plan and queue."""


TickOutcome = Literal["started", "known", "missed", "skipped", "replacing", "failed"]
"""Of a tick: a run was started, or had been before; it was passed over, as missed or because a run
has not ended; it waits for the end of that run; or its schedule was stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FiredTick:
    """One tick of a schedule, and what became of it."""

    namespace: str
    schedule: str
    outcome: TickOutcome
    late_s: float
    """Seconds since it was due."""
    run_id: str | None
    plan: str | None
    queue: str | None
    """Of the run that was started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TicksFired(Signal):
    """Ticks of schedules were due."""

    ticks: Sequence[FiredTick]


# Chores


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoreStepped(Signal):
    """A step of a chore is done, and the next one follows soon."""

    rest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoreRested(Signal):
    """A chore has nothing to do for so long."""

    rest_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoreFailed(Signal):
    """A step of a chore failed, and is tried again later."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoreTaken(Signal):
    """Another relay does this chore."""
