"""Brings a schema to the version that this code needs, while it is in use.

The DDL is plain SQL beside the revisions: `<revision>_<name>.pre.sql` is safe before the new code
runs, `.post.sql` only when no older code runs any more. Every statement names its tables without a
schema: `env.py` sets the search path, so the same files work in any schema.

A new schema is made in one transaction. One that is in use is changed one statement at a time, each
of which waits for its lock no longer than others can wait for it, and is tried again. The rules
for authors are in docs/migrations.md.
"""

import io
import logging
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import sqlalchemy
from alembic import command, op
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import exc

from beatless.errors import BadRequest, MigrationBlocked, SchemaTaken
from beatless.outbox.queries import execute
from beatless.schema import VERSIONS, check_encoding, current, head

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_MS = 200
"""How long a statement waits for its lock: later statements wait as long behind it."""

PAUSE_S = 0.5
"""Between two tries of a statement: those that waited behind it come first."""

TRIES = 240
"""So many tries are about three minutes. After them a person must look who holds the table."""

CONCURRENTLY = re.compile(
    r"(?P<create>CREATE (?:UNIQUE )?INDEX) CONCURRENTLY IF NOT EXISTS (?P<name>\w+)"
)

CREATED = re.compile(
    r"^CREATE (?:UNIQUE )?(?:TABLE|INDEX)(?: CONCURRENTLY)?(?: IF NOT EXISTS)? (\w+)", re.MULTILINE
)

FUNCTION = re.compile(r"^CREATE (?:OR REPLACE )?FUNCTION (\w+)", re.MULTILINE)

REPLACED = re.compile(r"replace\(before, \$text\$(.*?)\$text\$, \$text\$(.*?)\$text\$\)", re.DOTALL)
"""What a migration replaces in a function that an earlier one has made, and by what."""

BODY_OR_END = re.compile(r"(\$\$.*?\$\$|;[ \t]*\n)", re.DOTALL)

TABLE = re.compile(r"CREATE TABLE(?: IF NOT EXISTS)? (?P<name>\w+) \((?P<body>.*)\)", re.DOTALL)

HOLDERS = """
SELECT format('session %%s of %%s (%%s), in its transaction for %%s s', a.pid,
              coalesce(nullif(a.application_name, ''), a.usename), a.state,
              extract(epoch FROM clock_timestamp() - a.xact_start)::int)
  FROM pg_stat_activity a
 WHERE a.pid <> pg_backend_pid()
   AND a.pid IN (SELECT l.pid FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                  WHERE l.granted AND c.relnamespace = current_schema()::regnamespace)
 ORDER BY a.xact_start LIMIT 1"""


def _config(
    schema: str, connection: sqlalchemy.Connection | None, versions: Path | None, *, new: bool
) -> Config:
    config = Config()
    config.set_main_option("script_location", "beatless:migrations")
    config.set_main_option("path_separator", "newline")
    places = [str(VERSIONS), *([str(versions)] if versions else [])]
    config.set_main_option("version_locations", "\n".join(places).replace("%", "%%"))
    config.attributes |= {"schema": schema, "connection": connection, "new": new}
    return config


def last(versions: Path | None = None) -> str:
    """The newest revision, also one that must wait for the end of older code."""
    scripts = ScriptDirectory.from_config(_config("", None, versions, new=False))
    return scripts.get_current_head() or head()


def migrate(
    engine: sqlalchemy.Engine,
    schema: str,
    *,
    post: bool = False,
    versions: Path | None = None,
    tries: int = TRIES,
) -> str:
    """Create the schema or bring it to the version that this code needs; its revision then.

    Two at once wait for each other. `post` also runs revisions that must wait until no older code
    runs; `versions` is a directory with further revisions. The engine's sessions must be Postgres'
    own: a pooler in transaction mode loses their settings. Raises WrongEncoding, SchemaTaken, and
    MigrationBlocked if a table is held for minutes; finished revisions stay, and the next call
    continues from there.
    """
    target = last(versions) if post else head(versions)
    with engine.connect() as connection, _alone(connection, schema):
        check_encoding(connection)
        found = current(connection, schema)
        check_names(connection, schema, found, versions)
        connection.rollback()
        if found is None or found < target:
            config = _config(schema, connection, versions, new=found is None)
            config.attributes["tries"] = tries
            command.upgrade(config, target)
            found = target
    return found


