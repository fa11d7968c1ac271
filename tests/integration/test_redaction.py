"""`App(redact=…)`: what it hides is shown nowhere, and stays as it is where it is stored."""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from beatless import (
    App,
    ChildFailed,
    Client,
    Fatal,
    Plan,
    Run,
    RunContext,
    RunState,
    Schedule,
    StepContext,
    Undone,
    approve,
    plan,
    step,
)
from beatless.api import create_api
from beatless.cli import run as command
from beatless.client.pages import ApprovalPage, NumberedRunPage, RunPage, SchedulePage
from beatless.observe.logs import Format, configure
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.schedule import StoredSchedule
from beatless.redaction import FAILED, Redaction, ShownClient
from beatless.streams.tailed import TailedEvent
from beatless.testing import Kit

SECRET = "4111-1111"


@step
def charge(ctx: StepContext) -> dict[str, Any]:
    ctx.trace("asked", card=SECRET)
    return {"card": SECRET, "paid": True}


@step
def refuse(ctx: StepContext) -> None:
    raise Fatal(f"no such card: {SECRET}")


@step
def forget(ctx: StepContext, undone: Undone) -> None:
    return None


@step(undo=forget)
def look_up(ctx: StepContext, card: str) -> str:
    ctx.trace("asked", card=card)
    ctx.emit(card)
    return card


@step
def undo(ctx: StepContext) -> None:
    raise Fatal(f"not undone: {SECRET}")


@plan("looks_up")
def looks_up(run: RunContext) -> None:
    raise Fatal(f"no such card: {run.step(look_up, run.input['card'])}")


@plan("needs_all", on_cancel=undo)
def needs_all(run: RunContext) -> None:
    with suppress(ChildFailed):
        run.child(looks_up, run.input).result()
    run.wait("paid")
    run.approve(f"Refund {SECRET}?", name="Refund")
    run.wait("never")


PLANS = [Plan("charges", [charge]), Plan("refuses", [charge, refuse]), looks_up, needs_all]

ASKS = Plan("asks", [approve(f"charge {SECRET}?", name="charging")])


def hide(what: str, value: Any) -> Any:
    """As a careful user writes it: the members stay, the secret goes."""
    return json.loads(json.dumps(value).replace(SECRET, f"hidden {what}"))


hidden = App.__new__(App)
"""The app that the command line loads: the test's, see `kit`."""


@pytest.fixture
def kit(beatless_app: App, tmp_path: Path) -> Iterator[Kit]:
    app = App(beatless_app.settings, [*PLANS, ASKS], redact=hide)
    kit = Kit(app, directory=tmp_path)
    hidden.__dict__ = app.__dict__
    yield kit
    kit.close()


@pytest.fixture
def runs(kit: Kit) -> list[str]:
    found = [kit.start_run(plan.name, {"card": SECRET}).run_id for plan in PLANS[:2]]
    kit.work_until_idle()
    return found


def test_what_is_stored_stays_and_the_apps_own_code_gets_it(kit: Kit, runs: list[str]) -> None:
    paid, refused = (kit.client.get_run(run_id) for run_id in runs)
    assert paid.input == {"card": SECRET}
    assert paid.result == {"card": SECRET, "paid": True}
    assert refused.error is not None
    assert SECRET in refused.error["message"]
    assert SECRET in str([event.data for event in kit.client.events(runs[0])])


def test_http_and_its_streams_show_none_of_it(kit: Kit, runs: list[str]) -> None:
    with TestClient(create_api(kit.app, is_open=True), base_url="http://localhost") as http:
        said = [
            http.get("/v1/runs").text,
            http.get("/v1/failed-runs").text,
            http.post(f"/v1/runs/{runs[1]}/retry").text,
            http.post("/v1/runs", json={"plan": "charges", "input": {"card": SECRET}}).text,
        ]
        for run_id in runs:
            said += [
                http.get(f"/v1/runs/{run_id}").text,
                http.get(f"/v1/runs/{run_id}/events").text,
                http.get(f"/v1/runs/{run_id}/stream").text,
            ]
    assert SECRET not in str(said)
    told = str(said)
    for what in ("hidden input", "hidden result", "hidden error", "hidden trace"):
        assert what in told
    assert json.loads(said[4])["result"] == {"card": "hidden result", "paid": True}


