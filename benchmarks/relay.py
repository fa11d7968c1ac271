"""The journal and the relay against what they could be: `python -m benchmarks.relay [name …]`.

Keys are the numbers of the targets that the design was measured by (`relay.<number>`).
"""

import gc
import json
import random
import re
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, time
from typing import Any

import psycopg
import redis
import sqlalchemy
from sqlalchemy import orm

from beatless import App, Plan, Settings, StepContext, step
from beatless.client import RunRequest
from beatless.orchestrator.events import EventType
from beatless.orchestrator.tables import runs
from beatless.outbox.message import SHARDS, shard_of
from beatless.outbox.publishers import worker_queue
from beatless.outbox.queries import channel_of
from beatless.outbox.sockets import readable
from beatless.outbox.statements import fragment
from beatless.outbox.tables import run_events, run_outbox
from beatless.settings import libpq_url
from benchmarks.measure import (
    REPEATS,
    SPAWN,
    Bench,
    interleaved,
    pgbench,
    ratios,
    record,
    services,
)

DATA = {"note": "x" * 90, "number": 12345}
TRACE = EventType.DEBUG_TRACE


# What the benchmarks stand on


def make_runs(bench: Bench, count: int) -> list[str]:
    """Empty tables, and runs that are leased to token 1."""
    bench.db.execute("TRUNCATE runs, run_events, run_outbox, dispatches")
    names = [f"0192f3a4-7b1c-7d3e-8f00-{number:012}" for number in range(count)]
    bench.db.execute(
        "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, lease_token,"
        " lease_expires_at) SELECT id, 'p', 'v', 'default', 'running', 0, 1,"
        " now() + interval '1 day' FROM unnest(%s::text[]) AS id",
        (names,),
    )
    bench.db.execute("VACUUM ANALYZE runs")
    return names


def writer(bench: Bench) -> psycopg.Connection[Any]:
    return writer_of(bench.settings)


def writer_of(settings: Settings) -> psycopg.Connection[Any]:
    return psycopg.connect(libpq_url(settings.database_url), autocommit=True, prepare_threshold=5)


def script(statement: str) -> str:
    """The product's append of one event for pgbench; each client has its own run."""
    values = {
        "run_id": "('0192f3a4-7b1c-7d3e-8f00-' || lpad(:client_id::text, 12, '0'))",
        "token": "1",
        "after": "0",
        "n": "1",
        "shard": ":shard",
        "types": f"ARRAY['{TRACE.value}']",
        "steps": "ARRAY['work']",
        "attempts": "ARRAY[1]",
        "datas": f"ARRAY['{json.dumps(DATA)}']",
    }
    sql = " ".join((statement % values).split())
    return f"\\set shard mod(:client_id, {SHARDS})\n{sql};\n"


def without_outbox(statement: str) -> str:
    """The append without its outbox row."""
    return re.sub(
        r", o AS \(\s*INSERT.*?\)(?=\s*SELECT last_seq, cancelled)", "", statement, flags=re.DOTALL
    )


def relay_process(settings: Settings, options: Mapping[str, Any]) -> None:
    """A relay of its own process, as `beatless relay`."""
    relay = App(settings, []).relay(**options)
    gc.collect()
    gc.freeze()
    relay.run()


def leaders(bench: Bench) -> dict[int, int]:
    """Which session leads which shard."""
    return dict(
        bench.db.execute(
            "SELECT objid::int8, pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND"
            " classid = 'dispatches'::regclass::oid AND objsubid = 2 AND objid::int8 < %s",
            (SHARDS,),
        ).fetchall()
    )


def asleep(bench: Bench) -> int:
    """How many shards have a relay that sleeps."""
    return int(
        bench.db.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND"
            " mode = 'ExclusiveLock' AND classid = 'run_outbox'::regclass::oid"
        ).fetchone()[0]  # type: ignore[index]
    )


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    pause, deadline = threading.Event(), monotonic() + seconds
    while not condition():
        if monotonic() > deadline:
            raise TimeoutError
        pause.wait(0.002)


@contextmanager
def relays(bench: Bench, count: int = 1, **options: Any) -> Iterator[list[Any]]:
    """That many relays that share the shards and sleep."""
    processes = [bench.child(relay_process, options) for _ in range(count)]
    try:
        until(lambda: len(leaders(bench)) == SHARDS and asleep(bench) == SHARDS)
        until(lambda: len(set(leaders(bench).values())) == count)
        until(lambda: asleep(bench) == SHARDS)
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


