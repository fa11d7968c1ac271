"""Counts the signals of workers, relays and streams: each class observes one of them.

A worker adds a few numbers at each step boundary; a relay that is scraped searches each batch once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from time import time
from typing import ClassVar, get_args

from beatless.observe import published
from beatless.observe.counts import Counts, LocalCounts, SharedCounts
from beatless.observe.families import (
    BACKFILL,
    FAILURES,
    LATENCY,
    LEASE_LOST,
    LEASES_ENDED,
    LISTENER_UP,
    LONG_HISTORIES,
    MAX_QUEUE_SERIES,
    PUBLISHED,
    QUEUE_WAIT,
    REDISPATCH,
    RUN_DURATION,
    RUNS_FINISHED,
    RUNS_STARTED,
    SAMPLES_PER_BATCH,
    SCHEDULE_LATENESS,
    SCHEDULE_TICKS,
    STEP_ATTEMPTS,
    STEP_DURATION,
    STREAM_GAPS,
    STREAMS_OPEN,
    THREAD_FAILURES,
    THREADS_FAILING,
    WAKEUPS,
    Family,
    Labels,
)
from beatless.orchestrator.events import EventType, as_stored
from beatless.orchestrator.failure import was_cancelled
from beatless.orchestrator.observer import (
    Claimed,
    DeathCause,
    LeasesEnded,
    LongHistoryRead,
    Settled,
    TakenOver,
)
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.state import FINAL, RunState
from beatless.outbox.observer import (
    BatchFailed,
    ChoreFailed,
    ChoreRested,
    ChoreStepped,
    DeadlinesExpired,
    Drained,
    QueueRefused,
    RelayFailed,
    RelayStarted,
    RelayStopped,
    RelayWoke,
    ShardsAssigned,
    Signal,
    ThreadFailed,
    ThreadRecovered,
    TickOutcome,
    TicksFired,
    WatchdogRan,
)
from beatless.streams.observer import Backfilled, StreamClosed, StreamOpened

RUN_OUTCOMES = tuple(sorted(state.value for state in FINAL))
STEP_OUTCOMES = {EventType.STEP_FINISHED: "finished", EventType.STEP_FAILED: "failed"}
OTHER_OUTCOMES = ("cancelled", "snoozed")
"""Of a StepFailed by which a cancel ended the step, and of a trace."""


class WorkerCounters:
    """The observer of a worker's executors and threads, in all of its processes."""

    FAMILIES: ClassVar[tuple[Family, ...]] = (
        RUNS_FINISHED,
        RUN_DURATION,
        QUEUE_WAIT,
        STEP_DURATION,
        STEP_ATTEMPTS,
        LONG_HISTORIES,
        LEASE_LOST,
        LEASES_ENDED,
        THREAD_FAILURES,
        THREADS_FAILING,
    )
    THREADS: ClassVar[tuple[str, ...]] = (
        "heartbeat",
        "watchdog",
        "keeper",
        "announcement",
        "grace",
        "group",
        "output",
        "loop",
    )

    def __init__(self, plans: Iterable[Plan]) -> None:
        self.active = False
        self.counts = SharedCounts(self._series(list(plans)), QUEUE_WAIT)

    @staticmethod
    def _series(plans: Sequence[Plan]) -> Iterator[tuple[Family, Labels]]:
        yield from ((family, ()) for family in (RUN_DURATION, LEASE_LOST))
        yield from ((LEASES_ENDED, (cause,)) for cause in get_args(DeathCause))
        for family in (THREAD_FAILURES, THREADS_FAILING):
            yield from ((family, (thread,)) for thread in WorkerCounters.THREADS)
        for plan in plans:
            yield from ((RUNS_FINISHED, (plan.name, outcome)) for outcome in RUN_OUTCOMES)
            yield LONG_HISTORIES, (plan.name,)
            last = [plan.on_cancel] if plan.on_cancel else []
            for step in (*plan.steps, *plan.undo_steps.values(), *last):
                yield STEP_DURATION, (plan.name, step.name)
                for outcome in (*STEP_OUTCOMES.values(), *OTHER_OUTCOMES):
                    yield STEP_ATTEMPTS, (plan.name, step.name, outcome)

    def __call__(self, signal: Signal) -> None:
        self.active = True
        match signal:
            case Settled():
                self._settled(signal)
            case Claimed(lease=lease):
                if lease.waited is not None:
                    self.counts.observe_queue(max(0.0, lease.waited), lease.run.queue)
            case TakenOver():
                self.counts.add(LEASE_LOST)
            case LongHistoryRead(lease=lease):
                self.counts.add(LONG_HISTORIES, (lease.run.plan,))
            case LeasesEnded(cause=cause, leases=leases):
                self.counts.add(LEASES_ENDED, (cause,), leases)
            case ThreadFailed(thread=thread, first=first):
                self.counts.add(THREAD_FAILURES, (thread,))
                if first:
                    self.counts.add(THREADS_FAILING, (thread,))
            case ThreadRecovered(thread=thread):
                self.counts.add(THREADS_FAILING, (thread,), -1)

    def failing(self) -> list[str]:
        """Names of threads of this worker and its children that failed and have not recovered."""
        return _failing(self.counts)

    def _settled(self, signal: Settled) -> None:
        plan = signal.lease.run.plan
        for event in signal.events:
            outcome = STEP_OUTCOMES.get(event.type)
            if outcome is None and event.type == EventType.DEBUG_TRACE:
                outcome = "snoozed" if signal.reason == "snooze" else None
            if event.type == EventType.STEP_FAILED and was_cancelled(as_stored(event)):
                outcome = "cancelled"
            if outcome is None or event.step is None:
                continue
            step = event.step.partition("#")[0]
            self.counts.add(STEP_ATTEMPTS, (plan, step, outcome))
            if signal.duration_s is not None:
                self.counts.observe(STEP_DURATION, signal.duration_s, (plan, step))
        if signal.state.final:
            self.counts.add(RUNS_FINISHED, (plan, signal.state.value))
            self.counts.observe(RUN_DURATION, signal.lease.seconds)


