"""A whole beatless on one machine: servers, relay, workers and Flower as child processes.

Nothing outlives the process that starts it: each child ends with it, even if it is killed.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

from beatless.errors import BadRequest, JobsError
from beatless.migrations import migrate
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.doorbell import Alarm
from beatless.outbox.sockets import readable
from beatless.postgres import engine as connect_engine
from beatless.services import (
    EmbeddedPostgres,
    EmbeddedValkey,
    die_with_parent,
    free_port,
)
from beatless.settings import Settings
from beatless.stack_file import LOCK, STATE

logger = logging.getLogger(__name__)

READY_SECONDS = 60.0
GRACE_SECONDS = 15.0
LOCK_SECONDS = 0.3


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
        # -P: a folder called `beatless` in the current directory must not stand in for ours.
        command: Sequence[str] = (sys.executable, "-P", "-m", "beatless.cli"),
    ) -> None:
        self.name = name
        self.log = log
        self._command = [*command, arguments[0]]
        self._arguments = arguments[1:]
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
        self._ready, writer = os.pipe()
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self._command, "--ready-fd", str(writer), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environ,
                    pass_fds=[writer],
                    start_new_session=True,
                    # Killing is safe, that is the point of it all; a slow farewell is not needed.
                    preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
                )
        finally:
            os.close(writer)

    def restart(self) -> None:
        """Start it again after its end."""
        self.reap(monotonic())
        self.start()

    def wait_ready(self, alarm: Alarm | None = None) -> None:
        """Return when it said so. Raises NotReady, with its last words, if it ends before."""
        assert self._ready is not None  # noqa: S101 - started before
        waiting: list[int | Alarm] = [self._ready, *([alarm] if alarm else [])]
        ready = readable(waiting, READY_SECONDS)
        if alarm in ready:
            raise KeyboardInterrupt
        if self._ready not in ready or not os.read(self._ready, 1):
            raise NotReady(self.name, self.last_words())

    def last_words(self) -> str:
        """The end of its log, as one line."""
        lines = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return " | ".join(lines) or "nothing"

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


class Guard:
    """Starts one process again when it has ended, ever later the more often it ends."""

    STEADY_SECONDS = 30.0
    """A process that lived so long starts again without delay."""

    def __init__(self, part: Child | EmbeddedPostgres | EmbeddedValkey) -> None:
        self._part = part
        self._backoff = Backoff(initial=0.2, cap=10.0)
        self._failures = 0
        self._began = monotonic()
        self.restart_at: float | None = None

    @property
    def pid(self) -> int:
        return self._part.pid

    def look(self, say: Callable[[str], None]) -> None:
        """Notice that the process has ended, or start it again once it is time."""
        now = monotonic()
        if self.restart_at is None and _ended(self.pid):
            self._failures = 1 if now - self._began > self.STEADY_SECONDS else self._failures + 1
            self._later(f"{self._part.name} (PID {self.pid}) ended", say)
        elif self.restart_at is not None and now >= self.restart_at:
            try:
                self._start()
            except Exception as error:  # whatever it is: the rest of the stack goes on
                self._failures += 1
                ours = isinstance(error, JobsError)
                self._later(str(error) if ours else f"{self._part.name}: {error}", say)
            else:
                self._began, self.restart_at = monotonic(), None
                say(f"{self._part.name} started again, PID {self.pid}")

    def _later(self, what: str, say: Callable[[str], None]) -> None:
        delay = self._backoff.delay(self._failures)
        self.restart_at = monotonic() + delay
        say(f"{what}; starting it again in {delay:.1f} s, its log is {self._part.log}")

    def _start(self) -> None:
        if isinstance(self._part, Child):
            self._part.restart()
        else:
            self._part.crash()  # what is left of it
            self._part.start()


def _ended(pid: int) -> bool:
    """Whether a child of ours has ended; it stays to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


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
        api_port: int | None = None,
        flower_port: int | None = None,
        **settings: Any,
    ) -> None:
        """`directory` names the stack; with `ephemeral` its data is elsewhere and goes with it."""
        self.directory = directory.resolve()
        self._ephemeral = ephemeral
        self._app_name = app_name
        self._workers = workers
        self._concurrency = concurrency
        self._api_port = api_port
        self._flower_port = flower_port
        self._options = settings
        self._lock: IO[str] | None = None
        self._made_directory = False
        self._data = self.directory
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

    def start(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Bring everything up; `say` gets a line for each part.

        Raises AlreadyRunning, NotReady, ServicesMissing, ServiceFailed and BadSetting.
        """
        self._take_directory()
        fast = {"fsync": "off", "full_page_writes": "off"} if self._ephemeral else {}
        self.postgres = EmbeddedPostgres(self._data / "postgres", settings=fast)
        self.valkey = EmbeddedValkey(self._data / "valkey")
        self.postgres.start()
        self.valkey.start()
        say(f"postgres {self.postgres.url}")
        say(f"redis {self.valkey.url}")
        # The other settings (schema, prefix, lease …) are the user's own.
        self.settings = Settings.from_env(
            database_url=self.postgres.url,
            listen_url="",
            redis_url=self.valkey.url,
            broker_url="",
            app=self._app_name,
            metrics_port=None,  # one port would be asked for by each of the processes
            **self._options,
        )
        engine = connect_engine(self.settings.database_url, "beatless migrate", direct=True)
        migrate(engine, self.settings.schema)
        engine.dispose()
        self.relay = self._child("relay", ["relay"])
        arguments = ["worker"]
        if self._concurrency is not None:
            arguments += ["--concurrency", str(self._concurrency)]
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
        for child in self._children():
            child.wait_ready(self.alarm)
        if self.api is not None:
            say(f"api {self.api_url}")
        if self._flower_port is not None:
            self._start_flower(self._flower_port)
            say(f"flower {self.flower_url}")
        for worker in self.workers:
            say(f"worker PID {worker.pid}")
        say(f"relay PID {self.relay.pid}")
        self._write_state()

    def environ(self) -> dict[str, str]:
        """The BEATLESS_* variables of this stack."""
        if self.settings is None:
            raise RuntimeError("the stack has not been started")
        return self.settings.to_env()

    def facts(self) -> dict[str, Any]:
        """Where everything is, as JSON."""
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
        """Start again what ends, until `alarm` rings after `stopping` was set."""
        servers = [server for server in (self.postgres, self.valkey) if server is not None]
        guards = [Guard(part) for part in (*servers, *self._children())]
        while not self.stopping:
            for guard in guards:
                guard.look(say)
            # One that has ended since that look can be opened all the same: nobody reaped it.
            pidfds = [os.pidfd_open(guard.pid) for guard in guards if guard.restart_at is None]
            waits = [at - monotonic() for guard in guards if (at := guard.restart_at) is not None]
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
        deadline = monotonic() + GRACE_SECONDS
        for child in children:
            child.reap(deadline)
        self.workers, self.relay, self.api, self.flower = [], None, None, None
        for server in (self.valkey, self.postgres):
            if server is not None:
                server.stop()
        if self._lock is not None:
            (self.directory / STATE).unlink(missing_ok=True)
            if self._ephemeral:
                shutil.rmtree(self._data, ignore_errors=True)
                (self.directory / LOCK).unlink(missing_ok=True)
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
        try:
            # What a killed one has left is ours to remove as well.
            self._made_directory = not self.directory.exists() or (
                {path.name for path in self.directory.iterdir()} == {LOCK, "ephemeral", STATE}
            )
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.directory / LOCK).open("a+")
        except OSError as error:
            raise BadRequest("--data-dir", f"{self.directory} cannot be used: {error}") from error
        deadline = monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # It may be a command that only looks whether a stack runs here.
                if monotonic() < deadline:
                    readable([self.alarm], 0.02)
                    continue
                lock.seek(0)
                pid = int(lock.read().strip() or 0)
                lock.close()
                raise AlreadyRunning(str(self.directory), pid) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        (self.directory / STATE).unlink(missing_ok=True)  # of one that was killed
        if self._ephemeral:
            self._data = self.directory / "ephemeral"
            shutil.rmtree(self._data, ignore_errors=True)
            self._data.mkdir(mode=0o700)
        elif self._made_directory:
            # Data and passwords: nothing for the repository that the user works in.
            (self.directory / ".gitignore").write_text("*\n")

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

    def _write_state(self) -> None:
        path = self.directory / STATE
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({"pid": os.getpid(), "environ": self.environ()}, file)
