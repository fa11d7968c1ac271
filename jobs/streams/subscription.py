"""A blocking subscription to one run's Redis channel, or to those of all runs."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from beatless.orchestrator.events import EventText
from beatless.outbox import forks
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.message import run_of
from beatless.streams.messages import parse, why_without_redis

logger = logging.getLogger("beatless.stream")

SUBSCRIBE_TIMEOUT_S = 5.0
"""How long a stream waits for Redis to acknowledge its subscription."""

MESSAGES_AT_ONCE = 500
"""Messages that are taken together if they are there."""

MIN_REDIS_TIMEOUT_S = 0.05
"""How long even a stream whose time is over waits for Redis to answer."""


class Subscription:
    """One blocking subscription to one run. Knows when it may have missed something."""

    def __init__(
        self, client: Callable[[], "redis.Redis"], channel: str, *, of_all_runs: bool = False
    ) -> None:
        """`of_all_runs`: the channel is the pattern of all channels, for `messages`."""
        self._client = client
        self._channel = channel
        self._of_all_runs = of_all_runs
        self._pubsub: Any = None
        self._redis: redis.Redis | None = None
        self._backoff = Backoff(initial=0.5, cap=2.0)
        self._failures = 0
        self._told = ""
        self._retry_at = 0.0
        self._forked = False
        self._inherited: tuple[Any, ...] = ()
        forks.watch(self)

    def after_fork(self) -> None:
        # Kept, not dropped: redis-py takes a lock when one is no more referenced, and a thread that
        # is not here may hold it. The parent's connection is its own: here it is used by nobody.
        self._inherited = (self._pubsub, self._redis)
        self._pubsub = self._redis = None
        self._forked = True

    def ensure(self, patience: float = SUBSCRIBE_TIMEOUT_S) -> bool:
        """Subscribe, if we are not, and wait for the acknowledgement; False without Redis.

        Also while the channel is not known.
        """
        if self._pubsub is not None:
            return True
        self._forked = False
        if not self._channel:
            return False
        if monotonic() < self._retry_at:
            return False
        try:
            self._redis = self._client()
            # Without retries a lost connection is an error; with them redis-py reconnects in
            # silence, and events published meanwhile would be missed without a trace.
            options = self._redis.connection_pool.connection_kwargs
            options["retry"] = Retry(NoBackoff(), 0)
            for name in ("socket_connect_timeout", "socket_timeout"):
                if options.get(name):  # 0 would not mean soon, but without waiting at all
                    options[name] = min(options[name], max(MIN_REDIS_TIMEOUT_S, patience))
            pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
            (pubsub.psubscribe if self._of_all_runs else pubsub.subscribe)(self._channel)
            while (message := pubsub.get_message(timeout=patience)) is not None:
                if message["type"] in ("subscribe", "psubscribe"):
                    self._pubsub, self._failures, self._told = pubsub, 0, ""
                    return True
        except (RedisError, OSError) as error:
            reason = why_without_redis(error)
            if reason != self._told:  # once for each outage, not with each try
                logger.warning(
                    "%s, stream reads the journal",
                    reason,
                    extra={"action": "stream_without_redis", "reason": str(error)},
                )
                self._told = reason
        self.close()
        self._failures += 1
        self._retry_at = monotonic() + self._backoff.delay(self._failures)
        return False

    def move(self, channel: str) -> bool:
        """Listen there instead; False if it does already."""
        if channel == self._channel:
            return False
        self.close()
        self._channel = channel
        return True

    def next(self, timeout: float) -> list[EventText] | None:
        """The next message's events; [] after `timeout` seconds; None if one may be lost."""
        message = self._receive(timeout)
        if message is None:
            return None
        return parse(message["data"], run_of(self._channel)) if message else []

    def messages(self, timeout: float) -> list[tuple[str, bytes]] | None:
        """The channel and body of each message that is there, [] and None as of `next`."""
        found: list[tuple[str, bytes]] = []
        while len(found) < MESSAGES_AT_ONCE:
            message = self._receive(0 if found else timeout)
            if message is None:
                return None
            if not message:
                break
            found.append(channel_and_body(message))
        return found

    def probe(self, timeout: float) -> list[tuple[str, bytes]] | None:
        """`messages` after a question that Redis answers with one; None without an answer too.

        A Redis that is stopped, or gone without a word, closes nothing.
        """
        if self._pubsub is not None:
            try:
                self._pubsub.ping()
            except (RedisError, OSError):
                self.close()
                return None
        found = self.messages(timeout)
        if found == []:
            self.close()
            return None
        return found

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        """The next message; an empty one after `timeout` seconds; None if one may be lost."""
        if self._pubsub is None:
            if not self._forked:
                threading.Event().wait(max(0.0, timeout))
            return None
        try:
            message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout)
        except (RedisError, OSError):
            self.close()
            return None
        return message or {}

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
        if self._redis is not None:
            self._redis.close()
        self._pubsub = self._redis = None


def channel_and_body(message: dict[str, Any]) -> tuple[str, bytes]:
    """Those of a message; an answer to `probe` has no channel."""
    return (message["channel"] or b"").decode(errors="replace"), message["data"]
