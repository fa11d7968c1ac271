"""Counts what a process does, for Prometheus. Reads Postgres only when it is scraped.

Counts are kept in plain memory and become Prometheus' families when somebody asks. A worker's are
in memory that its children share, so that they survive a child, however it ends: no files, no
thread, nothing that a killed child could leave locked. Names and meanings: docs/metrics.md.
"""

import logging
import mmap
import platform
import re
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from time import time
from typing import Any, ClassVar, Protocol
from wsgiref.simple_server import WSGIServer

import sqlalchemy
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from beatless import loopback
from beatless.errors import BadSetting
from beatless.orchestrator.events import EventType
from beatless.orchestrator.observer import Claimed, Settled, TakenOver
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.progress import UNKNOWN_STEP
from beatless.orchestrator.state import FINAL, RunState
from beatless.outbox.clock import monotonic
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
    WatchdogRan,
)
from beatless.outbox.queries import execute, outbox_lag
from beatless.streams.observer import Backfilled, StreamClosed, StreamOpened

logger = logging.getLogger("beatless.metrics")

Labels = tuple[str, ...]
Series = tuple[str, Labels]

PLACES = 1024
"""Children of one worker that can count at the same time."""

QUEUES = 100
"""Queues that get a series of their own; the others share `other`: a start may name any."""

SAMPLES = 4
"""Messages of one batch whose way out of Postgres is timed: the first, the last, and between."""

FRESH_SECONDS = 5.0
"""How long an answer of Postgres is good for: scrapes come more often than anything changes."""

TASKS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
MESSAGES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0)

NAME_BYTES = 64
"""Of a queue's name, in memory that a worker's children share: as long as one may be."""

OUTCOMES = tuple(sorted(state.value for state in FINAL))
ENDS = {EventType.STEP_FINISHED: "finished", EventType.STEP_FAILED: "failed"}

