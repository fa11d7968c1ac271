"""What systemd hears of a process: that it is ready, and that it moves."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from beatless import App
from beatless.local.child import Child
from beatless.observe.systemd import ServiceManager
from beatless.testing import Kit

Hear = Callable[[bytes], None]


@pytest.fixture
def hear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hear]:
    """Stands in for systemd, whose protocol is these datagrams: waits for one of them."""
    with (
        # The path of a socket may have no more than 107 bytes.
        TemporaryDirectory(prefix="notify-") as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door,
    ):
        door.bind(f"{short}/notify")
        door.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{short}/notify")
        monkeypatch.setenv("WATCHDOG_USEC", "150000")
        monkeypatch.delenv("WATCHDOG_PID", raising=False)

        def wait(line: bytes) -> None:
            while door.recv(100) != line:
                pass

        yield wait


@pytest.mark.slow
def test_a_relay_says_that_it_listens_and_that_it_moves(
    beatless: Kit, hear: Hear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3")  # it says so each time, and not now and then
    beatless.relay_process("tests.plans:app")
    hear(b"READY=1")
    beatless.start_run("two_steps")
    hear(b"WATCHDOG=1")


@pytest.mark.slow
def test_a_worker_says_so_too_while_it_has_nothing_to_do(beatless: Kit, hear: Hear) -> None:
    beatless.worker_process("tests.plans:app")
    hear(b"READY=1")
    for _ in range(3):
        hear(b"WATCHDOG=1")


@pytest.mark.slow
def test_the_api_says_so_too(beatless: Kit, beatless_app: App, hear: Hear, tmp_path: Path) -> None:
    environ = os.environ | beatless_app.settings.to_env() | {"BEATLESS_APP": "tests.plans:app"}
    api = Child("api", ["serve", "--port", "0"], environ=environ, log=tmp_path / "log")
    api.start()
    try:
        hear(b"READY=1")
        for _ in range(3):
            hear(b"WATCHDOG=1")
    finally:
        api.kill()
        api.reap(0)


def test_nobody_asks_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch, hear: Hear) -> None:
    monkeypatch.setenv("WATCHDOG_PID", "1")  # for another process than this one
    assert ServiceManager().interval_s == 0
    monkeypatch.delenv("NOTIFY_SOCKET")
    ServiceManager().ready()


def test_an_abstract_socket_and_one_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.bind("")  # Linux chooses an abstract name
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + door.getsockname()[1:].decode())
        ServiceManager().ready()
        assert door.recv(100) == b"READY=1"
    ServiceManager().ready()
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    ServiceManager().alive()
