"""Checks of the database server: version, settings, sessions, notifications and vacuum."""

import secrets
import time
from collections.abc import Iterator

import psycopg

from beatless.doctor import versions
from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, ok, problem, unreachable, warn
from beatless.doctor.probe import Need, Probe
from beatless.errors import WrongEncoding
from beatless.outbox.queries import channel_of
from beatless.schema import head

UNLIMITED = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",
}
"""Limits that end sessions. Behind a pooler they are not ours to set."""

MAX_CHANNEL_BYTES = 63
NOTIFY_TIMEOUT_S = 2.0

NOTIFY_QUEUE_WARNING, NOTIFY_QUEUE_PROBLEM = 0.01, 0.5
"""Shares of the queue of notifications that are in use."""

IN_LINE_S = 180.0
"""Seconds after which a session of ours that stands in line is a frozen one."""

MAX_CONNECTIONS_USED = 0.8

MAX_TRANSACTION_ID_AGE = 1_500_000_000

MIN_DEAD_ROWS, MAX_DEAD_PER_LIVE = 20_000, 2
"""Autovacuum leaves no more dead rows than their sum, the second times the living ones."""


@check("postgres", needs={Need.POSTGRES})
def version(probe: Probe) -> Verdict:
    """The server's version, and the time to it."""
    sql = probe.sql(__file__)
    major, minor = divmod(probe.rows(sql["version"])[0][0], 10_000)
    began = time.perf_counter()
    probe.rows(sql["ping"])
    took_ms = (time.perf_counter() - began) * 1000
    text = f"PostgreSQL {major}.{minor}, {took_ms:.1f} ms away"
    oldest = min(versions.POSTGRES)
    if major < oldest:
        return problem(f"{text}: too old", f"beatless needs PostgreSQL {oldest} or newer")
    fix = versions.POSTGRES.get(major)
    if fix is not None and minor < fix.patch:
        return warn(
            f"{text}, older than {major}.{fix.patch}, which closes {fix.hole} and others",
            f"update to {major}.{fix.patch} or newer, {versions.BACKPORTS}",
        )
    return ok(text)


@check("primary", needs={Need.POSTGRES})
def primary(probe: Probe) -> Verdict:
    """Whether anything can be written."""
    sql = probe.sql(__file__)
    if probe.missing({Need.PRIMARY}):
        return problem(
            "the database URL reaches a replica: nothing can be started or executed",
            "let BEATLESS_DATABASE_URL name the primary, or add "
            "?target_session_attrs=read-write with all hosts",
        )
    if probe.rows(sql["is_read_only"])[0][0]:
        return problem(
            "transactions are read-only by default for this user or database",
            "ALTER DATABASE … RESET default_transaction_read_only",
        )
    return ok("the primary, and writable")


@check("encoding", needs={Need.POSTGRES})
def encoding(probe: Probe) -> Verdict:
    """Whether the database holds every text."""
    sql = probe.sql(__file__)
    database, found = probe.rows(sql["encoding"])[0]
    if found == "UTF8":
        return ok("UTF8: it holds every text")
    error = WrongEncoding(database, found)
    return problem(error.problem, error.advice)


@check("sessions", needs={Need.POSTGRES})
def sessions(probe: Probe) -> Verdict:
    """Limits that role or database put on sessions of a pooler."""
    if not probe.settings.pooled:
        return ok("they set what they depend on, whatever role and database say")
    sql = probe.sql(__file__)
    wanted = {**UNLIMITED, "default_transaction_isolation": "read committed"}
    found = probe.rows(
        sql["other_settings"], {"names": list(wanted), "values": list(wanted.values())}
    )
    if not found:
        return ok("role and database set no limits for what comes through the pooler")
    return warn(
        "through the pooler, whose sessions beatless cannot set, come "
        + ", ".join(f"{name} = {value}" for name, value in found),
        "ALTER ROLE … SET them, for beatless' role, to "
        + ", ".join(f"{name} = {wanted[name]}" for name, _ in found),
    )


@check("schema", needs={Need.POSTGRES})
def schema(probe: Probe) -> Verdict:
    """The migration that the schema is at, beside the one that this version needs."""
    found, needed = probe.revision, head()
    if found is None:
        return problem(
            f"schema {probe.schema} was never migrated here",
            "run `beatless migrate`, or see what BEATLESS_SCHEMA says",
        )
    if found < needed:
        return problem(
            f"schema {probe.schema} is at migration {found}, behind this version's {needed}",
            "run `beatless migrate` before the new version",
        )
    if found > needed:
        return warn(
            f"schema {probe.schema} is at migration {found}, ahead of this version's {needed}",
            "this is an old version beside newer ones: finish the rollout",
        )
    return ok(f"schema {probe.schema} is at migration {needed}")


