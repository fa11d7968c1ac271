"""Commands without settings find the `beatless dev` of their directory, also one that starts."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import click
import pytest
from prometheus_client import CollectorRegistry

from beatless import BadSetting, loopback
from beatless.cli import COMMANDS, cli, run
from beatless.local.child import Child, wait_until_ready
from beatless.local.errors import NotReady
from beatless.local.restarts import Restarter
from beatless.local.stack_file import LOCK, STATE, settings_of_running
from beatless.observe.exposition import listen
from beatless.outbox.clock import monotonic

FOUND = {"BEATLESS_DATABASE_URL": "postgresql://127.0.0.1:1/x"}


def write_state(directory: Path) -> None:
    (directory / STATE).write_text(json.dumps({"pid": 1, "environ": FOUND}))


@pytest.fixture(params=[".beatless", "elsewhere"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    found = tmp_path / request.param
    found.mkdir()
    return found


def asking(here: Path, ask: Callable[[Future[dict[str, str]]], None]) -> dict[str, str]:
    """What is found by one who asks while `ask` goes on, from when he says that he waits."""
    said: Queue[str] = Queue()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(settings_of_running, here, said.put)
        assert "is starting in this directory" in said.get(timeout=60)
        ask(answer)
        return answer.result(timeout=60)


def test_a_stack_that_is_starting_is_waited_for(directory: Path) -> None:
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert asking(directory.parent, lambda _: write_state(directory)) == FOUND


def test_a_stack_that_fails_to_start_is_waited_for_no_longer(directory: Path) -> None:
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert asking(directory.parent, lambda _: lock.close()) == {}


def test_a_stack_that_has_not_come_to_its_lock_is_waited_for(tmp_path: Path) -> None:
    """Python takes a second to start it."""
    with subprocess.Popen(
        [sys.executable, "-c", "input()", "beatless", "dev"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
    ) as starting:
        assert starting.stdin is not None
        assert asking(tmp_path, lambda _: starting.communicate(b"\n")) == {}


def test_nobody_waits_where_nothing_starts(directory: Path) -> None:
    said: list[str] = []
    (directory / LOCK).touch()
    write_state(directory)  # of one that was killed
    assert settings_of_running(directory.parent, said.append) == {}
    assert said == []


def test_a_missing_setting_beside_others_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("BEATLESS_")]:
        monkeypatch.delenv(name)
    assert run(["runs"]) == 2
    assert "BEATLESS_DATABASE_URL is not set, and no `beatless dev` runs" in capsys.readouterr().err
    monkeypatch.setenv("BEATLESS_DATABASE_URL", FOUND["BEATLESS_DATABASE_URL"])
    assert run(["runs"]) == 2
    said = capsys.readouterr().err
    assert "BEATLESS_REDIS_URL is not set; BEATLESS_DATABASE_URL is, so no `beatless dev`" in said


class Part:
    """A process of a stack that has ended and cannot be started again for a while."""

    name, log = "part", Path("part.log")

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            self.pid = ended.pid

    def restart(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), RuntimeError("odd")])
def test_a_restart_that_fails_in_any_way_is_tried_again(error: Exception) -> None:
    said: list[str] = []
    part = Part(error)
    restarter = Restarter(part)
    restarter.check(said.append)
    restarter.restart_at = 0.0
    restarter.check(said.append)
    assert str(error) in said[-1]
    assert restarter.restart_at
    part.error, restarter.restart_at = None, 0.0
    restarter.check(said.append)
    assert "started again" in said[-1]
    assert restarter.restart_at is None


def test_an_ipv6_address_is_printed_as_a_browser_takes_it() -> None:
    assert loopback.url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert loopback.url("::1", 80) == "http://[::1]:80"
    with pytest.raises(BadSetting, match=r"http://\[::2\]:1 cannot be served"):
        listen(CollectorRegistry(), "::2", 1)


def test_the_list_of_commands_shows_the_help_of_each() -> None:
    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    shown = {name: text for module in COMMANDS.values() for name, text in module.items()}
    assert {name: found.get_short_help_str(1000) for name, found in commands.items()} == shown


def test_a_process_that_ends_before_it_was_ready_ends_the_wait_for_the_others(
    tmp_path: Path,
) -> None:
    shell = ("/bin/sh", "-c")
    starting, broken = (
        Child(name, [script], environ={}, log=tmp_path / name, command=shell)
        for name, script in (("relay", "exec sleep 60"), ("worker-1", "echo no such step; exit 1"))
    )
    try:
        starting.start()
        broken.start()
        with pytest.raises(NotReady, match=r"the worker-1 did not become ready; .*no such step"):
            wait_until_ready([starting, broken])
    finally:
        for child in (starting, broken):
            child.kill()
            child.reap(monotonic())


def test_servers_that_are_not_those_of_the_stack_of_this_directory_are_told(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shell has read the file of a stack that was started again since."""
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://127.0.0.1:2/x")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://127.0.0.1:2/0")
    write_state(directory)
    told = "BEATLESS_DATABASE_URL of your environment is not of the `beatless dev` that runs"
    assert run(["runs"]) == 3
    assert told not in capsys.readouterr().err  # it runs no more
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(["runs"]) == 3
        assert told in capsys.readouterr().err
        monkeypatch.setenv("BEATLESS_DATABASE_URL", FOUND["BEATLESS_DATABASE_URL"])
        assert run(["runs"]) == 3
        assert told not in capsys.readouterr().err
