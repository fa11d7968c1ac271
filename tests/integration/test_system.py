"""The fleet as one answer: relays, workers, versions and lag."""

from collections.abc import Iterator
from importlib import metadata

import pytest

from beatless import App
from beatless.auth import Tokens
from beatless.testing import Kit
from tests.serving import Api, serving

PLANS = "tests.plans:app"


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as served:
        yield served


def test_an_empty_fleet_says_what_waits(beatless: Kit, api: Api) -> None:
    beatless.start_run("two_steps")
    found = api("GET", "/v1/system").json
    assert (found["relays"], found["workers"]) == ([], [])
    assert (found["unpublished"], found["dead_letters"]) == (1, 0)
    assert found["lag_seconds"] > 0
    assert found["revision"] == found["revision_needed"]
    assert found["version"] == metadata.version("beatless")
    assert found["redis"].split()[0] in ("Redis", "Valkey")


@pytest.mark.slow
def test_a_relay_and_a_worker_are_named_with_their_versions(beatless: Kit, api: Api) -> None:
    beatless.relay_process(PLANS)
    beatless.worker_process(PLANS, concurrency=2)
    found = api("GET", "/v1/system").json
    (relay,), (worker,) = found["relays"], found["workers"]
    assert relay["version"] == worker["version"] == metadata.version("beatless")
    assert len(relay["shards"]) <= found["shards"]
    assert "default" in worker["queues"]
    assert worker["processes"] == 2


@pytest.mark.parametrize(
    ("scopes", "namespace", "status"),
    [
        (["runs:read"], "default", 200),
        (["queues"], "default", 403),
        (["runs:read"], "acme", 403),
        (["admin"], "acme", 403),
    ],
)
def test_who_reads_runs_of_the_default_namespace_sees_it(
    beatless: Kit, api: Api, scopes: list[str], namespace: str, status: int
) -> None:
    tokens = Tokens(beatless.app.engine, beatless.app.settings.schema)
    _, api.token = tokens.create(scopes, namespace=namespace)
    assert api("GET", "/v1/system").status == status


def test_sessions_of_every_process_name_its_version(beatless: Kit, beatless_app: App) -> None:
    version = metadata.version("beatless")
    with beatless_app.engine.connect() as connection:
        name = connection.exec_driver_sql("SHOW application_name").scalar()
    assert name == f"beatless {version}"
    with beatless_app.bounded_engine(lock_s=1, statement_s=1).connect() as connection:
        name = connection.exec_driver_sql("SHOW application_name").scalar()
    assert name == f"beatless {version}"
