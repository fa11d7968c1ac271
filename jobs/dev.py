"""A whole beatless on one machine: servers, relay, workers and Flower as child processes.

Nothing outlives the process that starts it: each child ends with it, even if it is killed.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import IO, Any, Self

import sqlalchemy

from jobs.errors import JobsError
from jobs.migrations import migrate
from jobs.services import EmbeddedPostgres, EmbeddedValkey, die_with_parent, free_port
from jobs.settings import Settings, engine_url
from outbox.backoff import Backoff
from outbox.doorbell import Alarm

logger = logging.getLogger(__name__)

READY_SECONDS = 60.0
GRACE_SECONDS = 15.0


class AlreadyRunning(JobsError):
    """Another stack runs on this data directory."""

    def __init__(self, directory: str, pid: int) -> None:
        super().__init__(directory, pid)
        self.directory = directory
        self.pid = pid

    def __str__(self) -> str:
        return (
            f"a `beatless dev` with pid {self.pid} already runs on {self.directory}: use it, stop "
            f"it with `kill {self.pid}`, or choose another directory with --data-dir"
        )


class NotReady(JobsError):
    """A process of the stack did not come up."""

    def __init__(self, name: str, log: str) -> None:
        super().__init__(name, log)
        self.name = name
        self.log = log

    def __str__(self) -> str:
        return f"the {self.name} did not become ready; its log says: {self.log}"


class Child:
    """One process of the stack. It says through a pipe when it is ready."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        environ: dict[str, str],
        log: Path,
        command: Sequence[str] = (sys.executable, "-m", "jobs.cli"),
    ) -> None:
        self.name = name
        self.log = log
        self.failures = 0
        self.restart_at: float | None = None
        self._arguments = [*command, *arguments]
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._ready: int | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        reader, writer = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._arguments, "--ready-fd", str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environ,
                pass_fds=[writer],
                start_new_session=True,
                # Killing is safe, that is the point of it all; a slow farewell is not needed here.
                preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
            )
        os.close(writer)
        if self._ready is not None:
            os.close(self._ready)
        self._ready = reader
        self.restart_at = None

    def wait_ready(self, alarm: Alarm | None = None) -> None:
        """Return when it said so. Raises NotReady, with its last words, if it ends before."""
        assert self._ready is not None  # noqa: S101 - started before
        waiting: list[int | Alarm] = [self._ready, *([alarm] if alarm else [])]
        ready, _, _ = select.select(waiting, [], [], READY_SECONDS)
        if alarm in ready:
            raise KeyboardInterrupt
        if self._ready not in ready or not os.read(self._ready, 1):
            lines = self.log.read_text(errors="replace").strip().splitlines()[-3:]
            raise NotReady(self.name, " | ".join(lines))

    def kill(self) -> None:
        """SIGKILL to this process alone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        if self.alive and self._process is not None:
            self._process.terminate()

    def reap(self, deadline: float) -> None:
        """Wait for its end; past the deadline, end it and its group."""
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - monotonic()))
            except subprocess.TimeoutExpired:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._process = None
        if self._ready is not None:
            os.close(self._ready)
            self._ready = None


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
        flower_port: int | None = None,
        **settings: Any,
    ) -> None:
        """`directory` names the stack; with `ephemeral` its data is elsewhere and goes with it."""
        self.directory = directory.resolve()
        self._ephemeral = ephemeral
        self._app_name = app_name
        self._workers = workers
        self._concurrency = concurrency
        self._flower_port = flower_port
        self._options = settings
        self._lock: IO[str] | None = None
        self._made_directory = False
        self._data = self.directory
        self.postgres: EmbeddedPostgres | None = None
        self.valkey: EmbeddedValkey | None = None
        self.relay: Child | None = None
        self.workers: list[Child] = []
        self.flower: Child | None = None
        self.flower_url = ""
        self.settings: Settings | None = None
        self.alarm = Alarm()
        self.stopping = False

    @staticmethod
    def settings_of_running(directory: Path) -> dict[str, str]:
        """The BEATLESS_* variables of the stack that runs on this directory now, or none."""
        state = directory / "stack.json"
        try:
            with (directory / "dev.lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                return dict(json.loads(state.read_text())["environ"])
        except OSError:
            pass  # there is no such directory: nothing has run here
        return {}

    def start(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Bring everything up; `say` gets a line for each part. Raises AlreadyRunning, NotReady."""
        self._take_directory()
        fast = {"fsync": "off", "full_page_writes": "off"} if self._ephemeral else {}
        self.postgres = EmbeddedPostgres(self._data / "postgres", settings=fast)
        self.valkey = EmbeddedValkey(self._data / "valkey")
        self.postgres.start()
        self.valkey.start()
        say(f"postgres {self.postgres.url}")
        say(f"redis {self.valkey.url}")
        self.settings = Settings(
            database_url=self.postgres.url,
            redis_url=self.valkey.url,
            app=self._app_name,
            **self._options,
        )
        engine = sqlalchemy.create_engine(engine_url(self.settings.database_url))
        migrate(engine, self.settings.schema)
        engine.dispose()
        self.relay = self._child("relay", ["relay"])
        arguments = ["worker"]
        if self._concurrency is not None:
            arguments += ["--concurrency", str(self._concurrency)]
        self.workers = [
            self._child(f"worker-{place}", arguments) for place in range(1, self._workers + 1)
        ]
        for child in self._children():
            child.start()
        if self._flower_port is not None:
            self._start_flower(self._flower_port)
        for child in self._children():
            child.wait_ready(self.alarm)
        for worker in self.workers:
            say(f"worker PID {worker.pid}")
        say(f"relay PID {self.relay.pid}")
        if self.flower is not None:
            self._await_flower()
            say(f"flower {self.flower_url}")
        self._write_state()

    def environ(self) -> dict[str, str]:
        """The BEATLESS_* variables of this stack."""
        if self.settings is None:
            raise RuntimeError("the stack has not been started")
        return self.settings.to_env()

    def watch(self, say: Callable[[str], None]) -> None:
        """Restart what dies, until `alarm` rings after `stopping` was set."""
        backoff = Backoff(initial=0.5, cap=10.0)
        while not self.stopping:
            pidfds = {os.pidfd_open(child.pid): child for child in self._children() if child.alive}
            try:
                waits = [c.restart_at - monotonic() for c in self._children() if c.restart_at]
                sockets: list[int | Alarm] = [*pidfds, self.alarm]
                select.select(sockets, [], [], max(0.0, min(waits)) if waits else None)
            finally:
                for fd in pidfds:
                    os.close(fd)
            self.alarm.quiet()
            for child in self._children():
                if self.stopping or child.alive:
                    continue
                if child.restart_at is None:
                    child.failures += 1
                    delay = backoff.delay(child.failures)
                    child.restart_at = monotonic() + delay
                    say(f"{child.name} ended, starting it again in {delay:.1f} s; see {child.log}")
                elif monotonic() >= child.restart_at:
                    child.start()
                    self._write_state()

    def stop(self) -> None:
        """End every process; with `ephemeral` remove the data. May be called more than once."""
        self.stopping = True
        children = self._children()
        for child in children:
            child.terminate()
        deadline = monotonic() + GRACE_SECONDS
        for child in children:
            child.reap(deadline)
        self.workers, self.relay, self.flower = [], None, None
        for server in (self.valkey, self.postgres):
            if server is not None:
                server.stop()
        if self._lock is not None:
            (self.directory / "stack.json").unlink(missing_ok=True)
            if self._ephemeral:
                shutil.rmtree(self._data, ignore_errors=True)
                (self.directory / "dev.lock").unlink(missing_ok=True)
                if self._made_directory:
                    with contextlib.suppress(OSError):
                        self.directory.rmdir()
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_directory(self) -> None:
        self._made_directory = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self.directory / "dev.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            pid = int(lock.read().strip() or 0)
            lock.close()
            raise AlreadyRunning(str(self.directory), pid) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        if self._ephemeral:
            self._data = Path(tempfile.mkdtemp(prefix="beatless-"))

    def _child(self, name: str, arguments: Sequence[str]) -> Child:
        environ = {
            key: value for key, value in os.environ.items() if not key.startswith("BEATLESS_")
        }
        return Child(
            name,
            arguments,
            environ=environ | self.environ(),
            log=self._data / f"{name}.log",
        )

    def _children(self) -> list[Child]:
        parts = [self.relay, *self.workers, self.flower]
        return [child for child in parts if child is not None]

    def _start_flower(self, port: int) -> None:
        port = port or free_port()
        self.flower_url = f"http://127.0.0.1:{port}"
        self.flower = self._child("flower", ["flower", "--port", str(port)])
        self.flower.start()

    def _await_flower(self) -> None:
        deadline = monotonic() + READY_SECONDS
        while self.flower is not None and self.flower.alive and monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{self.flower_url}/healthcheck", timeout=2).close()  # noqa: S310
                return
            select.select([self.alarm], [], [], 0.1)
        raise NotReady("flower", "see flower.log in the data directory")

    def _write_state(self) -> None:
        path = self.directory / "stack.json"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"pid": os.getpid(), "environ": self.environ()}, file)


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on SIGINT and SIGTERM, from the signal handler: it must not block."""

    def handle(_number: int, _frame: object) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
