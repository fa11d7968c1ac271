"""The routes of an API, which are made once for all of a process: FastAPI takes 40 ms for them."""

import pytest
from fastapi import FastAPI

from beatless import App, Settings
from beatless.api import create_api


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
