"""Gauges whose values stand in Postgres, read when they are scraped."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import time
from typing import TYPE_CHECKING, Any

import sqlalchemy

from beatless.observe.families import (
    DEAD_LETTERS,
    LIMIT_OLDEST,
    LIMIT_RUNS,
    MAX_LIMIT_SERIES,
    MAX_QUEUE_SERIES,
    NOTIFY_QUEUE,
    OLDEST_AGE,
    PENDING,
    QUEUE_GROUPS,
    QUEUE_LARGEST_GROUP,
    QUEUE_OLDEST_DUE,
    QUEUE_WORKERS,
    RUNS_ACTIVE,
    RUNS_UNKNOWN_STEP,
    SCHEDULE_LAST_FIRED,
    SCHEDULE_LATE,
    SCHEDULES_STOPPED,
    Labels,
)
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP
from beatless.orchestrator.queues import PRESENCE_EXPIRES_S, QueueStatements
from beatless.outbox.clock import monotonic
from beatless.outbox.message import SHARDS
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements

if TYPE_CHECKING:
    from prometheus_client.core import Metric

logger = logging.getLogger("beatless.metrics")

CACHE_S = 5.0
"""How long an answer of Postgres is reused: scrapes are more frequent than changes."""

UNHEARD_S = PRESENCE_EXPIRES_S
"""How long after a start of Postgres it is not known which workers are there: those that were there
before tell it within this time."""

TIMEOUT_S = 2.0
"""How long Postgres may take to answer; then a scrape has no gauges."""


class PostgresGauges:
    """The gauges of one schema, read at most every `CACHE_S`.

    Without an answer there are none: an old number would hide the trouble.
    """

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        schema: str,
        *,
        plans: Iterable[str] = (),
        schedules: Iterable[str] = (),
        limits: Iterable[str] = (),
        wanted: Callable[[], bool],
    ) -> None:
        """`wanted` returns whether this process shall expose them now."""
        self.wanted = wanted
        self._plans = list(plans)
        self._schedules = list(schedules)
        self._limits = list(limits)
        self._engine = engine
        self._mutex = threading.Lock()
        self._asked_at = float("-inf")
        self._answer: Sequence[Any] | None = None
        self._offset = 0.0
        self._sql = statements(
            __file__,
            schema,
            last_shard=SHARDS - 1,
            presence_expires_s=PRESENCE_EXPIRES_S,
            unheard_s=UNHEARD_S,
        )
        self._queues = QueueStatements(schema)

    def now(self) -> float:
        """Postgres' time in seconds since the epoch, by its offset at the last scrape."""
        return time() + self._offset

    def collect(self) -> Iterator["Metric"]:
        """The metrics; none if another process exposes them, or if Postgres does not answer."""
        if not self.wanted():
            return
        with self._mutex:
            if monotonic() >= self._asked_at + CACHE_S:
                self._answer = self._ask()
                self._asked_at = monotonic()
            answer = self._answer
        if answer is None:
            return
        _, usage, pending, age, letters, active, groups, limits, unknown, *rest = answer
        workers, unheard, late, stopped, fired, ages = rest
        yield NOTIFY_QUEUE.metric({(): [usage]})
        yield PENDING.metric({(): [pending]})
        yield OLDEST_AGE.metric({(): [age or 0.0]})
        yield DEAD_LETTERS.metric({(): [letters]})
        yield SCHEDULE_LATE.metric({(): [max(0.0, late or 0.0)]})
        yield SCHEDULES_STOPPED.metric({(): [stopped]})
        yield SCHEDULE_LAST_FIRED.metric({(name,): [at] for name, at in (fired or {}).items()})
        named = _named(active or [])
        yield RUNS_ACTIVE.metric(found := _counts(active or [], named))
        yield QUEUE_OLDEST_DUE.metric(_greatest(ages, named))
        yield from _grouped(groups or [], named)
        yield from _limited([*((name, 0, 0, 0.0) for name in self._limits), *(limits or [])])
        consumed = {queue: (workers or {}).get(queue, 0) for queue, _ in found if queue != "other"}
        yield QUEUE_WORKERS.metric(
            {
                (queue,): [count]
                for queue, count in consumed.items()
                if count or queue not in (unheard or [])
            }
        )
        counts = dict.fromkeys(self._plans, 0) | (unknown or {})
        yield RUNS_UNKNOWN_STEP.metric({(plan,): [runs] for plan, runs in counts.items()})

    def forget(self) -> None:
        """Ask Postgres at the next scrape, however recent the last answer is."""
        with self._mutex:
            self._asked_at = float("-inf")

    def _ask(self) -> Sequence[Any] | None:
        began = time()
        try:
            with self._engine.begin() as connection:
                execute(connection, f"SET LOCAL statement_timeout = '{TIMEOUT_S:g}s'", {})
                began = time()
                snapshot: Sequence[Any] = execute(
                    connection,
                    self._sql["snapshot"],
                    {"unknown": [UNKNOWN_STEP, CHANGED_CALL], "schedules": self._schedules},
                )[0]
                ended = time()
                ages = self._queues.oldest_due(connection)
        except Exception as error:  # any error: this process's own counts are exposed
            reason = (
                str(getattr(error, "orig", None) or error).strip() or repr(error)
            ).splitlines()[0]
            logger.warning(
                "metrics of Postgres cannot be read",
                extra={"action": "metrics_failed", "reason": reason},
            )
            return None
        self._offset = snapshot[0] - (began + ended) / 2
        return [*snapshot, ages]


