"""The directory of a stack: one stack at a time uses it, and its remains are recognised."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from beatless.errors import BadRequest
from beatless.local.errors import AlreadyRunning
from beatless.local.stack_file import LOCK, STATE
from beatless.outbox.clock import monotonic
from beatless.outbox.sockets import Alarm, readable

LOCK_TIMEOUT_S = 0.3

EPHEMERAL = "ephemeral"
"""Where the data is that goes with its stack."""


class DataDirectory:
    """Locked from `take` until `release`. With `ephemeral` the data goes with the stack."""

    def __init__(self, path: Path, *, ephemeral: bool) -> None:
        self.path = path.resolve()
        self.data = self.path / EPHEMERAL if ephemeral else self.path
        """Where servers and processes write."""
        self._ephemeral = ephemeral
        self._created = False
        self._lock: IO[str] | None = None

    def take(self, alarm: Alarm) -> None:
        """Lock the directory, made if it is missing, and remove the remains of a killed stack.

        Raises AlreadyRunning, and BadRequest for one that cannot be used.
        """
        try:
            # The remains of a killed one are ours to remove as well.
            self._created = not self.path.exists() or (
                {path.name for path in self.path.iterdir()} == {LOCK, EPHEMERAL, STATE}
            )
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = (self.path / LOCK).open("a+")
        except OSError as error:
            raise BadRequest("--data-dir", f"{self.path} cannot be used: {error}") from error
        deadline = monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # It may be a command that only looks whether a stack runs here.
                if monotonic() < deadline:
                    readable([alarm], 0.02)
                    continue
                lock.seek(0)
                pid = int(lock.read().strip() or 0)
                lock.close()
                raise AlreadyRunning(str(self.path), pid) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        self._state.unlink(missing_ok=True)  # of one that was killed
        if self._ephemeral:
            shutil.rmtree(self.data, ignore_errors=True)
            self.data.mkdir(mode=0o700)
        elif self._created:
            # Data and passwords: nothing for the repository that the user works in.
            (self.path / ".gitignore").write_text("*\n")

    def announce(self, environ: Mapping[str, str]) -> None:
        """Let commands that run in the parent directory find the stack and its settings."""
        descriptor = os.open(self._state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump({"pid": os.getpid(), "environ": dict(environ)}, file)

    def release(self) -> None:
        """Unlock it; with `ephemeral` remove the data first. May be called more than once."""
        if self._lock is None:
            return
        self._state.unlink(missing_ok=True)
        if self._ephemeral:
            shutil.rmtree(self.data, ignore_errors=True)
            (self.path / LOCK).unlink(missing_ok=True)
            if self._created:
                with contextlib.suppress(OSError):
                    self.path.rmdir()
        self._lock.close()
        self._lock = None

    @property
    def _state(self) -> Path:
        return self.path / STATE
