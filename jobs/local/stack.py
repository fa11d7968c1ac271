"""A whole beatless on one machine: servers, relay, workers and Flower as child processes.

Nothing outlives the process that starts it: each child ends with it, even if it is killed.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from beatless.local.child import Child, wait_until_ready
from beatless.local.data_directory import DataDirectory
from beatless.local.ports import free_port
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.restarts import Restarter
from beatless.local.stack_file import DJANGO_SETTINGS
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.outbox.clock import monotonic
from beatless.outbox.sockets import Alarm, readable
from beatless.postgres import engine as connect_engine
from beatless.settings import Settings, redact

STOP_TIMEOUT_S = 15.0
"""Seconds until processes that were asked to end are killed."""


class Stack:
    """Embedded servers, migrated, with a relay, workers and optionally Flower."""

    def __init__(
        self,
        directory: Path,
        *,
        ephemeral: bool = False,
        app_name: str = "",
        workers: int = 1,
        concurrency: int | None = None,
        pool: str | None = None,
        api_port: int | None = None,
        flower_port: int | None = None,
        **settings: Any,
    ) -> None:
        """`directory` names the stack; with `ephemeral` its data is elsewhere and goes with it."""
        self._directory = DataDirectory(directory, ephemeral=ephemeral)
        self._ephemeral = ephemeral
        self._app_name = app_name
        self._workers = workers
        self._concurrency = concurrency
        self._pool = pool
        self._api_port = api_port
        self._flower_port = flower_port
        self._options = settings
        self.postgres: EmbeddedPostgres | None = None
        self.valkey: EmbeddedValkey | None = None
        self.relay: Child | None = None
        self.workers: list[Child] = []
        self.api: Child | None = None
        self.api_url = ""
        self.flower: Child | None = None
        self.flower_url = ""
        self.settings: Settings | None = None
        self.alarm = Alarm()
        self.stopping = False

    def start(
        self,
        say: Callable[[str], None] = lambda _: None,
        load: Callable[[Settings], Settings] = lambda settings: settings,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Bring everything up; `say` gets a line for each part, without passwords.

        `load` gets the settings when the servers are up, and returns those to use: an app may have
        chosen its schema and prefix. `check` is called when that schema is migrated, before the
        first process starts. An exception of either ends the start.

        Raises AlreadyRunning, NotReady, ServicesMissing, ServiceFailed and BadSetting.
        """
        self._directory.take(self.alarm)
        fast = {"fsync": "off", "full_page_writes": "off"} if self._ephemeral else {}
        self.postgres = EmbeddedPostgres(self._directory.data / "postgres", settings=fast)
        self.valkey = EmbeddedValkey(self._directory.data / "valkey")
        self.postgres.start()
        self.valkey.start()
        say(f"postgres {redact(self.postgres.url)}")
        say(f"redis {redact(self.valkey.url)}")
        # The other settings (schema, prefix, lease …) are the user's own.
        self.settings = load(
            Settings.from_env(
                database_url=self.postgres.url,
                listen_url="",
                redis_url=self.valkey.url,
                broker_url="",
                app=self._app_name,
                metrics_port=None,  # one port would be asked for by each of the processes
                **self._options,
            )
        )
        schema, prefix = self.settings.schema, self.settings.prefix
        say(f"names schema {schema} (tables), prefix {prefix} (queues, channels, keys)")
        engine = connect_engine(self.settings.database_url, "beatless migrate", direct=True)
        migrate(engine, schema)
        engine.dispose()
        check()
        self.relay = self._child("relay", ["relay"])
        arguments = ["worker"]
        if self._concurrency is not None:
            arguments += ["--concurrency", str(self._concurrency)]
        if self._pool is not None:
            arguments += ["--pool", self._pool]
        self.workers = [
            self._child(f"worker-{place}", arguments) for place in range(1, self._workers + 1)
        ]
        if self._api_port is not None:
            port = self._api_port or free_port()
            self.api_url = f"http://127.0.0.1:{port}"
            arguments = ["serve", "--port", str(port)]
            if self._flower_port is not None:
                self._flower_port = self._flower_port or free_port()
                arguments += ["--flower-url", f"http://127.0.0.1:{self._flower_port}"]
            self.api = self._child("api", arguments)
        for child in self._children():
            child.start()
        wait_until_ready(self._children(), self.alarm)
        if self.api is not None:
            say(f"api {self.api_url}")
        if self._flower_port is not None:
            self._start_flower(self._flower_port)
            say(f"flower {self.flower_url}")
        for worker in self.workers:
            say(f"worker PID {worker.pid}")
        say(f"relay PID {self.relay.pid}")
        say(f"logs {self._directory.data}")
        self._directory.announce(self.environ())

    def environ(self) -> dict[str, str]:
        """The BEATLESS_* variables of this stack, and that by which Django's App is found."""
        if self.settings is None:
            raise RuntimeError("the stack has not been started")
        module = os.environ.get(DJANGO_SETTINGS, "")
        if not module or not self._app_name.startswith("beatless.django:"):
            return self.settings.to_env()
        return self.settings.to_env() | {DJANGO_SETTINGS: module}

    def facts(self) -> dict[str, Any]:
        """The addresses of the stack, as JSON."""
        return {
            "postgres": self.postgres.url if self.postgres else None,
            "redis": self.valkey.url if self.valkey else None,
            "api": self.api_url or None,
            "flower": self.flower_url or None,
            "workers": [worker.pid for worker in self.workers],
            "relay": self.relay.pid if self.relay else None,
            "environ": self.environ(),
        }

    def watch(self, say: Callable[[str], None]) -> None:
        """Restart processes that end, until `alarm` rings after `stopping` was set."""
        servers = [server for server in (self.postgres, self.valkey) if server is not None]
        restarters = [Restarter(part) for part in (*servers, *self._children())]
        while not self.stopping:
            for restarter in restarters:
                restarter.check(say)
            # One that has ended since that check can be opened all the same: it was not reaped.
            running = [each.pid for each in restarters if each.restart_at is None]
            pidfds = [os.pidfd_open(pid) for pid in running]
            waits = [at - monotonic() for each in restarters if (at := each.restart_at) is not None]
            try:
                sockets: list[int | Alarm] = [*pidfds, self.alarm]
                readable(sockets, min(waits, default=None))
            finally:
                for pidfd in pidfds:
                    os.close(pidfd)
            self.alarm.quiet()

    def stop(self) -> None:
        """End every process; with `ephemeral` remove the data. May be called more than once."""
        self.stopping = True
        children = self._children()
        for child in children:
            child.terminate()
        deadline = monotonic() + STOP_TIMEOUT_S
        for child in children:
            child.reap(deadline)
        self.workers, self.relay, self.api, self.flower = [], None, None, None
        for server in (self.valkey, self.postgres):
            if server is not None:
                server.stop()
        self._directory.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _child(self, name: str, arguments: Sequence[str]) -> Child:
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith("BEATLESS_")
        }
        return Child(
            name,
            arguments,
            environ=environ | self.environ(),
            log=self._directory.data / f"{name}.log",
        )

    def _children(self) -> list[Child]:
        parts = [self.relay, *self.workers, self.api, self.flower]
        return [child for child in parts if child is not None]

    def _start_flower(self, port: int) -> None:
        port = port or free_port()
        self.flower_url = f"http://127.0.0.1:{port}"
        arguments = ["flower", "--port", str(port)]
        if self.api_url:
            arguments += ["--page-url", self.api_url]
        flower = self.flower = self._child("flower", arguments)
        flower.start()
        flower.wait_ready(self.alarm)
