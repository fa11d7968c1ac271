"""Serves metrics with prometheus_client, which only a process that is scraped imports."""

import logging
import socket
from collections.abc import Callable, Iterator
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from beatless import loopback
from beatless.errors import BadSetting

logger = logging.getLogger("beatless.metrics")


class Collected(Collector):
    """A collector of what a function gives at each scrape."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def registry_of(collect: Callable[[], Iterator[Metric]]) -> CollectorRegistry:
    """A registry of the metrics that the function gives."""
    registry = CollectorRegistry()
    registry.register(Collected(collect))
    return registry


def check_port(host: str, port: int) -> None:
    """Raises BadSetting if `listen` could not serve on this port now."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself
            tried.bind(address)
            tried.listen()
    except OSError as error:
        raise _not_served(host, port, error) from error


def listen(registry: CollectorRegistry, host: str, port: int) -> WSGIServer:
    """Serve a registry on /metrics from a thread until `shutdown` and `server_close`.

    Port 0 takes a free one; it is in `server_port`. Raises BadSetting.
    """
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise _not_served(host, port, error) from error
    logger.info(
        "metrics are served",
        extra={"action": "metrics", "url": f"{loopback.url(host, server.server_port)}/metrics"},
    )
    return server


def _not_served(host: str, port: int, error: OSError) -> BadSetting:
    problem = f"is {port}, and {loopback.url(host, port)} cannot be served: {error.strerror}"
    return BadSetting("BEATLESS_METRICS_PORT", problem, "9464")