# 1, 2, 3: what the wake-up costs


def appends(statement: str) -> dict[str, str]:
    """The product's append in schema `bench`, and those without its doorbell."""
    bell = fragment("events_doorbell", "bench")
    notify = f"pg_notify('{channel_of('bench')}', (%(shard)s)::text)"
    return {
        "doorbell": statement,
        "none": statement.replace(bell, "NULL"),
        "notify": statement.replace(bell, notify),
    }


def append(bench: Bench) -> None:
    texts = appends(bench.app.journal.sql["append"])
    with writer(bench) as listener:
        listener.execute(f"LISTEN {channel_of('bench')}")

        def run(text: str, delay: bool) -> float:
            make_runs(bench, 16)
            return pgbench(bench, script(text), clients=16, seconds=1, delay=delay)

        for delay in (True, False):
            found = interleaved({name: partial(run, text, delay) for name, text in texts.items()})
            if delay:
                record(
                    "relay.1",
                    ratios(found["doorbell"], found["none"]),
                    unit="x",
                    what="append with doorbell / without wake-up, 16 writers, 1 ms disk",
                )
            record(
                "relay.2" if delay else "relay.3",
                ratios(found["doorbell"], found["notify"]),
                unit="x",
                what="append with doorbell / with NOTIFY in the transaction, 16 writers, "
                + ("1 ms disk" if delay else "this disk"),
            )


# 4, 5: what our API costs


class Base(orm.DeclarativeBase):
    metadata = runs.metadata


class RunRow(Base):
    __table__ = runs


class EventRow(Base):
    __table__ = run_events


class OutboxRow(Base):
    __table__ = run_outbox


def api(bench: Bench) -> None:
    journal = bench.app.journal
    (run_id, *_) = make_runs(bench, 1)
    text = json.dumps(DATA)
    statement = journal.sql["append"].encode()
    engine = bench.app.engine.execution_options(schema_translate_map={None: "bench"})
    with writer(bench) as connection:

        def ours() -> None:
            event = journal.new_event(TRACE, step="work", attempt=1, where="here", data=DATA)
            journal.append(connection, run_id, 1, [event])

        cursor = connection.cursor()
        parameters = {
            "run_id": run_id,
            "token": 1,
            "after": 0,
            "shard": shard_of(run_id),
            "n": 1,
            "types": [TRACE.value],
            "steps": ["work"],
            "attempts": [1],
            "datas": [text],
        }

        def bare() -> None:
            cursor.execute(statement, parameters)
            cursor.fetchall()

        def by_orm() -> None:
            with orm.Session(engine) as session, session.begin():
                row = session.scalars(
                    sqlalchemy.select(RunRow).where(runs.c.run_id == run_id).with_for_update()
                ).one()
                row.last_seq += 1
                session.add(
                    EventRow(
                        run_id=run_id,
                        seq=row.last_seq,
                        type=TRACE.value,
                        source="worker",
                        step="work",
                        attempt=1,
                        data=DATA,
                    )
                )
                session.add(
                    OutboxRow(
                        shard=shard_of(run_id),
                        run_id=run_id,
                        from_seq=row.last_seq,
                        to_seq=row.last_seq,
                    )
                )

        found = interleaved(
            {
                name: lambda f=f: rate(f, 0.6)
                for name, f in (("ours", ours), ("bare", bare), ("orm", by_orm))
            },  # type: ignore[misc]
            repeats=7,
        )
    record(
        "relay.4",
        ratios(found["ours"], found["bare"]),
        unit="x",
        what="Journal.append with its checks / bare psycopg loop over the same statement",
    )
    record(
        "relay.5",
        ratios(found["ours"], found["orm"]),
        unit="x",
        what="Journal.append / naive SQLAlchemy ORM append",
    )


def rate(act: Callable[[], Any], seconds: float) -> float:
    """Calls per second."""
    count, begin = 0, monotonic()
    while monotonic() - begin < seconds:
        act()
        count += 1
    return count / (monotonic() - begin)


# 6, 7, 8: how fast the relay is


def fill_events(bench: Bench, count: int, events: int) -> None:
    """Runs with that many events each; no outbox rows yet."""
    make_runs(bench, count)
    bench.db.execute(
        "INSERT INTO run_events (run_id, seq, type, source, step, attempt, data)"
        " SELECT run_id, n, 'DebugTrace', 'worker', 'work', 1, %s::jsonb"
        " FROM runs, generate_series(1, %s) n",
        (json.dumps(DATA), events),
    )
    bench.db.execute("VACUUM ANALYZE run_events")


