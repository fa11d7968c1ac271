"""Each option of a run is stored, whichever way it comes in, and is read back."""

from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from beatless import App, RunRequest
from beatless.http import Client as HttpClient
from beatless.orchestrator.records import Run
from tests.serving import serving

SOON = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

OPTIONS: dict[str, tuple[Any, Callable[[Run], Any], Any]] = {
    "plan": ("two_steps", lambda run: run.plan, "two_steps"),
    "input": ({"order": 1}, lambda run: run.input, {"order": 1}),
    "run_id": ("order-1", lambda run: run.run_id, "order-1"),
    "key": ("order:1", lambda run: run.key, "order:1"),
    "queue": ("mail", lambda run: run.queue, "mail"),
    "delay": (90, lambda run: (run.not_before - run.created_at).total_seconds() >= 89, True),
    "not_before": (SOON, lambda run: run.not_before, SOON),
    "deadline": (7200, lambda run: (run.deadline_at - run.created_at).total_seconds() > 7190, True),
    "priority": (7, lambda run: run.priority, 7),
    "tags": ({"shop": "berlin"}, lambda run: run.tags, {"shop": "berlin"}),
}
"""What is given, what is read of the run, and what that must be."""

TOLD = {"traceparent"}
"""In RunStarted, and not in the run."""


def test_each_option_has_its_case_here() -> None:
    assert OPTIONS.keys() | TOLD == {each.name for each in fields(RunRequest)}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_stored_and_read_back(beatless_app: App, option: str) -> None:
    given, read, expected = OPTIONS[option]
    request = {"plan": "two_steps", option: given}
    client = beatless_app.client
    started = client.start_run(**request)
    assert read(started) == read(client.get_run(started.run_id)) == expected
    if option != "key":  # which names the first run
        [many] = client.start_runs([RunRequest(**request | {"run_id": f"{option}-many"})])
        assert option == "run_id" or read(client.get_run(many.run_id)) == expected


def test_each_option_comes_in_over_http(beatless_app: App) -> None:
    with serving(beatless_app) as api, HttpClient(api.url) as client:
        for option, (given, read, expected) in OPTIONS.items():
            started = client.start_run(**{"plan": "two_steps", option: given})
            assert read(started) == read(client.get_run(started.run_id)) == expected, option


def test_the_trace_that_a_run_joins_is_in_its_first_event(beatless_app: App) -> None:
    run = beatless_app.client.start_run("two_steps", traceparent=TRACE)
    [first] = beatless_app.client.events(run.run_id)
    assert first.data["traceparent"] == TRACE