# As Postgres builds them. Nothing in users' data looks like it: jsonb writes a space after a colon.
STARTED = b'"type":"RunStarted","v":1,"source":"api","data":{"plan": "'
CANCELLED = b'"type":"RunFinished","v":1,"source":"api","data":{"plan": "'
QUEUE = b'", "queue": "'
TIME = re.compile(rb'"ts":(\d+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric: its name, what it says, its labels, and the bounds of a histogram's buckets."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] | None = None


RUNS_STARTED = Family(
    name="beatless_runs_started_total",
    text="Runs whose start was committed, as the relay published it.",
    labels=("plan", "queue"),
)
RUNS_FINISHED = Family(
    name="beatless_runs_finished_total",
    text="Runs that ended.",
    labels=("plan", "outcome"),
)
RUN_DURATION = Family(
    name="beatless_run_duration_seconds",
    text="From a run's first claim by a worker to its end, waits between attempts included.",
    bounds=TASKS,
)
QUEUE_WAIT = Family(
    name="beatless_queue_wait_seconds",
    text="From the time a run was due to its claim by a worker.",
    labels=("queue",),
    bounds=TASKS,
)
STEP_DURATION = Family(
    name="beatless_step_duration_seconds",
    text="One attempt of a step, with the commit of its outcome.",
    labels=("plan", "step"),
    bounds=TASKS,
)
STEP_ATTEMPTS = Family(
    name="beatless_step_attempts_total",
    text="Attempts of steps by what became of them.",
    labels=("plan", "step", "outcome"),
)
LEASE_LOST = Family(
    name="beatless_lease_lost_total",
    text="Runs that were taken from a worker that was too slow to keep its lease.",
)
THREAD_FAILURES = Family(
    name="beatless_thread_failures_total",
    text="Times that something went wrong in a thread of ours, which went on.",
    labels=("thread",),
)
THREADS_FAILING = Family(
    name="beatless_threads_failing",
    text="Threads of ours that have failed and not worked since.",
    labels=("thread",),
)
REDISPATCH = Family(
    name="beatless_redispatch_total",
    text="Task messages beyond a run's first, by reason.",
    labels=("reason",),
)
PUBLISHED = Family(
    name="beatless_outbox_published_total",
    text="Events and task messages that were published.",
    labels=("kind",),
)
FAILURES = Family(
    name="beatless_outbox_publish_failures_total",
    text="Batches that a publisher did not take; they are published later.",
    labels=("kind",),
)
LATENCY = Family(
    name="beatless_outbox_publish_latency_seconds",
    text="From the writing of an event to its publication; some of each batch, the oldest always.",
    bounds=MESSAGES,
)
WAKEUPS = Family(
    name="beatless_relay_wakeups_total",
    text="Times that a sleeping relay woke up, by what woke it.",
    labels=("source",),
)
LISTENER_UP = Family(
    name="beatless_relay_listener_up",
    text="1 while this relay hears its notifications.",
)
STREAMS_OPEN = Family(
    name="beatless_streams_open", text="Streams that are being followed in this process."
)
STREAM_GAPS = Family(
    name="beatless_stream_gaps_total",
    text="Times that a later event came before an earlier one: a message was lost or is late.",
)
BACKFILL = Family(
    name="beatless_stream_backfill_events_total",
    text="Events that streams read from the journal instead of hearing them, by reason.",
    labels=("reason",),
)
RUNS_ACTIVE = Family(
    name="beatless_runs_active",
    text="Unfinished runs: queued (due now), delayed (due later) or running.",
    labels=("queue", "state"),
)
RUNS_UNKNOWN_STEP = Family(
    name="beatless_runs_unknown_step",
    text="Unfinished runs in a step that the last worker's version of their plan does not have.",
    labels=("plan",),
)
PENDING = Family(
    name="beatless_outbox_pending", text="Appends whose events have not been published yet."
)
OLDEST_AGE = Family(
    name="beatless_outbox_oldest_age_seconds",
    text="Age of the oldest event that has not been published; 0 if there is none.",
)
DEAD_LETTERS = Family(
    name="beatless_dead_letters", text="Messages that were given up on and wait for a person."
)
NOTIFY_QUEUE = Family(
    name="beatless_pg_notify_queue_usage_ratio",
    text="How full Postgres' queue of notifications is; at 1 every commit that notifies fails.",
)


class Counts(Protocol):
    """Where numbers are kept."""

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        """Count something."""

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Put a value into a histogram."""

    def read(self) -> Mapping[Series, Sequence[float]]:
        """Everything: one number for a counter; the buckets and the sum for a histogram."""


class LocalCounts:
    """The counts of one process. Series begin when they are first used. Threads may share it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._series: dict[Series, list[float]] = {}

    def declare(self, family: Family, labels: Labels = ()) -> None:
        """Begin a series at 0, so that its first increase is seen as one."""
        with self._mutex:
            self._series.setdefault((family.name, labels), _empty(family))

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        with self._mutex:
            self._series.setdefault((family.name, labels), _empty(family))[0] += amount

    def set(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._mutex:
            self._series[family.name, labels] = [value]

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        with self._mutex:
            numbers = self._series.setdefault((family.name, labels), _empty(family))
            numbers[bisect_left(family.bounds or (), value)] += 1
            numbers[-1] += value

    def read(self) -> Mapping[Series, Sequence[float]]:
        with self._mutex:
            return {series: list(numbers) for series, numbers in self._series.items()}


def _empty(family: Family) -> list[float]:
    return [0.0] * _width(family)


def _width(family: Family) -> int:
    # A bucket for each bound, one for what is above them, and the sum.
    return 1 if family.bounds is None else len(family.bounds) + 2


class SharedCounts:
    """The counts of a worker and all of its children, in memory shared across fork.

    Every child writes in a place of its own, so nobody waits for anybody; the place of a dead child
    is taken over, with what is in it, by the child that replaces it. All series are there from the
    start: children cannot tell each other of new ones. But for one family, whose only label is a
    queue: any run may name another one, so each place has names beside its numbers.
    """

    def __init__(self, series: Iterable[tuple[Family, Labels]], of_queues: Family) -> None:
        self._offsets: dict[Series, int] = {}
        self._of_queues = of_queues
        self._widths: dict[Series, int] = {}
        width = 0
        for family, labels in series:
            self._offsets[family.name, labels] = width
            self._widths[family.name, labels] = _width(family)
            width += _width(family)
        self._queues = width
        width += QUEUES * _width(of_queues)
        self._width = width
        memory = memoryview(mmap.mmap(-1, PLACES + PLACES * width * 8))
        self._used = memory[:PLACES]
        self._numbers = memory[PLACES:].cast("d")
        self._names = memoryview(mmap.mmap(-1, PLACES * QUEUES * NAME_BYTES))
        # The place of the main process, which its children leave alone.
        self.take(PLACES - 1)

    def take(self, place: int) -> None:
        """Count in this place from now on: after a fork, in the child."""
        self._mutex = threading.Lock()  # the parent's may have been held by a thread of its own
        self._place = place % PLACES
        self._start = self._place * self._width
        self._slots = {name: slot for slot, name in enumerate(self._queue_names(self._place))}
        self._used[self._place] = 1
        for (name, _), offset in self._offsets.items():
            if name == THREADS_FAILING.name:  # the threads went with the child before
                self._numbers[self._start + offset] = 0.0

    def _queue_names(self, place: int) -> list[str]:
        """The queues that were counted in this place, in the order of their numbers."""
        start = place * QUEUES * NAME_BYTES
        block = bytes(self._names[start : start + QUEUES * NAME_BYTES])
        cells = [block[at : at + NAME_BYTES] for at in range(0, len(block), NAME_BYTES)]
        return [cell.rstrip(b"\0").decode(errors="replace") for cell in cells if cell[0]]

    def _slot(self, queue: str) -> int:
        """Where a queue is counted; the last one is for all that find no place."""
        if queue not in self._slots:
            name = queue if len(self._slots) < QUEUES - 1 else "other"
            if name not in self._slots:
                at = (self._place * QUEUES + len(self._slots)) * NAME_BYTES
                written = name.encode()[:NAME_BYTES]
                # The first byte says that there is a name: whoever is killed before has none.
                self._names[at + 1 : at + len(written)] = written[1:]
                self._names[at] = written[0]
                self._slots[name] = len(self._slots)
            return self._slots[name]
        return self._slots[queue]

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        offset = self._offsets.get((family.name, labels))
        if offset is not None:  # else of a plan that this app does not have
            with self._mutex:
                self._numbers[self._start + offset] += amount

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        offset = self._offsets.get((family.name, labels))
        if offset is None or family.bounds is None:
            return
        start = self._start + offset
        with self._mutex:
            self._numbers[start + bisect_left(family.bounds, value)] += 1
            self._numbers[start + len(family.bounds) + 1] += value

    def observe_queue(self, value: float, queue: str) -> None:
        """Put a value into the histogram of a queue."""
        bounds = self._of_queues.bounds or ()
        with self._mutex:
            start = self._start + self._queues + self._slot(queue) * _width(self._of_queues)
            self._numbers[start + bisect_left(bounds, value)] += 1
            self._numbers[start + len(bounds) + 1] += value

    def _read_queues(self, used: Iterable[int]) -> Mapping[Series, Sequence[float]]:
        width = _width(self._of_queues)
        found: dict[Series, list[float]] = {}
        for place in used:
            for slot, name in enumerate(self._queue_names(place)):
                start = place * self._width + self._queues + slot * width
                numbers = self._numbers[start : start + width].tolist()
                sums = found.setdefault((self._of_queues.name, (name,)), [0.0] * width)
                sums[:] = map(sum, zip(sums, numbers, strict=True))
        return found

    def read(self) -> Mapping[Series, Sequence[float]]:
        used = [place for place in range(PLACES) if self._used[place]]
        rows = [
            self._numbers[place * self._width : (place + 1) * self._width].tolist()
            for place in used
        ]
        sums = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * self._width
        fixed = {
            series: sums[offset : offset + self._widths[series]]
            for series, offset in self._offsets.items()
        }
        return {**fixed, **self._read_queues(used)}


def _metric(family: Family, series: Mapping[Labels, Sequence[float]]) -> Metric:
    metric: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
    if family.bounds is not None:
        metric = HistogramMetricFamily(family.name, family.text, labels=family.labels)
        for labels, numbers in sorted(series.items()):
            below, buckets = 0.0, []
            for bound, number in zip((*family.bounds, "+Inf"), numbers, strict=False):
                below += number
                buckets.append((bound if isinstance(bound, str) else repr(bound), below))
            metric.add_metric(labels, buckets, sum_value=numbers[-1])
        return metric
    if family.name.endswith("_total"):
        metric = CounterMetricFamily(family.name, family.text, labels=family.labels)
    else:
        metric = GaugeMetricFamily(family.name, family.text, labels=family.labels)
    for labels, numbers in sorted(series.items()):
        metric.add_metric(labels, numbers[0])
    return metric


class WorkerCounts:
    """What the executors of a worker do. Called as their observer."""

    FAMILIES: ClassVar[tuple[Family, ...]] = (
        RUNS_FINISHED,
        RUN_DURATION,
        QUEUE_WAIT,
        STEP_DURATION,
        STEP_ATTEMPTS,
        LEASE_LOST,
        THREAD_FAILURES,
        THREADS_FAILING,
    )
    THREADS: ClassVar[tuple[str, ...]] = (
        "heartbeat",
        "watchdog",
        "keeper",
        "announcement",
        "grace",
    )

    def __init__(self, plans: Iterable[Plan]) -> None:
        self.active = False
        self.counts = SharedCounts(self._series(list(plans)), QUEUE_WAIT)

    @staticmethod
    def _series(plans: Sequence[Plan]) -> Iterator[tuple[Family, Labels]]:
        yield from ((family, ()) for family in (RUN_DURATION, LEASE_LOST))
        for family in (THREAD_FAILURES, THREADS_FAILING):
            yield from ((family, (thread,)) for thread in WorkerCounts.THREADS)
        for plan in plans:
            yield from ((RUNS_FINISHED, (plan.name, outcome)) for outcome in OUTCOMES)
            for step in (*plan.steps, *([plan.on_cancel] if plan.on_cancel else ())):
                yield STEP_DURATION, (plan.name, step.name)
                for outcome in (*ENDS.values(), "snoozed"):
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
            case ThreadFailed(thread=thread, first=first):
                self.counts.add(THREAD_FAILURES, (thread,))
                if first:
                    self.counts.add(THREADS_FAILING, (thread,))
            case ThreadRecovered(thread=thread):
                self.counts.add(THREADS_FAILING, (thread,), -1)

    def failing(self) -> list[str]:
        """Which threads of this worker and its children have failed, and not worked since."""
        return sorted(
            labels[0]
            for (name, labels), numbers in self.counts.read().items()
            if name == THREADS_FAILING.name and numbers[0] > 0
        )

    def _settled(self, signal: Settled) -> None:
        plan = signal.lease.run.plan
        for event in signal.events:
            outcome = ENDS.get(event.type)
            if outcome is None and event.type == EventType.DEBUG_TRACE:
                outcome = "snoozed" if signal.reason == "snooze" else None
            if outcome is None or event.step is None:
                continue
            step = event.step.partition("#")[0]
            self.counts.add(STEP_ATTEMPTS, (plan, step, outcome))
            if signal.duration_s is not None:
                self.counts.observe(STEP_DURATION, signal.duration_s, (plan, step))
        if signal.state.final:
            self.counts.add(RUNS_FINISHED, (plan, signal.state.value))
            self.counts.observe(RUN_DURATION, signal.lease.seconds)


class RelayCounts:
    """What a relay publishes, and what wakes it. Called as its observer.

    It looks at the messages only if it is `active`: that somebody will ask.

    Every start of a run, and every run that was cancelled before a worker had it, passes here once,
    whoever wrote it: that is why they are counted here.
    """

    FAMILIES: ClassVar[tuple[Family, ...]] = (
        RUNS_STARTED,
        RUNS_FINISHED,
        REDISPATCH,
        PUBLISHED,
        FAILURES,
        LATENCY,
        WAKEUPS,
        LISTENER_UP,
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
        for source in ("notify", "timer", "broker", "reconnect", "watchdog"):
            self.counts.declare(WAKEUPS, (source,))
        for thread in ("relay", "courier", "chores"):
            self.counts.declare(THREAD_FAILURES, (thread,))
            self.counts.declare(THREADS_FAILING, (thread,))
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
            case RelayWoke(source=source):
                self.counts.add(WAKEUPS, (source,))
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
        begun = Counter(
            batch[place : batch.index(b'"', batch.index(QUEUE, place) + len(QUEUE))]
            for place in _places(batch, STARTED)
        )
        for names, runs in begun.items():
            plan, _, queue = names.decode().partition(QUEUE.decode())
            self.counts.add(RUNS_STARTED, (self._known(plan), self._queue(queue)), runs)
        for place in _places(batch, CANCELLED):
            plan = batch[place : batch.index(b'"', place)].decode()
            self.counts.add(RUNS_FINISHED, (self._known(plan), RunState.CANCELLED.value))
        now = self.clock()
        for place in {index * (len(rows) - 1) // (SAMPLES - 1) for index in range(SAMPLES)}:
            if written := TIME.search(rows[place].body):
                self.counts.observe(LATENCY, max(0.0, now - int(written[1]) / 1000))

    def _known(self, plan: str) -> str:
        return plan if plan in self._plans else "other"

    def _queue(self, queue: str) -> str:
        if len(self._queues) < QUEUES:
            self._queues.add(queue)
        return queue if queue in self._queues else "other"


def _places(batch: bytes, pattern: bytes) -> Iterator[int]:
    """Where something begins that follows the pattern."""
    place = batch.find(pattern)
    while place >= 0:
        yield place + len(pattern)
        place = batch.find(pattern, place + len(pattern))


class StreamCounts:
    """What the streams of a process do. Called as their observer."""

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


class PostgresGauges:
    """What only Postgres knows, in one statement, at most every `FRESH_SECONDS`.

    Without an answer it gives nothing: an old number would hide the trouble.
    """

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        schema: str,
        *,
        plans: Iterable[str] = (),
        wanted: Callable[[], bool],
    ) -> None:
        """`wanted` tells whether it is this process that shall export them now."""
        self.wanted = wanted
        self._plans = list(plans)
        self._engine = engine
        self._mutex = threading.Lock()
        self._asked_at = float("-inf")
        self._answer: Sequence[Any] | None = None
        self._offset = 0.0
        s = schema
        self._sql = f"""
SELECT extract(epoch FROM clock_timestamp())::float8, pg_notification_queue_usage(),
       {outbox_lag(s)},
       (SELECT jsonb_agg(jsonb_build_array(queue, state, runs)) FROM (
          SELECT queue, CASE WHEN state = 'running' THEN state
                             WHEN state <> 'sent' AND due_at > clock_timestamp() THEN 'delayed'
                             ELSE 'queued' END AS state, count(*) AS runs
            FROM {s}.dispatches GROUP BY 1, 2) t),
       (SELECT jsonb_object_agg(task, runs) FROM (
          SELECT task, count(*) AS runs FROM {s}.dispatches
           WHERE reason = '{UNKNOWN_STEP}' GROUP BY 1) t)"""

    def now(self) -> float:
        """Postgres' time in seconds since the epoch, as far as the last scrape tells."""
        return time() + self._offset

    def collect(self) -> Iterator[Metric]:
        """Nothing if another process shall export them, or if Postgres does not answer."""
        if not self.wanted():
            return
        with self._mutex:
            if monotonic() >= self._asked_at + FRESH_SECONDS:
                self._answer = self._ask()
                self._asked_at = monotonic()
            answer = self._answer
        if answer is None:
            return
        _, usage, pending, age, letters, active, unknown = answer
        yield _metric(NOTIFY_QUEUE, {(): [usage]})
        yield _metric(PENDING, {(): [pending]})
        yield _metric(OLDEST_AGE, {(): [age or 0.0]})
        yield _metric(DEAD_LETTERS, {(): [letters]})
        yield _metric(RUNS_ACTIVE, _capped(active or []))
        counts = dict.fromkeys(self._plans, 0) | (unknown or {})
        yield _metric(RUNS_UNKNOWN_STEP, {(plan,): [runs] for plan, runs in counts.items()})

    def forget(self) -> None:
        """Ask Postgres at the next scrape, however young the last answer is."""
        with self._mutex:
            self._asked_at = float("-inf")

    def _ask(self) -> Sequence[Any] | None:
        began = time()
        try:
            with self._engine.begin() as connection:
                execute(connection, "SET LOCAL statement_timeout = '2s'", {})
                began = time()
                answer: Sequence[Any] = execute(connection, self._sql, {})[0]
        except Exception as error:  # whatever it is: what this process counts itself is told
            reason = (
                str(getattr(error, "orig", None) or error).strip() or repr(error)
            ).splitlines()[0]
            logger.warning(
                "metrics of Postgres cannot be read",
                extra={"action": "metrics_failed", "reason": reason},
            )
            return None
        self._offset = answer[0] - (began + time()) / 2
        return answer


def _capped(active: Sequence[tuple[str, str, int]]) -> dict[Labels, list[float]]:
    """Counts by queue and state; beyond so many queues, those with the fewest runs together."""
    sizes: dict[str, int] = {}
    for queue, _, runs in active:
        sizes[queue] = sizes.get(queue, 0) + runs
    named = set(sorted(sizes, key=lambda queue: (-sizes[queue], queue))[:QUEUES])
    found: dict[Labels, list[float]] = {}
    for queue, state, runs in active:
        found.setdefault((queue if queue in named else "other", state), [0.0])[0] += runs
    return found


class Part(Protocol):
    """An observer that counts."""

    FAMILIES: ClassVar[tuple[Family, ...]]
    active: bool
    """Whether this process does such work: only then are its counts exposed."""

    @property
    def counts(self) -> Counts: ...


class Metrics(Collector):
    """The counts of one app in one process. A part is exposed once the process does such work.

    `registry` is prometheus_client's: serve it with `start_http_server(port, registry=…)` or its
    WSGI and ASGI apps, where your own process follows streams or runs a relay.
    """

    def __init__(self, plans: Sequence[Plan], engine: sqlalchemy.Engine, schema: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.worker = WorkerCounts(plans)
        self.streams = StreamCounts()
        self.relay = RelayCounts([plan.name for plan in plans])
        self.postgres = PostgresGauges(
            engine,
            schema,
            plans=[plan.name for plan in plans],
            wanted=lambda: 0 in self.relay.shards,
        )
        self.relay.clock = self.postgres.now

    def collect(self) -> Iterator[Metric]:
        """Called by the registry. What several parts count is added up."""
        facts = {"version": metadata.version("beatless"), "python": platform.python_version()}
        yield InfoMetricFamily("beatless_build", "The version that runs here.", facts)
        parts: tuple[Part, ...] = (self.worker, self.streams, self.relay)
        found: dict[str, tuple[Family, dict[Labels, list[float]]]] = {}
        for part in (part for part in parts if part.active):
            read = part.counts.read()
            for family in part.FAMILIES:
                _, series = found.setdefault(family.name, (family, {}))
                for (name, labels), numbers in read.items():
                    if name == family.name:
                        before = series.get(labels, [0.0] * len(numbers))
                        series[labels] = [a + b for a, b in zip(before, numbers, strict=True)]
        for family, series in found.values():
            yield _metric(family, series)
        yield from self.postgres.collect()


def listen(registry: CollectorRegistry, host: str, port: int) -> WSGIServer:
    """Serve a registry on /metrics from a thread until `shutdown` and `server_close`.

    Port 0 takes a free one; it is in `server_port`. Raises BadSetting.
    """
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        problem = f"is {port}, and {loopback.url(host, port)} cannot be served: {error.strerror}"
        raise BadSetting("BEATLESS_METRICS_PORT", problem, "9464") from error
    logger.info(
        "metrics are served",
        extra={"action": "metrics", "url": f"{loopback.url(host, server.server_port)}/metrics"},
    )
    return server
