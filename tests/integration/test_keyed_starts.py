"""A second start with the same key or id: its content is what the caller named, not what was the
plan's default at that time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from beatless import App, Plan, RunConflict, step
from beatless.client import RunRequest
from beatless.http import Client
from beatless.testing import Kit
from tests.serving import serving


def plan(queue: str, default_input: Any = None) -> Plan:
    return Plan(
        "p", [step(name="one")(lambda ctx: ctx.input)], queue=queue, default_input=default_input
    )


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [plan("blue", {"size": 1})]


@pytest.fixture
def deployed(beatless_app: App) -> Iterator[Callable[..., App]]:
    """The app with other defaults of its plan."""
    apps: list[App] = []

    def deploy(*defaults: Any) -> App:
        apps.append(App(beatless_app.settings, [plan(*defaults)]))
        return apps[-1]

    yield deploy
    for app in apps:
        app.close()


def start(app: App, **named: Any) -> str:
    return app.client.start_run("p", **{"key": "k", **named}).run_id


def test_a_deploy_that_changes_the_defaults_makes_no_conflict(
    beatless: Kit, deployed: Callable[..., App]
) -> None:
    after = deployed("green", {"size": 2})
    run_id = start(beatless.app)
    assert start(after) == run_id
    assert start(after, queue="blue", input={"size": 1}) == run_id  # what it has
    by_id = beatless.client.start_run("p", run_id="chosen").run_id
    assert after.client.start_run("p", run_id="chosen").run_id == by_id
    many = [RunRequest(plan="p", key="k"), RunRequest(plan="p", run_id="chosen")]
    assert [run.run_id for run in after.client.start_runs(many)] == [run_id, by_id]
    with serving(after) as api, Client(f"http://127.0.0.1:{api.port}") as client:
        assert client.start_run("p", key="k").run_id == run_id
        with pytest.raises(RunConflict, match="another queue"):
            client.start_run("p", key="k", queue="green")
    run = beatless.client.get_run(run_id)
    assert (run.queue, run.input) == ("blue", {"size": 1})


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        ({"queue": "red"}, {}, "queue"),
        ({}, {"queue": "red"}, "queue"),
        ({"input": {"size": 3}}, {}, "input"),
        ({}, {"input": {"size": 3}}, "input"),
        ({"input": {"on": True}}, {"input": {"on": 1}}, "input"),
    ],
)
def test_what_one_start_names_and_the_other_does_not_is_compared(
    beatless: Kit, deployed: Callable[..., App], first: dict, second: dict, differs: str
) -> None:
    start(beatless.app, **first)
    with pytest.raises(RunConflict, match=f"another {differs}"):
        start(deployed("green", {"size": 2}), **second)


def test_what_an_older_release_has_stored_is_the_same_if_the_second_start_names_nothing(
    beatless: Kit, deployed: Callable[..., App], postgres: psycopg.Connection
) -> None:
    run_id = start(beatless.app)
    postgres.execute("UPDATE runs SET default_queue = NULL, default_input = NULL")
    after = deployed("green", {"size": 2})
    assert start(after) == run_id
    with pytest.raises(RunConflict):
        start(after, queue="green")


@pytest.mark.parametrize("number", [1e23, 1.5e300, 5e-324, -0.0, 10**40, 2**53 + 1, 0.1])
def test_a_number_is_the_same_number_however_postgres_writes_it(
    beatless: Kit, number: float
) -> None:
    first = start(beatless.app, input={"n": [number]})
    assert start(beatless.app, input={"n": [number]}) == first