@pytest.mark.slow
def test_no_address_of_the_api_shows_it_of_a_run_that_has_everything(kit: Kit) -> None:
    daily = Schedule("daily", "looks_up", cron="0 0 * * *", input={"card": SECRET})
    kit.client.create_schedule(daily)
    run_id = kit.start_run("needs_all", {"card": SECRET}).run_id
    kit.work_until_idle()
    for name in ("paid", "unasked"):
        kit.client.signal_run(run_id, name, {"card": SECRET})
    kit.work_until_idle()
    decision = {"approved": True, "comment": SECRET}
    kit.client.approve_run(run_id, "Refund", decision, by="ann@example.com")
    kit.work_until_idle()
    (child,) = kit.client.children(run_id)

    with TestClient(create_api(kit.app, is_open=True), base_url="http://localhost") as http:
        paths = [
            path.format(run_id=run, name="daily", letter_id=1)
            for path, methods in http.get("/openapi.json").json()["paths"].items()
            for run in (run_id, child.run_id)
            if "get" in methods and path != "/v1/stream"  # it does not end: see below
        ]
        waiting = [http.get(path) for path in paths if not path.endswith("/stream")]
        kit.client.cancel_run(run_id)
        kit.work_until_idle()
        ended = [http.get(path) for path in paths]

    given = [(event.data or {}).get("given") for event in kit.client.events(child.run_id)]
    assert SECRET in str(given)
    stored = str([event.data for event in kit.client.events(run_id)])
    assert all(event in stored for event in ("unasked", "not undone", "approved"))
    assert [each.url for each in waiting + ended if SECRET in each.text] == []
    told = "".join(each.text for each in ended)
    for what in ("input", "result", "error", "trace", "output"):
        assert f"hidden {what}" in told


