"""A fleet of the first release is upgraded under load: old code on the new schema, nobody waits."""

import logging
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import psycopg
import pytest
import sqlalchemy

from beatless import App, Settings
from beatless.cli.demo import GOLDEN, without_handbacks
from beatless.demo import PLANS
from beatless.local.child import Child
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.schema import VERSION_TABLE, head
from beatless.settings import engine_url
from beatless.testing import Kit
from tests.valkeys import until

RELEASE = Path(__file__).parents[1] / "releases" / "0001.tar.xz"

LOAD = """
import sys, threading
from jobs import App, Settings
from jobs.demo import PLANS

app = App(Settings.from_env(), PLANS)
stop = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
while not stop.is_set():
    started = [app.client.start_run("agents.run") for _ in range(4)]
    for run in started:
        app.client.wait_for_run(run.run_id, 60)
        print(run.run_id, flush=True)
"""


class Load:
    """A program of the old release: it starts runs and waits for their end, until it is stopped."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.finished: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", LOAD],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self.finished.append(line.strip())

    def more(self, runs: int) -> None:
        """Wait until so many more have ended."""
        wanted = len(self.finished) + runs
        until(lambda: len(self.finished) >= wanted or self._process.poll() is not None, 300)
        assert len(self.finished) >= wanted, "the program of the old release has ended"

    def stop(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        assert self._process.wait(60) == 0
        self._reader.join()
        self._process.stdout.close()

    def kill(self) -> None:
        self._process.kill()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedValkey]]:
    settings = {
        "fsync": "off",
        "log_lock_waits": "on",
        "deadlock_timeout": "10s",  # which a process that stands still may hold a lock for
        "log_line_prefix": "%a: ",
    }
    with ExitStack() as stack:
        postgres = stack.enter_context(EmbeddedPostgres(tmp_path / "pg", settings=settings))
        yield postgres, stack.enter_context(EmbeddedValkey(tmp_path / "valkey"))


class Fleet:
    """Processes of one release on the servers."""

    def __init__(self, settings: Settings, directory: Path, packages: Path | None = None) -> None:
        # Only what the old release knows, too: it refuses other names.
        given = settings.to_env()
        known = ("DATABASE_URL", "REDIS_URL", "LEASE_SECONDS")
        self.environ = os.environ | {
            f"BEATLESS_{name}": given[f"BEATLESS_{name}"] for name in known
        }
        module = "beatless"
        if packages is not None:
            self.environ["PYTHONPATH"] = str(packages)
            module = "jobs.cli"  # its name before the first release
        self._command = (sys.executable, "-P", "-m", module)
        self._directory = directory
        self.children: list[Child] = []

    def run(self, *arguments: str) -> str:
        command = [*self._command, *arguments]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> None:
        for number, arguments in enumerate((["relay"], ["worker", "--concurrency", "2"])):
            log = self._directory / f"{arguments[0]}-{number}.log"
            child = Child(
                arguments[0], arguments, environ=self.environ, log=log, command=self._command
            )
            self.children.append(child)
            self.children[-1].start()
        for child in self.children:
            child.wait_ready()

    def replace(self) -> None:
        """As an orchestrator does it: SIGTERM, and wait for the end."""
        for child in self.children:
            child.terminate()
            child.reap(monotonic() + 300)

    def close(self) -> None:
        for child in self.children:
            child.reap(monotonic())


class Holders(logging.Handler):
    """Hears that a migration is held up."""

    def __init__(self) -> None:
        super().__init__()
        self.held_up = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "a table is in use":
            self.held_up.set()


@pytest.mark.long(minutes=2)
def test_a_fleet_of_the_first_release_is_upgraded_under_load(
    servers: tuple[EmbeddedPostgres, EmbeddedValkey], tmp_path: Path
) -> None:
    postgres, valkey = servers
    settings = Settings(database_url=postgres.url, redis_url=valkey.url, lease_seconds=300)
    for name in ("packages", "old", "new"):
        (tmp_path / name).mkdir()
    with tarfile.open(RELEASE) as archive:
        archive.extractall(tmp_path / "packages", filter="data")
    heard = Holders()
    logging.getLogger("beatless.migrations").addHandler(heard)
    with ExitStack() as stack:
        stack.callback(logging.getLogger("beatless.migrations").removeHandler, heard)
        old = Fleet(settings, tmp_path / "old", tmp_path / "packages")
        assert "is at migration 0001" in old.run("migrate")
        stack.callback(old.close)
        old.start()
        load = Load(old.environ)
        stack.callback(load.kill)
        load.more(8)

        # The upgrade meets somebody who reads the tables and takes his time.
        reader = stack.enter_context(psycopg.connect(postgres.url, application_name="report"))
        reader.execute("SELECT count(*) FROM beatless.runs, beatless.run_events")
        app = App(settings, PLANS)
        kit = Kit(app, directory=tmp_path)
        stack.callback(kit.close)
        named = {"application_name": "beatless migrate"}
        engine = sqlalchemy.create_engine(engine_url(postgres.url), connect_args=named)
        stack.callback(engine.dispose)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        upgrade = pool.submit(migrate, engine, "beatless")
        assert heard.held_up.wait(60)
        load.more(16)  # through several tries of the migration
        assert not upgrade.done()
        reader.rollback()
        assert upgrade.result(300) == head() > "0001"

        load.more(16)  # all of it old, on the new schema
        new = Fleet(settings, tmp_path / "new")
        stack.callback(new.close)
        new.start()
        load.more(8)  # both
        old.replace()
        load.more(8)  # an old client, new processes
        load.stop()

        theirs = kit.start_run("agents.run")
        for run_id in (*load.finished, theirs.run_id):
            events = without_handbacks(kit.collect_stream(run_id))
            assert [event.type for event in events] == GOLDEN
        kit.verify()
        with psycopg.connect(postgres.url) as looking:
            version = looking.execute(f"SELECT * FROM beatless.{VERSION_TABLE}").fetchone()
        assert version == (head(),)
    lines = [line for line in postgres.log.read_text().splitlines() if "still waiting for" in line]
    # The relay that stands by waits for the shards of the other as long as that lives.
    assert not [line for line in lines if not re.search("^beatless migrate: |advisory lock", line)]
