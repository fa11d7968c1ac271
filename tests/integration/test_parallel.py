"""Several steps of one run at the same time, with the kit and in real workers."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import App, Plan, RunContext, RunState, plan, step
from beatless.orchestrator.leased_writer import LeasedWriter
from beatless.orchestrator.settlement import Settlement
from beatless.testing import Kit
from tests.parallel_plans import ALL, WIDTH, store

APP = "tests.parallel_plans:app"
LEASE_S = 60
RESULTS: dict[str, Any] = {
    "fans_out": 281,
    "in_branches": [1, 11, 21],
    "threads": list(range(1, WIDTH + 1)),
    "waits_in_a_branch": [10, 8, 2],
    "in_turn_async": [0, 1, 2],
    "children_in_branches": [4, [1, 4, 9, 16, 25], 9, 2],
}
IN_FLIGHT = [
    *(("beside.before", nth) for nth in (1, 2, 4)),
    *(("beside.committed", nth) for nth in (1, 2, 4)),
    *(("step.before", nth) for nth in (1, 3)),
    *(("step.effect_done", nth) for nth in (1, 3)),
]
WAITS = [
    *(("beside.before", 1), ("beside.committed", 1), ("step.before", 1), ("step.effect_done", 1)),
    *(("wait.before", 1), ("wait.committed", 1)),
]
CRASHES = {
    "fans_out": [*IN_FLIGHT, ("step.committed", 1), ("task.before_ack", 1)],
    "in_branches": IN_FLIGHT,
    "threads": IN_FLIGHT,
    "waits_in_a_branch": WAITS,
    "children_in_branches": [*WAITS, ("children.before", 2), ("children.started", 2)],
}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return ALL


def finish(beatless: Kit, run_id: str) -> None:
    """Until the run has ended, as time passes."""
    for _ in range(12):
        beatless.work_until_idle()
        if beatless.client.get_run(run_id).state.final:
            return
        if any(wait.names == ["go"] for wait in beatless.waits(run_id)):
            beatless.signal(run_id, "go", 7, key="once")
        beatless.advance(LEASE_S + 1)
    raise AssertionError(beatless.client.explain(run_id))


def bodies(ledger: Path) -> list[tuple[str, str]]:
    """The run and the step of each body that has begun."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return [tuple(json.loads(line)[:2]) for line in lines]


def check_once(beatless: Kit, run_id: str) -> None:
    """No step was begun after its result."""
    finished: set[str | None] = set()
    for event in beatless.client.events(run_id):
        if event.type in ("StepStarted", "StepFinished"):
            assert event.step not in finished, event
        if event.type == "StepFinished":
            finished.add(event.step)


@pytest.mark.parametrize("name", RESULTS)
def test_branches_go_on_beside_one_another(beatless: Kit, name: str) -> None:
    run = beatless.start_run(name, {})
    finish(beatless, run.run_id)

    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.result) == (RunState.COMPLETED, RESULTS[name])
    check_once(beatless, run.run_id)
    beatless.verify()


@pytest.mark.parametrize(
    "name",
    [
        "waits_in_a_branch",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fans_out", "children_in_branches", "in_branches", "threads")
        ),
    ],
)
def test_no_crash_begins_a_body_again_after_its_commit(
    beatless: Kit, subtests: pytest.Subtests, tmp_path: Path, name: str
) -> None:
    for point, nth in CRASHES[name]:
        with subtests.test(point, nth=nth):
            ledger = tmp_path / f"{point}-{nth}"
            run = beatless.start_run(name, {"ledger": str(ledger)})
            with beatless.crash(at=point, nth=nth):
                beatless.work_until_idle()
            events = beatless.client.events(run.run_id)
            finished = {event.step for event in events if event.type == "StepFinished"}
            before = len(bodies(ledger))
            finish(beatless, run.run_id)

            assert beatless.client.get_run(run.run_id).result == RESULTS[name]
            assert not {step for _, step in bodies(ledger)[before:]} & finished
            check_once(beatless, run.run_id)
            beatless.verify()


@pytest.mark.parametrize("name", ["fans_out", "threads", "in_branches"])
def test_a_failure_is_told_and_the_others_end_before_the_run(beatless: Kit, name: str) -> None:
    run = beatless.start_run(name, {"fails": 1})
    finish(beatless, run.run_id)

    ended = beatless.client.get_run(run.run_id)
    assert ended.state is RunState.FAILED
    assert ended.error is not None
    events = beatless.client.events(run.run_id)
    begun = {event.step for event in events if event.type == "StepStarted"}
    over = {event.step for event in events if event.type in ("StepFinished", "StepFailed")}
    assert begun == over
    assert events[-1].type == "RunFinished"
    beatless.verify()


def test_the_timeline_tells_each_attempt_of_steps_that_were_in_flight_at_once(
    beatless: Kit,
) -> None:
    run = beatless.start_run("threads", {})
    beatless.work_until_idle()

    found = beatless.client.explain(run.run_id)
    attempts = [moment for moment in found if moment.kind == "attempt"]
    assert sorted(str(moment.step) for moment in attempts) == sorted(
        f"store#{number}:1" for number in range(1, WIDTH + 1)
    )
    assert {moment.text for moment in attempts} == {"finished"}


