"""The isolation of one xdist worker's tests, from each other and from those of others."""

import itertools
import re
from collections.abc import Sequence

import psycopg

from beatless.settings import libpq_url
from beatless.testing.leaks import LeakDetector, objects
from beatless.testing.names import WorkerName
from beatless.testing.neighbours import Neighbours
from beatless.testing.redis_stores import RedisStores
from beatless.testing.schemas import SchemaPool, Tables
from beatless.testing.servers import Services

LOCK_TIMEOUT_S = 15
"""The wait for the locks of a schema that is emptied, while sessions of its test end."""


class Isolation:
    """Schemas, names and leaks of the tests of one xdist worker."""

    def __init__(
        self, services: Services, worker: str, *, session: str = "", allowed: Sequence[str] = ()
    ) -> None:
        """`session` is known to all xdist workers that run beside this one, and to no others.

        `allowed` are patterns of keys and channels that a test may leave, as shop:*.
        """
        self.services = services
        self.connection = psycopg.connect(libpq_url(services.database_url), autocommit=True)
        self.connection.execute(f"SET lock_timeout TO '{LOCK_TIMEOUT_S}s'")
        self.stores = RedisStores(services)
        self.name = WorkerName(worker, self.connection, self.stores)
        # Leaks of a killed session would be taken for our tests' doing.
        self.stores.remove(self.name.prefixes)
        self.neighbours = Neighbours(self.stores.events, session, self.name.worker)
        taken = any(
            " public." in found for found in objects(self.connection, self.name, everybody=True)
        )
        self.schemas = SchemaPool(
            self.connection, services.database_url, self.name, search_public=not taken
        )
        self.leaks = LeakDetector(
            services,
            self.name,
            connection=self.connection,
            stores=self.stores,
            neighbours=self.neighbours,
            allowed=allowed,
        )
        self._numbers = itertools.count(1)
        self._tests: dict[str, str] = {}

    def begin(self, test: str) -> str:
        """A prefix for the test of this name."""
        self.leaks.writes.begin()
        self.neighbours.begin(test)
        prefix = self.name.prefix(next(self._numbers))
        self._tests[prefix] = test
        return prefix

    def attributed(self, leak: str) -> str:
        """The leak, with the earlier test of this worker that its name belongs to."""
        prefix = re.search(rf"\bt_{re.escape(self.name.worker)}_\d+(?=[:.])", leak)
        test = self._tests.get(prefix[0]) if prefix else None
        return leak if test is None else f"{leak}, a name of {test}, which had ended"

    def take(self, tables: Tables | None = None) -> str:
        """A schema for the test whose tables are empty, with the tables of `tables`."""
        schema = self.schemas.take(tables)
        self.leaks.writes.allow(schema)
        return schema

    def end(self) -> None:
        """The test has ended."""
        self.leaks.writes.allow("")
        self.neighbours.end()

    def close(self) -> None:
        """Give back all that the worker holds."""
        self.leaks.close()
        self.schemas.close()
        self.name.release()
        self.connection.close()
        self.stores.close()
