"""The servers of a session of tests: started for it, or given from outside."""

import importlib
import json
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg
import pytest
import redis

from beatless.errors import ExtraMissing, JobsError, Unreachable
from beatless.local.errors import ServiceFailed
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.valkey import EmbeddedValkey
from beatless.settings import Settings, libpq_url

POSTGRES_SETTINGS = {
    # A test's data need not survive a power cut; a killed server keeps it all the same.
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "500",
    "autovacuum_naptime": "5s",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The addresses of this session's servers."""

    database_url: str
    redis_url: str
    broker_url: str
    ours: bool
    """Whether no other program uses them, so that all data on them was left by a test."""


def start_services(config: pytest.Config, stack: ExitStack) -> Services:
    """The servers that `--beatless-services` asks for, until the stack is closed.

    Raises UsageError if they cannot be had like this.
    """
    kind = config.getoption("--beatless-services")
    broker_url = config.getoption("--beatless-broker")
    try:
        if kind == "external":
            settings = Settings.from_env()
            ask(settings)
            return Services(
                database_url=settings.database_url,
                redis_url=settings.redis_url,
                broker_url=broker_url or settings.broker_url,
                ours=False,
            )
        start = start_containers if kind == "testcontainers" else start_embedded
        database_url, redis_url = start(config, stack)
    except JobsError as error:
        raise pytest.UsageError(f"--beatless-services={kind}: {error}") from error
    return Services(
        database_url=database_url,
        redis_url=redis_url,
        broker_url=broker_url or redis_url,
        ours=True,
    )


def ask(settings: Settings) -> None:
    """Raises Unreachable if one of the servers does not answer."""
    try:
        psycopg.connect(libpq_url(settings.database_url), connect_timeout=10).close()
    except psycopg.OperationalError as error:
        raise Unreachable("Postgres", str(error)) from error
    try:
        with settings.redis.client(socket_connect_timeout=10) as client:
            client.ping()
    except redis.RedisError as error:
        raise Unreachable("Redis", str(error)) from error


def server_settings(config: pytest.Config) -> dict[str, str]:
    """The settings of a Postgres of ours. Raises UsageError."""
    found = dict(POSTGRES_SETTINGS)
    for line in config.getini("beatless_embedded_settings"):
        name, equals, value = line.partition("=")
        if not equals:
            raise pytest.UsageError(
                f"beatless_embedded_settings: {line!r} is not name=value, as in work_mem=64MB"
            )
        found[name.strip()] = value.strip()
    return found


def start_embedded(config: pytest.Config, stack: ExitStack) -> tuple[str, str]:
    """(database URL, Redis URL) of servers from wheels.

    Raises ServicesMissing, ServiceFailed, and UsageError for a folder that cannot be written to.
    """
    settings = server_settings(config)
    folder = config.getoption("--beatless-directory")
    try:
        made = tempfile.TemporaryDirectory(prefix="beatless-test-", dir=folder)
    except OSError as error:
        raise pytest.UsageError(f"--beatless-directory={folder}: {error.strerror}") from error
    directory = Path(stack.enter_context(made))
    binaries = config.getoption("--beatless-postgres-bin")
    postgres = stack.enter_context(
        EmbeddedPostgres(
            directory / "postgres", settings=settings, binaries=Path(binaries) if binaries else None
        )
    )
    valkey = stack.enter_context(EmbeddedValkey(directory / "valkey"))
    return postgres.url, valkey.url


def start_containers(config: pytest.Config, stack: ExitStack) -> tuple[str, str]:
    """(database URL, Redis URL) of containers. Raises ExtraMissing, ServiceFailed."""
    settings = server_settings(config)
    try:
        # Imported when it is asked for: the extra `docker` is not installed everywhere.
        containers = importlib.import_module("beatless.local.containers")
    except ModuleNotFoundError as error:
        raise ExtraMissing("it", "testcontainers", "docker") from error
    try:
        urls: tuple[str, str] = containers.start_containers(
            stack,
            postgres_image=config.getoption("--beatless-postgres-image"),
            redis_image=config.getoption("--beatless-redis-image"),
            settings=settings,
        )
    except Exception as error:  # of the engine's client, which is not always installed
        reason = f"{type(error).__name__}: {error}; is a Docker engine running?"
        raise ServiceFailed("a container", reason) from error
    return urls


def answer_of_services(config: pytest.Config, stack: ExitStack) -> str:
    """The answer of the controller to an xdist worker that requests servers."""
    try:
        return json.dumps({"services": asdict(start_services(config, stack))})
    except pytest.UsageError as error:
        return json.dumps({"refused": str(error)})


def shared_services(port: int, token: str) -> Services:
    """The servers of the controller, which starts them now at the first request.

    Raises UsageError with the controller's message.
    """
    with socket.create_connection(("127.0.0.1", port)) as controller:
        controller.sendall(token.encode())
        with controller.makefile() as answer:
            said = json.loads(answer.read())
    if "refused" in said:
        raise pytest.UsageError(said["refused"])
    return Services(**said["services"])