class RelayCounters:
    """The observer of a relay. It searches messages only while it is `active`: is scraped.

    Every start of a run, and every run that was cancelled before a worker had it, passes here once,
    by any writer: that is why they are counted here.
    """

    FAMILIES: ClassVar[tuple[Family, ...]] = (
        RUNS_STARTED,
        RUNS_FINISHED,
        SCHEDULE_TICKS,
        SCHEDULE_LATENESS,
        REDISPATCH,
        PUBLISHED,
        FAILURES,
        LATENCY,
        WAKEUPS,
        LISTENER_UP,
        LONG_HISTORIES,
        LEASES_ENDED,
        THREAD_FAILURES,
        THREADS_FAILING,
    )

    def __init__(self, plans: Iterable[str]) -> None:
        self.active = False
        self.counts = LocalCounts()
        self.clock: Callable[[], float] = time
        """Postgres' time in seconds since the epoch."""
        self.shards: frozenset[int] = frozenset()
        """Those that this relay leads."""
        self._plans = frozenset(plans)
        self._queues: set[str] = set()
        self._started = False
        for kind in ("event", "task"):
            self.counts.declare(PUBLISHED, (kind,))
            self.counts.declare(FAILURES, (kind,))
        # From zero on: the first burst is otherwise no increase.
        for reason in ("lease", "unclaimed", "broker_lost", "refused"):
            self.counts.declare(REDISPATCH, (reason,))
        for source in ("notify", "timer", "broker", "reconnect", "watchdog"):
            self.counts.declare(WAKEUPS, (source,))
        for thread in ("relay", "courier", "chores", "watch"):
            self.counts.declare(THREAD_FAILURES, (thread,))
            self.counts.declare(THREADS_FAILING, (thread,))
        self.counts.declare(LEASES_ENDED, ("worker_died",))
        for outcome in get_args(TickOutcome):
            self.counts.declare(SCHEDULE_TICKS, (outcome,))
        self.counts.declare(SCHEDULE_LATENESS)
        self.counts.declare(LATENCY)
        self.counts.declare(LISTENER_UP)

    def __call__(self, signal: Signal) -> None:
        match signal:
            case Drained():
                if self.active:
                    self._drained(signal)
            case DeadlinesExpired(runs=runs):
                for _, plan, _ in runs:
                    labels = (self._known(plan), RunState.FAILED.value)
                    self.counts.add(RUNS_FINISHED, labels)
            case TicksFired(ticks=ticks):
                for tick in ticks:
                    self.counts.add(SCHEDULE_TICKS, (tick.outcome,))
                    if tick.outcome == "started":
                        self.counts.observe(SCHEDULE_LATENESS, tick.late_s)
            case RelayWoke(source=source):
                self.counts.add(WAKEUPS, (source,))
            case LeasesEnded(cause=cause, leases=leases):
                self.counts.add(LEASES_ENDED, (cause,), leases)
            case WatchdogRan():
                self.counts.add(WAKEUPS, ("watchdog",))
            case BatchFailed(publisher=publisher):
                self.counts.add(FAILURES, ("event" if publisher == "Redis" else "task",))
            case QueueRefused():
                self.counts.add(FAILURES, ("task",))
            case RelayStarted():
                if self._started:
                    self.counts.add(WAKEUPS, ("reconnect",))
                self._started = True
                self.counts.set(LISTENER_UP, 1)
                self._works("relay")
            case ThreadFailed(thread=thread):
                self._failed(thread)
            case ThreadRecovered(thread=thread):
                self._works(thread)
            case ChoreFailed():
                self._failed("chores")
            case ChoreStepped() | ChoreRested():
                self._works("chores")
            case ShardsAssigned(shards=shards):
                self.shards = frozenset(shards)
            case RelayFailed():
                self._leads_none()
                self._failed("relay")
            case RelayStopped():
                self._leads_none()

    def failing(self) -> list[str]:
        """Names of threads of this relay that failed and have not recovered."""
        return _failing(self.counts)

    def _leads_none(self) -> None:
        self.shards = frozenset()
        self.counts.set(LISTENER_UP, 0)

    def _failed(self, thread: str) -> None:
        self.counts.add(THREAD_FAILURES, (thread,))
        self.counts.set(THREADS_FAILING, 1, (thread,))

    def _works(self, thread: str) -> None:
        self.counts.set(THREADS_FAILING, 0, (thread,))

    def _drained(self, drained: Drained) -> None:
        rows, messages = drained.rows, drained.messages
        for message in messages:
            if message.attempt > 1:
                self.counts.add(REDISPATCH, (message.reason,))
        if messages:
            self.counts.add(PUBLISHED, ("task",), len(messages))
        if not rows:
            return
        # One search through the batch: a look at each row would cost a tenth of a drain.
        batch = b"\n".join([row.body for row in rows])
        self.counts.add(PUBLISHED, ("event",), batch.count(b"\n") + 1)
        for (plan, queue), runs in published.starts(batch).items():
            self.counts.add(RUNS_STARTED, (self._known(plan), self._queue(queue)), runs)
        for plan in published.cancellations(batch):
            self.counts.add(RUNS_FINISHED, (self._known(plan), RunState.CANCELLED.value))
        now = self.clock()
        for index in _sampled(len(rows)):
            if (written_at_ms := published.written_at_ms(rows[index].body)) is not None:
                self.counts.observe(LATENCY, max(0.0, now - written_at_ms / 1000))

    def _known(self, plan: str) -> str:
        return plan if plan in self._plans else "other"

    def _queue(self, queue: str) -> str:
        if len(self._queues) < MAX_QUEUE_SERIES:
            self._queues.add(queue)
        return queue if queue in self._queues else "other"


