"""The servers that all peers share, and one trial of one peer on a fresh database.

Postgres has its defaults, so fsync and synchronous_commit are on, and Valkey appends every command
to a file that is flushed each second: a broker that forgets its tasks would be none.
"""

import json
import os
import re
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, process_time
from typing import Any, Self

import psycopg
import redis

from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from benchmarks.peers.catalogue import Peer
from benchmarks.peers.process_tree import kill, machine_s, processor_s, start

APPEND_ONLY = {"appendonly": "yes", "appendfsync": "everysec"}
READY_TIMEOUT_S = 180.0
STALLED_AFTER_S = 120.0
PRODUCED_WITHIN_S = 300.0
LOOK_EVERY_S = 0.01
RECORD = struct.Struct("<dd")
PASSING = {None, 0}
"""The exit status of a process that runs, or that has done its part."""


class TrialFailed(Exception):
    """A peer has not done what it should have; the message says what, and where its log is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What has been used so far, and how many marks there are."""

    at: float
    marks: int
    processor_s: dict[str, float]
    """By group: postgres, valkey, work, relay, follow, produce."""
    foreign_s: float
    """Processor time of this machine that is none of a group's, nor the measuring process'."""
    wal_bytes: int


class Testbed:
    """Postgres and Valkey, for as long as the block lasts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.postgres = EmbeddedPostgres(folder / "postgres")
        self.valkey = EmbeddedValkey(folder / "valkey", settings=APPEND_ONLY)
        self._trials = 0

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self]:
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory(prefix="beatless-peers-"))
            bed = cls(Path(name))
            for server in (bed.postgres, bed.valkey):
                stack.enter_context(server)
            bed.admin = stack.enter_context(psycopg.connect(bed.postgres.url, autocommit=True))
            yield bed

    admin: psycopg.Connection[Any]
    """A session in a database that no peer uses, autocommit."""

    def ask(self, statement: str, *values: Any) -> int:
        row = self.admin.execute(statement, values).fetchone()
        assert row
        return int(row[0])

    @contextmanager
    def trial(self, peer: Peer, workload: str) -> Iterator["Trial"]:
        """A trial with a database and a Valkey without data; its processes end with the block."""
        self._trials += 1
        database, folder = f"trial_{self._trials}", self.folder / f"trial-{self._trials}"
        folder.mkdir()
        template = self._template(peer)
        self.admin.execute(f"CREATE DATABASE {database} TEMPLATE {template}")
        with redis.Redis.from_url(self.valkey.url) as client:
            client.flushall()
        self.admin.execute("CHECKPOINT")
        trial = Trial(self, peer, workload, database, folder)
        try:
            yield trial
        finally:
            trial.end()
            self.admin.execute(f"DROP DATABASE {database} WITH (FORCE)")

    def described(self) -> str:
        """The servers with their versions, and the processor that all share."""
        row = self.admin.execute("SHOW server_version").fetchone()
        assert row
        with redis.Redis.from_url(self.valkey.url) as client:
            facts: Any = client.info("server")
        models = re.findall(
            r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        servers = f"PostgreSQL {row[0]}, Valkey {facts.get('valkey_version', '')}"
        return ", ".join([servers, *models[:1]])

    def url(self, database: str) -> str:
        return f"{self.postgres.url.rpartition('/')[0]}/{database}"

    def _template(self, peer: Peer) -> str:
        """The database with the peer's tables and nothing in them, made at its first trial."""
        name = f"template_{peer.name}" if peer.installs else "template1"
        if self.ask("SELECT count(*) FROM pg_database WHERE datname = %s", name):
            return name
        self.admin.execute(f"CREATE DATABASE {name}")
        log = self.folder / f"{peer.name}.log"
        trial = Trial(self, peer, "install", name, self.folder)
        try:
            trial.run("install", log=log)
            trial.await_sessions_gone()
        except BaseException:
            self.admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            raise
        return name


