"""The Redis servers of a session of tests: who else uses one, and which keys are a test's."""

import re
import uuid
from collections.abc import Mapping
from contextlib import closing, suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from beatless.redis_urls import RedisUrl
from beatless.settings import REDIS, Settings
from beatless.testing.servers import Services

OWN_BROKER: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5}
"""Options of a client for the broker of one test, which may be away."""


class RedisStores:
    """A client for each Redis that the tests of a session use: for events, and as a broker."""

    def __init__(self, services: Services) -> None:
        urls = sorted({services.redis_url, services.broker_url})
        self._clients = {url: client_of(url) for url in urls if url.startswith(REDIS)}
        self.events = self._clients[services.redis_url]
        self.databases = databases(self._clients)
        """(client, number) of each database, once."""

    def remove(self, pattern: str) -> None:
        """Remove the keys that match, wherever they are."""
        for client in self._clients.values():
            remove_keys(client, pattern)

    def sweep(self, pattern: str, own: re.Pattern[str]) -> set[str]:
        """Remove the keys of one test, and no others; the others that match the pattern."""
        return {name for client in self._clients.values() for name in sweep(client, pattern, own)}

    def clean_own_broker(self, settings: Settings) -> None:
        """Remove all under a test's prefix in a Redis that only its settings name."""
        if settings.redis_broker is None or settings.broker_url in self._clients:
            return
        client = client_of(settings.broker_url, retry=Retry(NoBackoff(), 0), **OWN_BROKER)
        # One that is away has nothing that a test could take.
        with suppress(redis.ConnectionError, redis.TimeoutError):
            remove_keys(client, f"{settings.prefix}[:.]*")
        client.close()

    def close(self) -> None:
        """Close the clients."""
        for client in self._clients.values():
            client.close()


def client_of(url: str, **options: Any) -> "redis.Redis":
    """A client of the Redis with this URL."""
    return RedisUrl.parse(url).client(**options)


def databases(clients: "Mapping[str, redis.Redis]") -> "list[tuple[redis.Redis, int]]":
    """(client, number) of each database, once: several URLs may name the same one."""
    found: list[tuple[redis.Redis, int]] = []
    for url, client in clients.items():
        number = RedisUrl.parse(url).db
        if not any(number == other and same_server(client, one) for one, other in found):
            found.append((client, number))
    return found


def same_server(one: "redis.Redis", other: "redis.Redis") -> bool:
    """Whether both are clients of one server, under any names.

    INFO has its id, which not every user may ask for and not every server has.
    """
    channel = f"t_{uuid.uuid4().hex}_0:same"
    with closing(one.pubsub()) as hold:  # type: ignore[no-untyped-call]  # redis-py's gap
        hold.subscribe(channel)
        hold.get_message(timeout=5)  # it holds from now on
        ((_, holders),) = other.pubsub_numsub(channel)
    return bool(holders)


def sweep(client: "redis.Redis", pattern: str, own: re.Pattern[str]) -> set[str]:
    """Remove the keys of one test, and no others; the others that match the pattern."""
    names = {key: key.decode(errors="replace") for key in client.scan_iter(pattern, count=10_000)}
    if mine := [key for key, name in names.items() if own.match(name)]:
        client.unlink(*mine)
    return {name for name in names.values() if not own.match(name)}


def remove_keys(client: "redis.Redis", pattern: str) -> None:
    """Remove the keys that match."""
    if keys := list(client.scan_iter(match=pattern, count=10_000)):
        client.unlink(*keys)


def end_subscription(hold: Any) -> None:
    """End a subscription, and wait until the server has."""
    hold.unsubscribe()
    while (heard := hold.get_message(timeout=5)) and heard["type"] != "unsubscribe":
        pass
    hold.close()
