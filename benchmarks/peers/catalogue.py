"""The systems that are measured, and how each is run: with the settings that served it best."""

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environments import LOCKS, node_environment, python_environment, versions

ROLES = Path(__file__).parent / "roles"
CORES = os.cpu_count() or 1
WORKLOADS = ("runs", "jobs", "latency", "live")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One system with its settings."""

    name: str
    title: str
    does: str
    """Less or more than ours, in a sentence."""
    settings: str
    lock: str = ""
    """Of the environment; empty: this one."""
    node: bool = False
    least_python: tuple[int, int] = (3, 11)
    workloads: Sequence[str] = WORKLOADS
    workers: int = CORES
    """Processes, one for each core unless one process has children of its own."""
    worker_options: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    """What its processes have in their environment."""
    relay: str = ""
    """The role that publishes what a run has committed."""
    follows_runs: bool = False
    """Whether a viewer of all events sees `runs` end, instead of the body of the last step."""
    installs: bool = True
    """Whether it needs tables."""
    marks: int = 1
    """Marks of a run: a chain of jobs has one for each, as a backlog is executed step by step."""
    events: int = 0
    """Of a run, each of which the viewer must see."""
    bulk: bool = True
    """Whether many jobs can be started by one call, or in one transaction."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Runs, and jobs, of a backlog: some seconds of work."""

    @property
    def version(self) -> str:
        """What the lock pins; empty for this checkout."""
        if self.node:
            return _node_version(self.lock)
        return versions(self.lock)[PACKAGES.get(self.lock, self.lock)] if self.lock else ""

    def command(self) -> list[str]:
        """How its roles are called, in its environment. Raises CannotInstall."""
        if self.node:
            node_environment(self.lock)
            return [shutil.which("node") or "node", str(ROLES / f"{self.lock}_peer.mjs")]
        python = python_environment(self.lock, least=self.least_python) if self.lock else None
        return [str(python or sys.executable), str(ROLES / f"{self.lock or 'beatless'}_peer.py")]

    def environ(self) -> dict[str, str]:
        """What its processes need beside the addresses. Raises CannotInstall."""
        if self.node:
            return {"PEER_NODE_FOLDER": str(node_environment(self.lock))}
        return {"PYTHONPATH": str(ROLES), **self.variables}


PACKAGES = {"absurd": "absurd-sdk"}
"""The package whose version is the peer's, where it has another name than the lock."""


def _node_version(lock: str) -> str:
    found = json.loads((LOCKS / lock / "package-lock.json").read_text())
    return str(found["packages"][f"node_modules/{lock}"]["version"])


CHAIN = "no steps: a run is a chain of five jobs, without a record of it, events or a resume"

OURS = "beatless"

PEERS = (
    Peer(
        name=OURS,
        title="beatless",
        does="five durable steps, all 13 events published in order, a viewer follows every run",
        settings="`beatless worker`, `beatless relay`, no option; prefork, a child for each core",
        workers=1,
        relay="relay",
        follows_runs=True,
        events=13,
        sizes={"runs": 2000, "jobs": 8000},
    ),
    Peer(
        name="beatless_threads",
        title="beatless, 64 threads",
        does="the same",
        settings="`beatless worker --concurrency 64 -- --pool threads`, one process",
        workloads=("runs", "jobs"),
        workers=1,
        worker_options=("--concurrency", "64", "--", "--pool", "threads"),
        relay="relay",
        follows_runs=True,
        events=13,
        sizes={"runs": 3000, "jobs": 8000},
    ),
    Peer(
        name="beatless_async",
        title="beatless, async pool",
        does="the same, with `async def` steps",
        settings="`beatless worker --pool async --concurrency 64`, one process",
        workloads=("runs", "jobs"),
        variables={"PEER_BODIES": "async"},
        workers=1,
        worker_options=("--pool", "async", "--concurrency", "64"),
        relay="relay",
        follows_runs=True,
        events=13,
        sizes={"runs": 3000, "jobs": 8000},
    ),
    Peer(
        name="pgqueuer",
        title="PgQueuer",
        does=f"{CHAIN}; acknowledges in batches: a crash repeats jobs that were executed",
        settings="batch 50, asyncpg, uvloop",
        lock="pgqueuer",
        workloads=("runs", "jobs", "latency"),
        marks=5,
        sizes={"runs": 1500, "jobs": 20000},
    ),
    Peer(
        name="oban",
        title="Oban (Python)",
        does=f"{CHAIN}; acknowledges in batches: a crash repeats jobs that were executed",
        settings="limit 30, 10 connections, uvloop; needs Python 3.12",
        lock="oban",
        least_python=(3, 12),
        workloads=("runs", "jobs", "latency"),
        marks=5,
        sizes={"runs": 1000, "jobs": 10000},
    ),
    Peer(
        name="absurd",
        title="Absurd",
        does="five durable steps; no events of a run and no live stream",
        settings="asyncio, concurrency 16, polls every 50 ms (default: 250)",
        lock="absurd",
        workloads=("runs", "jobs", "latency"),
        bulk=False,
        sizes={"runs": 800, "jobs": 4000},
    ),
    Peer(
        name="celery",
        title="Celery",
        does="no steps, nothing durable but the broker: a run is a chain of five tasks on Redis",
        settings="acks_late, solo pool, prefetch 4; results in Redis for `runs` and `live`",
        lock="celery",
        installs=False,
        marks=5,
        bulk=False,
        sizes={"runs": 500, "jobs": 5000},
    ),
    Peer(
        name="dbos",
        title="DBOS",
        does="five durable steps; events only where a workflow writes to a stream",
        settings="concurrency 32, polls every 50 ms (default: 1 s, unlimited), LISTEN for readers",
        lock="dbos",
        sizes={"runs": 400, "jobs": 2500},
    ),
    Peer(
        name="procrastinate",
        title="Procrastinate",
        does=CHAIN,
        settings="concurrency 8",
        lock="procrastinate",
        workloads=("runs", "jobs", "latency"),
        marks=5,
        sizes={"runs": 300, "jobs": 2000},
    ),
    Peer(
        name="bullmq",
        title="BullMQ and an outbox",
        does="one job is a run; a journal and an outbox in Postgres beside it, written and "
        "published event by event; no resume. The other workloads are BullMQ alone, on Redis",
        settings="concurrency 8, one publisher, node-pg with prepared statements",
        lock="bullmq",
        node=True,
        relay="publish",
        follows_runs=True,
        sizes={"runs": 500, "jobs": 20000},
    ),
)

BY_NAME = {peer.name: peer for peer in PEERS}
