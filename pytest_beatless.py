"""The pytest plugin of beatless: its options, and the fixtures for any project's tests.

pytest loads it wherever beatless is installed. So it imports nothing of beatless, which would cost
every session a second, before a test asks for a fixture: `jobs.pytest_plugin` has what they do.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beatless")
    group.addoption(
        "--beatless-services",
        choices=("embedded", "testcontainers", "external"),
        default="embedded",
        help="embedded: from wheels; testcontainers: see the image options; external: "
        "BEATLESS_DATABASE_URL and BEATLESS_REDIS_URL.",
    )
    group.addoption(
        "--beatless-broker",
        metavar="URL",
        default="",
        help="another broker for the task messages, such as amqp://guest:guest@localhost/; "
        "default: Redis, which carries the events in any case",
    )
    group.addoption("--beatless-postgres-image", default="postgres:18", help="for testcontainers")
    group.addoption("--beatless-redis-image", default="redis:8", help="for testcontainers")
    parser.addini("beatless_app", "module:attribute of the App whose plans the tests run")
    parser.addini("beatless_embedded_settings", "Postgres settings, name=value", type="linelist")


class SharedServices:
    """Servers that the controller starts for all xdist workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._stack = ExitStack()
        self._services: Any = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        if self._services is None:
            self._services = implementation().start_services(self._config, self._stack)
        node.workerinput["beatless"] = (
            self._services.database_url,
            self._services.redis_url,
            self._services.broker_url,
            self._services.ours,
        )

    def pytest_unconfigure(self) -> None:
        self._stack.close()


def pytest_configure(config: pytest.Config) -> None:
    # Projects that have beatless installed and do not test with it start no servers.
    if config.getini("beatless_app") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SharedServices(config), "beatless-shared-services")


def implementation() -> ModuleType:
    """What the fixtures do, imported when the first of them is asked for."""
    return importlib.import_module("jobs.pytest_plugin")


@pytest.fixture(scope="session")
def beatless_services(pytestconfig: pytest.Config) -> Iterator[Any]:
    """Postgres and Redis: shared by all xdist workers of a session, or given from outside."""
    with implementation().beatless_services(pytestconfig) as services:
        yield services


@pytest.fixture(scope="session")
def _beatless_schemas(beatless_services: Any, pytestconfig: pytest.Config) -> Iterator[Any]:
    with implementation().beatless_schemas(beatless_services, pytestconfig) as schemas:
        yield schemas


@pytest.fixture
def beatless_plans(pytestconfig: pytest.Config) -> Sequence[Any]:
    """The plans of the test's app. Override it, or set `beatless_app` in the pytest settings."""
    plans: Sequence[Any] = implementation().beatless_plans(pytestconfig)
    return plans


@pytest.fixture
def beatless_settings() -> dict[str, Any]:
    """Settings of the test's app beside its own names. Override it.

    What isolates the test (`database_url`, `redis_url`, `schema`, `prefix`) is refused with a
    UsageError: it is the kit's to choose.
    """
    return {}


@pytest.fixture
def beatless_app(
    _beatless_schemas: Any, beatless_plans: Sequence[Any], beatless_settings: dict[str, Any]
) -> Iterator[Any]:
    """An App with a schema, prefix and channel that only this test has.

    Tables that your own code names without a schema are the test's own as well: make them with
    `metadata.create_all(beatless_app.engine)`.
    """
    with implementation().beatless_app(_beatless_schemas, beatless_plans, beatless_settings) as app:
        yield app


@pytest.fixture
def beatless(beatless_app: Any, tmp_path: Path) -> Iterator[Any]:
    """The helpers of `jobs.testing.Kit`, bound to the test's own app."""
    with implementation().beatless(beatless_app, tmp_path) as kit:
        yield kit
