"""Runs through a worker in a container, as pytest-celery sets it up: our image, its broker.

The plugin is off in the other suites, for it replaces fixtures by Celery's own names; here it is
asked for with `-p celery` (`make test-docker`).
"""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pytest_celery import (
    CeleryBrokerCluster,
    CeleryTestSetup,
    CeleryWorkerContainer,
    RedisContainer,
    RedisTestBroker,
)
from pytest_docker_tools import container, fxtr
from pytest_docker_tools.wrappers import Container

from beatless import App, Fatal, Plan, Settings, StepContext, step
from beatless.cli.demo import GOLDEN, without_handbacks
from beatless.client import RunRequest
from beatless.demo import PLANS
from beatless.migrations import migrate
from beatless.testing import Kit
from tests.valkeys import until

PLANS_OF_THE_WORKER = b"""
import threading

from beatless import App, Plan, Settings, StepContext, step
from beatless.demo import PLANS


@step
def stuck_once(ctx: StepContext) -> int:
    if ctx.attempt == 1:
        threading.Event().wait()
    return ctx.attempt


app = App(Settings.from_env(), plans=[*PLANS, Plan("stuck", [stuck_once])])
"""


@step
def stuck_once(_ctx: StepContext) -> int:
    """Only its name counts in this process."""
    raise Fatal("executed outside of the container")


class Broker(RedisContainer):
    """The plugin takes `localhost` for the host of every engine."""

    @property
    def host_url(self) -> str:
        host, port = self.get_addr("6379/tcp")
        return f"redis://{host}:{port}/{self.vhost}"


class Worker(CeleryWorkerContainer):
    """Of our own image, whose entry point is `beatless`."""

    @classmethod
    def command(cls, *args: str, **_: object) -> list[str]:
        return ["worker", "--concurrency", "2", *args]

    @property
    def ready_prompt(self) -> None:
        """Nothing is waited for: what is dispatched before it is ready waits in the broker."""


postgres = container(
    image="postgres:18",
    environment={"POSTGRES_PASSWORD": "secret"},
    ports={"5432/tcp": None},
    network="{default_pytest_celery_network.name}",
    timeout=120,
)

default_redis_broker = container(
    image="redis:8",
    ports={"6379/tcp": None},
    command=fxtr("default_redis_broker_command"),
    network="{default_pytest_celery_network.name}",
    wrapper_class=Broker,
    timeout=120,
)

default_worker_container = container(
    image="beatless:local",
    environment=fxtr("default_worker_env"),
    network="{default_pytest_celery_network.name}",
    volumes={"{default_worker_volume.name}": {"bind": "/app", "mode": "ro"}},
    wrapper_class=Worker,
    command=fxtr("default_worker_command"),
    timeout=120,
)


@pytest.fixture
def default_worker_container_cls() -> type[Worker]:
    return Worker


@pytest.fixture
def default_worker_initial_content() -> dict[str, bytes]:
    return {"fleet.py": PLANS_OF_THE_WORKER}


@pytest.fixture
def default_worker_env(
    beatless_host: App, postgres: Container, default_redis_broker: Broker
) -> dict[str, str]:
    """Where the servers are for who is in their network; the schema is migrated by then."""
    inside = f"{postgres.attrs['Config']['Hostname']}:5432"
    return {
        "BEATLESS_DATABASE_URL": f"postgresql://postgres:secret@{inside}/postgres",
        "BEATLESS_REDIS_URL": default_redis_broker.url,
        "BEATLESS_LEASE_SECONDS": str(beatless_host.settings.lease_seconds),
        "BEATLESS_APP": "fleet:app",
    }


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster() -> None:
    """Results are in the journal."""


@pytest.fixture
def beatless_host(postgres: Container, default_redis_broker: Broker) -> Iterator[App]:
    """The app in this process: it starts runs, relays and watches; it executes nothing."""
    host, port = postgres.get_addr("5432/tcp")
    settings = Settings(
        database_url=f"postgresql://postgres:secret@{host}:{port}/postgres",
        redis_url=default_redis_broker.host_url,
        lease_seconds=300,  # a worker that is only slow loses none
        redispatch_seconds=3,
    )
    app = App(settings, [*PLANS, Plan("stuck", [stuck_once])])
    migrate(app.engine, settings.schema)
    yield app
    app.close()


@pytest.fixture
def host(beatless_host: App, tmp_path: Path) -> Iterator[Kit]:
    kit = Kit(beatless_host, directory=tmp_path)
    kit.relay.start()
    yield kit
    kit.close()


def test_runs_are_exact_through_a_worker_that_is_killed_and_replaced(
    host: Kit, celery_setup: CeleryTestSetup
) -> None:
    worker = celery_setup.worker
    first = host.start_run("agents.run")
    assert [event.type for event in host.collect_stream(first.run_id, timeout=120)] == GOLDEN

    stuck = host.start_run("stuck")
    stream = host.client.stream_run(stuck.run_id, timeout=120)
    seen = [next(stream), next(stream)]
    assert [event.type for event in seen] == ["RunStarted", "StepStarted"]

    worker.kill()
    with psycopg.connect(host.app.settings.database_url, autocommit=True) as postgres:
        held = "SELECT count(*) FROM beatless.runs WHERE lease_expires_at > now()"
        # The relay knows of its death by the end of its sessions, and ends its lease.
        until(lambda: postgres.execute(held).fetchone() == (0,), 120)
    waiting = host.client.start_runs([RunRequest(plan="agents.run")] * 50)
    worker.restart()

    seen += stream
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert [event.attempt for event in seen if event.type == "StepStarted"] == [1, 2]
    assert host.client.get_run(stuck.run_id).result == 2
    for run in waiting:
        events = without_handbacks(host.collect_stream(run.run_id, timeout=120))
        assert [event.type for event in events] == GOLDEN
    host.wait_for_outbox_flush(waiting[-1].run_id, timeout=120)
    executors = {host.client.get_run(run.run_id).worker.split(":")[0] for run in (first, *waiting)}
    assert executors == {worker.container.id[:12]}
    host.verify()
