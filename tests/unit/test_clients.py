"""The three clients offer the same, and each option of a run has every way in."""

import inspect
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import pytest

from beatless import Client, RunRequest
from beatless.api.bodies import StartRequest
from beatless.cli.runs import start_options
from beatless.client.requests import OPTIONS, REQUEST_FIELDS, RunOptions, json_members
from beatless.http import (
    AsyncClient,
    approval_calls,
    calls,
    group_calls,
    limit_calls,
    schedule_calls,
)
from beatless.http import Client as HttpClient
from beatless.orchestrator.options import StoredKeywords, StoredOptions

NEED_THE_DATABASE = {
    "start_runs",
    "signal_runs",
    "explain",
    "epoch",
    "stored_id",
    "count_failed_runs",
    "apply_plans",
    "apply_schedules",
    "declared_schedules",
}
OF_THE_SERVER = {
    "approval_link_of",
    "decide_by_link",
    "link_of",
    "page_of_approvals",
    "page_of_schedules",
    "ends_of_children",
    "event_page",
    "page_of_children",
    "page_of_failed_runs",
    "page_of_runs",
    "retry_page",
    "told",
}
OF_THE_CONNECTION = {"from_env", "close", "aclose", "after_fork"}
WITH_STREAMS = {"stream_run", "astream_run", "tail", "atail", "wait_for_run"}
"""Not in the table: their I/O is their own."""


TWINS = {name for name in dir(Client) if name[0] == "a" and hasattr(Client, name[1:])} - {
    "astream_run",
    "atail",
}
"""Asynchronous calls of an app's client: AsyncClient has them without the a."""


def offers(kind: type) -> dict[str, tuple[list[tuple[str, Any, Any, Any]], Any]]:
    """(name, kind, default and type) of each option of each call, and its result.

    Without `connection`.
    """
    found = {}
    for name, call in inspect.getmembers(kind, inspect.isroutine):
        if not name.startswith("_") and name not in OF_THE_CONNECTION:
            signature = inspect.signature(call)
            options = [
                (each.name, each.kind, each.default, each.annotation)
                for each in signature.parameters.values()
                if each.name not in ("self", "connection")
            ]
            found[name] = (options, signature.return_annotation)
    return found


def test_the_clients_over_http_have_the_calls_of_an_apps_client() -> None:
    names = offers(Client).keys() - NEED_THE_DATABASE - OF_THE_SERVER - TWINS
    assert offers(HttpClient).keys() == names
    assert offers(AsyncClient).keys() == names - {"stream_run", "tail"}
    assert {"from_env", "after_fork"} <= set(dir(HttpClient)) & set(dir(AsyncClient))


@pytest.mark.parametrize("call", sorted(offers(HttpClient)))
def test_each_call_has_the_same_options_in_each_client(call: str) -> None:
    assert offers(HttpClient)[call] == offers(Client)[call]
    if call in offers(AsyncClient):
        assert offers(AsyncClient)[call] == offers(Client)[call]


def test_each_call_on_a_connection_has_an_asynchronous_twin_with_the_same_options() -> None:
    on_a_connection = {
        name
        for name, call in inspect.getmembers(Client, inspect.isfunction)
        if not name.startswith("_") and "connection" in inspect.signature(call).parameters
    }
    assert on_a_connection == TWINS | {name[1:] for name in TWINS}
    for name in TWINS:
        twin = getattr(Client, name)
        assert inspect.iscoroutinefunction(twin)
        assert offers(Client)[name] == offers(Client)[name[1:]]
        assert twin.__doc__.startswith(f"`{name[1:]}` in your asynchronous transaction")


def test_every_call_over_http_is_one_of_the_table() -> None:
    table = {
        name: exchange
        for module in (calls, approval_calls, group_calls, limit_calls, schedule_calls)
        for name, exchange in inspect.getmembers(module, inspect.isfunction)
        if get_origin(inspect.signature(exchange).return_annotation) is Generator
        and not name.startswith("_")
        and name != "ask"
    }
    assert table.keys() | WITH_STREAMS == offers(HttpClient).keys()
    for name, exchange in table.items():
        for kind in (HttpClient, AsyncClient):
            assert getattr(kind, name).__doc__ == exchange.__doc__


def test_the_keywords_of_a_start_are_the_members_of_a_run_request() -> None:
    members = get_type_hints(RunRequest)
    assert get_type_hints(RunOptions) == {name: members[name] for name in OPTIONS}
    assert get_type_hints(StoredKeywords) == get_type_hints(StoredOptions)
    assert [each.name for each in REQUEST_FIELDS] == ["plan", "input", *OPTIONS]
    options, _ = offers(Client)["start_run"]
    assert [(name, default) for name, _, default, _ in options[1:]] == [
        (each.name, each.default) for each in REQUEST_FIELDS[1:]
    ]


def test_every_member_of_a_run_request_has_its_way_into_the_api_and_the_command_line() -> None:
    members = [each.name for each in json_members()]
    assert list(StartRequest.model_fields) == members
    assert ["plan", "input", *(each.name for each in start_options())] == members
    # A header over HTTP; on the command line from OpenTelemetry.
    assert {each.name for each in REQUEST_FIELDS} - set(members) == {"traceparent"}


@pytest.mark.parametrize("page", ["python", "http"])
def test_each_option_of_a_run_stands_on_the_page(page: str) -> None:
    wanted = RunOptions.__annotations__ if page == "python" else {m.name for m in json_members()}
    row = "`start_run(" if page == "python" else "`POST /v1/runs`"
    lines = (Path(__file__).parents[2] / "docs" / f"{page}.md").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("|") and row in line.split("|")[1]]
    assert [name for name in wanted if not re.search(rf"\b{name}\b", line)] == []
