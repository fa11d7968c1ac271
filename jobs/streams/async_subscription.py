"""An asynchronous subscription to the Redis channels of all runs, for one task."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.streams.cancellation import kept_cancellation
from beatless.streams.messages import why_without_redis
from beatless.streams.subscription import (
    MESSAGES_AT_ONCE,
    SUBSCRIBE_TIMEOUT_S,
    channel_and_body,
)

logger = logging.getLogger("beatless.stream")


class AsyncSubscription:
    """`Subscription` to the channels of all runs for asyncio. Knows when one may be lost."""

    def __init__(self, client: Callable[[], "aioredis.Redis"], pattern: str) -> None:
        self._client = client
        self._pattern = pattern
        self._redis: aioredis.Redis | None = None
        self._pubsub: Any = None
        self._backoff = Backoff(initial=0.5, cap=2.0)
        self._failures = 0
        self._told = ""
        self._retry_at = 0.0

    async def ensure(self) -> bool:
        """Subscribe, if we are not, and wait for the acknowledgement; False without Redis."""
        if self._pubsub is not None:
            return True
        if monotonic() < self._retry_at:
            return False
        reason = "Redis gives no answer"
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
                self._redis = self._client()
                # As in `Subscription`: with retries a lost connection is replaced in silence.
                self._redis.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
                pubsub = self._redis.pubsub()
                with kept_cancellation():
                    await pubsub.psubscribe(self._pattern)
                while (message := await pubsub.get_message(timeout=None)) is not None:
                    if message["type"] == "psubscribe":
                        self._pubsub, self._failures, self._told = pubsub, 0, ""
                        return True
        except (RedisError, OSError) as error:  # a TimeoutError is an OSError
            reason = why_without_redis(error)
            if reason != self._told:  # once for each outage, not with each try
                logger.warning(
                    "%s, stream reads the journal",
                    reason,
                    extra={"action": "stream_without_redis", "reason": str(error)},
                )
                self._told = reason
        await self.aclose()
        self._failures += 1
        self._retry_at = monotonic() + self._backoff.delay(self._failures)
        return False

    async def messages(self, timeout: float) -> list[tuple[str, bytes]] | None:
        """The channel and body of each message that is there.

        [] after `timeout` seconds; None if one may be lost, and after them without Redis.
        """
        if self._pubsub is None:
            await asyncio.sleep(max(0.0, timeout))
            return None
        found: list[tuple[str, bytes]] = []
        try:
            while len(found) < MESSAGES_AT_ONCE:
                message = await self._pubsub.get_message(
                    ignore_subscribe_messages=True, timeout=0 if found else max(0.0, timeout)
                )
                if message is None:
                    break
                found.append(channel_and_body(message))
        except (RedisError, OSError):
            await self.aclose()
            return None
        return found

    async def probe(self, timeout: float) -> list[tuple[str, bytes]] | None:
        """`messages` after a question that Redis answers with one; None without an answer too."""
        if self._pubsub is not None:
            try:
                with kept_cancellation():
                    await self._pubsub.ping()
            except (RedisError, OSError):
                await self.aclose()
                return None
        found = await self.messages(timeout)
        if found == []:
            await self.aclose()
            return None
        return found

    async def aclose(self) -> None:
        """Close the connection."""
        pubsub, client, self._pubsub, self._redis = self._pubsub, self._redis, None, None
        if pubsub is not None:
            await pubsub.aclose()
        if client is not None:
            await client.aclose()