def backlog(bench: Bench, names: Sequence[str], events: int, k: int) -> int:
    """Outbox rows of k events each, interleaved over the runs; how many events they stand for."""
    bench.db.execute("TRUNCATE run_outbox")
    shards = [shard_of(name) for name in names]
    bench.db.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
        " SELECT s, r, n, n + %(k)s - 1 FROM generate_series(1, %(events)s, %(k)s) n,"
        " unnest(%(runs)s::text[], %(shards)s::int[]) AS u(r, s) ORDER BY n",
        {"k": k, "events": events, "runs": list(names), "shards": shards},
    )
    bench.db.execute("VACUUM run_outbox")
    return len(names) * events


def drain(bench: Bench) -> None:
    names = [f"0192f3a4-7b1c-7d3e-8f00-{number:012}" for number in range(2000)]
    fill_events(bench, len(names), 30)
    relay = bench.app.relay()
    client = redis.Redis.from_url(bench.settings.redis_url)
    message = b"x" * 260

    def ours(k: int) -> float:
        events = backlog(bench, names, 30 if k > 1 else 15, k)
        begin = monotonic()
        relay.drain_once()
        return events / (monotonic() - begin)

    def pipeline() -> float:
        begin = monotonic()
        for _ in range(100):
            with client.pipeline(transaction=False) as pipe:
                for number in range(500):
                    pipe.publish(f"bench:events:{names[number]}", message)
                pipe.execute()
        return 50_000 / (monotonic() - begin)

    def seed() -> float:
        backlog(bench, names, 1, 1)
        with writer(bench) as connection:
            connection.execute("SET search_path TO bench")
            connection.autocommit = False
            return rate(lambda: seed_step(connection, client), 0.7)

    ours(1), pipeline()  # prepared statements, the script, the page cache
    gc.collect()
    gc.freeze()  # as `beatless relay`
    found = interleaved(
        {"ten": lambda: ours(10), "one": lambda: ours(1), "pipeline": pipeline, "seed": seed}
    )
    gc.unfreeze()
    relay.stop()
    client.close()
    record(
        "relay.6",
        ratios(found["ten"], found["pipeline"]),
        unit="x",
        what="relay, events/s of 10-event appends / redis-py's pipelined PUBLISH alone",
    )
    record(
        "relay.7",
        ratios(found["one"], found["pipeline"]),
        unit="x",
        what="relay, events/s of 1-event appends / redis-py's pipelined PUBLISH alone",
    )
    record(
        "relay.8",
        ratios(found["one"], found["seed"]),
        unit="x",
        what="relay, events/s of 1-event appends / one transaction per event",
    )


def seed_step(connection: psycopg.Connection[Any], client: "redis.Redis") -> None:
    """What an outbox relay is in most projects."""
    row = connection.execute(
        "SELECT o.shard, o.id, e.run_id, e.seq, e.ts, e.type, e.data FROM run_outbox o"
        " JOIN run_events e ON e.run_id = o.run_id AND e.seq = o.from_seq"
        " ORDER BY o.shard, o.id LIMIT 1 FOR UPDATE OF o SKIP LOCKED"
    ).fetchone()
    if row is not None:
        shard, id, run_id, seq, ts, type, data = row
        event = {"run_id": run_id, "seq": seq, "ts": ts.isoformat(), "type": type, "data": data}
        client.publish(f"bench:events:{run_id}", json.dumps(event))
        connection.execute("DELETE FROM run_outbox WHERE shard = %s AND id = %s", (shard, id))
    connection.commit()


def scale(bench: Bench) -> None:
    names = [f"0192f3a4-7b1c-7d3e-8f00-{number:012}" for number in range(2000)]
    fill_events(bench, len(names), 30)

    def run(count: int) -> float:
        with relays(bench, count), writer(bench) as other:
            # Uncommitted while it grows, so that all relays begin at once.
            other.execute("SET search_path TO bench")
            with other.transaction():
                other.execute(
                    "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
                    " SELECT s, r, n, n FROM generate_series(1, 30) n,"
                    " unnest(%s::text[], %s::int[]) AS u(r, s) ORDER BY n",
                    (names, [shard_of(name) for name in names]),
                )
            bench.db.execute(f"NOTIFY {channel_of('bench')}, '0'")
            begin = monotonic()
            until(
                lambda: not bench.db.execute("SELECT FROM run_outbox LIMIT 1").fetchall(),
                seconds=60,
            )
            return len(names) * 30 / (monotonic() - begin)

    found = interleaved({"one": lambda: run(1), "two": lambda: run(2)})
    record(
        "relay.9",
        ratios(found["two"], found["one"]),
        unit="x",
        what="two relay processes / one, k=1, on cores that Postgres and Redis share",
    )


