"""The examples in the docstrings of what users call: each has one, and they are executed."""

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import beatless as package
from beatless import Client, Fatal, Plan, StepContext, approve, http, step, wait
from beatless.api import handle_errors
from beatless.testing import Kit
from tests.serving import serving

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

WITHOUT = {"Kit.close", "Client.stored_id", "Client.page_of_runs", "Client.event_page"} | {
    "Client.decide_by_link",
    "Client.approval_link_of",
    "Client.link_of",
    "Client.page_of_approvals",
    "Client.page_of_schedules",
    "Client.count_failed_runs",
    "Client.ends_of_children",
    "Client.page_of_children",
    "Client.page_of_failed_runs",
    "Client.retry_page",
}
"""What the fixture and the API call, and users have no need of."""

TWINS = {name for name in dir(Client) if name[0] == "a" and hasattr(Client, name[1:])}
"""Asynchronous calls: the first one shows how, the others are as their calls."""
WITHOUT |= {f"Client.{name}" for name in TWINS - {"astart_run", "asignal_run"}}


@step
def reserve(ctx: StepContext) -> dict[str, Any]:
    return {"reserved": ctx.input["order"]}


@step
def charge(ctx: StepContext) -> dict[str, Any]:
    if ctx.input.get("declined"):
        raise Fatal("card declined")
    return {"charge": f"ch_{ctx.input['order']}"}


@step
def ship(ctx: StepContext) -> dict[str, Any]:
    return {"parcel": f"p_{ctx.input['order']}"}


@step
def receipt(ctx: StepContext) -> Any:
    return ctx.results["paid"].data


@step
def refunded(ctx: StepContext) -> dict[str, Any]:
    decision = ctx.results["Refund"]
    return {"refunded": decision.data.approved, "by": decision.by}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("checkout", [reserve, charge, ship]),
        Plan("payment", [wait("paid"), receipt]),
        Plan("complaint", [approve("Refund"), refunded]),
    ]


def names_of_the_package() -> Iterator[tuple[str, Any]]:
    """Its classes and functions, without the errors that users only catch."""
    for name in package.__all__:
        value = getattr(package, name)
        if value is Fatal or not (inspect.isclass(value) and issubclass(value, Exception)):
            yield name, value


def calls(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class."""
    for name, value in inspect.getmembers(kind):
        if not name.startswith("_") and f"{kind.__name__}.{name}" not in WITHOUT:
            if isinstance(value, property):
                value = value.fget
            if inspect.isroutine(value):
                yield f"{kind.__name__}.{name}", value


def examples(name: str, value: Any) -> doctest.DocTest:
    text = inspect.cleandoc(value.__doc__ or "")
    return doctest.DocTestParser().get_doctest(text, {}, name, inspect.getsourcefile(value), 0)


def without_example(documented: Iterator[tuple[str, Any]]) -> list[str]:
    return [name for name, value in documented if not examples(name, value).examples]


def check(documented: Iterator[tuple[str, Any]], names: dict[str, Any]) -> None:
    """Executes the examples of each, which see these names and none of one another's."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=OPTIONS)
    for name, value in documented:
        test = examples(name, value)
        test.globs = dict(names)
        runner.run(test, out=report.append)
    assert not report, "\n".join(report)


def test_each_name_of_the_package_has_an_example() -> None:
    assert without_example(names_of_the_package()) == []


def test_the_examples_of_the_package_give_what_they_show(beatless: Kit) -> None:
    check(names_of_the_package(), {"app": beatless.app, "beatless": beatless})


def test_the_example_of_the_errors_in_routes_gives_what_it_shows(beatless: Kit) -> None:
    check(iter([("handle_errors", handle_errors)]), {"app": beatless.app})


def test_each_call_of_the_client_has_an_example() -> None:
    assert without_example(calls(Client)) == []


@pytest.mark.slow
def test_the_examples_of_the_client_give_what_they_show(beatless: Kit) -> None:
    check(calls(Client), {"client": beatless.client, "app": beatless.app, "beatless": beatless})


def over_http() -> Iterator[tuple[str, Any]]:
    """The calls of the table, and what each client adds to them."""
    yield from [("AsyncClient", http.AsyncClient), ("Client", http.Client)]
    yield from calls(http.Client)


def test_each_call_over_http_has_an_example() -> None:
    assert without_example(over_http()) == ["Client.after_fork"]


@pytest.mark.slow
def test_the_examples_of_the_calls_over_http_give_what_they_show(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(beatless.app) as api, http.Client(api.url) as client:
        monkeypatch.setenv("BEATLESS_API_URL", api.url)
        names = {"Client": http.Client, "AsyncClient": http.AsyncClient, "url": api.url}
        check(over_http(), names | {"client": client, "beatless": beatless})


def test_each_helper_of_the_kit_has_an_example() -> None:
    assert without_example(calls(Kit)) == []


SHOP = """
from beatless import App, Plan, Settings, step

@step
def charge(ctx): ...

app = App(Settings.from_env(), plans=[Plan("checkout", [charge])])
"""
"""The project whose worker and relay the examples start."""


@pytest.mark.slow
def test_the_examples_of_the_kit_give_what_they_show(
    beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "app.py").write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    # A process that an example starts would do the work of those that come after it.
    documented = sorted(calls(Kit), key=lambda found: found[0].endswith("_process"))
    check(iter(documented), {"beatless": beatless})
