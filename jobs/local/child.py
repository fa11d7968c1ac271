"""A `beatless` process that this one starts, and that ends with it even if it is killed."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from beatless.local.errors import NotReady
from beatless.local.processes import die_with_parent
from beatless.outbox.clock import monotonic
from beatless.outbox.sockets import Alarm, readable

READY_TIMEOUT_S = 180.0
"""A machine at its limits takes longer than a minute for all processes of a stack."""


class Process(Protocol):
    """A process that was launched, as `subprocess.Popen`, which is one, describes it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...

    def terminate(self) -> None: ...


class Launch(Protocol):
    """Launches a process that has the descriptor `ready`, and writes its output to `log`."""

    def __call__(
        self, command: Sequence[str], *, environ: Mapping[str, str], log: IO[bytes], ready: int
    ) -> Process: ...


def spawn(
    command: Sequence[str], *, environ: Mapping[str, str], log: IO[bytes], ready: int
) -> Process:
    """A process that executes the command, and that ends with the thread that launches it."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environ,
        pass_fds=[ready],
        start_new_session=True,
        # Killing is safe, that is the point of it all; a slow farewell is not needed.
        preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
    )


class Child:
    """One process of the stack. It reports through a pipe when it is ready."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        environ: dict[str, str],
        log: Path,
        # -P: a folder called `beatless` in the current directory must not stand in for ours.
        command: Sequence[str] = (sys.executable, "-P", "-m", "beatless"),
        launch: Launch = spawn,
    ) -> None:
        self.name = name
        self.log = log
        self._command = [*command, arguments[0]]
        self._arguments = arguments[1:]
        self._environ = environ
        self._launch = launch
        self._process: Process | None = None
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
                self._process = self._launch(
                    [*self._command, "--ready-fd", str(writer), *self._arguments],
                    environ=self._environ,
                    log=log,
                    ready=writer,
                )
        finally:
            os.close(writer)

    def restart(self) -> None:
        """Start it again after its end."""
        self.reap(monotonic())
        self.start()

    def wait_ready(self, alarm: Alarm | None = None) -> None:
        """Return when it is ready. Raises NotReady, with its last lines, if it ends before."""
        wait_until_ready([self], alarm)

    @property
    def ready_pipe(self) -> int:
        """Where it writes a byte when it is ready, and which its end closes."""
        if self._ready is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._ready

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


def wait_until_ready(children: Sequence[Child], alarm: Alarm | None = None) -> None:
    """Return when all are ready.

    Raises NotReady, with its last lines, as soon as one ends before it was ready, and
    KeyboardInterrupt when the alarm rings.
    """
    deadline = monotonic() + READY_TIMEOUT_S
    waiting = {child.ready_pipe: child for child in children}
    while waiting:
        sources: list[int | Alarm] = [*waiting, *([alarm] if alarm else [])]
        found = readable(sources, deadline - monotonic())
        if alarm in found:
            raise KeyboardInterrupt
        for pipe in [each for each in found if isinstance(each, int)] or [next(iter(waiting))]:
            child = waiting.pop(pipe)
            if pipe not in found or not os.read(pipe, 1):
                raise NotReady(child.name, child.last_words())
