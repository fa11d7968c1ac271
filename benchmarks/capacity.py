"""What a fleet needs: connections, memory, disk, WAL: `python -m benchmarks.capacity`, 2 minutes.

Writes the tables in docs/operations.md too. Counts and bytes, no times: other work on the machine
does not change them.
"""

import os
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from beatless import App
from beatless.demo import PLANS
from beatless.testing import Kit
from benchmarks import runbook
from benchmarks.measure import Bench, record, services

RUNS = 500
REPEATS = 3
CHILDREN = 4


def megabytes(pid: int) -> float:
    """What a process has for itself: its share of what it shares is counted in."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def children(pid: int) -> list[int]:
    """Those of its pool: its keeper leads a session of its own."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split() if os.getsid(int(child)) != int(child)]


def sessions(bench: Bench, name: str) -> int:
    row = bench.db.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s", (name,)
    ).fetchone()
    assert row
    return int(row[0])


def spent(bench: Bench) -> dict[str, int]:
    """Bytes of all tables with their indexes, of WAL, and to Redis; commits that were flushed."""
    row = bench.db.execute(
        "SELECT sum(pg_total_relation_size(c.oid))::bigint, "
        "pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint FROM pg_class c "
        "WHERE relkind = 'r' AND relnamespace = 'bench'::regnamespace"
    ).fetchone()
    assert row
    with bench.app.redis() as client:
        received = client.info("stats")["total_net_input_bytes"]
    return {"disk": int(row[0]), "wal": int(row[1]), "redis": int(received)}


def run_all(kit: Kit, count: int) -> None:
    for run in [kit.start_run("agents.run") for _ in range(count)]:
        kit.wait_for_run_completion(run.run_id, timeout=300)


def processes(bench: Bench) -> None:
    """Memory and connections of each process, after it has worked."""
    found: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            settings = replace(bench.settings, lease_seconds=30.0)
            kit = Kit(App(settings, PLANS), run_prefix=f"r{repeat}", directory=Path(folder))
            stack.callback(kit.close)
            relay = kit.relay_process("")
            worker = kit.worker_process("", concurrency=CHILDREN)
            run_all(kit, 200)
            pool = children(worker.pid)
            memory = [megabytes(child) for child in pool]
            for key, value in (
                ("relay.connections", sessions(bench, "beatless relay%")),
                ("relay.memory", megabytes(relay.pid)),
                ("worker.connections", sessions(bench, "beatless worker%") / len(pool)),
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
    """What a run of 13 events with small results costs, with a relay and a worker."""
    found: dict[str, list[float]] = {"disk": [], "wal": [], "redis": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kit = Kit(App(bench.settings, PLANS), directory=Path(folder))
        stack.callback(kit.close)
        kit.relay_process("")
        kit.worker_process("", concurrency=CHILDREN)
        run_all(kit, 200)  # the first pages
        for _ in range(REPEATS):
            bench.db.execute("CHECKPOINT")
            before = spent(bench)
            run_all(kit, RUNS)
            after = spent(bench)
            for key, values in found.items():
                values.append((after[key] - before[key]) / RUNS)
    for key, what in (
        ("disk", "disk of a run of 13 events, with indexes"),
        ("wal", "WAL of a run of 13 events, from a checkpoint on"),
        ("redis", "bytes to Redis of a run of 13 events, broker and pub/sub"),
    ):
        record(f"capacity.{key}", found[key], unit="bytes", what=what)


def main() -> None:
    with services() as bench:
        processes(bench)
    with services() as bench:
        bytes_of_runs(bench)
    runbook.main()


if __name__ == "__main__":
    main()
