"""What a fleet needs: connections, memory, disk and WAL: `python -m benchmarks.capacity`.

The figures of the tables in docs/operations.md. Counts and bytes, no times.
"""

import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import Bench, record, services
from jobs import App
from jobs.demo import PLANS
from jobs.testing import Kit

RUNS = 2000
REPEATS = 3
CHILDREN = 4


def megabytes(pid: int) -> float:
    """What a process has for itself: its share of what it shares is counted in."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def sessions(bench: Bench, name: str) -> int:
    row = bench.db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s", (name,)
    ).fetchone()
    assert row
    return int(row[0])


def disk(bench: Bench) -> tuple[int, int]:
    """Bytes of all tables with their indexes, and the position in the WAL."""
    row = bench.db.execute(
        "SELECT sum(pg_total_relation_size(c.oid))::bigint, "
        "pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint FROM pg_class c "
        "WHERE relkind = 'r' AND relnamespace = 'bench'::regnamespace"
    ).fetchone()
    assert row
    return int(row[0]), int(row[1])


def run_all(kit: Kit, count: int) -> None:
    for run in [kit.start_run("agents.run") for _ in range(count)]:
        kit.wait_for_run_completion(run.run_id, timeout=300)


def processes(bench: Bench) -> None:
    """Memory and connections of each process, after it has worked."""
    found: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            settings = replace(bench.settings, lease_seconds=30.0)
            kit = Kit(App(settings, PLANS), directory=Path(folder))
            stack.callback(kit.close)
            relay = kit.relay_process("")
            worker = kit.worker_process("", concurrency=CHILDREN)
            run_all(kit, 200)
            pool = children(worker.pid)
            memory = [megabytes(child) for child in pool]
            for key, value in (
                ("relay.connections", sessions(bench, "beatless relay")),
                ("relay.memory", megabytes(relay.pid)),
                ("worker.connections", sessions(bench, "beatless worker") / len(pool)),
                ("worker.memory", megabytes(worker.pid)),
                ("child.memory", sum(memory) / len(memory)),
            ):
                found.setdefault(key, []).append(value)
    for key, unit, what in (
        ("relay.connections", "", "connections to Postgres of a relay"),
        ("relay.memory", "MB", "memory (PSS) of a relay"),
        (
            "worker.connections",
            "",
            f"connections to Postgres of a worker, each of {CHILDREN} children",
        ),
        ("worker.memory", "MB", "memory (PSS) of the main process of a worker"),
        ("child.memory", "MB", "memory (PSS) of a child of a worker, demo plans"),
    ):
        record(f"capacity.{key}", found[key], unit=unit, what=what)


def bytes_of_runs(bench: Bench) -> None:
    """Disk and WAL of a run of 13 events with small results, in process."""
    kit = Kit(App(bench.settings, PLANS))
    stored, logged = [], []
    try:
        run_all_in_process(kit, 200)  # the first pages
        for _ in range(REPEATS):
            bench.db.execute("CHECKPOINT")
            before = disk(bench)
            run_all_in_process(kit, RUNS)
            after = disk(bench)
            stored.append((after[0] - before[0]) / RUNS)
            logged.append((after[1] - before[1]) / RUNS)
    finally:
        kit.close()
    record("capacity.disk", stored, unit="bytes", what="disk of a run of 13 events, with indexes")
    record(
        "capacity.wal", logged, unit="bytes", what="WAL of a run of 13 events, after a checkpoint"
    )


def run_all_in_process(kit: Kit, count: int) -> None:
    for _ in range(count):
        kit.start_run("agents.run")
    kit.work_until_idle()


def main() -> None:
    with services() as bench:
        processes(bench)
    with services() as bench:
        bytes_of_runs(bench)


if __name__ == "__main__":
    main()
