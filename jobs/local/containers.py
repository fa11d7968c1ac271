"""Postgres and Redis as containers, for tests on other versions. Needs the extra `docker`."""

from contextlib import ExitStack
from typing import Any

from testcontainers.community.postgres import PostgresContainer
from testcontainers.community.redis import RedisContainer


def start_containers(
    stack: ExitStack, *, postgres_image: str, redis_image: str, settings: dict[str, str]
) -> tuple[str, str]:
    """(database URL, Redis URL) of two containers, which end with the stack."""
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    postgres: Any = PostgresContainer(postgres_image, driver=None)
    postgres = stack.enter_context(postgres.with_command(["postgres", *options]))
    valkey: Any = stack.enter_context(RedisContainer(redis_image))
    host, port = valkey.get_container_host_ip(), valkey.get_exposed_port(6379)
    return str(postgres.get_connection_url()), f"redis://{host}:{port}/0"
