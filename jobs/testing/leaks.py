"""Leaks of a test outside of its own names: in Postgres, in Redis, and as messages.

Keys, messages and tables have no author: the first worker that sees one reports it, with the tests
that ran beside its own (ADR 0024). Data of others is never touched.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import psycopg
import redis
import sqlalchemy
from sqlalchemy import make_url

from beatless.auth import api_tokens
from beatless.outbox.adapters import Cursor
from beatless.testing.names import OF_A_KIT, WorkerName
from beatless.testing.neighbours import Neighbours
from beatless.testing.redis_stores import RedisStores
from beatless.testing.servers import Services

ANYWHERE = (
    *("[^t]*", "t[^_]*", "t_[^gm]*", "t_g[^w]*", "t_gw[^0-9]*"),
    *("t_m[^a]*", "t_ma[^i]*", "t_mai[^n]*", "t_main[^_x]*"),
)
"""Every channel but those of tests, on which other workers publish all the time."""

HEAR_TIMEOUT_S = 60
"""The wait for what Redis has still to tell. What came later would be told of the next test."""

WRITE = re.compile(r'INSERT INTO "?(\w+)"?\.run_outbox\b')
"""Part of every statement that writes an event."""

OBJECTS = """
WITH schemas AS MATERIALIZED (
  SELECT oid, nspname AS name FROM pg_namespace
   WHERE nspname !~ '^(pg_|information_schema$)' AND (nspname !~ %(kit)s OR nspname ~ %(left)s)
), members AS MATERIALIZED (
  SELECT name, d.classid, d.objid FROM schemas
   CROSS JOIN LATERAL (SELECT classid, objid FROM pg_depend
                        WHERE refclassid = 'pg_namespace'::regclass AND refobjid = schemas.oid
                       OFFSET 0) d
   WHERE NOT EXISTS (SELECT 1 FROM pg_depend e WHERE e.deptype = 'e' AND e.objid = d.objid
                        AND e.classid = d.classid)
), objects AS (
  SELECT 'schema' AS kind, name, '' AS object FROM schemas
  UNION ALL
  SELECT CASE relkind WHEN 'S' THEN 'sequence' WHEN 'v' THEN 'view' WHEN 'm' THEN 'view'
                      ELSE 'table' END, name, relname
    FROM members JOIN pg_class c ON c.oid = objid
   WHERE members.classid = 'pg_class'::regclass
  UNION ALL
  SELECT 'function', name, proname FROM members JOIN pg_proc p ON p.oid = objid
   WHERE members.classid = 'pg_proc'::regclass
  UNION ALL
  SELECT 'type', name, typname
    FROM members JOIN pg_type y ON y.oid = objid AND typtype IN ('c', 'd', 'e', 'r')
   WHERE members.classid = 'pg_type'::regclass
)
SELECT kind, concat_ws('.', name, nullif(object, '')) FROM objects
 -- Other things that others make on servers of theirs are not ours to judge.
 WHERE %(ours)s OR name ~ %(left)s
    OR name = 'beatless' AND kind <> 'schema' OR name = 'public' AND object = ANY(%(tables)s)
"""
"""All objects outside of the schemas that the kit gives to tests, as these depend on their schemas.

