"""Runs that wait for a signal or a time: kept, exact, and for nobody's lock."""

from typing import Any

import pytest

from beatless import (
    BadPayload,
    BadRequest,
    Goto,
    Plan,
    RunContext,
    RunEnded,
    RunNotFound,
    SignalConflict,
    SignalRequest,
    StepContext,
    days,
    http,
    plan,
    sleep,
    step,
    wait,
)
from beatless.orchestrator.progress import CHANGED_CALL, UNKNOWN_STEP
from beatless.places import places
from beatless.redaction import Redaction
from beatless.testing import Kit
from tests.serving import serving


@step
def reserve(ctx: StepContext) -> str:
    return f"reserved {ctx.input}"


@step
def ship(ctx: StepContext) -> Any:
    paid = ctx.results["paid"]
    return None if paid is None else [paid.name, paid.data, paid.seq]


@step
def release(ctx: StepContext) -> str:
    assert ctx.results["paid"] is None
    return "released"


@step
def thanks(ctx: StepContext) -> Any:
    return ctx.results["payment"].data


@step
def ask(ctx: StepContext) -> str:
    assert ctx.results["sleep"] is None
    return "asked"


CHECKOUT = Plan(
    "checkout",
    [reserve, wait("paid", "refused", timeout=days(3), on_timeout=Goto("release")), ship, release],
)
ENDLESS = Plan("endless", [wait("paid"), ship])
SLEEPER = Plan("sleeper", [reserve, sleep(days=14), ask])


@plan("called")
def called(run: RunContext[Any]) -> Any:
    run.step(reserve)
    paid = run.wait("paid", "refused", timeout=days(3))
    return None if paid is None else paid.to_dict()


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [CHECKOUT, ENDLESS, SLEEPER, called]


def test_a_signal_wakes_the_run_that_waits_for_it(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    beatless.work_until_idle()
    assert beatless.event_types(run.run_id) == ["RunStarted", "WaitStarted"]
    assert beatless.client.get_run(run.run_id).state == "waiting"
    assert beatless.client.get_run(run.run_id).not_before is None

    beatless.signal(run.run_id, "paid", {"amount": 12})
    beatless.work_until_idle()

    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.result) == ("completed", ["paid", {"amount": 12}, 3])
    assert beatless.event_types(run.run_id) == [
        "RunStarted",
        "WaitStarted",
        "SignalReceived",
        "WaitFinished",
        "StepStarted",
        "StepFinished",
        "RunFinished",
    ]
    beatless.verify()


def test_a_sleep_ends_at_its_time(beatless: Kit) -> None:
    run = beatless.start_run("sleeper")
    beatless.work_until_idle()
    beatless.advance(14 * 86400 - 60)
    assert beatless.work_until_idle() == 0
    assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.advance(60)
    assert beatless.work_until_idle() == 1
    assert beatless.client.get_run(run.run_id).result == "asked"
    beatless.verify()


def test_a_time_out_takes_its_route(beatless: Kit) -> None:
    run = beatless.start_run("checkout")
    beatless.work_until_idle()
    beatless.advance(3 * 86400)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "released"
    beatless.verify()


def test_a_run_that_waits_is_found_counted_and_told(beatless: Kit) -> None:
    waits, delayed = beatless.start_run("endless"), beatless.start_run("endless", delay=60)
    beatless.work_until_idle()
    client = beatless.client
    assert [run.run_id for run in client.list_runs(state="waiting")] == [waits.run_id]
    assert [run.run_id for run in client.list_runs(state="queued")] == [delayed.run_id]
    assert [run.run_id for run in client.list_runs(state="waiting", step="paid")] == [waits.run_id]
    assert {run.state for run in client.list_runs()} == {"waiting", "queued"}
    (found,) = beatless.waits(waits.run_id)
    assert (found.occurrence, found.kind, found.names, found.until_ms) == (
        "paid",
        "signal",
        ["paid"],
        None,
    )