def _named(active: Sequence[tuple[str, str, int]], most: int = MAX_QUEUE_SERIES) -> frozenset[str]:
    """The queues, or limits, that get a series of their own: those with the most runs."""
    sizes: dict[str, int] = {}
    for queue, _, runs in active:
        sizes[queue] = sizes.get(queue, 0) + runs
    return frozenset(sorted(sizes, key=lambda queue: (-sizes[queue], queue))[:most])


def _counts(
    active: Sequence[tuple[str, str, int]], named: frozenset[str]
) -> dict[Labels, list[float]]:
    """Counts by queue and state, the sum of the queues without a series as `other`."""
    found: dict[Labels, list[float]] = {}
    for queue, state, runs in active:
        found.setdefault((queue if queue in named else "other", state), [0.0])[0] += runs
    return found


def _greatest(
    numbers: Sequence[tuple[str, float]], named: frozenset[str]
) -> dict[Labels, list[float]]:
    """By queue, or limit, the greatest number of those without a series as `other`."""
    found: dict[Labels, list[float]] = {}
    for name, number in numbers:
        greatest = found.setdefault((name if name in named else "other",), [0.0])
        greatest[0] = max(greatest[0], number)
    return found


def _grouped(groups: Sequence[tuple[str, int, int]], named: frozenset[str]) -> Iterator["Metric"]:
    """The groups of each queue by their number, and the largest: no group has a series."""
    counts: dict[Labels, list[float]] = {}
    for queue, count, _ in groups:
        counts.setdefault((queue if queue in named else "other",), [0.0])[0] += count
    yield QUEUE_GROUPS.metric(counts)
    yield QUEUE_LARGEST_GROUP.metric(_greatest([(queue, most) for queue, _, most in groups], named))


def _limited(limits: Sequence[tuple[str, int, int, float]]) -> Iterator["Metric"]:
    """The runs of each limit by its name: no key has a series."""
    states = [(name, "running", running) for name, running, _, _ in limits]
    states += [(name, "waiting", waiting) for name, _, waiting, _ in limits]
    named = _named(states, MAX_LIMIT_SERIES)
    yield LIMIT_RUNS.metric(_counts(states, named))
    yield LIMIT_OLDEST.metric(_greatest([(name, age) for name, _, _, age in limits], named))
