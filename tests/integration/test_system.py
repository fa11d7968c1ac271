"""The fleet as one answer: relays, workers, versions and lag."""

import socket
from collections.abc import Iterator
from importlib import metadata

import pytest

from beatless import App
from beatless.auth import Tokens
from beatless.system import process_in, version_in
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
    process = beatless.relay_process(PLANS)
    beatless.worker_process(PLANS, concurrency=2)
    found = api("GET", "/v1/system").json
    (relay,), (worker,) = found["relays"], found["workers"]
    assert relay["version"] == worker["version"] == metadata.version("beatless")
    assert relay["process"] == f"{process.pid}@{socket.gethostname().partition('.')[0][:20]}"
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


@pytest.mark.parametrize(
    ("name", "version", "process"),
    [
        ("beatless relay 1.2.0 4711@web-1; tasks, events", "1.2.0", "4711@web-1"),
        ("beatless relay 1.1.0", "1.1.0", None),
        ("beatless relay 1.1.0; tasks", "1.1.0", None),
        ("", None, None),
    ],
)
def test_the_name_of_a_session_tells_of_its_relay(
    name: str, version: str | None, process: str | None
) -> None:
    """Older ones do not name their process."""
    assert (version_in(name), process_in(name)) == (version, process)


def test_sessions_of_every_process_name_its_version(beatless: Kit, beatless_app: App) -> None:
    version = metadata.version("beatless")
    with beatless_app.engine.connect() as connection:
        name = connection.exec_driver_sql("SHOW application_name").scalar()
    assert name == f"beatless {version}"
    with beatless_app.bounded_engine(lock_s=1, statement_s=1).connect() as connection:
        name = connection.exec_driver_sql("SHOW application_name").scalar()
    assert name == f"beatless {version}"
