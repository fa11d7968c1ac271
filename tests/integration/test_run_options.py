"""Each option of a run is stored, whichever way it comes in, and is read back.

An option that a run keeps needs no case here: its description has an example.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from beatless import App, BadRequest, RunRequest
from beatless.client.requests import EXAMPLE_TRACE, OPTIONS
from beatless.http import Client as HttpClient
from beatless.orchestrator.options import STORED
from beatless.orchestrator.records import Run
from tests.serving import serving

SOON = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)

COMPUTED: dict[str, tuple[Any, Callable[[Run], Any], Any]] = {
    "plan": ("two_steps", lambda run: run.plan, "two_steps"),
    "input": ({"order": 1}, lambda run: run.input, {"order": 1}),
    "run_id": ("order-1", lambda run: run.run_id, "order-1"),
    "key": ("order:1", lambda run: run.key, "order:1"),
    "queue": ("mail", lambda run: run.queue, "mail"),
    "delay": (90, lambda run: (run.not_before - run.created_at).total_seconds() >= 89, True),
    "not_before": (SOON, lambda run: run.not_before, SOON),
    "while_unfinished": ("replace", lambda run: run.dedupe_key, "k"),
    "debounce": (90, lambda run: (run.not_before - run.created_at).total_seconds() >= 89, True),
    "max_wait": (95, lambda run: (run.not_before - run.created_at).total_seconds() < 95, True),
    "deadline": (7200, lambda run: (run.deadline_at - run.created_at).total_seconds() > 7190, True),
}
"""What is given, what is read of the run, and what that must be."""

BESIDE: dict[str, dict[str, Any]] = {
    "while_unfinished": {"dedupe_key": "k"},
    "debounce": {"dedupe_key": "k2"},
    "max_wait": {"dedupe_key": "k3", "debounce": 94},
}
"""Options that another one needs."""

KEPT = {
    name: (option.example, lambda run, name=name: getattr(run, name), option.example)
    for name, option in STORED.items()
}
CASES = COMPUTED | KEPT

TOLD = {"traceparent"}
"""In RunStarted, and not in the run."""

ODD = [
    *(True, -1, 10**9, 1e400, float("nan"), "", "\0", "a\ud800", "x" * 10**6, [], [1], object()),
    *({"a": 1}, {1: "a"}, {"a": "\0"}, {"a": "x" * 10**6}),
]


def test_each_option_has_its_case_here() -> None:
    assert CASES.keys() | TOLD == {"plan", "input"} | OPTIONS.keys()


@pytest.mark.parametrize("name", STORED)
def test_an_example_is_not_the_default(beatless_app: App, name: str) -> None:
    run = beatless_app.client.start_run("two_steps")
    assert getattr(run, name) != STORED[name].example


def test_an_option_is_stored_and_read_back(beatless_app: App, subtests: pytest.Subtests) -> None:
    for option in CASES:
        with subtests.test(option):
            store_and_read(beatless_app, option)


def store_and_read(app: App, option: str) -> None:
    given, read, expected = CASES[option]
    request = {"plan": "two_steps", option: given, **BESIDE.get(option, {})}
    client = app.client
    started = client.start_run(**request)
    assert read(started) == read(client.get_run(started.run_id)) == expected
    if option != "key":  # which names the first run
        # Of a run alone each member is a parameter, of several they are JSON.
        again = RunRequest(**request | {"run_id": f"{option}-many"})
        [many, _] = client.start_runs([again, RunRequest(plan="two_steps")])
        assert option == "run_id" or read(client.get_run(many.run_id)) == expected


@pytest.mark.slow
def test_each_option_comes_in_over_http(beatless_app: App) -> None:
    with serving(beatless_app) as api, HttpClient(api.url) as client:
        for option, (given, read, expected) in CASES.items():
            beside = BESIDE.get(option, {})
            started = client.start_run(**{"plan": "two_steps", option: given, **beside})
            assert read(started) == read(client.get_run(started.run_id)) == expected, option


@pytest.mark.parametrize("name", STORED)
def test_a_retry_takes_over_what_a_run_keeps(beatless_app: App, name: str) -> None:
    client = beatless_app.client
    run = client.cancel_run(client.start_run("two_steps", **{name: STORED[name].example}).run_id)
    assert getattr(client.retry_run(run.run_id), name) == STORED[name].example


def test_explain_tells_the_options_that_were_chosen(beatless_app: App) -> None:
    client = beatless_app.client
    chosen = client.start_run("two_steps", **{name: case[0] for name, case in KEPT.items()})
    told = client.explain(chosen.run_id)[0].text
    plain = client.explain(client.start_run("two_steps").run_id)[0].text
    for name, option in STORED.items():
        assert f", {name} {json.dumps(option.example)}" in told
        assert f", {name} " not in plain


@pytest.mark.parametrize("name", STORED)
def test_an_odd_value_is_refused_by_its_name_or_read_back(
    beatless_app: App, subtests: pytest.Subtests, name: str
) -> None:
    client = beatless_app.client
    for number, odd in enumerate(ODD):
        with subtests.test(number=number):
            try:
                found = repr(getattr(client.start_run("two_steps", **{name: odd}), name))
            except BadRequest as refused:
                found = refused.field
            assert found in (name, repr(odd))


def test_the_trace_that_a_run_joins_is_in_its_first_event(beatless_app: App) -> None:
    run = beatless_app.client.start_run("two_steps", traceparent=EXAMPLE_TRACE)
    [first] = beatless_app.client.events(run.run_id)
    assert first.data["traceparent"] == EXAMPLE_TRACE
