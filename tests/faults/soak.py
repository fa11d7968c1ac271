"""`python -m tests.faults.soak --seconds 600`: a steady load, and whether anything grows.

Runs are started over HTTP, some are followed, and ended ones are removed after some seconds, as an
operator's `beatless clean` does; autovacuum does the rest. Samples are stored in
benchmarks/results/soak.json. Exit status 1 if a series grows by more than its noise explains.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from beatless.errors import JobsError
from beatless.http import Client
from beatless.local.processes import children_of
from tests.faults.results import SOAK, write
from tests.faults.steady import SmallFleet, SteadyLoad

RUNS_PER_S = 20.0
KEPT_S = 20.0
"""Ended runs are removed after this time, so that a flat table is one that vacuum keeps flat."""
CLEAN_EVERY_S = 2.0
SAMPLES = 150
"""At most, and one a second at most."""
LEAST_INTERVAL_S = 1.0
WARM_UP_SHARE = 0.25
"""Of the samples, the first ones are not judged: caches fill, and children are forked."""
BLOCKS = 12
STANDARD_ERRORS = 3.0
GROWTH_SHARE = 0.05
"""Growth over the judged time, beyond doubt, that is no longer flat; of the mean."""

# Autovacuum as it is by default, but for a nap that fits into a short soak.
POSTGRES = {"autovacuum_naptime": "5s"}

TABLES = """
SELECT sum(pg_table_size(c.oid))::bigint, sum(pg_indexes_size(c.oid))::bigint
FROM pg_class c WHERE relkind = 'r' AND relnamespace = %s::regnamespace
"""
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'beatless%'"


class Series(NamedTuple):
    """One line of the plot."""

    title: str
    unit: str
    floor: float
    """Growth below this is none: a page, a buffer, a connection that comes and goes."""


SERIES = {
    "relay_memory": Series("memory of two relays", "MB", 2.0),
    "worker_memory": Series("memory of two workers with two children each", "MB", 4.0),
    "api_memory": Series("memory of the API", "MB", 3.0),
    "descriptors": Series("open descriptors of all processes", "", 4.0),
    "postgres_sessions": Series("connections to Postgres", "", 2.0),
    "redis_clients": Series("connections to Redis", "", 4.0),
    "tables": Series("tables", "MB", 1.0),
    "indexes": Series("indexes", "MB", 1.0),
}


class Verdict(NamedTuple):
    mean: float
    growth: float
    """Over the judged time, by a straight line through means of blocks."""
    least: float
    """The growth that is beyond doubt: less three standard errors."""
    grows: bool


def verdict(values: Sequence[float], floor: float) -> Verdict:
    """Whether a series grows, after its warm-up.

    A line through the means of twelve blocks by least squares: neighbouring samples depend on each
    other, their blocks hardly.
    """
    judged = values[int(len(values) * WARM_UP_SHARE) :]
    if len(judged) < BLOCKS:
        raise ValueError(f"{len(values)} samples are too few: take at least {BLOCKS * 2}")
    size = len(judged) / BLOCKS
    means = [statistics.fmean(judged[int(n * size) : int((n + 1) * size)]) for n in range(BLOCKS)]
    slope, intercept = statistics.linear_regression(range(BLOCKS), means)
    squares = sum((mean - intercept - slope * n) ** 2 for n, mean in enumerate(means))
    spread = sum((n - (BLOCKS - 1) / 2) ** 2 for n in range(BLOCKS))
    error = (squares / (BLOCKS - 2) / spread) ** 0.5
    growth, least = slope * (BLOCKS - 1), (slope - STANDARD_ERRORS * error) * (BLOCKS - 1)
    mean = statistics.fmean(judged)
    return Verdict(mean, growth, least, least > max(floor, GROWTH_SHARE * mean))


def megabytes(pid: int) -> float:
    """The resident memory of a process. Its share of shared pages would be dear to ask for."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def sampled(fleet: SmallFleet) -> dict[str, float]:
    """One value of each series."""
    pids = {name: child.pid for name, child in fleet.processes.items()}
    families = {name: [pid, *children_of(pid)] for name, pid in pids.items()}

    def memory(role: str) -> float:
        found = [
            pid for name, family in families.items() if name.startswith(role) for pid in family
        ]
        return sum(megabytes(pid) for pid in found)

    with fleet.connect() as session:
        tables, indexes = session.execute(TABLES, [fleet.settings.schema]).fetchone() or (0, 0)
        (sessions,) = session.execute(SESSIONS).fetchone() or (0,)
    with fleet.app.redis() as client:
        clients = client.info("clients")["connected_clients"]
    descriptors = sum(
        len(list(Path(f"/proc/{pid}/fd").iterdir()))
        for family in families.values()
        for pid in family
    )
    return {
        "relay_memory": memory("relay"),
        "worker_memory": memory("worker"),
        "api_memory": memory("api"),
        "descriptors": descriptors,
        "postgres_sessions": sessions,
        "redis_clients": clients,
        "tables": tables / 2**20,
        "indexes": indexes / 2**20,
    }