def test_a_retry_goes_on_with_the_results_of_the_branches_that_have_ended(
    beatless: Kit, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    run = beatless.start_run("threads", {"fails": 1, "ledger": str(ledger)})
    beatless.work_until_idle()
    events = beatless.client.events(run.run_id)
    finished = {event.step for event in events if event.type == "StepFinished"}
    assert finished
    again = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()

    repeated = {step for run_id, step in bodies(ledger) if run_id == again.run_id}
    assert "store#2:1" in repeated
    assert not repeated & finished


def test_a_transactional_step_that_is_tried_again_after_others_is_no_violation(
    beatless: Kit,
) -> None:
    run = beatless.start_run("in_turn", {"fails_first": 0})
    finish(beatless, run.run_id)

    assert beatless.client.get_run(run.run_id).result == [0, 1, 2]
    begun = [e.step for e in beatless.client.events(run.run_id) if e.type == "StepStarted"]
    assert begun == ["books", "books#2", "books#3", "books"]
    beatless.verify()


def test_a_cancel_before_a_commit_whose_answer_was_lost_begins_no_body(
    beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger"
    run = beatless.start_run("in_branches", {"ledger": str(ledger)})
    settle, lost = beatless.app.journal.settle, []

    def cancel_and_lose(
        connection: Any, run_id: str, token: int, settlement: Any, *rest: Any
    ) -> Any:
        types = [event.type for event in settlement.normal.events]
        goes_on = not lost and {"StepFinished", "StepStarted"} <= set(types)
        if goes_on:
            beatless.client.cancel_run(run_id)
        appended = settle(connection, run_id, token, settlement, *rest)
        if goes_on:
            lost.append(run_id)
            raise psycopg.OperationalError("the answer is lost")
        return appended

    monkeypatch.setattr(beatless.app.journal, "settle", cancel_and_lose)
    beatless.work_until_idle()

    assert lost
    events = beatless.client.events(run.run_id)
    begun = {event.step for event in events if event.type == "StepStarted"}
    assert {step for _, step in bodies(ledger)} <= begun
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("child_of_a_value", "settle_with_children"),
        ("waits_in_a_branch", "settle_if_quiet"),
    ],
)
def test_a_cancel_is_seen_though_the_answer_to_a_transaction_was_lost(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    run = beatless.start_run(name, {})
    settle, transaction = getattr(LeasedWriter, method), psycopg.Connection.transaction
    losing, answers = [False], []

    @contextmanager
    def committed_and_lost(connection: Any, *arguments: Any) -> Iterator[Any]:
        with transaction(connection, *arguments) as begun:
            yield begun
        if losing[0]:
            losing[0] = False
            raise psycopg.OperationalError("the answer is lost")

    def cancelled(writer: LeasedWriter, settlement: Settlement, *rest: Any, **named: Any) -> Any:
        stays = settlement.normal.state is settlement.if_cancelled.state
        if answers or not (stays and settlement.normal.events):
            return settle(writer, settlement, *rest, **named)
        beatless.client.cancel_run(run.run_id)
        losing[0] = True
        answers.append(settle(writer, settlement, *rest, **named))
        return answers[0]

    monkeypatch.setattr(psycopg.Connection, "transaction", committed_and_lost)
    monkeypatch.setattr(LeasedWriter, method, cancelled)
    beatless.work_until_idle()
    beatless.advance(1)
    beatless.work_until_idle()

    assert not losing[0]
    assert [answer.cancelled for answer in answers] == [True]
    assert beatless.client.get_run(run.run_id).state is RunState.CANCELLED
    beatless.verify()


def test_a_step_that_is_renamed_while_others_are_beside_it_is_no_violation(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("in_branches", {})
    with beatless.crash(at="step.before", nth=2):
        beatless.work_until_idle()
    get = step(name="get")(lambda ctx, number: number * 10)

    @plan("in_branches", renamed={"fetch": "get"})
    async def renamed(run: RunContext) -> list[int]:
        async def branch(number: int) -> int:
            return int(await run.step(store, await run.step(get, number)))

        return list(await asyncio.gather(*(branch(number) for number in range(3))))

    with closing(App(beatless_app.settings, [renamed])) as app, closing(Kit(app)) as kit:
        kit.advance(LEASE_S + 1)
        kit.work_until_idle()
        assert kit.client.get_run(run.run_id).result == RESULTS["in_branches"]
        begun = [(e.step, e.data) for e in kit.client.events(run.run_id) if e.type == "StepStarted"]
        assert any("renamed_from" in (data or {}) for _, data in begun)
        kit.verify()


@pytest.fixture
def pools() -> dict[str, list[str]]:
    return {
        "prefork": [],
        "threads": ["--", "--pool", "threads"],
        "solo": ["--", "--pool", "solo"],
        "async": ["--pool", "async"],
    }


@pytest.mark.parametrize("pool", ["prefork", "async"])
def test_real_workers_execute_branches(
    beatless: Kit, pools: dict[str, list[str]], pool: str
) -> None:
    beatless.relay.start()
    beatless.worker_process(APP, concurrency=4, arguments=pools[pool])
    runs = {name: beatless.start_run(name, {}) for name in RESULTS}
    beatless.signal(runs["waits_in_a_branch"].run_id, "go", 7)

    for name, run in runs.items():
        assert beatless.wait_for_run_completion(run.run_id).result == RESULTS[name]
        check_once(beatless, run.run_id)
    beatless.verify()
