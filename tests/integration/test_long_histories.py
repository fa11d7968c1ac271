"""A history that grows and grows: it is told, and then its run fails with what to do instead."""

import logging
from typing import Any

import pytest

from beatless import Goto, Plan, RunContext, RunState, Snooze, StepContext, plan, retry, step
from beatless.doctor import Doctor, Status
from beatless.orchestrator import long_history, run_report, timeline
from beatless.orchestrator.long_history import length
from beatless.testing import Kit


@step(retry=retry(max_attempts=2, initial=1, jitter=0))
def turn(ctx: StepContext) -> Any:
    """Goes round for ever, in claims of a few turns."""
    if ctx.attempt == 1:
        raise ValueError("again")
    return Goto("turn")


rounds = Plan("rounds", [turn], routes={"turn": ["turn"]})


@step(retry=retry(max_attempts=2, initial=1, jitter=0))
def one(ctx: StepContext) -> None:
    if ctx.attempt == 1:
        raise ValueError("again")


@plan("endless")
def endless(run: RunContext[Any]) -> None:
    while True:
        run.step(one)


@step
def poll(ctx: StepContext) -> Any:
    return Snooze(1)


polls = Plan("polls", [poll])


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [rounds, endless, polls]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten events are many, and twenty too many."""
    for module in (run_report, timeline):
        monkeypatch.setattr(module, "MANY_EVENTS", 10)
    monkeypatch.setattr("beatless.doctor.backlog.MANY_EVENTS", 10)
    monkeypatch.setattr(long_history, "MAX_EVENTS", 20)


def take_turns(kit: Kit, number: int) -> None:
    for _ in range(number):
        kit.work_until_idle()
        kit.advance(2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("rounds", "make the plan a function, and return run.again(…) before"),
        ("endless", "its plan asks for a further step: return run.again(…) before"),
    ],
)
def test_a_history_that_is_long_is_told_and_one_that_is_too_long_fails_its_run(
    beatless: Kit, caplog: pytest.LogCaptureFixture, name: str, advice: str
) -> None:
    caplog.set_level(logging.WARNING, "beatless.orchestrator.executor")
    run_id = beatless.start_run(name).run_id
    doctor = Doctor(beatless.app)

    def told() -> list[bool]:
        (finding,) = doctor.examine(("histories",))
        explained = [moment.text for moment in beatless.client.explain(run_id)]
        return [
            finding.status is Status.WARNING and run_id in finding.text,
            any("run.again" in text for text in explained),
            any(getattr(each, "action", "") == "long_history" for each in caplog.records),
        ]

    take_turns(beatless, 2)
    assert told() == [False, False, False]
    take_turns(beatless, 3)
    assert told() == [True, True, True]
    take_turns(beatless, 10)
    ended = beatless.client.get_run(run_id)
    assert ended.error is not None
    assert (ended.state, ended.error["type"]) == (RunState.FAILED, "HistoryTooLong")
    assert advice in ended.error["message"]
    assert 20 <= ended.last_seq < 26
    beatless.verify()


@pytest.mark.slow
def test_polls_in_a_row_make_no_history_long(beatless: Kit) -> None:
    run_id = beatless.start_run("polls").run_id
    take_turns(beatless, 15)
    run = beatless.client.get_run(run_id)
    assert (run.state.final, run.last_seq > 30) == (False, True)
    assert length(beatless.client.events(run_id)) < 5
    (finding,) = Doctor(beatless.app).examine(("histories",))
    assert finding.status is Status.OK
