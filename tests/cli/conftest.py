"""Fixtures of the tests of the command line."""

import signal
from collections.abc import Iterator

import pytest

from beatless import App
from tests.commands import Command


@pytest.fixture
def command(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Calls `beatless` in this process, with the settings of the test's app."""
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    return Command(capsys)


@pytest.fixture
def heeded() -> Iterator[None]:
    """Ctrl-C, also where the tests run in the background of a shell, whose jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
