"""Fixtures of the suite. The test kit itself is the installed plugin `pytest_beatless`."""

import functools
import gc
import importlib
import importlib.metadata
import logging
import os
import socket
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from _pytest.logging import LogCaptureHandler
from hypothesis import settings

from beatless import App
from beatless.settings import libpq_url
from tests.order import longest_first

pytest_plugins = ["pytester"]

# The same cases in every run, on every machine: who finds another one writes it down as a test.
settings.register_profile("beatless", derandomize=True, deadline=None, database=None)
settings.load_profile("beatless")

YOUNG_OBJECTS = 20_000
"""How many new ones the collector lets be, in place of 700."""

# redis-py reads its version from the disk for each connection, of which tests open thousands.
importlib.metadata.version = functools.cache(importlib.metadata.version)

# They change what pytest, click and rich write, and tests read what their processes wrote.
for name in ("CI", "BUILD_NUMBER", "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "NO_COLOR"):
    os.environ.pop(name, None)


@pytest.hookimpl(wrapper=True, trylast=True)  # in the environment for imports of the plugin
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """The collector does not look at modules and tests, which stay, again and again."""
    gc.disable()
    try:
        import_in_turn(session.config)
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS)


def import_in_turn(config: pytest.Config) -> None:
    """Let each xdist worker begin its imports at another of the modules.

    In a new checkout every module's assertions are rewritten, which takes longer than all else of
    the collection: each worker does a part of them, and reads what the others have written.
    """
    given = getattr(config, "workerinput", None)
    if given is None:
        return
    here = Path(__file__).parent
    apart = {here / name for name in config.getini("norecursedirs")}
    modules = sorted(
        path
        for each in map(Path, config.args)
        for path in each.absolute().rglob("test_*.py")
        if here in path.parents and not apart & set(path.parents)
    )
    number = int(given["workerid"].removeprefix("gw"))
    first = len(modules) * number // given["workercount"]
    for path in modules[first:] + modules[:first]:
        with suppress(Exception):  # which the collection reports
            importlib.import_module(".".join(path.relative_to(here.parent).with_suffix("").parts))


@pytest.hookimpl(trylast=True)  # of those that -m has left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let xdist workers begin with the tests that take minutes."""
    given = getattr(config, "workerinput", None)
    marks = ((item, item.get_closest_marker("long")) for item in items)
    minutes = {item: mark.kwargs["minutes"] for item, mark in marks if mark and mark.kwargs}
    if given is not None and minutes:
        items[:] = longest_first(items, minutes, given["workercount"])


@pytest.fixture(autouse=True)
def _path_as_it_was() -> Iterator[None]:
    """A command puts its directory into the path, and has done so to all later processes."""
    before = [*sys.path]
    yield
    sys.path[:] = before


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