def _is_ours(source: str, texts: Collection[str]) -> bool:
    """Whether one of these migrations has made a function with this body; others may change it."""
    for before, after in (pair for text in texts for pair in REPLACED.findall(text)):
        source = source.replace(after, before)
    return any(f"${source}$" in text for text in texts)


def check_names(
    connection: sqlalchemy.Connection, schema: str, found: str | None, versions: Path | None
) -> None:
    """Raises SchemaTaken if the schema has something of others under a name that is to be made.

    Tables of an interrupted migration have our columns, and functions our text. Asked before the
    first change: IF NOT EXISTS would take another's table for ours, and OR REPLACE its function.
    """
    places = [VERSIONS, *([versions] if versions else [])]
    texts = {file.name: file.read_text() for place in places for file in place.glob("*.sql")}
    tables = {name: columns for text in texts.values() for name, columns in _tables(text)}
    pending = [text for name, text in texts.items() if not found or name.partition("_")[0] > found]
    names = {name for text in pending for name in CREATED.findall(text)}
    functions = {name for text in pending for name in FUNCTION.findall(text)} - {
        name for text in texts.values() if text not in pending for name in FUNCTION.findall(text)
    }
    rows = execute(
        connection,
        "SELECT c.relname::text, ARRAY(SELECT a.attname::text FROM pg_attribute a "
        "WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped), t.relname::text "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "LEFT JOIN pg_index i ON i.indexrelid = c.oid LEFT JOIN pg_class t ON t.oid = i.indrelid "
        "WHERE n.nspname = %(schema)s AND c.relname = ANY(%(names)s) ORDER BY 1",
        {"schema": schema, "names": sorted(names)},
    )
    taken = [
        name
        for name, columns, indexed in rows
        # A new schema is made at once: nothing that is there is left of an interrupted migration.
        if not found
        or (indexed is None and not tables.get(name, {""}) <= set(columns))
        or (indexed is not None and indexed not in tables)
    ]
    rows = execute(
        connection,
        "SELECT t.typname::text, t.typname::text, NULL FROM pg_type t "
        "JOIN pg_namespace n ON n.oid = t.typnamespace "
        "WHERE n.nspname = %(schema)s AND t.typname = ANY(%(names)s) AND t.typrelid = 0 "
        "UNION ALL SELECT p.proname::text, p.proname || '()', p.prosrc FROM pg_proc p "
        "JOIN pg_namespace n ON n.oid = p.pronamespace "
        "WHERE n.nspname = %(schema)s AND p.proname = ANY(%(functions)s) ORDER BY 1",
        {"schema": schema, "names": sorted(names), "functions": sorted(functions)},
    )
    taken += [
        shown
        for _, shown, source in rows
        if not (found and source and _is_ours(source, texts.values()))
    ]
    if taken:
        raise SchemaTaken(schema, taken)


def _tables(text: str) -> Iterator[tuple[str, set[str]]]:
    """The tables that a file makes, with their columns."""
    for statement in statements(text):
        if made := TABLE.search(re.sub(r"--.*", "", statement)):
            body = made["body"].partition(") WITH (")[0]
            # Of `numeric(10, 2)` or a CHECK only the first part is at the outermost level.
            flat = re.sub(r"\([^()]*\)", "", re.sub(r"\([^()]*\)", "", body))
            first = [column.split()[0] for column in flat.split(",") if column.strip()]
            yield made["name"], {word for word in first if word.islower()}


@contextmanager
def _alone(connection: sqlalchemy.Connection, schema: str) -> Iterator[None]:
    """No other migration of this schema runs.

    Asked for again and again instead of waited for: CREATE INDEX CONCURRENTLY waits for every
    statement that runs, and would wait for one that waits for it.
    """
    turn = threading.Event()
    while True:
        free = connection.exec_driver_sql(
            "SELECT pg_try_advisory_lock(hashtext('beatless migrate'), hashtext(%(schema)s))",
            {"schema": schema},
        ).scalar()
        connection.rollback()
        if free:
            break
        turn.wait(0.05)
    try:
        yield
    finally:
        # Closed and not given back to the pool: the lock and the settings go with it.
        connection.invalidate()