# 10, 11: from the commit to the subscriber


def published(settings: Settings, pipe: Pipe) -> Iterator[bytes]:
    """The events' messages, from "ready" on until `hush`."""
    client = redis.Redis.from_url(settings.redis_url)
    channel = client.pubsub()  # type: ignore[no-untyped-call]
    channel.psubscribe(f"{settings.prefix}:events:*")
    channel.get_message(timeout=5)
    pipe.send("ready")
    for message in channel.listen():
        if message["data"] == b"hush":
            return
        yield message["data"]


def hush(settings: Settings) -> None:
    """Let those who listen tell what they have heard."""
    with redis.Redis.from_url(settings.redis_url) as client:
        client.publish(f"{settings.prefix}:events:", "hush")


def subscriber(settings: Settings, pipe: Pipe) -> None:
    """Notes when each seq came."""
    pattern = re.compile(rb'"seq":(\d+)')
    came: dict[int, float] = {}
    for message in published(settings, pipe):
        now = monotonic()
        for seq in pattern.findall(message):
            came.setdefault(int(seq), now)
    pipe.send(came)


def delays(bench: Bench, run_id: str, per_second: float, seconds: float) -> list[float]:
    """Milliseconds from the acknowledged commit of each event to its arrival."""
    here, there = SPAWN.Pipe()
    listener = bench.child(subscriber, there)
    here.recv()
    journal, committed = bench.app.journal, {}
    event = journal.new_event(TRACE, step="work", attempt=1, where="here", data=DATA)
    with writer(bench) as connection:
        pause = threading.Event()
        at, end = monotonic(), monotonic() + seconds
        while at < end:
            at += random.expovariate(per_second)
            if (wait := at - monotonic()) > 0:
                pause.wait(wait)
            appended = journal.append(connection, run_id, 1, [event])
            committed[appended.last_seq] = monotonic()  # type: ignore[union-attr]
    until(lambda: not bench.db.execute("SELECT FROM run_outbox LIMIT 1").fetchall())
    pause.wait(0.25)
    hush(bench.settings)
    came = here.recv()
    listener.join()
    lost = committed.keys() - came.keys()
    if lost:
        raise AssertionError(f"{len(lost)} events did not come")
    return [(came[seq] - when) * 1000 for seq, when in committed.items()]


def polling(settings: Settings) -> None:
    """A relay that looks every 200 ms."""
    relay = App(settings, []).relay()
    pause = threading.Event()
    while not pause.wait(0.2):
        relay.drain_once()


def raw_latency(bench: Bench) -> float:
    """Medians of NOTIFY to its listener, plus PUBLISH to its subscriber, in milliseconds."""
    client = redis.Redis.from_url(bench.settings.redis_url)
    channel = client.pubsub()  # type: ignore[no-untyped-call]
    channel.subscribe("raw")
    channel.get_message(timeout=5)
    notified, published = [], []
    with writer(bench) as ear, writer(bench) as mouth:
        ear.execute("LISTEN raw")
        for _ in range(200):
            begin = monotonic()
            mouth.execute("NOTIFY raw")
            while ear.pgconn.notifies() is None:
                readable([ear], None)
                ear.pgconn.consume_input()
            notified.append(monotonic() - begin)
            begin = monotonic()
            client.publish("raw", "x")
            while channel.get_message(timeout=1) is None:
                pass
            published.append(monotonic() - begin)
    channel.close()
    client.close()
    return 1000 * (statistics.median(notified) + statistics.median(published))


