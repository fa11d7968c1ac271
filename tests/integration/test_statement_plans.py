"""Each statement of the `.sql` files, planned over long tables: it finds its rows by an index.

Those that read one in whole say which in their description. What is planned is the generic plan,
which knows no value: a session that has run a statement some times may use it for ever.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import beatless
from beatless import App
from beatless.orchestrator.options import OPTION_SQL
from beatless.outbox.doorbell import prepare_to_drain
from beatless.outbox.message import SHARDS
from beatless.outbox.statements import read, statements
from tests import column_statistics
from tests.unit.test_statements import OF_MODULES, named

ENDED, UNFINISHED = 100_000, 10_000
"""Runs. Of each that has not ended the first event waits for its relay."""

ALL = ENDED + UNFINISHED

SCHEDULES = 20_000

LONG = {"runs", "run_events", "dispatches", "run_outbox", "schedules"}

IN_DRAINS = {"queries", "doorbell", "deadlines", "ended_runs", "firing", "retention", "shards"}
"""Their statements run in sessions of the relay, whose plans are pinned."""

SHORT_INDEXES = {
    "dispatches_out",
    "dispatches_sent",
    "dispatches_deadline",
    "schedules_stopped",
}
"""Of dispatches in a state or with a deadline: windows and times bound how many there are.

Of schedules that are stopped: a person looks at each."""

VALUES: dict[str, float | str] = {
    "adopted": 1000,
    "batch": 100,
    "batch_bytes": 8 * 1024 * 1024,
    "defer_s": 2,
    "failures": 5,
    "few_per_shard": 8,
    "groups_looked_at": 128,
    "held_key_wait_ms": 50,
    "last_shard": SHARDS - 1,
    "lock_timeout_ms": 1000,
    "looked_at": 256,
    "looked_back": 2000,
    "rest_s": 3600,
    "names": 5,
    "most_counted": 1000,
    "near_runs": 10_000,
    "never": "9999-01-01Z",
    "claims_poll_s": 0.02,
    "oldest_runs": 10_000,
    "page": 100,
    "page_bytes": 262_144,
    "page_events": 5000,
    "page_runs": 1000,
    "per_shard": 128,
    "presence_expires_s": 30.0,
    "unheard_s": 30.0,
    "reason": "wait",
    "recent_ends": 1000,
    "recheck_factor": 4,
    "replacing_s": 1.0,
    "sweep": 100,
    "turns_forgotten": 256,
    "window": 64,
} | OPTION_SQL

TYPES = {
    "above": "int[]",
    "after": "int",
    "afters": "smallint[]",
    "aside": "text[]",
    "attempts": "int[]",
    "batch": "int",
    "branches": "bool[]",
    "cancelled": "bigint[]",
    "completed": "bigint[]",
    "cursors": "text[]",
    "datas": "text[]",
    "debounce": "float8",
    "default_input": "bool",
    "cron": "text",
    "declared": "bool",
    "delay": "float8",
    "delay_cancelled": "float8",
    "delays": "float8[]",
    "delays_cancelled": "float8[]",
    "dispatch": "int",
    "dispatches": "int[]",
    "ended": "bool",
    "errors": "text[]",
    "errors_cancelled": "text[]",
    "events": "float8",
    "every": "int",
    "expires_s": "float8",
    "failed": "bigint[]",
    "failing": "text[]",
    "finishes": "float8[]",
    "firsts": "text[]",
    "floor": "bigint",
    "groups": "text[]",
    "hash": "bytea",
    "held": "text[]",
    "ids": "text[]",
    "keys": "text[]",
    "known": "text[]",
    "lead": "smallint",
    "limit": "int",
    "lost_after_s": "float8",
    "max_wait": "float8",
    "jitter": "float8",
    "just_sent": "float8",
    "moves": "bool",
    "n": "smallint",
    "n_cancelled": "smallint",
    "names": "text[]",
    "next": "bigint",
    "ns": "smallint[]",
    "ns_cancelled": "smallint[]",
    "old": "float8",
    "patience": "float8",
    "pids": "int[]",
    "places": "smallint",
    "plans": "text[]",
    "processes": "int",
    "queues": "text[]",
    "reasons": "text[]",
    "redispatch": "float8",
    "results": "text[]",
    "retried": "bool",
    "run_ids": "text[]",
    "runs": "float8",
    "scopes": "text[]",
    "seconds": "float8",
    "seen": "int",
    "shard": "smallint",
    "shards": "smallint[]",
    "states": "text[]",
    "states_cancelled": "text[]",
    "steps": "text[]",
    "token": "bigint",
    "tokens": "bigint[]",
    "turns": "float8[]",
    "types": "text[]",
    "uncalled": "bool[]",
    "beside": "bool[]",
    "upto": "int[]",
    "values": "text[]",
    "version": "bigint",
    "versions": "text[]",
    "waits": "int[]",
    "workers": "text[]",
}
"""As psycopg sends them; what is not here is text or unknown to it, and for Postgres to infer."""

OTHER_TYPES = {
    ("orchestrator/deadlines", "after"): "text",
    ("jobs/verify", "after"): "text",
    ("jobs/verify", "upto"): "text",
    ("orchestrator/ended_runs", "after"): "text",
    ("orchestrator/journal", "runs"): "text",
    ("orchestrator/group_commit", "settle_many", "places"): "int[]",
    ("orchestrator/group_commit", "append_many", "places"): "int[]",
    ("orchestrator/journal", "settle", "places"): "int[]",
    ("orchestrator/journal", "settle_if_unsignalled", "places"): "int[]",
    ("outbox/letters", "after"): "bigint",
    ("outbox/queries", "forget_events", "ids"): "text",
    ("outbox/queries", "forget_events", "shards"): "text",
    ("orchestrator/firing", "id"): "bigint",
    ("orchestrator/schedules", "after"): "text",
    ("outbox/queries", "ids"): "bigint[]",
}


@pytest.fixture
def long_tables(beatless_app: App, postgres: psycopg.Connection) -> psycopg.Connection:
    """A session before many runs of all states, as ANALYZE has seen them."""
    postgres.execute(
        f"""
INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, lease_token, key, tags,
                  retry_of, created_at, started_at, finished_at, pruned_seq, pruned_at, error)
SELECT 'run-' || n, 'p' || n % 7, '1', 'q' || n % 5,
       CASE WHEN n > {ENDED} THEN CASE n % 50 WHEN 0 THEN 'running' ELSE 'queued' END
            WHEN n % 100 = 0 THEN 'failed' ELSE 'completed' END,
       CASE WHEN n > {ENDED} THEN 1 ELSE 2 END, n, CASE n % 3 WHEN 0 THEN 'key-' || n END,
       jsonb_build_object('n', n), CASE n % 200 WHEN 1 THEN 'run-' || n - 1 END,
       now() - make_interval(mins => {ALL} - n), now() - make_interval(mins => {ALL} - n),
       CASE WHEN n <= {ENDED} THEN now() - make_interval(mins => {ALL} - n) END,
       CASE WHEN n <= 5000 THEN 2 ELSE 0 END, CASE WHEN n <= 5000 THEN now() END,
       CASE WHEN n <= {ENDED} AND n % 100 = 0 THEN '{{"type": "E"}}'::jsonb END
  FROM generate_series(1, {ALL}) n""".encode()
    )
    postgres.execute(
        b"""
INSERT INTO run_events (run_id, seq, ts, type, source, data)
SELECT run_id, seq, created_at, CASE seq WHEN 1 THEN 'RunStarted' ELSE 'RunFinished' END, 'worker',
       CASE seq WHEN 2 THEN jsonb_build_object('outcome', state) END
  FROM runs CROSS JOIN generate_series(1, 2) seq WHERE seq <= last_seq AND pruned_seq = 0"""
    )
    postgres.execute(
        f"""
INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)
SELECT n % {SHARDS}, 'run-' || n, 1, 1 FROM generate_series({ENDED} + 1, {ALL}) n""".encode()
    )
    postgres.execute(
        f"""
INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason, deadline_at)
SELECT 'run-' || n, n % {SHARDS}, 'p' || n % 7, 'q' || n % 5, n % 3,
       CASE n % 50 WHEN 0 THEN 'running' WHEN 1 THEN 'delayed' ELSE 'waiting' END,
       now() + make_interval(secs => n % 50), 'start',
       CASE n % 1000 WHEN 2 THEN now() + make_interval(secs => n) END
  FROM generate_series({ENDED} + 1, {ALL}) n""".encode()
    )
    postgres.execute(
        f"""
INSERT INTO schedules (namespace, name, app, declared, run, every, tz, catch_up, overlap, jitter,
                       state, tick, due_at, look_at)
SELECT 'default', 's' || n, 'app-' || n % 3, n % 100 = 0, '{{"plan": "p"}}', 60, 'UTC', 'one',
       'allow', 0, 'active', now(), now(),
       CASE WHEN n % 10 > 0 THEN now() + make_interval(mins => n) END
  FROM generate_series(1, {SCHEDULES}) n""".encode()
    )
    column_statistics.forget(postgres)  # now: autovacuum may come while rows are written
    column_statistics.forget_sizes(postgres)
    postgres.execute("ANALYZE runs, run_events, run_outbox, dispatches, schedules")
    return postgres


def prepared(statement: str, types: dict[str, str]) -> tuple[str, int]:
    """The statement as the text of a PREPARE, and how many parameters it has."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    text = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", statement)
    declared = ", ".join(types.get(name, "unknown") for name in names)
    return f"PREPARE one{f' ({declared})' if names else ''} AS {text.replace('%%', '%')}", len(
        names
    )


