"""Fixtures of the suite. The test kit itself is the installed plugin `pytest_beatless`."""

import gc
import logging
import os
import socket
from collections.abc import Generator, Iterator

import psycopg
import pytest
from _pytest.logging import LogCaptureHandler
from hypothesis import settings

from beatless import App
from beatless.settings import libpq_url

pytest_plugins = ["pytester"]

# The same cases in every run, on every machine: who finds another one writes it down as a test.
settings.register_profile("beatless", derandomize=True, deadline=None, database=None)
settings.load_profile("beatless")

# They change what pytest, click and rich write, and tests read what their processes wrote.
for name in ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR"):
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The collector does not look at modules and tests, which stay, again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that logs to its standard error would go on to do so in the next test."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.setLevel(level)
    for handler in list(root.handlers):
        if handler not in handlers and not isinstance(handler, LogCaptureHandler):
            root.removeHandler(handler)


@pytest.fixture
def shut_port() -> Iterator[int]:
    """A port of 127.0.0.1 at which nobody listens, and that nobody else gets meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def postgres(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session of the test's own, in its schema, committing each statement."""
    with psycopg.connect(libpq_url(beatless_app.settings.database_url), autocommit=True) as found:
        found.execute(f"SET search_path TO {beatless_app.settings.schema}")
        yield found