@check("listen", needs={Need.PRIMARY})
def listen(probe: Probe) -> Verdict:
    """Whether a notification of the database comes over the listen URL."""
    sql = probe.sql(__file__)
    channel = channel_of(probe.schema)
    if len(channel.encode()) > MAX_CHANNEL_BYTES:
        return problem(
            f"the channel {channel} is longer than {MAX_CHANNEL_BYTES} bytes: LISTEN cuts it off "
            "silently",
            "choose a shorter BEATLESS_SCHEMA",
        )
    try:
        listener = probe.connect_directly()
    except psycopg.Error as error:
        return unreachable("the listen URL", error, setting="BEATLESS_LISTEN_URL")
    with listener:
        here = listener.execute(sql["server"].encode()).fetchone()
        there = probe.rows(sql["server"])[0]
        if here is not None and here[:2] != there[:2]:
            return problem(
                f"the listen URL reaches another database ({here[0]}) than the database "
                f"URL ({there[0]}): relays would hear nothing",
                "let both name the same server and database",
            )
        if here is not None and here[2]:
            return problem(
                "the listen URL reaches a replica, which takes no LISTEN",
                "let BEATLESS_LISTEN_URL name the primary",
            )
        private = f"beatless_doctor_{secrets.token_hex(6)}"
        listener.execute(f'LISTEN "{private}"'.encode())
        began = time.perf_counter()
        with probe.connect_directly() as sender:
            sender.execute(sql["notify"].encode(), {"channel": private})
        came = list(listener.notifies(timeout=NOTIFY_TIMEOUT_S, stop_after=1))
        took_ms = (time.perf_counter() - began) * 1000
    if came:
        return ok(f"a NOTIFY arrives, {took_ms:.1f} ms with a connection of its own")
    return problem(
        "a NOTIFY does not arrive: a pooler in transaction mode, as PgBouncer, takes "
        "LISTEN and never delivers",
        "set BEATLESS_LISTEN_URL to a direct connection; the database URL may stay with the pooler",
    )


@check("notify queue", needs={Need.POSTGRES})
def notify_queue(probe: Probe) -> Verdict:
    """The use of Postgres' queue of notifications: when it is full, commits fail."""
    sql = probe.sql(__file__)
    usage = float(probe.rows(sql["notify_queue"])[0][0])
    text = f"{usage:.2%} of Postgres' queue of notifications is in use"
    if usage <= NOTIFY_QUEUE_WARNING:
        return ok(text)
    verdict = problem if usage > NOTIFY_QUEUE_PROBLEM else warn
    return verdict(
        f"{text}: a session listens and does not read, for it is in a transaction",
        "SELECT pid, application_name, xact_start FROM pg_stat_activity WHERE state = "
        "'idle in transaction' ORDER BY xact_start; end it. At 100 % commits fail",
    )


@check("durability", needs={Need.POSTGRES})
def durability(probe: Probe) -> Verdict:
    """Whether a power cut takes back commits."""
    sql = probe.sql(__file__)
    off = [name for (name,) in probe.rows(sql["not_durable"])]
    if off:
        return warn(
            f"{' and '.join(off)} off: a power cut takes back what was acknowledged",
            "leave them on wherever runs matter",
        )
    return ok("what is committed is on disk")


@check("transactions", needs={Need.POSTGRES})
def transactions(probe: Probe) -> Iterator[Verdict]:
    """Transactions that are old, and those that were prepared and forgotten."""
    sql = probe.sql(__file__)
    old = probe.rows(sql["old_transaction"], {"old": probe.old_transaction_s, "in_line": IN_LINE_S})
    prepared = probe.rows(sql["prepared_transactions"])[0][0]
    if prepared:
        yield warn(
            f"{prepared} prepared transactions wait for somebody to end them",
            "SELECT * FROM pg_prepared_xacts; COMMIT or ROLLBACK PREPARED",
        )
    for pid, name, state, age in old:
        yield warn(
            f"{name} (pid {pid}) is {state} in a transaction for {age:.0f} s: what is "
            "deleted meanwhile cannot be vacuumed",
            "see why its relay gets no further (relays, below): it may be Redis or the broker"
            if name.startswith("beatless relay")
            else f"SELECT pg_terminate_backend({pid}), or shorten it",
        )
    if not old and not prepared:
        yield ok(f"none is older than {probe.old_transaction_s:.0f} s")


@check("connections", needs={Need.POSTGRES})
def connections(probe: Probe) -> Verdict:
    """The number of free connections."""
    sql = probe.sql(__file__)
    used, limit = probe.rows(sql["connections"])[0]
    text = f"{used} of {limit} connections are in use"
    if used > MAX_CONNECTIONS_USED * limit:
        return warn(
            text,
            "raise max_connections, or put a pooler before workers and API "
            "(docs/settings.md has the number for each process)",
        )
    return ok(text)


@check("wraparound", needs={Need.POSTGRES})
def wraparound(probe: Probe) -> Verdict:
    """The age of transaction ids: near their end, Postgres stops."""
    sql = probe.sql(__file__)
    age = probe.rows(sql["transaction_id_age"])[0][0]
    text = f"the oldest transaction id is {age:,} back; at 2,100,000,000 writing stops"
    if age > MAX_TRANSACTION_ID_AGE:
        return problem(text, "VACUUM FREEZE, and find what holds it: an old slot or transaction")
    return ok(text)


@check("bloat", needs={Need.SCHEMA})
def bloat(probe: Probe) -> Iterator[Verdict]:
    """Whether autovacuum is on, and keeps up."""
    sql = probe.sql(__file__)
    rows = probe.rows(sql["dead_rows"], {"schema": probe.schema})
    off = sorted(name for name, _, _, without in rows if without)
    if off:
        yield problem(
            f"autovacuum is off for {', '.join(off)}: the outbox grows for ever",
            "turn it on: ALTER TABLE … RESET (autovacuum_enabled), or autovacuum = on",
        )
    full = [row for row in rows if row[1] > MIN_DEAD_ROWS + MAX_DEAD_PER_LIVE * row[2]]
    for name, dead, live, _ in full[:1]:
        yield warn(
            f"{name} has {dead:,} dead rows beside {live:,} living ones",
            "find what keeps VACUUM from it (transactions, above), then VACUUM "
            f"{probe.schema}.{name}",
        )
    if not off and not full:
        yield ok(f"{sum(row[1] for row in rows):,} dead rows in all tables")
