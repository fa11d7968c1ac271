"""A fleet of real processes on services of its own, and what is known of it."""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from beatless import App, RunRequest
from beatless.client import Client
from beatless.local.child import Child
from benchmarks.measure import Bench, services
from benchmarks.peers.process_tree import processor_s
from benchmarks.waits.plans import PLANS

APP = "benchmarks.waits.app:app"
BULK = 500
"""Runs that are started, and signals that are sent, by one call."""

MOST_WAIT_S = 900.0
"""Seconds until what is awaited has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What one part has found: a value of each repeat."""

    key: str
    values: Sequence[float]
    unit: str
    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """How much is measured."""

    size: float
    """A share of what is measured by default."""
    repeats: int

    def of(self, count: int, least: int = 1) -> int:
        return max(least, round(count * self.size))


class Fleet:
    """Processes of `beatless` by their commands."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.db = bench.db
        self.app = App(bench.settings, PLANS)
        self.client: Client = self.app.client
        self.folder = folder
        self._children: list[Child] = []

    def start(self, *command: str, **settings: Any) -> Child:
        """A process that is ready, with the settings of the benchmark and these."""
        found_here = {"BEATLESS_APP": APP, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environ = os.environ | self.bench.settings.to_env() | found_here
        environ |= {f"BEATLESS_{name.upper()}": str(value) for name, value in settings.items()}
        name = f"{command[0]}-{len(self._children) + 1}"
        child = Child(name, command, environ=environ, log=self.folder / f"{name}.log")
        self._children.append(child)
        child.start()
        child.wait_ready()
        return child

    def processor_s(self) -> dict[str, float]:
        """Processor time so far, by command and server, with all their processes."""
        pids = dict(self.bench.pids)
        pids |= {child.name.partition("-")[0]: child.pid for child in self._children if child.alive}
        return {name: processor_s(pid) for name, pid in pids.items()}

    def start_runs(self, plan: str, inputs: Sequence[Any]) -> list[str]:
        """Start a run for each input, in bulk; their ids."""
        requests = [RunRequest(plan=plan, input=each) for each in inputs]
        found: list[str] = []
        for first in range(0, len(requests), BULK):
            found += [run.run_id for run in self.client.start_runs(requests[first : first + BULK])]
        return found

    def park(self, plan: str, inputs: Sequence[Any]) -> list[str]:
        """Start runs, and wait until all of them wait; their ids."""
        before = self.count_parked()
        found = self.start_runs(plan, inputs)
        self.until(lambda: self.count_parked() - before >= len(found), "all runs wait", every_s=0.5)
        return found

    def count_parked(self) -> int:
        return self.ask(
            "SELECT count(*) FROM dispatches WHERE state = 'delayed' AND reason = 'wait'"
        )

    def await_ends(self, run_ids: Sequence[str], every_s: float = 0.25) -> None:
        """Wait until the runs have ended; few, for each look asks for all of them."""
        statement = "SELECT count(*) FROM runs WHERE run_id = ANY(%s) AND finished_at IS NULL"
        self.until(lambda: not self.ask(statement, list(run_ids)), "the runs end", every_s=every_s)

    def results(self, run_ids: Sequence[str]) -> list[Any]:
        """The results of runs that have completed, in the same order."""
        rows = dict(
            self.db.execute(
                "SELECT run_id, result FROM runs WHERE run_id = ANY(%s) AND state = 'completed'",
                (list(run_ids),),
            ).fetchall()
        )
        return [rows[run_id] for run_id in run_ids]

    def await_published(self) -> None:
        """Wait until the relay has nothing left."""
        self.until(lambda: not self.ask("SELECT count(*) FROM run_outbox"), "all is published")

    def ask(self, statement: str, *values: Any) -> int:
        row = self.db.execute(statement, values).fetchone()
        assert row
        return int(row[0])

    def until(self, holds: Callable[[], bool], what: str, *, every_s: float = 0.05) -> None:
        """Look until it holds. Raises TimeoutError, and RuntimeError if a process has ended."""
        waiting, deadline = threading.Event(), monotonic() + MOST_WAIT_S
        while not holds():
            for child in self._children:
                if not child.alive:
                    raise RuntimeError(f"{child.name} has ended: {child.last_words()}")
            if monotonic() > deadline:
                words = {child.name: child.last_words() for child in self._children}
                raise TimeoutError(f"it did not come that {what}: {words}")
            waiting.wait(every_s)

    def end(self, *some: Child) -> None:
        """End these processes, or all, at once; a worker that has nothing to do loses nothing."""
        for child in list(some or self._children):
            self._children.remove(child)
            child.reap(monotonic())

    def close(self) -> None:
        self.end()
        self.app.close()


@contextmanager
def fleets() -> Iterator[Fleet]:
    """A fleet without processes, with services of its own."""
    with ExitStack() as stack:
        bench = stack.enter_context(services())
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="beatless-waits-"))
        fleet = Fleet(bench, Path(folder))
        stack.callback(fleet.close)
        yield fleet


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def pause_until(at: float) -> None:
    """Return at this time of the clock."""
    pause(max(0.0, at - time.time()))