def apply(revision: str) -> None:
    """Run the SQL file beside a revision: `apply(__file__)`."""
    path = Path(revision)
    file = next(
        file for suffix in (".pre.sql", ".post.sql") if (file := path.with_suffix(suffix)).exists()
    )
    context = op.get_context()
    config = context.config
    if config is None or config.attributes["new"]:
        for statement in statements(file.read_text()):
            op.execute(CONCURRENTLY.sub(r"\g<create> \g<name>", statement))
        return
    with context.autocommit_block():
        for statement in statements(file.read_text()):
            _online(statement, config.attributes.get("tries", TRIES))


def statements(text: str) -> list[str]:
    """The statements of a file, each with the comments before it.

    One ends with a line's `;` that is not part of the body of a function, between two `$$`.
    """
    found = [""]
    for part in BODY_OR_END.split(text + "\n"):
        if BODY_OR_END.fullmatch(part) and not part.startswith("$"):
            found.append("")
        else:
            found[-1] += part
    return [part.strip() for part in found if re.sub(r"--.*", "", part).strip()]


def _online(statement: str, tries: int) -> None:
    """One statement on a schema that is in use."""
    concurrent = CONCURRENTLY.search(statement)
    # An index that is built concurrently waits for others, delays none, and may take hours.
    op.execute(f"SET lock_timeout TO {0 if concurrent else LOCK_TIMEOUT_MS}")
    op.execute("SET statement_timeout TO 0")
    if op.get_context().as_sql:
        if concurrent:
            # The remains of an interrupted build would be taken for done.
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {concurrent['name']}")
        op.execute(statement)
        return
    bind = op.get_bind()
    pause = threading.Event()
    facts = {"action": "migrate", "statement": _first_line(statement)}
    logger.info("schema is changed", extra=facts)
    for tried in range(1, tries + 1):
        try:
            if concurrent:
                _drop_invalid(bind, concurrent["name"])
            op.execute(statement)
        except exc.OperationalError as error:
            if not isinstance(
                error.orig, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected
            ):
                raise
            if tried % 20 == 1:
                holder = bind.exec_driver_sql(HOLDERS).scalar()
                logger.warning("a table is in use", extra={**facts, "holder": holder})
            pause.wait(PAUSE_S)
        else:
            return
    holder = bind.exec_driver_sql(HOLDERS).scalar()
    raise MigrationBlocked(_first_line(statement), str(holder or "many short transactions"))


def _drop_invalid(bind: sqlalchemy.Connection, name: str) -> None:
    """Drop invalid indexes of interrupted builds: IF NOT EXISTS would take them for done."""
    invalid = bind.exec_driver_sql(
        "SELECT 1 FROM pg_index JOIN pg_class c ON c.oid = indexrelid WHERE NOT indisvalid "
        "AND c.relnamespace = current_schema()::regnamespace AND c.relname = %(name)s",
        {"name": name},
    ).scalar()
    if invalid:
        op.execute(f"DROP INDEX CONCURRENTLY {name}")


def _first_line(statement: str) -> str:
    return re.sub(r"--.*\n", "", statement).strip().partition("\n")[0]


def migration_sql(schema: str, since: str | None = None) -> str:
    """The migration as SQL text, for people who run it themselves.

    Of a new schema, or from a revision on: then outside of any transaction, as CONCURRENTLY asks.
    Raises BadRequest for a revision that there is not.
    """
    text = io.StringIO()
    config = _config(schema, None, None, new=since is None)
    known = [found.revision for found in ScriptDirectory.from_config(config).walk_revisions()]
    if since is not None and since not in known:
        names = ", ".join(sorted(known))
        raise BadRequest("--since", f"is {since!r:.200}, which is none of the revisions: {names}")
    config.output_buffer = text
    command.upgrade(config, f"{since}:{head()}" if since else head(), sql=True)
    return text.getvalue()