def latency(bench: Bench) -> None:
    (run_id, *_) = make_runs(bench, 1)
    p99: list[float] = []

    def doorbell_at(per_second: float) -> float:
        with relays(bench):
            found = sorted(delays(bench, run_id, per_second, 1.5))
        if per_second == 1000:
            p99.append(found[int(len(found) * 0.99)])
        return statistics.median(found)

    def polled() -> float:
        process = bench.child(polling)
        found = delays(bench, run_id, 1000, 1.5)
        process.terminate()
        process.join()
        return statistics.median(found)

    found = interleaved(
        {
            "100": lambda: doorbell_at(100),
            "1000": lambda: doorbell_at(1000),
            "raw": lambda: raw_latency(bench),
            "poll": polled,
        }
    )
    record(
        "relay.10",
        ratios(found["100"], found["raw"]),
        unit="x",
        what="commit to subscriber, p50 at 100/s / (raw NOTIFY p50 + raw PUBLISH p50)",
    )
    record(
        "relay.11",
        ratios(p99, found["poll"]),
        unit="x",
        what="commit to subscriber, p99 at 1000/s / p50 of a poll every 200 ms",
    )
    record("relay.10.ms", found["100"], unit="ms", what="commit to subscriber, p50 at 100/s")
    record("relay.11.ms", p99, unit="ms", what="commit to subscriber, p99 at 1000/s")


# 12, 13: what the relay asks of Postgres


def statements(bench: Bench) -> list[tuple[Any, ...]]:
    """When each session of a relay began its last statement."""
    return bench.db.execute(
        "SELECT pid, query_start FROM pg_stat_activity"
        " WHERE application_name LIKE 'beatless relay%' ORDER BY pid"
    ).fetchall()


def idle(bench: Bench) -> None:
    make_runs(bench, 16)
    asked, ticks = [], []
    for _ in range(REPEATS):
        with relays(bench) as (process,):
            stat = Path(f"/proc/{process.pid}/stat")
            threading.Event().wait(0.2)  # the last look comes after the locks
            before, used = statements(bench), cpu_ticks(stat)
            threading.Event().wait(2)
            after = statements(bench)
            ticks.append(float(cpu_ticks(stat) - used))
            asked.append(float(sum(a != b for a, b in zip(before, after, strict=True))))
    record("relay.12", asked, unit="", what="statements of an idle relay in 2 s")
    record("relay.12.ticks", ticks, unit="", what="processor ticks of an idle relay in 2 s")

    shares = []
    with writer(bench) as listener:
        listener.execute(f"LISTEN {channel_of('bench')}")
        for _ in range(REPEATS):
            make_runs(bench, 16)
            with relays(bench):
                list(listener.notifies(timeout=0))
                pgbench(bench, script(bench.app.journal.sql["append"]), clients=16)
                rung = len(list(listener.notifies(timeout=0.2)))
                events = bench.db.execute("SELECT sum(last_seq) FROM runs").fetchone()
                shares.append(100 * rung / int(events[0]))  # type: ignore[index]
    record("relay.13", shares, unit="%", what="NOTIFYs / events at saturation, 16 writers")


def cpu_ticks(stat: Path) -> int:
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


# 14, 15: what history and old snapshots cost


def growth(bench: Bench) -> None:
    journal = bench.app.journal
    appended: dict[str, list[float]] = {}
    read: dict[str, list[float]] = {}
    sizes = {"10k": 10, "1M": 1000}
    for _ in range(3):
        for name, each in random.sample(list(sizes.items()), 2):
            fill_events(bench, 1000, each)
            bench.db.execute("UPDATE runs SET last_seq = %s", (each,))
            bench.db.execute("VACUUM ANALYZE runs")
            bench.db.execute("CHECKPOINT")
            for _ in range(2):
                tps = pgbench(bench, script(journal.sql["append"]), clients=8)
                appended.setdefault(name, []).append(tps)
            with writer(bench) as connection:
                names = [f"0192f3a4-7b1c-7d3e-8f00-{number:012}" for number in range(8, 1000)]
                for run in names:  # of both sizes what is read is in the cache
                    journal.read(connection, run, after=max(0, each - 10), limit=10)
                read.setdefault(name, []).append(
                    rate(
                        lambda c=connection, n=names, e=each: journal.read(  # type: ignore[misc]
                            c, random.choice(n), after=max(0, e - 10), limit=10
                        ),
                        1,
                    )
                )
    record(
        "relay.14",
        ratios(appended["1M"], appended["10k"]),
        unit="x",
        what="appends/s with 1 M stored events / with 10 k, 8 writers",
    )
    record(
        "relay.14.backfill",
        ratios(read["1M"], read["10k"]),
        unit="x",
        what="backfills/s of 10 events with 1 M stored events / with 10 k",
    )


