"""What removing old events costs, in batches and by partitions: `python -m benchmarks.retention`.

The numbers behind docs/adr/0009-retention-in-batches.md.
"""

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import choice
from time import monotonic

import psycopg

from beatless.migrations import migrate
from beatless.orchestrator.events import EventType
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.retention import Retention
from beatless.settings import libpq_url
from benchmarks.measure import (
    PGBENCH,
    Bench,
    interleaved,
    ratios,
    record,
    services,
)
from benchmarks.relay import TRACE, make_runs, script, writer

DAYS = 30
CLIENTS = 4

PARTITIONED = f"""
DROP TABLE parts.run_events;
CREATE TABLE parts.run_events (LIKE bench.run_events INCLUDING DEFAULTS) PARTITION BY RANGE (ts);
ALTER TABLE parts.run_events ADD PRIMARY KEY (run_id, seq, ts);
DO $$ BEGIN FOR day IN 0..{DAYS} LOOP
  EXECUTE format('CREATE TABLE parts.day_%s PARTITION OF parts.run_events FOR VALUES FROM (%L) TO (%L)',
    day, date_trunc('day', now()) - make_interval(days => day),
    date_trunc('day', now()) - make_interval(days => day - 1));
END LOOP; END $$"""  # noqa: E501

FILL = """
INSERT INTO {schema}.run_events (run_id, seq, ts, type, source, data)
SELECT 'old-' || run, seq, now() - make_interval(days => 1 + run %% {days}),
       CASE seq WHEN 13 THEN 'RunFinished' ELSE 'DebugTrace' END, 'worker',
       '{{"note": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}}'
  FROM generate_series(1, {runs}) AS run, generate_series(1, 13) AS seq
 ORDER BY run %% {days} DESC"""


def fill(bench: Bench, schema: str, runs: int, days: int = DAYS) -> None:
    """Ended runs of 13 events each, on the days from yesterday back."""
    bench.db.execute(f"TRUNCATE {schema}.run_events, {schema}.runs")
    bench.db.execute(
        f"INSERT INTO {schema}.runs (run_id, plan, plan_version, queue, state, last_seq,"
        " finished_at) SELECT 'old-' || run, 'p', 'v', 'default', 'completed', 13, now()"
        f" FROM generate_series(1, {runs}) AS run"
    )
    bench.db.execute(FILL.format(schema=schema, runs=runs, days=days).replace("%%", "%"))
    bench.db.execute(f"VACUUM ANALYZE {schema}.run_events")
    bench.db.execute(f"VACUUM ANALYZE {schema}.runs")


def hot(bench: Bench, schema: str) -> None:
    """The runs that pgbench appends to, beside the others."""
    bench.db.execute(
        f"INSERT INTO {schema}.runs (run_id, plan, plan_version, queue, state, last_seq,"
        " lease_token) SELECT '0192f3a4-7b1c-7d3e-8f00-' || lpad(n::text, 12, '0'), 'p', 'v',"
        f" 'default', 'running', 0, 1 FROM generate_series(0, {CLIENTS - 1}) AS n"
    )
    bench.db.execute("CHECKPOINT")


