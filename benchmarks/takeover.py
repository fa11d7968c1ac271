"""How soon a run goes on when its process is killed: `python -m benchmarks.takeover`, 4 minutes.

One run, whose step waits; whoever executes it is killed with SIGKILL, again and again. Measured
from before the kill to the first line of the step in the next process, by the machine's one clock,
with the default settings. The kinds come in random order. Workers are started again in batches,
and nothing is killed while one starts. On a busy machine it ends after `ENDS_AFTER_S`, with fewer
kills.
"""

import json
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beatless import App, Plan, StepContext, retry, step
from beatless.local.child import Child
from beatless.local.processes import children_of
from beatless.testing import Kit
from benchmarks.measure import record, services

APP = "benchmarks.takeover_app:app"
KILLS = 240
ENDS_AFTER_S = 210.0
WORKERS = 4
"""Of each pool."""
LIMIT_S = 60.0
"""Above the lease: a takeover by it is seen as one."""


@step(retry=retry(max_crashes=10_000))
def wait(ctx: StepContext) -> None:
    """Notes when it begins and in which process, then waits at a FIFO."""
    line = {"at": time.monotonic(), "pid": os.getpid(), "parent": os.getppid()}
    with Path(ctx.input["lines"]).open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    Path(ctx.input["fifo"]).read_text()


PLANS = [Plan("wait", [wait])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is killed, of the worker that has the run."""

    name: str
    pools: tuple[str, ...]
    kill: Callable[[int, int], None]
    """By the process that executes the run, and the main process of its worker."""
    whole: bool = True


def _all(_: int, main: int) -> None:
    """As the end of a container: nothing of the worker is left that could notice."""
    for pid in (*children_of(main), main):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


KINDS = (
    Kind(
        name="child",
        pools=("prefork",),
        kill=lambda pid, _: os.kill(pid, signal.SIGKILL),
        whole=False,
    ),
    Kind(
        name="main",
        pools=("prefork", "threads"),
        kill=lambda _, main: os.kill(main, signal.SIGKILL),
    ),
    Kind(
        name="group",
        pools=("prefork", "threads"),
        kill=lambda _, main: os.killpg(main, signal.SIGKILL),
    ),
    Kind(name="all", pools=("prefork", "threads"), kill=_all),
)


class Fleet:
    """A relay, and workers of both pools."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._workers: dict[int, tuple[str, Child]] = {}
        # They stay: a worker ends with the thread that has started it.
        self._threads = ThreadPoolExecutor(2 * WORKERS)
        kit.relay_process(APP)

    def fill(self) -> None:
        """Start what is missing, all at once."""
        alive = {pid: each for pid, each in self._workers.items() if each[1].alive}
        self._workers = alive
        missing = []
        for pool in ("prefork", "threads"):
            there = sum(1 for name, _ in alive.values() if name == pool)
            missing += [pool] * (WORKERS - there)
        list(self._threads.map(self._start, missing))

    def _start(self, pool: str) -> None:
        child = self._kit.worker_process(APP, concurrency=2, arguments=["--", "--pool", pool])
        self._workers[child.pid] = (pool, child)

    def whose(self, line: dict[str, Any]) -> tuple[str, int]:
        """The pool and the main process of the worker that has written the line."""
        for main in (line["pid"], line["parent"]):
            if main in self._workers:
                return self._workers[main][0], main
        raise RuntimeError(f"no worker has a process {line['pid']}")

    def left(self) -> int:
        return sum(1 for _, child in self._workers.values() if child.alive)


def await_line(path: Path, number: int) -> dict[str, Any]:
    """The line of this number, once it is there."""
    waiting, deadline = threading.Event(), time.monotonic() + LIMIT_S
    while True:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if len(lines) > number and lines[number].endswith("\n"):
            found: dict[str, Any] = json.loads(lines[number])
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not go on within {LIMIT_S:g} s")
        waiting.wait(0.005)


def measure(kit: Kit, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each takeover, by kind and pool."""
    fleet, found = Fleet(kit), {}
    lines, fifo = folder / "lines", folder / "fifo"
    os.mkfifo(fifo)
    fleet.fill()
    run = kit.start_run("wait", {"lines": str(lines), "fifo": str(fifo)})
    ends_at, number = time.monotonic() + ENDS_AFTER_S, 0
    while number < KILLS and time.monotonic() < ends_at:
        line = await_line(lines, number)
        pool, main = fleet.whose(line)
        kinds = [kind for kind in KINDS if pool in kind.pools]
        (kind,) = random.choices(kinds, [1 if kind.whole else 3 for kind in kinds])
        before = time.monotonic()
        kind.kill(line["pid"], main)
        took = await_line(lines, number + 1)["at"] - before
        number += 1
        found.setdefault(f"{kind.name}_{pool}", []).append(took * 1000)
        print(f"{number:4} {kind.name} {pool} {took * 1000:.0f} ms", flush=True)
        if kind.whole and fleet.left() <= WORKERS:
            fleet.fill()
    await_line(lines, number)
    fifo.write_text("go")
    kit.wait_for_run_completion(run.run_id)
    kit.verify()
    return found


def main() -> None:
    with services() as bench, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kit = Kit(App(bench.settings, PLANS), directory=Path(folder))
        stack.callback(kit.close)
        found = measure(kit, Path(folder))
    for key, values in sorted(found.items()):
        what, _, pool = key.partition("_")
        record(f"takeover.{key}", values, unit="ms", what=f"SIGKILL of {what}, {pool}: to the next")
    every = sorted(value for values in found.values() for value in values)
    record("takeover.p50", [statistics.median(every)], unit="ms", what=f"of {len(every)} kills")
    record("takeover.p99", [every[len(every) * 99 // 100]], unit="ms", what="of the same")


if __name__ == "__main__":
    main()
