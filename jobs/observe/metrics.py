"""Exposes the counts of a process to Prometheus. Reads Postgres only when it is scraped.

Names and meanings: docs/metrics.md.
"""

import platform
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, ClassVar, Protocol

import sqlalchemy

from beatless.observe.counters import RelayCounters, StreamCounters, WorkerCounters
from beatless.observe.counts import Counts
from beatless.observe.families import Family, Labels
from beatless.observe.gauges import PostgresGauges
from beatless.orchestrator.plan import Plan

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric


class Counters(Protocol):
    """An observer that counts signals."""

    FAMILIES: ClassVar[tuple[Family, ...]]
    active: bool
    """Whether this process does such work: its counts are exposed only then."""

    @property
    def counts(self) -> Counts: ...


class Metrics:
    """The metrics of one app in one process: of the kinds of work that the process does.

    `registry` is prometheus_client's: serve it with `start_http_server(port, registry=…)` or its
    WSGI and ASGI apps, where your own process follows streams or runs a relay.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        engine: sqlalchemy.Engine,
        schema: str,
        *,
        schedules: Sequence[str] = (),
    ) -> None:
        """`schedules` are the names of those that have a series of their own."""
        self.worker = WorkerCounters(plans)
        self.streams = StreamCounters()
        self.relay = RelayCounters([plan.name for plan in plans])
        self.postgres = PostgresGauges(
            engine,
            schema,
            plans=[plan.name for plan in plans],
            schedules=schedules,
            limits=[each.name for plan in plans for each in plan.all_limits],
            wanted=lambda: 0 in self.relay.shards,
        )
        self.relay.clock = self.postgres.now

    @cached_property
    def registry(self) -> "CollectorRegistry":
        """The registry of prometheus_client, which calls `collect`; made at its first use."""
        from beatless.observe.exposition import registry_of  # only who is scraped needs it

        return registry_of(self.collect)

    def collect(self) -> Iterator["Metric"]:
        """All metrics. Series of the same family are added up."""
        from prometheus_client.core import InfoMetricFamily

        facts = {"version": metadata.version("beatless"), "python": platform.python_version()}
        yield InfoMetricFamily("beatless_build", "Versions of beatless and Python.", facts)
        counters: tuple[Counters, ...] = (self.worker, self.streams, self.relay)
        found: dict[str, tuple[Family, dict[Labels, list[float]]]] = {}
        for each in (each for each in counters if each.active):
            read = each.counts.read()
            for family in each.FAMILIES:
                _, series = found.setdefault(family.name, (family, {}))
                for (name, labels), numbers in read.items():
                    if name == family.name:
                        before = series.get(labels, [0.0] * len(numbers))
                        series[labels] = [a + b for a, b in zip(before, numbers, strict=True)]
        for family, series in found.values():
            yield family.metric(series)
        yield from self.postgres.collect()