def appends(bench: Bench, schema: str, *, type: EventType = TRACE) -> tuple[float, float]:
    """(appends per second, 99th percentile in ms) of four writers, two seconds long."""
    bench.db.execute(f"TRUNCATE {schema}.run_outbox")
    statement = Journal(schema, max_event_bytes=262_144).sql["append"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "append.sql"
        file.write_text(script(statement).replace(TRACE.value, type.value))
        subprocess.run(
            [
                str(PGBENCH),
                *("-n", "-M", "prepared", "-c", str(CLIENTS), "-j", "2", "-T", "2", "-l"),
                *("-f", str(file), libpq_url(bench.settings.database_url)),
            ],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        times = sorted(
            int(line.split()[2])
            for log in Path(folder).glob("pgbench_log.*")
            for line in log.read_text().splitlines()
        )
    return len(times) / 2, times[len(times) * 99 // 100] / 1000


@contextmanager
def pruning(bench: Bench) -> Iterator[list[int]]:
    """The product's chore at work, with its pauses, as long as the block lasts."""
    stopping, steps = threading.Event(), []
    retention = Retention("bench", events_days=0.5, runs_days=0)

    def work() -> None:
        with bench.app.direct_connection() as session:
            session.execute("SET synchronous_commit = off")
            while not stopping.wait(retention.step(session)):
                steps.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield steps
    finally:
        stopping.set()
        thread.join()


def writes(bench: Bench) -> None:
    """What each design costs those who append."""

    def measured(schema: str, type: EventType = TRACE) -> float:
        fill(bench, schema, 3000)
        hot(bench, schema)
        return appends(bench, schema, type=type)[0]

    found = interleaved({name: partial(measured, name) for name in ("bench", "parts")})
    record(
        "retention.1",
        ratios(found["parts"], found["bench"]),
        unit="x",
        what="appends/s into daily partitions / into one table, 4 writers",
    )

    def without_index() -> float:
        bench.db.execute("DROP INDEX bench.run_events_finished")
        try:
            return measured("bench", EventType.RUN_FINISHED)
        finally:
            bench.db.execute(
                "CREATE INDEX run_events_finished ON bench.run_events (ts)"
                " WHERE type = 'RunFinished'"
            )

    found = interleaved(
        {"with": partial(measured, "bench", EventType.RUN_FINISHED), "without": without_index}
    )
    record(
        "retention.2",
        ratios(found["with"], found["without"]),
        unit="x",
        what="appends/s of nothing but RunFinished, with the index of what is due / without",
    )


def reads(bench: Bench) -> None:
    """What each design costs those who read a run."""
    for schema in ("bench", "parts"):
        fill(bench, schema, 30_000)

    def backfills(schema: str) -> float:
        journal, count = Journal(schema, max_event_bytes=262_144), 0
        names = [f"old-{n}" for n in range(1, 30_001)]
        with writer(bench) as connection:
            began = monotonic()
            while monotonic() < began + 1.5:
                assert len(journal.read(connection, choice(names))) == 13
                count += 1
        return count / 1.5

    found = interleaved({name: partial(backfills, name) for name in ("bench", "parts")})
    record(
        "retention.3",
        ratios(found["parts"], found["bench"]),
        unit="x",
        what=f"reads of a run from {DAYS} daily partitions / from one table",
    )


def beside(bench: Bench) -> None:
    """What the batches cost those who append meanwhile."""
    tails: dict[str, list[float]] = {"quiet": [], "pruning": []}

    def measured(name: str) -> float:
        fill(bench, "bench", 60_000)
        hot(bench, "bench")
        if name == "quiet":
            rate, tail = appends(bench, "bench")
        else:
            with pruning(bench) as steps:
                rate, tail = appends(bench, "bench")
            assert steps
        tails[name].append(tail)
        return rate

    found = interleaved({name: partial(measured, name) for name in tails})
    record(
        "retention.4",
        ratios(found["pruning"], found["quiet"]),
        unit="x",
        what="appends/s while the relay prunes / while it does not, 4 writers",
    )
    record(
        "retention.4.p99",
        ratios(tails["pruning"], tails["quiet"]),
        unit="x",
        what="99th percentile of an append while the relay prunes / while it does not",
    )


def removal(bench: Bench) -> None:
    """How fast old events go, and whom that stops."""
    runs = 15_000

    def batches() -> float:
        fill(bench, "bench", runs, days=1)
        retention = Retention("bench", events_days=0.5, runs_days=0)
        with bench.app.direct_connection() as session:
            session.execute("SET synchronous_commit = off")
            began = monotonic()
            while retention.step(session) < 60:
                pass
        return runs * 13 / (monotonic() - began)

    record(
        "retention.5",
        [batches() for _ in range(5)],
        unit="/s",
        what="events pruned in batches of 1000, without the pauses",
    )

    def stall(name: str, remove: Callable[[psycopg.Connection], None]) -> float:
        """Seconds of an append while a reader's transaction of one second is open."""
        fill(bench, name, 1000, days=2)
        hot(bench, name)
        journal = Journal(name, max_event_bytes=262_144)
        event = journal.new_event(TRACE, where="here", data={"n": 1})
        url = libpq_url(bench.settings.database_url)
        with (
            psycopg.connect(url) as reader,
            psycopg.connect(url, autocommit=True) as remover,
            writer(bench) as appender,
        ):
            reader.execute(f"SELECT count(*) FROM {name}.run_events")
            thread = threading.Thread(target=remove, args=(remover,))
            thread.start()
            timer = threading.Timer(1.0, reader.rollback)
            timer.start()
            threading.Event().wait(0.2)
            began = monotonic()
            assert journal.append(appender, "0192f3a4-7b1c-7d3e-8f00-000000000000", 1, [event])
            took = monotonic() - began
            timer.join()
            thread.join()
        return took

    def drop(connection: psycopg.Connection) -> None:
        connection.execute("DROP TABLE parts.day_1")
        connection.execute(
            "CREATE TABLE parts.day_1 PARTITION OF parts.run_events FOR VALUES"
            " FROM (date_trunc('day', now()) - interval '1 day') TO (date_trunc('day', now()))"
        )

    def prune(connection: psycopg.Connection) -> None:
        Retention("bench", events_days=0.5, runs_days=0).step(connection)

    found = interleaved(
        {"drop": partial(stall, "parts", drop), "prune": partial(stall, "bench", prune)}
    )
    record(
        "retention.6",
        [1000 * took for took in found["drop"]],
        unit="ms",
        what="an append while a partition is dropped and a reader's transaction is open for 0.8 s",
    )
    record(
        "retention.7",
        [1000 * took for took in found["prune"]],
        unit="ms",
        what="an append while a batch is pruned and a reader's transaction is open for 0.8 s",
    )


def main() -> None:
    with services() as bench:
        migrate(bench.app.engine, "parts")
        bench.db.execute(PARTITIONED)
        make_runs(bench, 0)
        for part in (writes, reads, beside, removal):
            part(bench)


if __name__ == "__main__":
    main()