class Trial:
    """One peer at one workload."""

    def __init__(
        self, bed: Testbed, peer: Peer, workload: str, database: str, folder: Path
    ) -> None:
        self.peer, self.folder = peer, folder
        self._bed, self._database = bed, database
        self._command = peer.command()
        self._environ = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith("BEATLESS")
            },
            **peer.environ(),
            "PEER_DATABASE_URL": bed.url(database),
            "PEER_REDIS_URL": bed.valkey.url,
            "PEER_TALLY": str(folder),
            "PEER_WORKLOAD": workload,
        }
        self._groups: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._log = folder / "log"
        self._ready = 0

    def start(self, group: str, role: str, *options: str, count: int = 1) -> None:
        """Start processes of a role, without waiting for them."""
        processes = self._groups.setdefault(group, [])
        for _ in range(count):
            command = [*self._command, role, *options]
            processes.append(start(command, self._environ, self._log))

    def start_workers(self) -> None:
        if self.peer.relay:
            self.start("relay", self.peer.relay)
        self.start("work", "work", *self.peer.worker_options, count=self.peer.workers)

    def await_ready(self, more: int = 1) -> None:
        """Return when so many processes more have said that they are ready. Raises TrialFailed."""
        self._ready += more
        deadline = monotonic() + READY_TIMEOUT_S
        self._watch(lambda: len(list(self.folder.glob("ready.*"))) >= self._ready, lambda: deadline)

    def run(self, role: str, *options: str, log: Path | None = None) -> None:
        """Call a role and wait for its end. Raises TrialFailed if it fails."""
        process = start([*self._command, role, *options], self._environ, log or self._log)
        try:
            process.wait(PRODUCED_WITHIN_S)
        except subprocess.TimeoutExpired as error:
            raise TrialFailed(f"{role} took more than {PRODUCED_WITHIN_S:g} s") from error
        finally:
            kill([process])
        if process.returncode != 0:
            raise TrialFailed(f"{role} ended with {process.returncode}: {self._last_words(log)}")

    def produce(self, what: str, how: str, count: int) -> dict[str, float]:
        """The report of a producer that has started so many."""
        self.run("produce", what, how, str(count))
        return self.report()

    def report(self) -> dict[str, float]:
        """The last that a process of the peer has handed in."""
        found: dict[str, float] = json.loads((self.folder / "report").read_text())
        return found

    def marks(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("t.*")) // RECORD.size

    def records(self) -> list[tuple[float, float]]:
        """When each thing began, and when it was seen, in the order of the latter."""
        found = [record for path in self.folder.glob("t.*") for record in _whole(path.read_bytes())]
        return sorted(found, key=lambda record: record[1])

    def read(self) -> Reading:
        groups = {
            name: sum(processor_s(process.pid) for process in processes)
            for name, processes in self._groups.items()
        }
        groups["postgres"] = processor_s(self._bed.postgres.pid)
        groups["valkey"] = processor_s(self._bed.valkey.pid)
        return Reading(
            at=monotonic(),
            marks=self.marks(),
            processor_s=groups,
            foreign_s=machine_s() - sum(groups.values()) - process_time(),
            wal_bytes=self._bed.ask("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"),
        )

    def await_marks(self, *counts: int) -> list[Reading]:
        """A reading at each count of marks, as soon as there are so many. Raises TrialFailed.

        The first is an earlier one if all were there when it was to be taken: there is something
        between them.
        """
        found, last = [], (0, monotonic())
        before = self.read()

        def deadline() -> float:
            nonlocal last
            if (now := self.marks()) != last[0]:
                last = now, monotonic()
            return last[1] + STALLED_AFTER_S

        for count in counts:
            self._watch(lambda count=count: self.marks() >= count, deadline)
            found.append(self.read())
        if found[0].marks >= counts[-1]:
            found[0] = before
        return found

    def commits(self) -> int:
        """Transactions of the trial's database so far; sessions report theirs when they end."""
        return self._bed.ask(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s",
            self._database,
        )

    def end(self) -> None:
        """End all processes of the peer, and wait until Postgres has noticed."""
        for processes in self._groups.values():
            kill(processes)
        self._groups.clear()
        self.await_sessions_gone()

    def await_sessions_gone(self) -> None:
        statement = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        deadline = monotonic() + READY_TIMEOUT_S
        self._watch(lambda: self._bed.ask(statement, self._database) == 0, lambda: deadline)

    def _watch(self, holds: Callable[[], bool], deadline: Callable[[], float]) -> None:
        waiting = threading.Event()
        while not holds():
            for group, processes in self._groups.items():
                ends = PASSING if group in ("produce", "follow") else {None}
                if any(process.poll() not in ends for process in processes):
                    raise TrialFailed(f"a process of {group} has ended: {self._last_words()}")
            if monotonic() > deadline():
                raise TrialFailed(f"it stands still at {self.marks()}: {self._last_words()}")
            waiting.wait(LOOK_EVERY_S)

    def _last_words(self, log: Path | None = None) -> str:
        path = log or self._log
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return " | ".join(lines[-3:]) or "it said nothing"


def _whole(data: bytes) -> Sequence[tuple[float, float]]:
    """Its records; the last may be half written."""
    return list(RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]))
