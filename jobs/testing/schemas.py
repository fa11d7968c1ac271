"""Migrated schemas for tests, recycled, so that a test costs milliseconds.

Beside each schema of runs there is one for the tables of the code under test.
"""

import itertools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psycopg
import sqlalchemy
from sqlalchemy import make_url

from beatless.auth import api_tokens
from beatless.migrations import migrate
from beatless.outbox.message import SHARDS
from beatless.outbox.tables import history
from beatless.schema import VERSION_TABLE
from beatless.settings import engine_url, libpq_url
from beatless.testing.names import WorkerName, own_tables

Tables = Callable[[sqlalchemy.Connection], object]
"""Makes the tables of the code under test."""

SHAPE = """
WITH spaces AS MATERIALIZED (
  SELECT oid, nspname FROM pg_namespace WHERE nspname = ANY(%s)
), members AS MATERIALIZED (
  SELECT nspname, d.classid, d.objid FROM spaces
   CROSS JOIN LATERAL (SELECT classid, objid FROM pg_depend
                        WHERE refclassid = 'pg_namespace'::regclass AND refobjid = spaces.oid
                       OFFSET 0) d
), types AS MATERIALIZED (
  SELECT nspname, y.* FROM members
   CROSS JOIN LATERAL (SELECT oid, typrelid, xmin FROM pg_type WHERE oid = objid OFFSET 0) y
   WHERE classid = 'pg_type'::regclass
), tables AS MATERIALIZED (
  SELECT nspname, objid AS oid FROM members WHERE classid = 'pg_class'::regclass
  UNION ALL
  SELECT nspname, typrelid FROM types WHERE typrelid <> 0
), indexes AS MATERIALIZED (
  SELECT nspname, i.* FROM tables
   CROSS JOIN LATERAL (SELECT indexrelid, xmin FROM pg_index WHERE indrelid = tables.oid OFFSET 0) i
), relations AS MATERIALIZED (
  SELECT nspname, oid FROM tables UNION ALL SELECT nspname, indexrelid FROM indexes
), facts AS (
  SELECT nspname, concat_ws(' ', 'space', oid) AS fact FROM spaces
  UNION ALL
  -- Not its xmin: TRUNCATE changes it.
  SELECT nspname, concat_ws(' ', 'class', c.*) FROM relations
   CROSS JOIN LATERAL (SELECT oid, relname, relnatts, relpersistence, reloptions, relacl, relowner,
                              relrowsecurity FROM pg_class WHERE oid = relations.oid OFFSET 0) c
  UNION ALL
  SELECT nspname, concat_ws(' ', 'column', relations.oid, a.*) FROM relations
   CROSS JOIN LATERAL (SELECT attnum, xmin FROM pg_attribute
                        WHERE attrelid = relations.oid OFFSET 0) a
  UNION ALL
  SELECT nspname, concat_ws(' ', 'index', i.indexrelid, i.xmin) FROM indexes i
  UNION ALL
  SELECT nspname, concat_ws(' ', d.*) FROM tables CROSS JOIN LATERAL (
    (SELECT 'default', oid, xmin FROM pg_attrdef WHERE adrelid = tables.oid)
    UNION ALL (SELECT 'sequence', seqrelid, xmin FROM pg_sequence WHERE seqrelid = tables.oid)
    UNION ALL (SELECT 'trigger', oid, xmin FROM pg_trigger WHERE tgrelid = tables.oid)
    UNION ALL (SELECT 'rule', oid, xmin FROM pg_rewrite WHERE ev_class = tables.oid)
    UNION ALL (SELECT 'constraint', oid, xmin FROM pg_constraint WHERE conrelid = tables.oid)
    OFFSET 0) d
  UNION ALL
  SELECT nspname, concat_ws(' ', 'function', f.*) FROM members
   CROSS JOIN LATERAL (SELECT oid, xmin FROM pg_proc WHERE oid = objid OFFSET 0) f
   WHERE classid = 'pg_proc'::regclass
  UNION ALL
  SELECT nspname, concat_ws(' ', 'type', oid, xmin) FROM types
  UNION ALL
  SELECT nspname, concat_ws(' ', 'domain', n.*) FROM types
   CROSS JOIN LATERAL (SELECT oid, xmin FROM pg_constraint WHERE contypid = types.oid OFFSET 0) n
)
SELECT nspname, sum(hashtextextended(fact, 0)) FROM facts GROUP BY nspname
"""
"""A fingerprint of a schema's objects beside its rows.

Found from the schema by its dependencies, each by an index: the catalogs have the objects of all
workers, and are read at the end of each test.
"""

