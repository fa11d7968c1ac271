"""Messages between the xdist workers of one session, in Redis: their tests, and leaks found."""

from typing import Any

import redis

FORGOTTEN_AFTER_S = 86_400


class Neighbours:
    """The other xdist workers of a session, if there are any."""

    def __init__(self, client: "redis.Redis", session: str, worker: str) -> None:
        """`session` is known to all its workers, and to no other process; "" has one worker."""
        self._redis = client
        self._session = session
        self._worker = worker
        self._running = f"t_{session}_0:running"
        self._told = f"t_{session}_0:told"

    def begin(self, test: str) -> None:
        """This worker is at that test."""
        if self._session:
            with self._redis.pipeline() as together:
                together.hset(self._running, self._worker, test)
                together.expire(self._running, FORGOTTEN_AFTER_S)
                together.execute()

    def end(self) -> None:
        """This worker is at no test."""
        if self._session:
            self._redis.hdel(self._running, self._worker)

    def running(self) -> list[str]:
        """The tests that the other workers are at."""
        if not self._session:
            return []
        found: Any = self._redis.hgetall(self._running)
        return sorted(
            test.decode() for worker, test in found.items() if worker != self._worker.encode()
        )

    def first_to_tell(self, leak: str) -> bool:
        """Whether no worker beside this one has reported the leak: they all see the same."""
        if not self._session:
            return True
        self._redis.hsetnx(self._told, leak, self._worker)
        self._redis.expire(self._told, FORGOTTEN_AFTER_S)
        return self._redis.hget(self._told, leak) == self._worker.encode()
