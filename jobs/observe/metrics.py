"""Exposes the counts of a process to Prometheus. Reads Postgres only when it is scraped.

Names and meanings: docs/metrics.md.
"""

import logging
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import ClassVar, Protocol
from wsgiref.simple_server import WSGIServer

import sqlalchemy
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from beatless import loopback
from beatless.errors import BadSetting
from beatless.observe.counters import RelayCounters, StreamCounters, WorkerCounters
from beatless.observe.counts import Counts
from beatless.observe.families import Family, Labels
from beatless.observe.gauges import PostgresGauges
from beatless.orchestrator.plan import Plan

logger = logging.getLogger("beatless.metrics")


class Counters(Protocol):
    """An observer that counts signals."""

    FAMILIES: ClassVar[tuple[Family, ...]]
    active: bool
    """Whether this process does such work: its counts are exposed only then."""

    @property
    def counts(self) -> Counts: ...


class Metrics(Collector):
    """The metrics of one app in one process: of the kinds of work that the process does.

    `registry` is prometheus_client's: serve it with `start_http_server(port, registry=…)` or its
    WSGI and ASGI apps, where your own process follows streams or runs a relay.
    """

    def __init__(self, plans: Sequence[Plan], engine: sqlalchemy.Engine, schema: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.worker = WorkerCounters(plans)
        self.streams = StreamCounters()
        self.relay = RelayCounters([plan.name for plan in plans])
        self.postgres = PostgresGauges(
            engine,
            schema,
            plans=[plan.name for plan in plans],
            wanted=lambda: 0 in self.relay.shards,
        )
        self.relay.clock = self.postgres.now

    def collect(self) -> Iterator[Metric]:
        """All metrics. Called by the registry. Series of the same family are added up."""
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