ROWS = """
SELECT oid::regclass::text FROM pg_class
 WHERE relnamespace = %s::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
"""

USED = """
SELECT oid::regclass::text FROM pg_class
 WHERE oid = ANY(%s::regclass[]) AND (reltuples >= 0 OR pg_relation_size(oid) > 0)
"""
"""The tables written to or analysed. TRUNCATE makes new files for each, and for its indexes."""

NUMBERS = """
SELECT setval(seqrelid, seqstart, false) FROM pg_sequence JOIN pg_class ON oid = seqrelid
 WHERE relnamespace = '"{}"'::regnamespace"""
"""Sequences begin anew; RESTART IDENTITY would take those of runs with them."""


TRIES = 10
"""How often a schema is emptied whose sessions wait for each other's locks.

Each takes Postgres a second to see; the sessions that did not wait for us then have what they need.
"""


class SchemaPool:
    """The schemas of one xdist worker."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        database_url: str,
        name: WorkerName,
        *,
        search_public: bool,
    ) -> None:
        """`search_public`: sessions of a test find extensions, and no tables, in `public`."""
        self._connection = connection
        self._database_url = database_url
        self._name = name
        self._behind = ",public" if search_public else ""
        self._numbers = itertools.count(1)
        self._free: list[str] = []
        self._abandoned: list[str] = []
        self._shapes: dict[str, Any] = {}
        self._tables: dict[str, Tables | None] = {}

    def url(self, schema: str) -> str:
        """The search path of the test's sessions, for tables without a schema.

        Extensions are in `public`, which comes behind the test's own, unless others have tables
        there: those would be found, changed and dropped in place of the test's.
        """
        return search(self._database_url, own_tables(schema) + self._behind)

    def take(self, tables: Tables | None = None) -> str:
        """A schema whose tables are empty, and beside it one with those that `tables` makes."""
        fitting = [name for name in self._free if self._tables[name] == tables]
        schema = (fitting or self._free or [self._make()])[-1]
        if schema in self._free:
            self._free.remove(schema)
        if self._tables[schema] != tables:
            self._make_own(schema, tables)
        return schema

    def _make(self) -> str:
        schema = self._name.schema(next(self._numbers))
        engine = sqlalchemy.create_engine(engine_url(self._database_url))
        self._drop(schema)
        migrate(engine, schema)
        engine.dispose()
        self._make_own(schema, None)
        return schema

    def _make_own(self, schema: str, tables: Tables | None) -> None:
        own = own_tables(schema)
        self._connection.execute(
            f'DROP SCHEMA IF EXISTS "{own}" CASCADE; CREATE SCHEMA "{own}"'.encode()
        )
        self._tables[schema] = None
        if tables is not None:
            engine = sqlalchemy.create_engine(engine_url(self.url(schema)))
            try:
                with engine.begin() as connection:
                    tables(connection)
            except BaseException:
                self._abandoned.append(schema)
                raise
            finally:
                engine.dispose()
        self._tables[schema] = tables
        self._shapes[schema] = self._shape(schema)

    def _shape(self, schema: str) -> Any:
        """Everything of a test's schemas that emptying their tables does not undo."""
        names = [schema, own_tables(schema)]
        shape: dict[str, Any] = dict(self._connection.execute(SHAPE.encode(), (names,)).fetchall())
        version = f'SELECT version_num FROM "{schema}".{VERSION_TABLE}'
        try:
            shape[VERSION_TABLE] = self._connection.execute(version.encode()).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.errors.LockNotAvailable):
            shape[VERSION_TABLE] = None
        return shape

    def _drop(self, schema: str) -> None:
        for name in (schema, own_tables(schema)):
            self._connection.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())

    def give_back(self, schema: str) -> list[str]:
        """Empty the schema for the next test, or report the sessions that still hold locks in it.

        One in which a test has made, changed or dropped something is dropped.
        """
        made, found = self._shapes[schema], self._shape(schema)
        own = own_tables(schema)
        same = all(found.get(name) == made[name] for name in (schema, VERSION_TABLE))
        kept = self._tables[schema] is not None and found.get(own) == made[own]
        for tried in range(1, TRIES + 1):
            try:
                if not same:
                    self._drop(schema)
                elif kept or found.get(own) == made[own]:
                    self._empty(schema, own if kept else None)
                else:
                    self._connection.execute(f'DROP SCHEMA IF EXISTS "{own}" CASCADE'.encode())
                    self._empty(schema, None)
                    self._make_own(schema, None)
                break
            except psycopg.errors.DeadlockDetected:
                # With the last statement of a process that was killed within it: it ends now.
                if tried == TRIES:
                    raise
            except psycopg.errors.LockNotAvailable:
                self._abandoned.append(schema)
                return self._holders(schema)
        if same:
            self._free.append(schema)
        return []

    def _empty(self, schema: str, own: str | None) -> None:
        """Empty the tables of runs, and those in `own`. Raises LockNotAvailable."""
        runs = [
            f'"{schema}".{table.name}'
            for table in api_tokens.metadata.sorted_tables
            if table is not history
        ]
        execute = self._connection.execute
        beside = [name for (name,) in execute(ROWS.encode(), (own,))] if own else []
        with self._connection.transaction():
            # A connection that was closed a moment ago still holds its locks: all are awaited.
            execute(
                "SELECT pg_advisory_xact_lock(key::oid::int4, shard) FROM generate_series(-1, "
                f"{SHARDS}) AS shard, unnest(ARRAY['\"{schema}\".run_outbox'::regclass, "
                f"'\"{schema}\".dispatches'::regclass]) AS key; "
                f"LOCK TABLE {', '.join(runs + beside)}".encode()
            )
            # Tables beside them may refer to each other, and to runs: they are emptied at once.
            if used := [name for (name,) in execute(USED.encode(), (runs,))] + beside:
                execute(f"TRUNCATE {', '.join(used)}".encode())
            if own:
                execute(NUMBERS.format(own).encode())

    def _holders(self, schema: str) -> list[str]:
        rows = self._connection.execute(
            """
SELECT a.application_name, a.state, a.query FROM pg_stat_activity a
 WHERE a.pid <> pg_backend_pid() AND a.backend_type = 'client backend' AND a.pid IN (
   SELECT l.pid FROM pg_locks l LEFT JOIN pg_class c ON c.oid IN (l.relation, l.classid)
    WHERE c.relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname IN (%s, %s)))""",
            (schema, own_tables(schema)),
        ).fetchall()
        return [
            f"a session of {name!r} ({state}) with a lock in the test's schema, last: {query[:200]}"
            for name, state, query in rows
        ]

    def close(self) -> None:
        """Drop the schemas, but for those in use."""
        for schema in (*self._free, *self._abandoned):
            # A locked schema may be so still; the next session drops it then.
            with suppress(psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                self._drop(schema)


def search(url: str, path: str) -> str:
    """The URL of sessions that look for tables without a schema in this path, and make them there.

    Settings of the URL itself stay.
    """
    found = make_url(url)
    given = found.query.get("options", ())
    options = [given] if isinstance(given, str) else given
    return libpq_url(
        found.update_query_dict({"options": " ".join([*options, f"-csearch_path={path}"])})
    )