def test_a_signal_is_sent_once_for_its_key_and_refused_with_other_content(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    first = beatless.signal(run.run_id, "paid", {"amount": 12}, key="psp:42")
    beatless.work_until_idle()  # it is in the journal from now on, and the run has ended
    again = beatless.signal(run.run_id, "paid", {"amount": 12}, key="psp:42")
    assert (first.new, again.new, again.id) == (True, False, "psp:42")
    with pytest.raises(SignalConflict, match="another key"):
        beatless.signal(run.run_id, "paid", {"amount": 13}, key="psp:42")
    with pytest.raises(RunEnded):
        beatless.signal(run.run_id, "paid", {"amount": 12}, key="psp:43")
    assert beatless.event_types(run.run_id).count("SignalReceived") == 1


def test_of_many_signals_none_is_sent_if_one_cannot_be(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    with pytest.raises(RunNotFound):
        beatless.client.signal_runs(
            [SignalRequest(run.run_id, "paid"), SignalRequest("nobody", "paid")]
        )
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.verify()


def test_a_bad_signal_is_refused_with_the_member(beatless: Kit, subtests: pytest.Subtests) -> None:
    run = beatless.start_run("endless")
    signals: list[tuple[Any, Any, Any]] = [
        ("", None, None),
        ("a b", None, None),
        (7, None, None),
        ("a", "", None),
        ("a", None, {1}),
    ]
    told = r"^(name|key|the signal's data)"
    for name, key, data in signals:
        with (
            subtests.test(repr((name, key, data))),
            pytest.raises((BadRequest, BadPayload), match=told),
        ):
            beatless.signal(run.run_id, name, data, key=key)


def test_a_signal_to_a_run_whose_worker_dies_gets_its_place_with_a_claim(beatless: Kit) -> None:
    run = beatless.start_run("sleeper")
    with beatless.crash("step.effect_done"):
        beatless.work_once()
    beatless.signal(run.run_id, "note", 1)
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert beatless.event_types(run.run_id)[1:] == [
        "StepStarted",
        "SignalReceived",
        "StepStarted",
        "StepFinished",
        "WaitStarted",
    ]
    assert beatless.client.get_run(run.run_id).state == "waiting"
    beatless.verify()


def test_a_retry_takes_over_the_signal_that_a_wait_took(beatless: Kit) -> None:
    run = beatless.start_run("checkout")
    beatless.signal(run.run_id, "paid", 12)
    beatless.work_until_idle()
    again = beatless.client.retry_run(run.run_id, from_step="ship")
    beatless.work_until_idle()
    finished = [e for e in beatless.client.events(again.run_id) if e.step == "ship" and e.data]
    assert (finished[0].data or {})["result"] == ["paid", 12, 5]


def test_a_wait_that_was_renamed_goes_on_under_its_new_name(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    beatless.work_until_idle()
    beatless.app.plans["endless"] = Plan(
        "endless", [wait("paid", name="payment"), thanks], renamed={"paid": "payment"}
    )
    beatless.signal(run.run_id, "paid", 12)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == 12


def test_a_run_at_a_wait_that_the_plan_does_not_have_waits_for_one_that_has(beatless: Kit) -> None:
    run = beatless.start_run("sleeper")
    beatless.work_until_idle()
    plan = beatless.app.plans["sleeper"]
    beatless.app.plans["sleeper"] = Plan("sleeper", [reserve, thanks])
    beatless.advance(14 * 86_400)
    beatless.work_until_idle()
    found = beatless.client.get_run(run.run_id)
    assert (found.state, found.result) == ("queued", None)
    beatless.app.plans["sleeper"] = plan
    beatless.advance(60)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == "asked"


def test_waits_over_http_are_those_of_the_client(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    beatless.work_until_idle()
    with serving(beatless.app) as api, http.Client(api.url) as client:
        assert client.waits(run.run_id) == beatless.client.waits(run.run_id)
        assert client.get_run(run.run_id).state == "waiting"
        first = client.signal_run(run.run_id, "paid", 12, key="psp:1")
        again = client.signal_run(run.run_id, "paid", 12, key="psp:1")
        assert (first.new, again.new) == (True, False)
        with pytest.raises(SignalConflict):
            client.signal_run(run.run_id, "paid", 13, key="psp:1")
        beatless.work_until_idle()
        with pytest.raises(RunEnded):
            client.signal_run(run.run_id, "paid", 12)
        with pytest.raises(RunNotFound):
            client.signal_run("nobody", "paid")


@pytest.mark.parametrize("name", ["checkout", "called"])
def test_explain_says_what_a_run_waits_for_and_how_it_ended(beatless: Kit, name: str) -> None:
    run = beatless.start_run(name)
    beatless.work_until_idle()

    def told() -> list[str]:
        return [moment.text for moment in beatless.client.explain(run.run_id)]

    assert any(text.startswith("waits for signal paid or refused") for text in told())
    beatless.signal(run.run_id, "refused")
    beatless.work_until_idle()
    assert "signal refused was received" in told()
    assert "waited for signal paid or refused, and received it" in told()


def test_a_run_of_a_function_that_waits_is_found_and_a_changed_one_is_told(beatless: Kit) -> None:
    run = beatless.start_run("called")
    beatless.work_until_idle()
    assert [found.run_id for found in beatless.client.list_runs(step="paid")] == [run.run_id]
    (found,) = beatless.waits(run.run_id)
    assert (found.occurrence, found.names) == ("paid", ["paid", "refused"])

    def told(function: Any) -> tuple[str | None, str | None]:
        changed = plan("called")(function)
        (place,) = places(beatless.app.engine, beatless.app.journal, {"called": changed})
        return place.step, place.waits

    assert told(called.function) == ("paid", None)
    assert told(lambda run: (run.step(reserve), run.wait("paid"))) == ("paid", CHANGED_CALL)
    assert told(lambda run: run.step(reserve)) == ("paid", UNKNOWN_STEP)


def test_the_data_of_a_signal_is_redacted_as_an_input_is(beatless: Kit) -> None:
    run = beatless.start_run("endless")
    beatless.signal(run.run_id, "paid", {"card": "4242"})
    beatless.work_until_idle()
    redaction = Redaction(lambda what, _value: f"[{what}]")
    received = next(
        event for event in beatless.client.events(run.run_id) if event.type == "SignalReceived"
    )
    shown = redaction.event(received).data or {}
    assert (shown["name"], shown["data"]) == ("paid", "[input]")