def types_for(path: Path, name: str) -> dict[str, str]:
    module = f"{'jobs/' if path.parent == PACKAGE else ''}{named(path).removesuffix('.sql')}"
    found = dict(TYPES)
    for (file, *which), kind in OTHER_TYPES.items():
        if file == module and which[:-1] in ([], [name]):
            found[which[-1]] = kind
    return found


PACKAGE = Path(beatless.__file__).parent

REREADING = {"Sort", "Aggregate", "Hash", "Materialize", "WindowAgg", "Unique", "Group"}
"""Nodes that read all that is below them, whatever LIMIT is above."""


def whole_reads(plan: dict[str, Any], *, limited: bool = False) -> Iterator[str]:
    """The long tables that a plan reads from one end to the other.

    Below a LIMIT an index gives the first rows, unless a filter may pass over all of them.
    """
    table = plan.get("Relation Name")
    found = any(f"{kind} Cond" in plan for kind in ("Index", "Recheck", "TID"))
    if table in LONG and "Scan" in plan["Node Type"] and not found:
        first_rows = limited and "Index" in plan["Node Type"] and "Filter" not in plan
        if not first_rows and plan.get("Index Name") not in SHORT_INDEXES:
            yield table
    below = plan["Node Type"] == "Limit" or (limited and plan["Node Type"] not in REREADING)
    for child in plan.get("Plans", []):
        yield from whole_reads(child, limited=below)


def planned(connection: psycopg.Connection[Any], statement: str, types: dict[str, str]) -> Any:
    text, parameters = prepared(statement, types)
    connection.execute(text.encode())
    given = f"({', '.join(['NULL'] * parameters)})" if parameters else ""
    explained = f"EXPLAIN (FORMAT JSON) EXECUTE one{given}"
    ((plan,),) = connection.execute(explained.encode()).fetchall()
    connection.execute("DEALLOCATE one")
    return plan[0]["Plan"]


def admitted(description: str) -> set[str]:
    """The tables that a statement may read in whole, by its own description."""
    _, _, rest = description.partition("Reads in whole: ")
    return LONG & set(re.findall(r"\w+", rest.partition(".")[0]))


@pytest.mark.slow
def test_statements_find_their_rows_by_an_index_or_say_which_tables_they_read_in_whole(
    beatless_app: App, long_tables: psycopg.Connection
) -> None:
    found: dict[str, set[str]] = {}
    told: dict[str, set[str]] = {}
    with (
        beatless_app.direct_connection() as drains,
        beatless_app.direct_connection() as others,
    ):
        prepare_to_drain(drains)
        others.execute("SET plan_cache_mode TO force_generic_plan")
        for path in OF_MODULES:
            described = read(path).statements
            needed = {name for each in described.values() for name in each.placeholders}
            values = {name: VALUES[name] for name in needed - {"schema"}}
            texts = statements(str(path), beatless_app.settings.schema, **values)
            for name, text in texts.items():
                session = drains if path.stem in IN_DRAINS else others
                plan = planned(session, text, types_for(path, name))
                found[f"{named(path)} {name}"] = set(whole_reads(plan))
                told[f"{named(path)} {name}"] = admitted(described[name].description)
    assert found == told


def test_the_rule_bites(postgres: psycopg.Connection) -> None:
    postgres.execute("SET enable_seqscan TO off")
    postgres.execute("SET enable_bitmapscan TO off")
    reads: list[tuple[str, set[str]]] = [
        ("SELECT FROM runs WHERE run_id = 'a'", set()),
        ("SELECT FROM runs WHERE worker = 'a'", {"runs"}),
        ("SELECT FROM runs ORDER BY run_id LIMIT 1", set()),
        ("SELECT FROM runs ORDER BY run_id", {"runs"}),
        ("SELECT FROM runs WHERE worker = 'a' ORDER BY run_id LIMIT 1", {"runs"}),
        ("SELECT FROM (SELECT max(queue) FROM runs GROUP BY run_id) t LIMIT 1", {"runs"}),
        ("SELECT FROM queues", set()),
        ("SELECT count(*) FROM dispatches WHERE state = 'sent'", set()),
    ]
    for statement, whole in reads:
        assert set(whole_reads(planned(postgres, statement, {}))) == whole, statement