def _failing(counts: Counts) -> list[str]:
    """The threads whose gauge is above 0."""
    return sorted(
        labels[0]
        for (name, labels), numbers in counts.read().items()
        if name == THREADS_FAILING.name and numbers[0] > 0
    )


def _sampled(rows: int) -> set[int]:
    """Indexes of the rows whose latency is measured: the first, the last, and between."""
    last = SAMPLES_PER_BATCH - 1
    return {index * (rows - 1) // last for index in range(SAMPLES_PER_BATCH)}


class StreamCounters:
    """The observer of a process's streams."""

    FAMILIES: ClassVar[tuple[Family, ...]] = (STREAMS_OPEN, STREAM_GAPS, BACKFILL, THREAD_FAILURES)

    def __init__(self) -> None:
        self.active = False
        self.counts = LocalCounts()
        self.counts.declare(STREAMS_OPEN)
        self.counts.declare(STREAM_GAPS)
        self.counts.declare(THREAD_FAILURES, ("streams",))

    def __call__(self, signal: Signal) -> None:
        self.active = True
        match signal:
            case StreamOpened():
                self.counts.add(STREAMS_OPEN)
            case StreamClosed():
                self.counts.add(STREAMS_OPEN, amount=-1)
            case ThreadFailed(thread=thread):
                self.counts.add(THREAD_FAILURES, (thread,))
            case Backfilled(reason=reason, events=events):
                if reason == "gap":
                    self.counts.add(STREAM_GAPS)
                self.counts.add(BACKFILL, (reason,), events)