def snapshot(bench: Bench) -> None:
    names = [f"0192f3a4-7b1c-7d3e-8f00-{number:012}" for number in range(1000)]
    found = []
    for _ in range(3):
        fill_events(bench, len(names), 1)
        bench.db.execute("VACUUM run_outbox")
        relay = bench.app.relay()
        one = one_row(bench, names[0])
        with writer(bench) as old:
            fresh = pick_time(relay, one)
            old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            old.execute("SELECT count(*) FROM bench.runs")
            for _ in range(60):
                bench.db.execute(
                    "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq)"
                    " SELECT s, r, 1, 1 FROM generate_series(1, 5),"
                    " unnest(%s::text[], %s::int[]) AS u(r, s)",
                    (names, [shard_of(name) for name in names]),
                )
                relay.drain_once()
            found.append(pick_time(relay, one) / fresh)
            old.execute("ROLLBACK")
        relay.stop()
        bench.db.execute("TRUNCATE run_outbox")
    record(
        "relay.15",
        found,
        unit="x",
        what="pick of one row after 300 k rows under an old snapshot / fresh",
    )


def one_row(bench: Bench, name: str) -> Callable[[], None]:
    def add() -> None:
        bench.db.execute(
            "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (%s, %s, 1, 1)",
            (shard_of(name), name),
        )

    return add


def pick_time(relay: Any, add: Callable[[], None]) -> float:
    times = []
    for _ in range(60):
        add()
        begin = monotonic()
        relay.drain_once()
        times.append(monotonic() - begin)
    return statistics.median(times)


# 16, 17: what an append sends and writes


def wire(bench: Bench) -> None:
    journal = bench.app.journal
    bench.db.execute("ALTER SYSTEM SET full_page_writes = off")
    bench.db.execute("SELECT pg_reload_conf()")
    lean = without_outbox(journal.sql["append"])

    def wal(statement: str) -> float:
        (run_id, *_) = make_runs(bench, 1)
        parameters = {
            "run_id": run_id,
            "token": 1,
            "after": 0,
            "shard": 0,
            "n": 10,
            "types": [TRACE.value] * 10,
            "steps": ["work"] * 10,
            "attempts": [1] * 10,
            "datas": [json.dumps(DATA)] * 10,
        }
        with writer(bench) as connection:
            position = "SELECT pg_current_wal_insert_lsn()"
            begin = connection.execute(position).fetchone()
            for _ in range(1000):
                connection.execute(statement.encode(), parameters)
            row = connection.execute(f"SELECT ({position}) - %s", (begin[0],)).fetchone()  # type: ignore[index]
        return float(row[0]) / 1000  # type: ignore[index]

    found = interleaved({"with": lambda: wal(journal.sql["append"]), "without": lambda: wal(lean)})
    bench.db.execute("ALTER SYSTEM RESET full_page_writes")
    bench.db.execute("SELECT pg_reload_conf()")
    record(
        "relay.16",
        ratios(found["with"], found["without"]),
        unit="x",
        what="WAL bytes of a 10-event append / the same without outbox",
    )
    record("relay.17", round_trips(bench), unit="", what="round trips of an append")


def round_trips(bench: Bench) -> list[float]:
    """Counted in libpq's own trace: the server is ready for the next question once for each."""
    journal = bench.app.journal
    (run_id, *_) = make_runs(bench, 1)
    found = []
    with writer(bench) as connection:
        for count in (1, 2, 10, 1, 1, 1, 1, 1, 1, 1):
            with TemporaryFile("w+") as file:
                connection.pgconn.trace(file.fileno())
                event = journal.new_event(TRACE, step="work", attempt=1, where="", data=DATA)
                journal.append(connection, run_id, 1, [event] * count)
                connection.pgconn.untrace()
                file.seek(0)
                found.append(float(file.read().count("ReadyForQuery")))
    return found


# 18: lost, reordered


def witness(settings: Settings, pipe: Pipe) -> None:
    """Notes which event came after which."""
    pattern = re.compile(rb'"run_id":"([^"]+)","seq":(\d+)')
    came: dict[str, list[int]] = {}
    for message in published(settings, pipe):
        for run_id, seq in pattern.findall(message):
            came.setdefault(run_id.decode(), []).append(int(seq))
    pipe.send(came)


