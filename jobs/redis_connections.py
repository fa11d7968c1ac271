"""Connections of redis-py: their credentials, their pools, and the role of their server."""

import asyncio
from typing import Any

import redis
from redis.asyncio import sentinel
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.sentinel import SentinelConnectionPool

from beatless.credentials import Password, ask


class RedisCredentials(CredentialProvider):
    """The credential provider that redis-py calls at each connect."""

    def __init__(self, username: str | None, password: Password) -> None:
        self._username = username
        self._password = password

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        found = ask(self._password, RedisConnectionError)
        return (self._username, found) if self._username else (found,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return await asyncio.to_thread(self.get_credentials)


class SentinelPool(SentinelConnectionPool):
    """Closes its connections to the Sentinels too, which redis-py leaves to the collector."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        for each in self.sentinel_manager.sentinels:
            each.connection_pool.disconnect()


class AsyncSentinelPool(sentinel.SentinelConnectionPool):
    """`SentinelPool` for asyncio."""

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        for each in self.sentinel_manager.sentinels:
            await each.connection_pool.disconnect()


def is_cluster(client: "redis.Redis") -> bool:
    """Whether the server is a node of a Redis Cluster; False if it does not report it."""
    try:
        facts: Any = client.info("cluster")
    except redis.ResponseError:
        return False  # the user may not ask
    return bool(facts.get("cluster_enabled"))


def is_replica(client: "redis.Redis") -> bool:
    """Whether the server follows another one; False if it does not report it."""
    try:
        facts: Any = client.info("replication")
    except redis.ResponseError:
        return False  # the user may not ask
    return bool(facts.get("role") == "slave")
