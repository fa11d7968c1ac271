"""Values of other types than JSON's: what comes back is what was stored, or they are refused."""

from collections.abc import Callable
from datetime import UTC, datetime
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple

import msgspec
import pytest
from typing_extensions import TypedDict

from beatless import BadPayload, Fatal, Plan, RunContext, StepContext, StepFailed, plan, retry, step
from beatless.testing import Kit
from tests.serving import serving


class Size(StrEnum):
    LARGE = "large"


class Level(IntEnum):
    HIGH = 3


class Point(NamedTuple):
    x: int
    y: float


class Typed(TypedDict):
    when: str


REFUSED = {"datetime": (datetime(2026, 1, 1, tzinfo=UTC), "use .isoformat()")}
"""One of those of `tests/unit/test_events.py`, with what to do instead."""

ROUND: dict[str, tuple[Any, Any]] = {
    # with what it is wherever it is read, also by the function that has just got it
    "TypedDict": (Typed(when="now"), {"when": "now"}),
    "tuple": ((1, (2,)), [1, [2]]),
    "NamedTuple": (Point(1, 2.5), [1, 2.5]),
    "StrEnum": (Size.LARGE, "large"),
    "IntEnum": (Level.HIGH, 3),
    "numbers as keys": ({1: "a", 2.5: "b", None: "c"}, {"1": "a", "2.5": "b", "null": "c"}),
    "a large float": (1e16, 10**16),
    "a whole float": (2.0, 2.0),
}

VALUES: dict[str, Any] = {}
"""What the steps give: set by the test, for an input could not carry it."""


@step(retry=retry(max_attempts=1))
def gives(ctx: StepContext) -> Any:
    return {"deep": [VALUES["now"]]}


@step
def sees(ctx: StepContext, value: Any) -> Any:
    return [ctx.results["gives"], value]


@step
def emits(ctx: StepContext) -> None:
    with pytest.raises(BadPayload) as refused:
        ctx.emit({"deep": [VALUES["now"]]})
    raise Fatal(str(refused.value))


@step
def traces(ctx: StepContext) -> None:
    with pytest.raises(BadPayload) as refused:
        ctx.trace("here", deep=[VALUES["now"]])
    raise Fatal(str(refused.value))


listed = Plan("listed", [gives])
emitting = Plan("emitting", [emits])
tracing = Plan("tracing", [traces])


@plan("asks")
def asks(run: RunContext[Any]) -> Any:
    value = run.step(gives)
    VALUES.setdefault("live", []).append(value)
    return run.step(sees, value)


@plan("tells")
def tells(run: RunContext[Any]) -> Any:
    try:
        return run.step(gives)
    except StepFailed as failed:
        return str(failed)


@plan("returns")
def returns(run: RunContext[Any]) -> Any:
    return {"deep": [VALUES["now"]]}


@plan("starts")
def starts(run: RunContext[Any]) -> Any:
    return run.child(listed, {"deep": [VALUES["now"]]}).result()


@plan("maps")
def maps(run: RunContext[Any]) -> Any:
    return run.map(listed, [1, {"deep": [VALUES["now"]]}])[:]


@plan("parent")
def parent(run: RunContext[Any]) -> Any:
    return run.child(listed).result()


@plan("again")
def again(run: RunContext[Any]) -> Any:
    return run.again({"deep": [VALUES["now"]]}) if run.input is None else run.input


class Order(msgspec.Struct):
    due: datetime
    lines: list[int] = []


@step
def packs(ctx: StepContext, order: Order) -> Any:
    return [ctx.input, order.due.year]


@plan("ordered", input=Order)
def ordered(run: RunContext[Order]) -> Any:
    return run.step(packs, run.input)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [ordered, listed, emitting, tracing, asks, tells, returns, starts, maps, parent, again]


def test_a_struct_is_an_input_which_is_checked_before_it_is_stored(beatless: Kit) -> None:
    with pytest.raises(BadPayload, match=r"the run's input.due is refused: Invalid RFC3339"):
        beatless.start_run("ordered", {"due": "soon"})
    assert beatless.client.list_runs() == []
    run = beatless.start_run("ordered", Order(datetime(2026, 1, 1, tzinfo=UTC)))
    beatless.work_until_idle()

    stored = {"due": "2026-01-01T00:00:00Z", "lines": []}
    assert beatless.client.get_run(run.run_id).result == [stored, 2026]
    with serving(beatless.app) as api:
        (shown,) = [p for p in api("GET", "/v1/plans").json["plans"] if p["name"] == "ordered"]
    assert shown["input"]["properties"]["due"]["type"] == "string"
    assert shown["input"]["additionalProperties"] is False


def ended(kit: Kit, name: str) -> Any:
    run = kit.start_run(name)
    kit.work_until_idle()
    return kit.client.get_run(run.run_id)


def signalled(kit: Kit) -> str:
    run = kit.start_run("listed")
    with pytest.raises(BadPayload) as refused:
        kit.client.signal_run(run.run_id, "paid", {"deep": [VALUES["now"]]})
    return str(refused.value)


def started(kit: Kit) -> str:
    with pytest.raises(BadPayload) as refused:
        kit.start_run("listed", {"deep": [VALUES["now"]]})
    return str(refused.value)


PLACES: dict[str, tuple[Callable[[Kit], str], str]] = {
    # what is told there, and where the value is
    "a step of a list": (lambda kit: ended(kit, "listed").error["message"], "deep[0]"),
    "a step of a function": (lambda kit: ended(kit, "tells").result, "deep[0]"),
    "the result of a function": (lambda kit: ended(kit, "returns").error["message"], "deep[0]"),
    "run.again": (lambda kit: ended(kit, "again").error["message"], "deep[0]"),
    "the input of a child": (lambda kit: ended(kit, "starts").error["message"], "deep[0]"),
    "an input of a map": (lambda kit: ended(kit, "maps").error["message"], "[1]"),
    "the result of a child": (lambda kit: ended(kit, "parent").error["message"], "deep[0]"),
    "the input of a run": (started, "deep[0]"),
    "a signal": (signalled, "deep[0]"),
    "a trace": (lambda kit: ended(kit, "tracing").error["message"], "deep[0]"),
    "output": (lambda kit: ended(kit, "emitting").error["message"], "deep[0]"),
}


def test_a_value_that_json_cannot_give_back_is_refused_with_its_path_and_what_to_do(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    for place, (tell, path) in PLACES.items():
        for kind, (value, advice) in REFUSED.items():
            with subtests.test(place, kind=kind):
                VALUES["now"] = value
                told = tell(beatless)
                # A child's input.
                digested = "cannot be compared when the plan is called again" in told
                assert path in told or digested, told
                assert advice in told or digested, told
    beatless.verify()


def test_the_function_gets_a_value_as_it_is_stored_whether_it_is_called_again_or_not(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    for kind, (value, stored) in ROUND.items():
        with subtests.test(kind):
            VALUES.clear()
            VALUES["now"] = value
            run = beatless.start_run("asks")
            with beatless.crash("step.committed"):
                beatless.work_until_idle()
            beatless.forget_worker()
            beatless.advance(600)
            beatless.work_until_idle()
            expected = {"deep": [stored]}
            assert beatless.client.get_run(run.run_id).result == [expected, expected]
            assert len(VALUES["live"]) >= 2
            assert {repr(each) for each in VALUES["live"]} == {repr(expected)}
