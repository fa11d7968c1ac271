"""The metrics: name, HELP text, labels and buckets of each. Their meanings: docs/metrics.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.core import Metric

Labels = tuple[str, ...]

MAX_QUEUE_SERIES = 100
"""Queues that get a series of their own; the others share `other`: a start may name any."""

MAX_LIMIT_SERIES = 100
"""Limits that get a series of their own; the others share `other`."""

SAMPLES_PER_BATCH = 4
"""Rows of one batch whose latency is measured, evenly spread from the first to the last."""

TASK_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0,
)  # fmt: skip
PUBLISH_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric: a histogram if it has buckets, a counter if its name ends with `_total`."""

    name: str
    text: str
    """Its HELP."""
    labels: tuple[str, ...] = ()
    buckets_s: tuple[float, ...] | None = None
    """The upper bounds of a histogram's buckets, in seconds."""

    @property
    def width(self) -> int:
        """Numbers of one series: of a histogram a bucket each, the one above all, and the sum."""
        return 1 if self.buckets_s is None else len(self.buckets_s) + 2

    def metric(self, series: Mapping[Labels, Sequence[float]]) -> "Metric":
        """The family for prometheus_client, of `width` numbers for each series."""
        from prometheus_client.core import (  # only who is scraped needs it
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        metric: CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily
        if self.buckets_s is not None:
            metric = HistogramMetricFamily(self.name, self.text, labels=self.labels)
            for labels, numbers in sorted(series.items()):
                below, buckets = 0.0, []
                for bound, number in zip((*self.buckets_s, "+Inf"), numbers, strict=False):
                    below += number
                    buckets.append((bound if isinstance(bound, str) else repr(bound), below))
                metric.add_metric(labels, buckets, sum_value=numbers[-1])
            return metric
        if self.name.endswith("_total"):
            metric = CounterMetricFamily(self.name, self.text, labels=self.labels)
        else:
            metric = GaugeMetricFamily(self.name, self.text, labels=self.labels)
        for labels, numbers in sorted(series.items()):
            metric.add_metric(labels, numbers[0])
        return metric


RUNS_STARTED = Family(
    name="beatless_runs_started_total",
    text="Runs started, counted when the relay publishes the committed start.",
    labels=("plan", "queue"),
)
RUNS_FINISHED = Family(
    name="beatless_runs_finished_total",
    text="Runs finished, by outcome.",
    labels=("plan", "outcome"),
)
RUN_DURATION = Family(
    name="beatless_run_duration_seconds",
    text="Seconds from a run's first claim to its end, waits between attempts included.",
    buckets_s=TASK_BUCKETS_S,
)
QUEUE_WAIT = Family(
    name="beatless_queue_wait_seconds",
    text="Seconds from the time a run became due to its claim by a worker.",
    labels=("queue",),
    buckets_s=TASK_BUCKETS_S,
)
STEP_DURATION = Family(
    name="beatless_step_duration_seconds",
    text="Duration of a step attempt in seconds, the commit of its outcome included.",
    labels=("plan", "step"),
    buckets_s=TASK_BUCKETS_S,
)
STEP_ATTEMPTS = Family(
    name="beatless_step_attempts_total",
    text="Step attempts, by outcome.",
    labels=("plan", "step", "outcome"),
)
LONG_HISTORIES = Family(
    name="beatless_long_histories_total",
    text="Claims that have read a history of many events: at a limit its run fails.",
    labels=("plan",),
)
LEASE_LOST = Family(
    name="beatless_lease_lost_total",
    text="Leases that expired and were taken over by another worker.",
)
LEASES_ENDED = Family(
    name="beatless_leases_ended_total",
    text="Leases that were ended at once, because the process that held them had died.",
    labels=("cause",),
)
THREAD_FAILURES = Family(
    name="beatless_thread_failures_total",
    text="Unexpected errors in background threads, each of which continued.",
    labels=("thread",),
)
THREADS_FAILING = Family(
    name="beatless_threads_failing",
    text="Background threads that have failed and not recovered since.",
    labels=("thread",),
)
REDISPATCH = Family(
    name="beatless_redispatch_total",
    text="Task messages after the first of a run, by reason.",
    labels=("reason",),
)
PUBLISHED = Family(
    name="beatless_outbox_published_total",
    text="Events and task messages published.",
    labels=("kind",),
)
FAILURES = Family(
    name="beatless_outbox_publish_failures_total",
    text="Batches that Redis or the broker rejected; they are retried.",
    labels=("kind",),
)
LATENCY = Family(
    name="beatless_outbox_publish_latency_seconds",
    text=(
        "Commit-to-publish latency in seconds, "
        f"sampled ({SAMPLES_PER_BATCH} per batch, always the oldest)."
    ),
    buckets_s=PUBLISH_BUCKETS_S,
)
WAKEUPS = Family(
    name="beatless_relay_wakeups_total",
    text="Wake-ups of the relay, by source.",
    labels=("source",),
)
LISTENER_UP = Family(
    name="beatless_relay_listener_up",
    text="1 while this relay receives notifications, else 0.",
)
STREAMS_OPEN = Family(name="beatless_streams_open", text="Streams followed in this process.")
STREAM_GAPS = Family(
    name="beatless_stream_gaps_total",
    text="Gaps in streams: a later event arrived before an earlier one.",
)
BACKFILL = Family(
    name="beatless_stream_backfill_events_total",
    text="Events that streams read from the journal instead of Redis, by reason.",
    labels=("reason",),
)
RUNS_ACTIVE = Family(
    name="beatless_runs_active",
    text="Unfinished runs by state: queued (due now), paused (due, but their queue is paused), "
    "delayed (due later), waiting, limited, running.",
    labels=("queue", "state"),
)
QUEUE_OLDEST_DUE = Family(
    name="beatless_queue_oldest_due_seconds",
    text="Seconds that the oldest due run of a queue has waited for a worker; none if paused.",
    labels=("queue",),
)
QUEUE_GROUPS = Family(
    name="beatless_queue_groups",
    text="Groups of a queue whose runs are due or in the broker, and share out its turns.",
    labels=("queue",),
)
QUEUE_LARGEST_GROUP = Family(
    name="beatless_queue_largest_group_runs",
    text="Runs that the group of a queue has which has the most that are due or in the broker.",
    labels=("queue",),
)
LIMIT_RUNS = Family(
    name="beatless_limit_runs",
    text="Runs of a limit, of all of its keys: running (they have a slot), waiting.",
    labels=("limit", "state"),
)
LIMIT_OLDEST = Family(
    name="beatless_limit_oldest_waiting_seconds",
    text="Seconds that the run has waited for a limit that waits the longest; 0 if none does.",
    labels=("limit",),
)
QUEUE_WORKERS = Family(
    name="beatless_queue_workers",
    text="Workers that consume a queue which has unfinished runs.",
    labels=("queue",),
)
RUNS_UNKNOWN_STEP = Family(
    name="beatless_runs_unknown_step",
    text="Unfinished runs at a step that the last worker's version of their plan does not have.",
    labels=("plan",),
)
SCHEDULE_TICKS = Family(
    name="beatless_schedule_ticks_total",
    text="Ticks of schedules, by outcome: started, skipped, missed, replacing, known, failed.",
    labels=("outcome",),
)
SCHEDULE_LATENESS = Family(
    name="beatless_schedule_lateness_seconds",
    text="Seconds from the time at which a tick was due to the start of its run.",
    buckets_s=PUBLISH_BUCKETS_S,
)
SCHEDULE_LATE = Family(
    name="beatless_schedule_late_seconds",
    text="Seconds that the oldest tick has been due which no relay has fired; 0 if there is none.",
)
SCHEDULES_STOPPED = Family(
    name="beatless_schedules_stopped",
    text="Schedules that are stopped, as a tick could not be written.",
)
SCHEDULE_LAST_FIRED = Family(
    name="beatless_schedule_last_fired_timestamp_seconds",
    text="When a schedule that the app declares has last started a run, since 1970.",
    labels=("schedule",),
)
PENDING = Family(name="beatless_outbox_pending", text="Appends whose events are not published yet.")
OLDEST_AGE = Family(
    name="beatless_outbox_oldest_age_seconds",
    text="Age of the oldest unpublished event in seconds; 0 if there is none.",
)
DEAD_LETTERS = Family(
    name="beatless_dead_letters", text="Dead letters: messages given up on and kept for inspection."
)
NOTIFY_QUEUE = Family(
    name="beatless_pg_notify_queue_usage_ratio",
    text="Usage of Postgres' notification queue, 0 to 1; at 1 commits that notify fail.",
)
