"""The three clients offer the same."""

import inspect
from typing import Any

import pytest

from beatless import Client
from beatless.http import AsyncClient
from beatless.http import Client as HttpClient

NEED_THE_DATABASE = {"start_runs", "explain", "epoch", "stored_id", "count_failed_runs"}
OF_THE_SERVER = {"event_page", "page_of_runs", "page_of_failed_runs", "retry_page", "told"}
OF_THE_CONNECTION = {"from_env", "close", "aclose", "after_fork"}


def offers(kind: type) -> dict[str, list[tuple[str, Any, Any]]]:
    """(name, kind and default) of each option of each call, without `connection`."""
    return {
        name: [
            (each.name, each.kind, each.default)
            for each in inspect.signature(call).parameters.values()
            if each.name not in ("self", "connection")
        ]
        for name, call in inspect.getmembers(kind, inspect.isroutine)
        if not name.startswith("_") and name not in OF_THE_CONNECTION
    }


def test_the_clients_over_http_have_the_calls_of_an_apps_client() -> None:
    calls = offers(Client).keys() - NEED_THE_DATABASE - OF_THE_SERVER
    assert offers(HttpClient).keys() == calls
    assert offers(AsyncClient).keys() == calls - {"stream_run"}
    assert {"from_env", "after_fork"} <= set(dir(HttpClient)) & set(dir(AsyncClient))


@pytest.mark.parametrize("call", sorted(offers(HttpClient)))
def test_each_call_has_the_same_options_in_each_client(call: str) -> None:
    assert offers(HttpClient)[call] == offers(Client)[call]
    if call in offers(AsyncClient):
        assert offers(AsyncClient)[call] == offers(Client)[call]
