"""Processes of tests are forks of a server, and find what they would find if they were executed."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beatless import App
from beatless.local.child import Launch, Process, spawn
from beatless.local.processes import wait_for_end
from beatless.testing import Kit, fixtures
from beatless.testing.broker_guard import Guard
from beatless.testing.fork_server import ForkServer

CODE = """
import json, os, signal, sys, threading
found = {
    "argv": sys.argv,
    "orig_argv": sys.orig_argv,
    "path": sys.path,
    "environ": {name: value for name, value in os.environ.items() if name != "LC_CTYPE"},
    "directory": os.getcwd(),
    "leads its session": os.getsid(0) == os.getpid() == os.getpgrp(),
    "descriptors": sorted(os.listdir("/proc/self/fd")),
    "input": os.readlink("/proc/self/fd/0"),
    "inheritable": os.get_inheritable(int(sys.argv[2])),
    "signals": {
        int(each): getattr(found, "__qualname__", str(found))
        for each in signal.valid_signals()
        for found in [signal.getsignal(each)]
    },
    "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "threads": threading.active_count(),
    "main": sorted(set(vars()) - {"beatless"}),
    "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering],
}
print(json.dumps(found), file=sys.stderr)
print(os.getppid())
sys.stdout.flush()
if sys.argv[1] == "waits":
    os.write(int(sys.argv[2]), b"!")
    signal.pause()
sys.exit(7)
"""


@pytest.fixture
def server() -> Iterator[ForkServer]:
    server = ForkServer(CODE)
    yield server
    server.close()


class Launched:
    """A process with the code above, and a pipe that tells when it is ready."""

    def __init__(self, launch: Launch, log: Path, does: str = "exits", **environ: str) -> None:
        self.log = log
        self._ready, writer = os.pipe()
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with log.open("wb") as output:
            self.process: Process = launch(
                [sys.executable, "-P", "-c", CODE, does, str(writer)],
                environ={**os.environ, **path, **environ},
                log=output,
                ready=writer,
            )
        os.close(writer)

    def ready(self) -> bool:
        """Whether it is ready, as soon as it is or has ended."""
        with os.fdopen(self._ready, "rb") as pipe:
            return pipe.read(1) == b"!"

    def parent(self) -> int:
        """Its parent's process id."""
        return int(self.log.read_text().splitlines()[-1])

    def found(self) -> dict[str, Any]:
        """All that it has found."""
        assert not self.ready()
        assert self.process.wait(60) == 7
        found: dict[str, Any] = json.loads(self.log.read_text().splitlines()[0])
        return found


def test_a_fork_finds_what_an_executed_process_finds(server: ForkServer, tmp_path: Path) -> None:
    environ = {"BEATLESS_SCHEMA": "s_\udce4 of the test"}
    executed = Launched(spawn, tmp_path / "executed", **environ)
    expected = executed.found()
    forked = Launched(server.launch, tmp_path / "forked", **environ)

    assert forked.found() == expected
    assert forked.parent() != executed.parent() == os.getpid()


@pytest.mark.slow
def test_the_end_of_a_fork_is_told_as_that_of_a_child(server: ForkServer, tmp_path: Path) -> None:
    waiting = [Launched(server.launch, tmp_path / str(number), "waits") for number in range(3)]
    assert all(each.ready() for each in waiting)
    killed, terminated, left = (each.process for each in waiting)

    with pytest.raises(subprocess.TimeoutExpired):
        killed.wait(0)
    assert killed.poll() is None
    killed.kill()
    terminated.terminate()

    assert [killed.wait(60), terminated.wait(60)] == [-signal.SIGKILL, -signal.SIGTERM]
    assert [killed.poll(), left.poll()] == [-signal.SIGKILL, None]
    killed.kill()  # nobody's process any more
    left.kill()
    assert left.wait() == -signal.SIGKILL


def test_a_process_that_would_inherit_something_else_is_executed(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # nohup ignores the one of hang-ups
    try:
        ignoring = Launched(server.launch, tmp_path / "ignoring")
    finally:
        signal.signal(signal.SIGUSR1, before)
    variable = Launched(server.launch, tmp_path / "variable", TZ="Asia/Kathmandu")
    monkeypatch.syspath_prepend(tmp_path)
    path = Launched(server.launch, tmp_path / "path")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    directory = Launched(server.launch, tmp_path / "directory")

    for each in (ignoring, variable, path, directory):
        each.found()
        assert each.parent() == os.getpid()


@pytest.mark.slow
def test_without_the_server_its_forks_end_and_the_next_launch_starts_another(
    server: ForkServer, tmp_path: Path
) -> None:
    orphan = Launched(server.launch, tmp_path / "orphan", "waits")
    assert orphan.ready()
    os.kill(orphan.parent(), signal.SIGKILL)
    assert wait_for_end(orphan.parent(), timeout_s=60)

    assert orphan.process.wait(60) == -signal.SIGKILL
    assert wait_for_end(orphan.process.pid, timeout_s=60)
    Launched(server.launch, tmp_path / "next").found()


@pytest.mark.slow
def test_the_end_of_the_session_ends_the_server_and_its_forks(
    server: ForkServer, tmp_path: Path
) -> None:
    left = Launched(server.launch, tmp_path / "left", "waits")
    assert left.ready()
    server.close()

    assert wait_for_end(left.parent(), timeout_s=60)
    assert wait_for_end(left.process.pid, timeout_s=60)
    assert left.process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_the_server_ends_also_if_a_process_that_a_test_has_forked_has_its_descriptors(
    server: ForkServer, tmp_path: Path
) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    left = Launched(server.launch, tmp_path / "left", "waits")
    assert left.ready()
    new = set(Path("/proc/self/fd").iterdir()) - before
    copies = [os.dup(int(each.name)) for each in new if each.exists()]
    closing = threading.Thread(target=server.close)
    closing.start()
    closing.join(60)
    ended = not closing.is_alive()
    for each in copies:
        os.close(each)

    assert ended
    assert left.process.wait(60) == -signal.SIGKILL


@pytest.mark.slow
def test_without_a_server_that_can_import_all_processes_are_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "celery.py").write_text("raise ImportError('of the test')")
    monkeypatch.syspath_prepend(tmp_path)
    server = ForkServer(CODE)
    for number in range(2):
        executed = Launched(server.launch, tmp_path / str(number))
        executed.found()
        assert executed.parent() == os.getpid()
    server.close()


@pytest.fixture
def kit(beatless_app: App, _beatless_guard: Guard, tmp_path: Path) -> Iterator[Kit]:
    """Its server of forks knows the environment as it is now, whatever tests before have left."""
    with (
        fixtures.beatless_fork_server() as server,
        fixtures.beatless(beatless_app, _beatless_guard, server, tmp_path) as kit,
    ):
        yield kit


@pytest.mark.slow
def test_processes_of_a_test_are_forks_unless_it_has_set_a_variable(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parent(pid: int) -> int:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

    forked = kit.relay_process("tests.plans:app")
    monkeypatch.setenv("SHOP", "of the test")
    executed = kit.relay_process("tests.plans:app")

    assert parent(forked.pid) != os.getpid() == parent(executed.pid)