Objects of extensions are left out: a database has each extension once, for all tests.
"""


def objects(
    connection: psycopg.Connection[Any], name: WorkerName, *, everybody: bool = False
) -> set[str]:
    """The tables outside of the kit's schemas, and the leftovers in a schema named after us.

    `everybody`: also in schemas of others.
    """
    rows = connection.execute(
        OBJECTS.encode(),
        {
            "ours": everybody,
            "kit": rf"^{OF_A_KIT.pattern}",
            "left": rf"^(t_{name.worker}_|s_{name.worker}_\d+_(?!own$))",
            "tables": [table.name for table in api_tokens.metadata.sorted_tables],
        },
    )
    return {f"the {kind} {found}" for kind, found in rows}


class ForeignWrites:
    """Writes of this process to the runs of another schema than the test's, as they happen.

    Seen on the SQLAlchemy engines and on our own cursors: rows have no author, and others write
    there meanwhile.
    """

    def __init__(self, database_url: str, name: WorkerName) -> None:
        self._url = make_url(database_url)
        self._name = name
        self._own_schema = ""
        self._found: set[str] = set()
        sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", self._look)

        before = self._executes = Cursor.execute

        def execute(cursor: Cursor, query: Any, *given: Any, **options: Any) -> Cursor:
            before(cursor, query, *given, **options)
            info = cursor.connection.info
            statement = query.decode() if isinstance(query, bytes) else str(query)
            self._note(statement, lambda: (info.host, info.port, info.dbname))
            return cursor

        Cursor.execute = execute  # type: ignore[method-assign, assignment]

    def begin(self) -> None:
        """A test begins, without a schema yet."""
        self._found.clear()

    def allow(self, schema: str) -> None:
        """The test writes to this schema; to "": to none any more."""
        self._own_schema = schema

    def found(self) -> list[str]:
        """The names written since the test began."""
        return sorted(self._found)

    def close(self) -> None:
        """Look no more."""
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", self._look)
        Cursor.execute = self._executes  # type: ignore[method-assign]

    def _look(
        self,
        connection: sqlalchemy.Connection,
        _cursor: Any,
        statement: str,
        _parameters: Any,
        _context: Any,
        _many: bool,
    ) -> None:
        url = connection.engine.url
        self._note(statement, lambda: (url.host, url.port, url.database))

    def _note(self, statement: str, server: Callable[[], tuple[Any, ...]]) -> None:
        if not (found := WRITE.search(statement)) or found[1] == self._own_schema:
            return
        here = self._url
        if server() != (here.host, here.port, here.database):
            return  # a server of the test's own
        if self._name.owns_schema(found[1]) or not OF_A_KIT.match(found[1]):
            self._found.add(f"a write to the runs in the schema {found[1]}")


class LeakDetector:
    """Compares the objects after a test with those before."""

    def __init__(
        self,
        services: Services,
        name: WorkerName,
        *,
        connection: psycopg.Connection[Any],
        stores: RedisStores,
        neighbours: Neighbours,
        allowed: Sequence[str],
    ) -> None:
        """`allowed` are patterns of keys and channels that a test may leave, as shop:*."""
        self._services = services
        self._name = name
        self._connection = connection
        self._stores = stores
        self._neighbours = neighbours
        self._allowed = allowed
        self._ends = itertools.count(1)
        self._reported = self._objects()
        self._ear = self._listening()
        self.heard()
        self.writes = ForeignWrites(services.database_url, name)

    def left_outside(self, prefix: str) -> list[str]:
        """Leaks outside of this test's names. Each is reported once and left in place.

        The test's own keys are removed.
        """
        # On servers that others use too, only names that this worker made can be judged.
        pattern = "*" if self._services.ours else self._name.prefixes
        own = re.compile(rf"{re.escape(prefix)}[:.]")
        found = self._objects()
        keys = self._stores.sweep(pattern, own)
        found |= {f"the Redis key {name}" for name in keys if self._judged(name)}
        channels = {name for name in self.heard() if not own.match(name)}
        found |= {f"a message on {name}" for name in channels if self._judged(name)}
        new = sorted(found - self._reported)
        self._reported |= {leak for leak in new if not leak.startswith("a message")}
        return self.writes.found() + [leak for leak in new if self._neighbours.first_to_tell(leak)]

    def _listening(self) -> redis.client.PubSub:
        """Receives publishes under this worker's names, and under none of any test."""
        ear: redis.client.PubSub = self._stores.events.pubsub()  # type: ignore[no-untyped-call]
        ear.psubscribe(self._name.prefixes, *(ANYWHERE if self._services.ours else ()))
        return ear

    def heard(self) -> set[str]:
        """The channels that something was published on since the last call.

        As far as Redis has kept it: it ends the connection of who has too much to read.
        """
        # Numbered: patterns overlap for some names of workers, and then it is heard twice.
        end, number = f"{self._name.prefix(0)}:end", str(next(self._ends)).encode()
        self._stores.events.publish(end, number)
        channels = set()
        try:
            while message := self._ear.get_message(timeout=HEAR_TIMEOUT_S):
                if message["type"] != "pmessage":
                    continue
                channel = message["channel"].decode()
                if channel != end:
                    channels.add(channel)
                elif message["data"] == number:
                    break
        except redis.ConnectionError:
            self._ear.close()
            self._ear = self._listening()
        return channels

    def close(self) -> None:
        """Look and listen no more."""
        self.writes.close()
        self._ear.close()

    def _objects(self) -> set[str]:
        return objects(self._connection, self._name, everybody=self._services.ours)

    def _judged(self, name: str) -> bool:
        """Whether a key or channel can only be a test's."""
        if any(fnmatchcase(name, pattern) for pattern in self._allowed):
            return False
        return self._name.owns_key(name) or (
            self._services.ours and not re.match(r"t_\w+?_\d+[:.]", name)
        )
