"""The routes of an API, which are made once for all of a process: FastAPI takes 40 ms for them."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from beatless import App, Settings
from beatless.api import create_api
from beatless.api.server import bearer


@pytest.fixture
def apis() -> list[FastAPI]:
    settings = Settings(
        database_url="postgresql://me:secret@127.0.0.1:1/nothing",
        redis_url="redis://127.0.0.1:1/0",
        broker_url="redis://127.0.0.1:1/0",
    )
    return [create_api(App(settings, [])) for _ in range(2)]


def test_a_second_api_has_the_routes_of_the_first(apis: list[FastAPI]) -> None:
    one, other = apis
    assert len(one.routes) > 10
    assert list(map(id, one.routes)) == list(map(id, other.routes))


def test_a_route_that_a_host_adds_to_one_is_in_no_other(apis: list[FastAPI]) -> None:
    one, other = apis
    one.add_api_route("/of-the-host", lambda: "hello")
    assert len(one.routes) == len(other.routes) + 1


def test_a_dependency_is_overridden_in_the_api_that_says_so_alone(apis: list[FastAPI]) -> None:
    one, other = apis
    asked = []
    one.dependency_overrides[bearer] = lambda: asked.append("one")
    with (
        TestClient(one, client=("127.0.0.1", 1)) as of_one,
        TestClient(other, client=("127.0.0.1", 1)) as of_other,
    ):
        assert of_other.get("/livez").status_code == 200
        assert asked == []
        assert of_one.get("/livez").status_code == 200
        assert asked == ["one"]
        one.dependency_overrides.clear()
        assert of_one.get("/livez").status_code == 200
    assert asked == ["one"]