class Beside:
    """Threads that do something again and again until the soak is over."""

    def __init__(self) -> None:
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self.failed: list[str] = []

    def repeat(self, act: Any, every_s: float) -> None:
        def work() -> None:
            try:
                while not self._ending.wait(every_s):
                    act()
            except Exception as error:
                self.failed.append(repr(error))
                raise

        self._threads.append(threading.Thread(target=work))
        self._threads[-1].start()

    def stop(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()


def soaked(seconds: float, runs_per_s: float) -> dict[str, Any]:
    """The samples of each series, and how many runs there were."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        ExitStack() as stack,
    ):
        Path(folder).chmod(0o755)
        fleet = stack.enter_context(SmallFleet(Path(folder), postgres_settings=POSTGRES))
        client = stack.enter_context(Client(fleet.api_url))
        load, beside = SteadyLoad(client, runs_per_s), Beside()
        followed = count()

        def follow() -> None:
            if load.accepted:
                with suppress(JobsError):  # it may be removed meanwhile
                    for _ in client.stream_run(load.accepted[-1], timeout=30):
                        pass
                next(followed)

        beside.repeat(follow, 0.2)
        beside.repeat(lambda: fleet.app.client.clean("completed", KEPT_S), CLEAN_EVERY_S)
        load.start()
        begin, samples = monotonic(), []
        every = max(LEAST_INTERVAL_S, seconds / SAMPLES)
        try:
            while (passed := monotonic() - begin) < seconds:
                samples.append(sampled(fleet))
                load.wait(min(every, seconds - passed))
        finally:
            load.stop()
            beside.stop()
        if failed := load.failed + beside.failed:
            raise RuntimeError(f"the load itself failed: {failed}")
        fleet.wait_until_all_have_ended(60)
    return {
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "seconds": seconds,
        "runs": len(load.accepted),
        "followed": next(followed),
        "samples": {name: [round(sample[name], 3) for sample in samples] for name in SERIES},
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rate", type=float, default=RUNS_PER_S, help="runs started per second")
    given = parser.parse_args()
    found = soaked(given.seconds, given.rate)
    write(SOAK, found)
    growing = []
    for name, series in SERIES.items():
        told = verdict(found["samples"][name], series.floor)
        if told.grows:
            growing.append(name)
        print(
            f"{name:18} {told.mean:8.1f} {series.unit:3} {told.growth:+7.2f}"
            f" (at least {told.least:+.2f}){'  GROWS' if told.grows else ''}"
        )
    print(
        f"soak: {given.seconds:g} s, {found['runs']} runs, {found['followed']} followed,"
        f" growing: {', '.join(growing) or 'nothing'}"
    )
    return 1 if growing else 0


if __name__ == "__main__":
    sys.exit(main())
