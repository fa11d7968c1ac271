"""The cost of a turn of a plan's function, in calls: as much after many turns as after few."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

import pytest

from beatless import RunContext, plan
from beatless.orchestrator import child_calls
from beatless.orchestrator.child_calls import PAGE_DIGEST, child_call
from beatless.orchestrator.requests import RunBody
from tests.unit.test_execution import Journal
from tests.unit.test_function_execution import call, double, outcome, work

TURNS = 2000
PACKAGE = child_calls.__file__.rpartition("/")[0]


class Calls:
    """Counts the calls of functions of the orchestrator."""

    def __init__(self) -> None:
        self.count = 0
        self._ours: dict[CodeType, bool] = {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if code not in self._ours:
            self._ours[code] = code.co_filename.startswith(PACKAGE)
        self.count += event == "call" and self._ours[code]


async def steps(run: RunContext[Any]) -> int:
    for number in range(run.input["turns"]):
        await run.step(double, number)
    return run.input["turns"]


async def waits(run: RunContext[Any]) -> Any:
    """A wait in each turn, and begins again now and then."""
    for number in range(100):
        await run.wait("go")
        await run.step(double, number)
    done = run.input.get("done", 0) + 100
    return run.again(run.input | {"done": done}) if done < run.input["turns"] else done


@pytest.mark.parametrize(("function", "turns"), [(steps, TURNS), (waits, TURNS // 2)])
def test_the_last_of_many_turns_costs_no_more_calls_than_the_tenth(
    function: Callable[[RunContext[Any]], Any], turns: int
) -> None:
    """Of functions that are async: a profile does not follow a greenlet."""
    journal = Journal(plan("p")(function), input={"turns": turns})
    journal.inbox += [("go", None)] * turns
    costs: dict[int, Calls] = {}
    turn = 0

    def body(request: RunBody) -> Any:
        nonlocal turn
        sys.setprofile(None)
        turn += 1
        if turn in (10, turns - 1):  # from this body on, to the next one
            costs[turn] = Calls()
            sys.setprofile(costs[turn])
        return call(request)

    before = sys.getprofile()
    try:
        while not journal.state.final:
            work(journal, body)
    finally:
        sys.setprofile(before)
    assert (outcome(journal), turn) == (turns, turns)
    assert 10 < costs[turns - 1].count <= 1.2 * costs[10].count


def test_a_claim_costs_as_many_calls_for_each_turn_that_it_replays() -> None:
    async def replays(run: RunContext[Any]) -> None:
        for number in range(run.input):
            await run.step(double, number)

    def cost(turns: int) -> int:
        journal, calls = Journal(plan("p")(replays), input=turns), Calls()
        work(journal, dies_before=2 * turns + 2)
        before = sys.getprofile()
        sys.setprofile(calls)
        try:
            work(journal)
        finally:
            sys.setprofile(before)
        assert journal.state.final
        return calls.count

    assert cost(400) <= 10.5 * cost(40)


class Counted:
    """An input that counts how often it is digested."""

    digested = 0

    def model_dump(self, mode: str) -> int:
        assert mode == "json"
        Counted.digested += 1
        return 1


def test_a_map_that_starts_children_little_by_little_compares_the_inputs_of_these_alone() -> None:
    inputs: list[Any] = [Counted() for _ in range(10_000)]
    big = child_call(plan("big")(lambda run: None), inputs, at_once=20)
    children = replace(big.numbered(1), digests=big.page_digests())
    assert len(children.digests) == PAGE_DIGEST
    Counted.digested = 0
    assert big.is_open(children)
    assert big.has_inputs(children, range(501, 506))
    assert Counted.digested == PAGE_DIGEST
    inputs[600] = 2
    assert big.has_inputs(children, range(596, 601))
    assert not big.has_inputs(children, range(598, 603))
