"""A small fleet with the default settings under a steady load: for the scenarios and the soak."""

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Any, Self

import psycopg

from beatless import App, Plan, Settings, StepContext, step
from beatless.errors import JobsError
from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.settings import libpq_url
from tests.faults.load import lost

SHOWN_ROWS = """
SELECT run_id, state, extract(epoch FROM finished_at)::float8 FROM runs
"""


@step
def work(ctx: StepContext) -> int:
    """As the jobs of the public harness: next to nothing."""
    return 1


PLANS = [Plan("steady", [work])]
app = App(Settings.from_env(), PLANS) if "BEATLESS_DATABASE_URL" in os.environ else None


@dataclass
class SmallFleet:
    """Postgres, Valkey, and processes: two workers, two relays, an API. All end with the block."""

    directory: Path
    postgres_settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the app that are not the default ones."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.postgres = stack.enter_context(
                EmbeddedPostgres(self.directory / "postgres", settings=dict(self.postgres_settings))
            )
            self.valkey = stack.enter_context(EmbeddedValkey(self.directory / "valkey"))
            self.settings = Settings(
                database_url=self.postgres.url, redis_url=self.valkey.url, **self.options
            )
            self.app = App(self.settings, PLANS)
            stack.callback(self.app.close)
            migrate(self.app.engine, self.settings.schema)
            self.api_port = free_port()
            worker = ["worker", "--concurrency", "2"]
            self._arguments = {
                "worker-1": worker,
                "worker-2": worker,
                "relay-1": ["relay"],
                "relay-2": ["relay"],
                "api": ["serve", "--port", str(self.api_port)],
            }
            self.processes: dict[str, Child] = {}
            for name in self._arguments:
                self.start(name)
                stack.callback(self.kill, name)
            for child in self.processes.values():
                child.wait_ready()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.api_port}"

    def start(self, name: str) -> None:
        environ = os.environ | self.settings.to_env()
        environ |= {
            "BEATLESS_APP": "tests.faults.steady:app",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "",
        }
        log = self.directory / f"{name}.log"
        self.processes[name] = Child(name, self._arguments[name], environ=environ, log=log)
        self.processes[name].start()

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end."""
        self.processes[name].kill()
        self.processes[name].reap(monotonic() + 10)

    def connect(self) -> psycopg.Connection:
        """A session of the program's own."""
        return psycopg.connect(
            libpq_url(self.postgres.url),
            autocommit=True,
            options=f"-c search_path={self.settings.schema}",
            application_name="steady",
        )

    def wait_until_all_have_ended(self, seconds: float) -> None:
        """Or until the time for it is over."""
        until = monotonic() + seconds
        while monotonic() < until:
            with self.connect() as session:
                row = session.execute(
                    "SELECT count(*) FROM runs WHERE state IN ('queued', 'running')"
                ).fetchone()
            if row == (0,):
                return
            threading.Event().wait(0.2)


class SteadyLoad:
    """Starts runs at a rate; what cannot be started in its second is left out, not made up for."""

    def __init__(self, client: Any, runs_per_s: float) -> None:
        """`client` is an app's or one over HTTP."""
        self._client = client
        self._every_s = 1 / runs_per_s
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="steady load")
        self.accepted: list[str] = []
        """The runs whose start was acknowledged."""
        self.refused = 0
        """Starts that raised an error."""
        self.failed: list[str] = []
        """What the load itself died of."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def wait(self, seconds: float) -> float:
        """So many seconds; the time of their end."""
        self._ending.wait(seconds)
        return time()

    def _work(self) -> None:
        due = monotonic()
        while not self._ending.wait(max(0.0, due - monotonic())):
            try:
                self.accepted.append(self._client.start_run("steady").run_id)
            except JobsError:
                self.refused += 1
            except Exception as error:
                if not lost(error):
                    self.failed.append(repr(error))
                    raise
                self.refused += 1
            due = max(due + self._every_s, monotonic() - 1)