def disturbed_writer(settings: Settings, names: Sequence[str], count: int) -> None:
    """Appends by one, with transactions that linger, and others that are rolled back."""
    journal = App(settings, []).journal
    event = journal.new_event(TRACE, step="work", attempt=1, where="here", data=DATA)
    pause = threading.Event()
    with writer_of(settings) as connection:
        for number in range(count):
            fate = random.random()
            with connection.transaction(force_rollback=fate < 0.1):
                journal.append(connection, names[number % len(names)], 1, [event])
                if fate > 0.9:
                    pause.wait(random.uniform(0, 0.02))


def race(bench: Bench) -> None:
    """Two relays whose sessions are terminated all the time; 8 writers."""
    lost, reordered, total = [], [], 0
    for _ in range(REPEATS):
        names = make_runs(bench, 80)
        here, there = SPAWN.Pipe()
        listener = bench.child(witness, there)
        here.recv()
        with relays(bench, 2):
            writers = [bench.child(disturbed_writer, names[place::8], 1000) for place in range(8)]
            pause = threading.Event()
            while any(process.is_alive() for process in writers):
                bench.db.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name LIKE 'beatless relay%%' AND random() < 0.2"
                )
                pause.wait(0.2)
            until(lambda: not bench.db.execute("SELECT FROM run_outbox LIMIT 1").fetchall(), 60)
            pause.wait(0.25)
        hush(bench.settings)
        came = here.recv()
        listener.join()
        stored = dict(bench.db.execute("SELECT run_id, last_seq FROM runs").fetchall())
        total += sum(stored.values())
        first = {name: list(dict.fromkeys(seqs)) for name, seqs in came.items()}
        lost.append(float(sum(last - len(first.get(name, ())) for name, last in stored.items())))
        reordered.append(float(sum(seqs != sorted(seqs) for seqs in first.values())))
    record(
        "relay.18", lost, unit="", what=f"events lost of {total}, relays' sessions ended at random"
    )
    record("relay.18.order", reordered, unit="", what="runs whose events came in another order")


# 19: takeover


def takeover(bench: Bench) -> None:
    names = make_runs(bench, 200)
    journal = bench.app.journal
    client = redis.Redis.from_url(bench.settings.redis_url)
    channel = client.pubsub()  # type: ignore[no-untyped-call]
    channel.psubscribe("bench:events:*")
    channel.get_message(timeout=5)
    locks, arrivals = [], []
    for _ in range(REPEATS):
        with relays(bench, 2) as (victim, other), writer(bench) as connection:
            held = leaders(bench)
            ports = dict(
                bench.db.execute(
                    "SELECT pid, client_port FROM pg_stat_activity"
                    " WHERE starts_with(application_name, 'beatless relay')"
                )
            )
            dead = {pid for pid in held.values() if ports[pid] in local_ports(victim.pid)}
            run_id = next(name for name in names if held[shard_of(name)] in dead)
            names.remove(run_id)
            event = journal.new_event(TRACE, step="work", attempt=1, where="", data=DATA)
            begin = monotonic()
            victim.kill()
            journal.append(connection, run_id, 1, [event])
            for message in iter(lambda: channel.get_message(timeout=10), None):
                if message["channel"].endswith(run_id.encode()):
                    break
            else:
                raise AssertionError("nobody has taken over")
            arrivals.append(1000 * (monotonic() - begin))
            until(lambda: len(leaders(bench)) == SHARDS)
            locks.append(1000 * (monotonic() - begin))
            assert other.is_alive()
    channel.close()
    client.close()
    record(
        "relay.19",
        arrivals,
        unit="ms",
        what="kill -9 of a leader to an event of its shard, published by its successor",
    )
    record("relay.19.locks", locks, unit="ms", what="kill -9 of a leader to all shards led again")


# 20: runs that start later


@step
def nothing(_ctx: StepContext) -> None:
    """What a run does that only its start time is of interest of."""


LATER = Plan("later", [nothing])
DELAYED = 10_000
OVER = 10.0