@pytest.mark.slow
def test_the_command_line_shows_none_of_it(
    kit: Kit,
    runs: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BEATLESS_APP", f"{__name__}:hidden")
    monkeypatch.setattr("beatless.cli.environment.load", lambda _name, _given: kit.app)
    events = sum(len(kit.client.events(run_id)) for run_id in runs)
    for run_id in runs:
        for name in ("show", "events", "explain"):
            for flags in ((), ("--json",)):
                assert command([*flags, name, run_id]) == 0
    for flags in ((), ("--json",)):
        assert command([*flags, "runs"]) == 0
        assert command([*flags, "dead-letters"]) == 0
        assert command([*flags, "dead-letters", "show", runs[1]]) == 0
        assert command([*flags, "tail", "--from", runs[0], "--limit", str(events)]) == 0
    told = capsys.readouterr().out
    assert SECRET not in told
    assert told.count("hidden result") > 2
    assert "hidden error" in told


def test_the_question_of_an_approval_shows_none_of_it(
    kit: Kit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor once it is decided, to the person who had a link."""
    monkeypatch.setenv("BEATLESS_APP", f"{__name__}:hidden")
    monkeypatch.setattr("beatless.cli.environment.load", lambda _name, _given: kit.app)
    run_id = kit.start_run("asks").run_id
    kit.work_until_idle()
    assert SECRET in str(kit.waits(run_id)[0].title)
    link = kit.client.approval_link(run_id, "charging", by="ann@example.com")
    with TestClient(create_api(kit.app, is_open=True), base_url="http://localhost") as http:
        said = [
            http.get("/v1/approvals").text,
            http.get(f"/v1/runs/{run_id}/waits").text,
            http.get(f"/v1/runs/{run_id}/events").text,
            http.get(path := link.url("http://localhost")).text,
            http.post(path, data={"f.approved": "true"}).text,
        ]
    kit.work_until_idle()
    for name in ("show", "waits", "events", "explain"):
        for flags in ((), ("--json",)):
            assert command([*flags, name, run_id]) == 0
    said.append(capsys.readouterr().out)

    assert kit.client.get_run(run_id).state is RunState.COMPLETED
    assert [each for each in said if SECRET in each] == []
    assert [said.index(each) for each in said if "charge hidden title?" not in each] == []


CARRIERS = {Run, Event, EventText, TailedEvent, OpenWait, StoredSchedule}
CARRIERS |= {RunPage, NumberedRunPage, ApprovalPage, SchedulePage}

BY_ANOTHER_CALL = {"start_run": "start_runs", "wait_for_run": "get_run"}
"""Calls of a client that get what they give by another one of it."""


def test_each_call_of_a_client_whose_result_has_values_is_redacted_for_displays() -> None:
    def carries(kind: Any) -> bool:
        return kind in CARRIERS or any(map(carries, get_args(kind)))

    calls = dict(inspect.getmembers(Client, inspect.isfunction))
    carrying = {
        name
        for name, call in calls.items()
        if name[0] != "_" and carries(inspect.signature(call).return_annotation)
    }
    asynchronous = {name for name in carrying if inspect.iscoroutinefunction(calls[name])}
    assert {name[1:] for name in asynchronous} <= carrying
    assert len(carrying) > 30
    for name, other in BY_ANOTHER_CALL.items():
        assert f"self.{other}(" in inspect.getsource(calls[name])
    assert carrying - asynchronous - vars(ShownClient).keys() == BY_ANOTHER_CALL.keys()


@pytest.mark.parametrize(("shown", "told"), [(None, None), (7, "7"), (["a"], "['a']")])
def test_the_question_of_an_approval_stays_text_whatever_is_shown(shown: Any, told: Any) -> None:
    assert Redaction(lambda what, value: shown).title("charge?") == told


@pytest.mark.parametrize("form", list(Format))
def test_log_lines_show_none_of_it(kit: Kit, tmp_path: Path, form: Format) -> None:
    log = tmp_path / "lines.log"
    with log.open("w") as stream:
        restore = configure(form, stream)
        kit.start_run("refuses", {"card": SECRET})
        kit.work_until_idle()
        restore()
    told = log.read_text()
    assert "step failed" in told
    assert SECRET not in told
    assert "hidden error" in told


def test_a_redact_that_raises_or_gives_no_json_shows_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raises(_what: str, value: Any) -> Any:
        raise ValueError(value)

    with caplog.at_level(logging.WARNING):
        assert Redaction(raises).value("input", {"card": SECRET}) == FAILED
        assert Redaction(lambda _what, _value: {1j}).value("result", SECRET) == FAILED
        shown = Redaction(raises).value("error", {"type": "Fatal", "message": SECRET})
    assert shown == {"type": "Fatal", "message": FAILED}
    assert SECRET not in caplog.text


def test_it_gets_a_copy_and_may_change_it() -> None:
    def changes(_what: str, value: Any) -> Any:
        value["card"] = "hidden"
        return value

    stored = {"card": SECRET}
    assert Redaction(changes).value("input", stored) == {"card": "hidden"}
    assert stored == {"card": SECRET}


def test_the_retry_of_a_run_whose_results_are_hidden_takes_over_what_is_stored(kit: Kit) -> None:
    first = kit.start_run("refuses", {"card": SECRET})
    kit.work_until_idle()
    shown = kit.app.client_for("default", shown=True)
    again = shown.retry_run(first.run_id)
    assert again.input == {"card": "hidden input"}
    stored = kit.client.get_run(again.run_id)
    assert stored.input == {"card": SECRET}
    (started, *_) = kit.client.events(again.run_id)
    assert SECRET in str(started.data)
    assert SECRET not in str(shown.events(again.run_id)[0].data)
    assert stored.state is RunState.QUEUED
