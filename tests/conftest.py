"""Fixtures of the suite. The test kit itself is the installed plugin `jobs.pytest_plugin`."""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import settings

from jobs import App
from jobs.settings import libpq_url

pytest_plugins = ["pytester"]

# The same cases in every run, on every machine: who finds another one writes it down as a test.
settings.register_profile("beatless", derandomize=True, deadline=None, database=None)
settings.load_profile("beatless")


@pytest.fixture
def postgres(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session of the test's own, in its schema, committing each statement."""
    with psycopg.connect(libpq_url(beatless_app.settings.database_url), autocommit=True) as found:
        found.execute(f"SET search_path TO {beatless_app.settings.schema}")
        yield found