def fleet(settings: Settings, pipe: Pipe) -> None:
    """Notes when each message came, and claims what has come every 10 ms.

    All at once and without events: the claims of a fleet take five times the processor time of the
    two relays, and one machine has to do for all of them here.
    """
    app = App(settings, [LATER])
    came: dict[str, float] = {}
    taken: list[str] = []

    def take(body: Any, _message: Any) -> None:
        came.setdefault(body[0][0], time())
        taken.append(body[0][0])

    def claim(connection: psycopg.Connection[Any]) -> None:
        connection.execute(
            "UPDATE dispatches SET state = 'running', reason = 'lease',"
            " due_at = clock_timestamp() + interval '10 min' WHERE run_id = ANY(%s)",
            (taken,),
        )
        taken.clear()

    with (
        writer_of(settings) as connection,
        app.celery.connection_for_read() as broker,
        broker.Consumer(
            [worker_queue(settings.prefix, "default")],
            callbacks=[take],
            accept=["json"],
            no_ack=True,
            prefetch_count=200,
        ),
    ):
        connection.execute("SET search_path TO bench")
        pipe.send("ready")
        claimed = monotonic()
        while not pipe.poll():
            with suppress(TimeoutError):
                broker.drain_events(timeout=0.01)
            if taken and monotonic() - claimed > 0.01:
                claim(connection)
                claimed = monotonic()
    pipe.send(came)


def due(bench: Bench) -> None:
    """Runs that become due one after another, on two relays; none may be early."""
    app = App(bench.settings, [LATER])
    p50, p99, early, asked = [], [], [], []
    for _ in range(REPEATS):
        bench.db.execute("TRUNCATE runs, run_events, run_outbox, dispatches")
        here, there = SPAWN.Pipe()
        listener = bench.child(fleet, there)
        here.recv()
        with relays(bench, 2):
            begin = datetime.now(UTC) + timedelta(seconds=6)
            times = [begin + timedelta(seconds=OVER * n / DELAYED) for n in range(DELAYED)]
            started = app.client.start_runs(
                [RunRequest(plan="later", not_before=at) for at in times]
            )
            until(lambda: not bench.db.execute("SELECT FROM run_outbox LIMIT 1").fetchall())
            until(lambda: asleep(bench) == SHARDS)
            pause = threading.Event()
            pause.wait(0.2)
            before = statements(bench)
            pause.wait(1)
            asked.append(float(sum(a != b for a, b in zip(before, statements(bench), strict=True))))
            until(
                lambda: (
                    not bench.db.execute(
                        "SELECT FROM dispatches WHERE state <> 'running' LIMIT 1"
                    ).fetchall()
                ),
                seconds=60,
            )
        here.send("end")
        came = here.recv()
        listener.join()
        late = sorted(
            1000 * (came[run.run_id] - at.timestamp())
            for run, at in zip(started, times, strict=True)
        )
        p50.append(statistics.median(late))
        p99.append(late[int(len(late) * 0.99)])
        early.append(float(sum(one < 0 for one in late)))
    app.close()
    record("due.p50", p50, unit="ms", what="due time to message at the consumer, p50")
    record(
        "due.p99",
        p99,
        unit="ms",
        what="the same, p99: 10,000 runs due over 10 s, 2 relays, claimed in bulk",
    )
    record("due.early", early, unit="", what="runs that came before their time")
    record("due.idle", asked, unit="", what="statements of the relays in 1 s while nothing is due")


def delayed(bench: Bench) -> None:
    """What runs that wait for a later time cost a relay that looks for others."""
    relay = bench.app.relay()

    def look(waiting: int) -> float:
        bench.db.execute("TRUNCATE dispatches")
        bench.db.execute(
            "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)"
            " SELECT 'delayed-' || n, n %% %s, 'later', 'default', 0, 'waiting',"
            " now() + make_interval(hours => 1, secs => n), 'delay' FROM generate_series(1, %s) n",
            (SHARDS, waiting),
        )
        bench.db.execute("VACUUM ANALYZE dispatches")
        return pick_time(relay, lambda: None)

    found = interleaved({"many": lambda: look(200_000), "none": lambda: look(0)})
    relay.stop()
    record(
        "due.delayed",
        ratios(found["many"], found["none"]),
        unit="x",
        what="a look for due runs while 200,000 wait for a later time / while none does",
    )


def local_ports(pid: int) -> set[int]:
    """Local ports of a process's TCP connections."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {int(line[1].split(":")[1], 16) for line in lines if line[9] in inodes}


ALL: dict[str, Callable[[Bench], None]] = {
    "append": append,
    "api": api,
    "drain": drain,
    "scale": scale,
    "latency": latency,
    "idle": idle,
    "growth": growth,
    "snapshot": snapshot,
    "wire": wire,
    "race": race,
    "takeover": takeover,
    "due": due,
    "delayed": delayed,
}


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    if unknown := set(names) - ALL.keys():
        raise SystemExit(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")
    for name in names:
        with services() as bench:
            ALL[name](bench)


if __name__ == "__main__":
    main()
