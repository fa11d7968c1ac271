"""The API below a path: mounted in another app, or behind a proxy that takes the path away."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urljoin, urlsplit

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import ASGIApp

from beatless import App
from beatless.api import create_api
from beatless.api.routes.page import PAGE_FILES
from beatless.http import Client
from beatless.testing import Kit
from tests.hosted import host
from tests.serving import Api, hosting


def in_fastapi(app: App) -> tuple[ASGIApp, dict[str, str]]:
    host = FastAPI()
    host.mount("/jobs", create_api(app))
    return host, {}


def in_starlette(app: App) -> tuple[ASGIApp, dict[str, str]]:
    return Starlette(routes=[Mount("/jobs", create_api(app))]), {}


def behind_a_proxy(app: App) -> tuple[ASGIApp, dict[str, str]]:
    """Uvicorn adds what the proxy has taken away."""
    return create_api(app), {"root_path": "/jobs"}


@pytest.fixture(params=[in_fastapi, in_starlette, behind_a_proxy])
def mounted(request, beatless_app: App) -> Iterator[tuple[Api, str]]:
    """The API, and the path that a client of this server puts before its own."""
    host, options = request.param(beatless_app)
    with hosting(host, **options) as api:
        yield api, "" if options else "/jobs"


def test_the_page_asks_for_nothing_beside_its_mount(mounted: tuple[Api, str]) -> None:
    api, at = mounted
    page = api("GET", f"{at}/").text
    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', page) if link[0] != "#"]
    assert len(links) >= 3
    for link in links:
        path = urlsplit(urljoin(f"{api.url}{at}/", link)).path
        assert path.startswith(f"{at}/static/")
        assert api("GET", path).status == 200
    for script in (name for name in PAGE_FILES if name.endswith(".js")):
        source = api("GET", f"{at}/static/{script}").text
        assert not re.findall(r"""(?:fetch|EventSource|from)\W*["'`]/""", source)


def test_places_are_told_with_the_mount(beatless: Kit, mounted: tuple[Api, str]) -> None:
    api, at = mounted
    started = api("POST", f"{at}/v1/runs", {"plan": "half"})
    assert started.headers["location"] == f"/jobs/v1/runs/{started.json['run_id']}"
    beatless.work_until_idle()
    again = api("POST", f"{at}/v1/runs/{started.json['run_id']}/retry")
    assert again.headers["location"] == f"/jobs/v1/runs/{again.json['run_id']}"
    assert api("GET", f"{at}/openapi.json").json["servers"] == [{"url": "/jobs"}]
    assert api("GET", f"{at}/nothing").json["detail"] == "Not Found"


def test_a_client_of_ours_works_below_a_path(beatless: Kit, mounted: tuple[Api, str]) -> None:
    api, at = mounted
    with Client(api.url + at) as client:
        run = client.start_run("two_steps")
        beatless.work_until_idle()
        assert [event.seq for event in client.stream_run(run.run_id)] == [1, 2, 3, 4, 5, 6]
        assert client.list_runs(limit=1)[0].run_id == run.run_id


def test_a_document_told_at_one_path_is_right_at_another(beatless_app: App) -> None:
    api = create_api(beatless_app)
    host = Starlette(routes=[Mount("/one", api), Mount("/two", api)])
    with hosting(host) as served:
        for at in ("/one", "/two", "/one"):
            document = served("GET", f"{at}/openapi.json").json
            assert document["servers"] == [{"url": at}]


@pytest.mark.parametrize("_turn", [1, 2])
def test_an_api_that_a_module_has_mounted_answers_from_each_tests_schema(
    beatless: Kit, _turn: int
) -> None:
    """Twice: its App acts as another test's own in each."""
    with hosting(host) as api:
        run_id = api("POST", "/jobs/v1/runs", {"plan": "two_steps"}).json["run_id"]
        beatless.work_until_idle()
        with api.stream(f"/jobs/v1/runs/{run_id}/stream") as stream:
            assert list(stream)[-1]["event"] == "RunFinished"
        assert api("GET", "/jobs/readyz").json == {"status": "ok"}
        assert [run["run_id"] for run in api("GET", "/jobs/v1/runs").json["runs"]] == [run_id]
    assert beatless.client.get_run(run_id).state == "completed"


@pytest.mark.slow
def test_an_open_stream_does_not_keep_a_server_from_stopping(
    beatless: Kit, beatless_app: App
) -> None:
    """Uvicorn waits for ever for answers to end, and a mounted app gets no lifespan."""
    run = beatless.start_run("two_steps").run_id
    command = [sys.executable, "-m", "uvicorn", "tests.hosted:host", "--port", "0"]
    environment = os.environ | beatless_app.settings.to_env()
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = next(line for line in server.stderr if "running on" in line)
        api = Api(int(re.search(r":(\d+) ", said)[1]))
        with api.stream(f"/jobs/v1/runs/{run}/stream") as stream:
            next(stream), next(stream)
            server.terminate()
            assert list(stream) == []  # whole: an answer that breaks off raises IncompleteRead
        server.wait(60)


@pytest.mark.parametrize("stops", ["when it is told", "after so many requests"])
def test_an_open_stream_does_not_keep_a_server_in_a_thread_from_stopping(
    beatless: Kit, beatless_app: App, stops: str
) -> None:
    """It gets no signal, and after its last request nobody has told it to stop."""
    run = beatless.start_run("two_steps").run_id
    most = 1 if stops == "after so many requests" else None
    with (
        hosting(
            create_api(beatless_app), timeout_graceful_shutdown=None, limit_max_requests=most
        ) as api,
        api.stream(f"/v1/runs/{run}/stream") as stream,
    ):
        next(stream)
        assert next(stream)["event"] == "RunStarted"
        if most:
            api("GET", "/livez")
        else:
            api.state.should_exit = True
        assert list(stream) == []  # whole: an answer that breaks off raises IncompleteRead
