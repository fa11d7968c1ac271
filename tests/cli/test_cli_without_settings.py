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
from celery import _state
from celery.app import builtins
from prometheus_client import CollectorRegistry

from beatless import BadSetting, Settings, loopback
from beatless.cli import COMMANDS, cli, run
from beatless.cli.environment import NO_SERVERS, Environment
from beatless.local.child import Child, wait_until_ready
from beatless.local.errors import NotReady
from beatless.local.restarts import Restarter
from beatless.local.stack import Stack
from beatless.local.stack_file import LOCK, STATE, settings_of_running
from beatless.observe.exposition import listen
from beatless.outbox.clock import monotonic

FOUND = {"BEATLESS_DATABASE_URL": "postgresql://127.0.0.1:1/x"}

OWN = {"database_url": "postgresql://127.0.0.1:1/x", "redis_url": "redis://127.0.0.1:1/0"}


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


OF_CELERY = """
import os

from celery import Celery

app = Celery("shop", set_as_current=False, broker=os.environ["BEATLESS_REDIS_URL"])
app.conf.beat_schedule = {"nightly": {"task": "report", "schedule": 60}}


@app.task(name="report")
def report(host=os.environ["BEATLESS_DATABASE_URL"]): ...
"""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a person who has set nothing, for this test."""
    for name in ("BEATLESS_APP", *FOUND, "BEATLESS_REDIS_URL", "DJANGO_SETTINGS_MODULE"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("command", ["schedules from-beat", "plan from-celery"])
def test_what_reads_a_celery_app_gives_its_module_settings(
    directory: Path,
    bare: None,
    command: str,
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Those of a `beatless dev` of the directory, or such as name no server."""
    monkeypatch.chdir(directory.parent)
    monkeypatch.syspath_prepend(directory.parent)
    # Without tasks of other tests, which each app would have.
    own = {each for each in _state._on_app_finalizers if each.__module__ == builtins.__name__}
    monkeypatch.setattr(_state, "_on_app_finalizers", own)
    (directory.parent / "shop_of_celery.py").write_text(OF_CELERY)
    write_state(directory)
    with (directory / LOCK).open("w") as lock:
        if runs:
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = run([*command.split(), "shop_of_celery:app"])
    sys.modules.pop("shop_of_celery", None)
    assert done == 0
    assert "report" in capsys.readouterr().out
    url = FOUND["BEATLESS_DATABASE_URL"] if runs else NO_SERVERS["BEATLESS_DATABASE_URL"]
    assert os.environ["BEATLESS_DATABASE_URL"] == url


@pytest.mark.parametrize(
    ("app", "told"),
    [("beatless.django:app", {"DJANGO_SETTINGS_MODULE": "shop.settings"}), ("shop:app", {})],
)
def test_the_settings_of_a_stack_name_those_of_django(
    tmp_path: Path, bare: None, app: str, told: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    stack = Stack(tmp_path, app_name=app)
    stack.alarm.close()
    stack.settings = Settings.from_env({}, **OWN, app=app)
    assert stack.environ() == stack.settings.to_env() | told


@pytest.mark.parametrize(("given", "used"), [("", "shop.settings"), ("shop.other", "shop.other")])
def test_a_command_finds_the_settings_of_django_where_it_has_none(
    directory: Path, bare: None, given: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", given)
    found = {**FOUND, "DJANGO_SETTINGS_MODULE": "shop.settings"}
    (directory / STATE).write_text(json.dumps({"pid": 1, "environ": found}))
    with (directory / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        Environment().find_settings()
    assert os.environ["DJANGO_SETTINGS_MODULE"] == used


def test_the_app_of_django_without_its_settings_is_told(
    tmp_path: Path, bare: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["--app", "beatless.django:app", "runs"]) == 2
    said = capsys.readouterr().err
    assert "DJANGO_SETTINGS_MODULE is not set: call `manage.py beatless …` instead" in said
    assert "or export it; for example DJANGO_SETTINGS_MODULE=shop.settings" in said


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
