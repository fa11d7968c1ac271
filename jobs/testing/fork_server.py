"""Forks the processes of tests from a server that has imported what they execute.

Imports are most of the 0.6 s of processor time that a worker or a relay takes to start. As
`set_forkserver_preload` of Python's `multiprocessing` does:
https://docs.python.org/3/library/multiprocessing.html#multiprocessing.set_forkserver_preload
A process that is forked has a pid, a session, an environment, signals and a log as one that is
executed. The App that it runs, and all that its module imports, it imports itself (ADR 0078).
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from beatless.local.child import Process, spawn
from beatless.local.processes import die_with_parent
from beatless.outbox.sockets import readable

PRELOADED = (
    "beatless.app",
    "beatless.cli.processes",
    "beatless.local.stack_file",
    "beatless.orchestrator.watch_thread",
    "beatless.outbox.relay",
    "beatless.testing.broker_guard",
    "beatless.worker.composition",
    "beatless.worker.run",
    "beatless.worker.task_events",
    "billiard.popen_fork",
    "billiard.synchronize",
    "celery.app.control",
    "celery.app.log",
    "celery.apps.worker",
    "celery.concurrency.prefork",
    "celery.concurrency.thread",
    "celery.worker.autoscale",
    "celery.worker.components",
    "celery.worker.consumer",
    "celery.worker.control",
    "celery.worker.strategy",
    "kombu.transport.redis",
)
"""The modules of commands that tests start; one that is not here is imported by the process."""

SERVER = """\
import sys, beatless.cli.environment
with beatless.cli.environment.importing():
    import beatless.testing.fork_server
    beatless.testing.fork_server.preload()
beatless.testing.fork_server.serve(int(sys.argv[1]))
"""
"""The code of the server; the code of its forks follows."""

OF_A_TEST = ("BEATLESS_", "PYTEST_CURRENT_TEST")
"""Start the names of variables that no module reads while it is imported by the server."""

CODE = 3
"""Place of the code in the command `python -P -c CODE`."""

INTEGER_BYTES = 8


class ForkServer:
    """Launches processes that execute one piece of code, with several arguments, as forks.

    The server is started by the first launch, and ends with this process.
    """

    def __init__(self, code: str) -> None:
        self._code = code
        self._environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._state = inherited(self._environ)
        self._control: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def launch(
        self, command: Sequence[str], *, environ: Mapping[str, str], log: IO[bytes], ready: int
    ) -> Process:
        """A process that does the same as this command.

        One that would inherit something else than the server has inherited, as another
        `PYTHONPATH`, is executed: what modules do while they are imported may depend on it.
        """
        code = [sys.executable, "-P", "-c", self._code]
        if list(command[: CODE + 1]) != code or inherited(environ) != self._state:
            return spawn(command, environ=environ, log=log, ready=ready)
        connection, other = socket.socketpair()
        request = {"command": list(command), "environ": dict(environ), "ready": ready}
        try:
            with other:
                socket.send_fds(self._running(), [b"f"], [other.fileno(), log.fileno(), ready])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            pid = received(connection)
        except ConnectionError:
            pid = None
        if pid is None:  # the server has ended: its imports have failed, perhaps
            connection.close()
            return spawn(command, environ=environ, log=log, ready=ready)
        return ForkedProcess(pid, connection)

    def close(self) -> None:
        """End the server, and with it its forks."""
        control, server = self._control, self._server
        self._control = self._server = None
        if control is not None and server is not None:
            # A process that was forked from this one meanwhile has the descriptor too.
            control.shutdown(socket.SHUT_RDWR)
            control.close()
            server.wait()

    def _running(self) -> socket.socket:
        if self._control is None or self._server is None or self._server.poll() is not None:
            self.close()
            self._control, other = socket.socketpair()
            with other:
                self._server = subprocess.Popen(
                    [sys.executable, "-P", "-c", SERVER + self._code, str(other.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=self._environ,
                    pass_fds=[other.fileno()],
                    start_new_session=True,
                )
        return self._control


class ForkedProcess:
    """A process that the server has forked, and whose end the server reports."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self._connection = connection
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status if it has ended, as that of `subprocess.Popen`."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status when it has ended. Raises TimeoutExpired."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return status

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _status(self, timeout: float | None) -> int | None:
        if self._returncode is None and readable([self._connection], timeout):
            status = received(self._connection)
            # Without a server nobody knows: its forks are killed with it.
            self._returncode = -signal.SIGKILL if status is None else status
            self._connection.close()
        return self._returncode


def received(connection: socket.socket) -> int | None:
    """The next number that the server reports; None if it has ended."""
    data = connection.recv(INTEGER_BYTES, socket.MSG_WAITALL)
    return int.from_bytes(data, signed=True) if len(data) == INTEGER_BYTES else None


def inherited(environ: Mapping[str, str]) -> Any:
    """All that a process inherits, beside the environment's variables for one test."""
    return (
        Path.cwd(),
        {name: value for name, value in environ.items() if not name.startswith(OF_A_TEST)},
        {each for each in signal.valid_signals() if signal.getsignal(each) is signal.SIG_IGN},
    )


def preload() -> None:
    """Import what the forks execute."""
    for name in PRELOADED:
        importlib.import_module(name)


def serve(descriptor: int) -> None:
    """Fork for each request, and return in the fork. Exits when the other end is closed."""
    control, server = socket.socket(fileno=descriptor), os.getpid()
    forks: dict[int, tuple[int, socket.socket]] = {}
    while True:
        found = readable([descriptor, *forks], None)
        for ended in forks.keys() & set(found):
            pid, connection = forks.pop(ended)
            os.close(ended)
            with connection:
                report(connection, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        if descriptor not in found:
            continue
        message, (*descriptors,), _, _ = socket.recv_fds(control, 1, 3)
        if not message:
            sys.exit()
        connection, (log, ready) = socket.socket(fileno=descriptors[0]), descriptors[1:]
        pid = os.fork()
        if pid == 0:
            die_with_parent(signal.SIGKILL, server)
            request = json.loads(connection.makefile("rb").read())
            # Detached: their objects would close what has their numbers later.
            for each in (control, connection, *(other for _, other in forks.values())):
                os.close(each.detach())
            for pidfd in forks:
                os.close(pidfd)
            become(request, log, ready)
            return
        os.close(log)
        os.close(ready)
        forks[os.pidfd_open(pid)] = pid, connection
        report(connection, pid)


def report(connection: socket.socket, number: int) -> None:
    """Send a number to the process that asked for the fork, if it still listens."""
    try:
        connection.sendall(number.to_bytes(INTEGER_BYTES, signed=True))
    except OSError:
        return


def become(request: dict[str, Any], log: int, ready: int) -> None:
    """Give this process all that its command, executed, would have had."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    if ready != request["ready"]:
        os.dup2(ready, request["ready"])
        os.close(ready)
    os.set_inheritable(request["ready"], True)
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.orig_argv[:] = request["command"]
    sys.argv[:] = ["-c", *request["command"][CODE + 1 :]]
