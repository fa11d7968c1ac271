"""Names that only one test has, made of the name of its xdist worker and a number.

`t_<worker>_<number>` starts the keys, channels, queues and run ids of a test, `s_<worker>_<number>`
is a schema, recycled from test to test. The worker's name is held against other sessions.
"""

import re
from typing import Any

import psycopg

from beatless.testing.redis_stores import RedisStores, end_subscription

OF_A_KIT = re.compile(r"[st]_.+_\d+")
"""Starts the names of schemas that a kit makes, this one or that of another session."""


def own_tables(schema: str) -> str:
    """Beside a test's schema there is one for the tables of the code under test."""
    return f"{schema}_own"


class WorkerName:
    """The name of one xdist worker, which no other session on the same servers uses meanwhile.

    An advisory lock holds it in Postgres. Sessions with another database may use the same Redis:
    there a subscription holds it, which ends with its session too.
    """

    def __init__(
        self, wanted: str, connection: psycopg.Connection[Any], stores: RedisStores
    ) -> None:
        """A number is added to a name that is taken."""
        self._connection = connection
        self._stores = stores
        self._holds: list[Any] = []
        self.worker = self._claim_next(wanted)

    def prefix(self, number: int) -> str:
        """The prefix of a test's names."""
        return f"t_{self.worker}_{number}"

    def schema(self, number: int) -> str:
        """The name of a schema of the pool."""
        return f"s_{self.worker}_{number}"

    @property
    def prefixes(self) -> str:
        """The pattern of all keys and channels of this worker's tests."""
        return f"t_{self.worker}_*"

    def owns_schema(self, name: str) -> bool:
        """Whether it is a schema of this worker's pool."""
        return re.fullmatch(rf"s_{re.escape(self.worker)}_\d+", name) is not None

    def owns_key(self, name: str) -> bool:
        """Whether it is a key or channel of one of this worker's tests."""
        return re.match(rf"t_{re.escape(self.worker)}_\d+[:.]", name) is not None

    def release(self) -> None:
        """Let other sessions have the name.

        Explicitly, not by the end of the session, which the server notices later.
        """
        for hold in self._holds:
            end_subscription(hold)
        self._connection.execute("SELECT pg_advisory_unlock_all()")

    def _claim_next(self, wanted: str) -> str:
        for number in range(1, 1000):
            name = wanted if number == 1 else f"{wanted}x{number}"
            if self._claim(name):
                return name
        raise AssertionError("other sessions hold every name that this session could have")

    def _claim(self, name: str) -> bool:
        key = ("beatless tests", name)
        row = self._connection.execute(
            "SELECT pg_try_advisory_lock(hashtext(%s), hashtext(%s))", key
        ).fetchone()
        if row != (True,):
            return False
        # Channels are the server's, keys the database's.
        wanted = [(self._stores.events, f"t_{name}_0:session")]
        wanted += [
            (client, f"t_{name}_0:keys-{number}") for client, number in self._stores.databases
        ]
        holds: list[Any] = []
        for client, channel in wanted:
            hold: Any = client.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
            holds.append(hold)
            hold.subscribe(channel)
            hold.get_message(timeout=5)  # it holds from now on
            ((_, holders),) = client.pubsub_numsub(channel)
            if holders > 1:
                break
        else:
            self._holds = holds
            return True
        for hold in holds:
            end_subscription(hold)
        self._connection.execute("SELECT pg_advisory_unlock(hashtext(%s), hashtext(%s))", key)
        return False
