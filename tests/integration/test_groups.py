"""Several runs are executed in one thread, with one commit for all: each is as it is alone."""

import gc
import itertools
import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import psycopg
import pytest
from celery.concurrency.prefork import TaskPool as Prefork
from celery.concurrency.solo import TaskPool as Solo
from celery.concurrency.thread import TaskPool as Threads
from sqlalchemy import make_url

from beatless import App, Plan, RunState, StepContext, retry, step
from beatless.cli.demo import without_handbacks
from beatless.orchestrator import body, sure_writer
from beatless.orchestrator import group as groups
from beatless.orchestrator.board import CHILDREN, SLOTS, slots_of
from beatless.orchestrator.observer import Claimed, Settled
from beatless.orchestrator.pace import Pace
from beatless.orchestrator.plan import Step
from beatless.orchestrator.turnstile import GROUPS_AT_ONCE
from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.observer import Signal
from beatless.testing import Kit
from beatless.testing.servers import Services
from beatless.worker.bootsteps import GroupLimit
from tests.plans import TWO_STEPS
from tests.proxy import Proxy, proxy

ACTS: dict[str, Callable[[StepContext], Any]] = {}
"""What the body of a run does, by its input."""


@step
def act(ctx: StepContext) -> Any:
    found = ACTS.get(ctx.input)
    return ctx.input if found is None else found(ctx)


@step
def then(ctx: StepContext) -> Any:
    return ctx.results["act"]


@step
def slow(ctx: StepContext) -> Any:
    return act.function(ctx)


@step(transactional=True)
def within(ctx: StepContext) -> Any:
    ctx.connection.exec_driver_sql("SELECT 1")
    return act.function(ctx)


class Known(Pace):
    """Every step is short but the slow one, whatever the machine does."""

    of_each_s = groups.GROUP_S / 16

    def is_short(self, plan: Plan, step: Step) -> bool:
        return step.name != "slow"

    def suits_groups(self, plan: Plan) -> bool:
        return plan.name != "other"

    def longest_s(self, plan: Plan) -> float:
        return self.of_each_s

    def is_known(self, plan: Plan, step: Step) -> bool:
        return True


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("short", [act, then]),
        Plan("later", [act, slow]),
        Plan("mixed", [act, within]),
        Plan("other", [act]),
        Plan("elsewhere", [act], queue="elsewhere"),
    ]


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no reason to leave a group, or for none."""
    for name in ("BUSY_S", "ROUND_S", "LULL_S", "BACKLOG_S"):
        monkeypatch.setattr(groups, name, 600.0)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """But where a test says so."""
    be_patient(monkeypatch)
    ACTS.clear()
    yield
    ACTS.clear()


class Together:
    """A worker of the test's app, which executes runs in groups, and what it has announced."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit
        self.signals: list[Signal] = []
        self.worker = kit.app.executors.new_group_executor(observer=self.signals.append)
        self.executor = self.worker.executor
        self.executor.pace = Known()
        plan = next(iter(kit.app.plans.values()))
        self.worker.execute(plan, "none", 1)  # in a backlog from now on
        self.signals.clear()

    def execute(self, *inputs: str, plan: str = "short") -> list[str]:
        """Start runs with these inputs and execute the message of the first; their ids."""
        ids = [self.kit.start_run(plan, input).run_id for input in inputs]
        assert self.deliver(ids[0])
        return ids

    def deliver(self, run_id: str) -> bool:
        plan = self.kit.client.get_run(run_id).plan
        return self.worker.execute(self.kit.app.plans[plan], run_id, 1)

    def states(self, ids: list[str]) -> list[RunState]:
        return [self.kit.client.get_run(run_id).state for run_id in ids]

    def results(self, ids: list[str]) -> list[Any]:
        return [self.kit.client.get_run(run_id).result for run_id in ids]

    def finish(self, ids: list[str]) -> None:
        """All others are executed one by one, and what is stored is right."""
        self.kit.advance(60)
        self.kit.work_until_idle()
        assert all(state.final for state in self.states(ids))
        self.kit.verify()


@pytest.fixture
def together(beatless: Kit) -> Iterator[Together]:
    found = Together(beatless)
    yield found
    found.executor.disconnect()


@pytest.fixture
def written(together: Together, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of boundaries of each statement that wrote several."""
    found: list[int] = []
    settle = together.worker.statement.settle

    def counted(connection: Any, proposals: Any) -> Any:
        appended = settle(connection, proposals)
        found.append(len(appended))
        return appended

    monkeypatch.setattr(together.worker.statement, "settle", counted)
    return found


def test_runs_that_wait_are_executed_with_the_one_of_the_message_and_committed_together(
    together: Together, written: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ids = together.execute("a", "b", "c", "d")

    assert together.results(ids) == ["a", "b", "c", "d"]
    assert written == [4, 4]
    for run_id in ids:
        assert together.kit.event_types(run_id) == [
            "RunStarted",
            *["StepStarted", "StepFinished"] * 2,
            "RunFinished",
        ]
    claimed = [signal.lease.run.run_id for signal in together.signals if type(signal) is Claimed]
    assert claimed == ids
    assert sum(type(signal) is Settled for signal in together.signals) == 8
    logged = [(r.action, r.run_id) for r in caplog.records if r.action in ("claimed", "finished")]
    assert logged[:4] == [("claimed", run_id) for run_id in ids]
    assert logged[4:] == [("finished", run_id) for run_id in ids]
    together.kit.verify()


def test_lines_of_a_body_carry_the_facts_of_its_own_run(together: Together) -> None:
    from beatless.observe.logs import CONTEXT

    found: list[Any] = []
    for name in "ab":
        ACTS[name] = lambda ctx: found.append((ctx.run_id, CONTEXT.get({})["run_id"]))
    ids = together.execute("a", "b")
    assert found == [(run_id, run_id) for run_id in ids]
    assert CONTEXT.get({}) == {}


def test_bodies_leave_their_garbage_to_the_collector_which_rests_beside_them(
    together: Together,
) -> None:
    """Not in work that a collector which somebody has switched off would be switched on by."""
    bodies: list[bool] = []
    ours: list[bool] = []
    ACTS["a"] = ACTS["b"] = lambda _: bodies.append(gc.isenabled())
    together.worker._own_work = groups.uncollected
    together.executor.observer = lambda _: ours.append(gc.isenabled())
    assert gc.isenabled()
    together.execute("a", "b")
    assert gc.isenabled()
    assert bodies == [True, True]
    assert ours.count(False) >= len(bodies)
    with groups.uncollected():
        with groups.uncollected():
            pass
        assert not gc.isenabled()


def test_no_group_has_more_runs_than_the_setting_says(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beatless.app.executors, "max_group_runs", 6)
    monkeypatch.setattr(Known, "of_each_s", 0.0)
    together = Together(beatless)
    ids = together.execute(*"abcdefgh")
    assert together.states(ids) == [RunState.COMPLETED] * 6 + [RunState.QUEUED] * 2
    together.finish(ids)
    together.executor.disconnect()


def test_the_longer_bodies_are_the_fewer_runs_are_in_a_group(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Known, "of_each_s", groups.GROUP_S / 4.5)
    ids = together.execute(*"abcdef")
    assert together.states(ids) == [RunState.COMPLETED] * 4 + [RunState.QUEUED] * 2
    monkeypatch.setattr(Known, "of_each_s", 2 * groups.GROUP_S)
    assert together.deliver(ids[4])
    assert together.states(ids[4:]) == [RunState.COMPLETED, RunState.QUEUED]
    together.finish(ids)


def test_the_runs_of_a_group_are_the_next_in_the_order_of_the_relay(beatless: Kit) -> None:
    together = Together(beatless)
    message = beatless.start_run("short", "a", priority=1)
    low = [beatless.start_run("short", "b", priority=1) for _ in range(2)]
    high = [beatless.start_run("short", "c", priority=5) for _ in range(15)]
    others = [
        beatless.start_run("other", "d", priority=5),
        beatless.start_run("elsewhere", "e", priority=5),
        beatless.start_run("short", "f", priority=5, delay=3600),
    ]
    together.deliver(message.run_id)
    assert together.states([run.run_id for run in [message, *high]]) == [RunState.COMPLETED] * 16
    assert together.states([run.run_id for run in [*low, *others]]) == [RunState.QUEUED] * 5
    beatless.advance(3600)
    together.finish([run.run_id for run in [*low, *others]])
    together.executor.disconnect()


def test_runs_of_several_plans_are_in_one_group(together: Together, written: list[int]) -> None:
    ids = [together.kit.start_run(plan, plan).run_id for plan in ("short", "mixed")]
    together.deliver(ids[0])
    assert together.results(ids) == ["short", "mixed"]
    assert written == [2, 1]  # a transactional step commits by itself
    together.kit.verify()


def test_a_message_whose_run_has_ended_still_brings_others(together: Together) -> None:
    (first,) = together.execute("a")
    other = together.kit.start_run("short", "b").run_id
    assert together.deliver(first) is False
    assert together.results([other]) == ["b"]


def test_nothing_is_claimed_of_a_paused_queue(together: Together) -> None:
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    together.kit.app.queues.pause("default")
    assert together.deliver(ids[0]) is False
    assert together.states(ids) == [RunState.QUEUED] * 3
    together.kit.app.queues.resume("default")
    together.finish(ids)


def test_a_run_that_was_claimed_before_has_no_neighbours(together: Together) -> None:
    """Its process may have died of it."""
    run = together.kit.start_run("short", "a")
    with together.kit.crash(at="step.before"):
        together.kit.work_until_idle()
    together.kit.advance(60)
    other = together.kit.start_run("short", "b").run_id
    assert together.deliver(run.run_id)
    assert together.states([run.run_id, other]) == [RunState.COMPLETED, RunState.QUEUED]
    # Nor is it a neighbour of another one.
    again = together.kit.start_run("short", "c")
    with together.kit.crash(at="step.before"):
        together.kit.executor().execute(together.kit.app.plans["short"], again.run_id, 1)
    together.kit.advance(60)
    assert together.deliver(other)
    assert together.states([again.run_id]) == [RunState.RUNNING]
    together.finish([again.run_id])


def test_a_run_whose_row_another_transaction_holds_is_left_out_of_a_claim(
    together: Together, postgres: psycopg.Connection
) -> None:
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    with postgres.transaction():
        postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", [ids[1]])
        together.deliver(ids[0])
    assert together.states(ids) == [RunState.COMPLETED, RunState.QUEUED, RunState.COMPLETED]
    together.finish(ids)


def test_a_result_that_postgres_refuses_fails_its_run_alone(
    together: Together, written: list[int]
) -> None:
    """A number of more digits than `jsonb` can hold."""
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        ACTS["b"] = lambda _: 10**131_100
        ids = together.execute("a", "b", "c")
    finally:
        sys.set_int_max_str_digits(digits)
    states = together.states(ids)
    assert states == [RunState.COMPLETED, RunState.FAILED, RunState.COMPLETED]
    assert written == [3]  # the first boundaries were written one by one
    together.kit.verify()


def test_a_failure_fails_its_run_alone(together: Together, written: list[int]) -> None:
    def fail(_: StepContext) -> None:
        raise ValueError("of one run")

    ACTS["b"] = fail
    ids = together.execute("a", "b", "c")
    assert together.states(ids) == [RunState.COMPLETED, RunState.FAILED, RunState.COMPLETED]
    assert written == [3, 2]
    together.kit.verify()


def test_a_run_whose_row_is_held_delays_no_other(
    together: Together, postgres: psycopg.Connection
) -> None:
    """The others end while it is held; it is written as soon as it is free."""
    holder = psycopg.connect(together.kit.app.settings.database_url)
    ended: list[list[RunState]] = []

    def hold(ctx: StepContext) -> str:
        holder.execute(
            f"SELECT FROM {together.kit.app.settings.schema}.runs WHERE run_id = %s FOR UPDATE",
            [ctx.run_id],
        )
        return "held"

    settle = together.executor.journal.settle

    def alone(*arguments: Any) -> Any:
        ended.append(together.states(ids))
        holder.rollback()
        return settle(*arguments)

    ACTS["b"] = hold
    # A statement that waits for the row ends so, and the assertions tell; nothing else waits.
    together.executor.connection().execute("SET lock_timeout TO '20s'")
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    together.executor.journal.settle = alone  # type: ignore[method-assign]
    try:
        together.deliver(ids[0])
    finally:
        together.executor.journal.settle = settle  # type: ignore[method-assign]
        holder.close()
    assert ended == [[RunState.COMPLETED, RunState.RUNNING, RunState.COMPLETED]]
    assert together.results(ids) == ["a", "held", "c"]
    together.kit.verify()


def test_a_lost_lease_is_lost_by_its_run_alone(
    together: Together, postgres: psycopg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    def lose(ctx: StepContext) -> str:
        postgres.execute(
            "UPDATE runs SET lease_token = lease_token + 1 WHERE run_id = %s", [ctx.run_id]
        )
        return "written by nobody"

    ACTS["b"] = lose
    ids = together.execute("a", "b", "c")
    assert together.states(ids) == [RunState.COMPLETED, RunState.RUNNING, RunState.COMPLETED]
    assert together.kit.event_types(ids[1]) == ["RunStarted", "StepStarted"]
    assert [r.run_id for r in caplog.records if r.action == "lease_lost"] == [ids[1]]
    ACTS.clear()
    together.finish(ids)


def test_a_cancel_ends_its_run_alone(together: Together) -> None:
    ACTS["b"] = lambda ctx: together.kit.client.cancel_run(ctx.run_id).run_id
    ids = together.execute("a", "b", "c")
    assert together.states(ids) == [RunState.COMPLETED, RunState.CANCELLED, RunState.COMPLETED]
    assert together.kit.event_types(ids[1])[-3:] == [
        "CancelRequested",
        "StepFinished",
        "RunFinished",
    ]
    together.kit.verify()


def test_a_step_that_is_long_goes_on_when_its_neighbours_have_left(together: Together) -> None:
    ids = together.execute("a", "b", "c", plan="later")
    short = together.kit.start_run("short", "d").run_id
    assert together.states(ids) == [RunState.COMPLETED, RunState.QUEUED, RunState.QUEUED]
    together.finish([*ids, short])
    for run_id in ids[1:]:
        run = together.kit.client.get_run(run_id)
        assert run.result == run.input


def test_a_body_that_turns_out_long_hands_its_neighbours_to_others(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and without an attempt that counts; those that had returned are committed."""
    handed_back = threading.Event()
    seen: list[list[RunState]] = []

    def shorten(_: StepContext) -> str:
        """No turn lasts until now, and the next one does: however slow the machine is."""
        monkeypatch.setattr(groups, "BUSY_S", 0.05)
        return "a"

    def hold_up(_: StepContext) -> str:
        assert handed_back.wait(60)
        seen.append(together.states(ids))
        return "at last"

    queued = set[str]()

    def observe(signal: Signal) -> None:
        if isinstance(signal, Settled) and signal.state is RunState.QUEUED:
            queued.add(signal.lease.run.run_id)
            if len(queued) == 3:
                handed_back.set()

    together.executor.observer = observe
    ACTS.update(a=shorten, b=hold_up)
    ids = [together.kit.start_run("short", name).run_id for name in "abcd"]
    together.deliver(ids[0])

    assert seen == [[RunState.QUEUED, RunState.RUNNING, RunState.QUEUED, RunState.QUEUED]]
    assert together.results(ids[1:2]) == ["at last"]
    assert together.kit.event_types(ids[0]) == [
        "RunStarted",
        "StepStarted",
        "StepFinished",
        "StepStarted",
        "DebugTrace",
    ]
    status = [
        together.kit.app.journal.dispatch_status(connection, ids[2]).dispatch
        for connection in [together.executor.connection()]
    ]
    assert status[0] is not None
    made_at = together.kit.client.get_run(ids[2]).created_at
    assert status[0][:3] == ("waiting", made_at, "busy")  # before those that have not begun
    together.finish(ids)
    last = together.kit.client.events(ids[2])
    assert [event.attempt for event in last if event.type == "StepStarted"] == [1, 1, 1]
    assert [event.type for event in without_handbacks(last)] == TWO_STEPS


def test_a_worker_that_stops_gives_the_runs_of_a_group_back(
    together: Together,
) -> None:
    ACTS["b"] = lambda _: together.executor.stopping.set()
    ids = [together.kit.start_run("short", name).run_id for name in "abcd"]
    together.executor.stopping = threading.Event()
    together.deliver(ids[0])
    assert together.states(ids) == [RunState.QUEUED] * 4
    for run_id in ids:
        assert together.kit.client.events(run_id)[-1].type in ("StepFinished", "DebugTrace")
    ACTS.clear()
    together.finish(ids)
    assert together.kit.client.events(ids[3])[-1].data["outcome"] == "completed"


@pytest.mark.parametrize("point", ["step.before", "step.effect_done", "step.committed"])
def test_a_crash_in_a_group_loses_and_doubles_nothing(together: Together, point: str) -> None:
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    together.executor.faults.arm(point, nth=2)
    with pytest.raises(SimulatedCrash):
        together.deliver(ids[0])
    together.executor.disconnect()
    together.finish(ids)
    assert together.results(ids) == ["a", "b", "c"]


def test_an_exception_that_ends_the_process_gives_the_neighbours_back(
    together: Together,
) -> None:
    def leave(_: StepContext) -> None:
        raise SystemExit(3)

    ACTS["b"] = leave
    together.executor.leaving = lambda: True
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    with pytest.raises(SystemExit):
        together.deliver(ids[0])
    assert together.states(ids) == [RunState.QUEUED] * 3
    ACTS.clear()
    together.finish(ids)
    assert together.results(ids) == ["a", "b", "c"]


@pytest.fixture
def path(beatless_services: Services) -> Iterator[Proxy]:
    """A proxy before the shared Postgres."""
    with proxy(make_url(beatless_services.database_url).port or 5432) as found:
        yield found


@pytest.fixture
def proxied(beatless_app: App, path: Proxy, tmp_path: Path) -> Iterator[Together]:
    """A worker whose Postgres is behind the proxy."""
    url = make_url(beatless_app.settings.database_url).set(host="127.0.0.1", port=path.port)
    settings = replace(
        beatless_app.settings,
        database_url=url.render_as_string(hide_password=False),
        listen_url="",
    )
    kit = Kit(App(settings, list(beatless_app.plans.values())), directory=tmp_path)
    found = Together(kit)
    yield found
    found.executor.disconnect()
    kit.close()


@pytest.mark.parametrize("committed", [True, False], ids=["committed", "not_committed"])
def test_a_commit_of_several_runs_without_an_answer_is_neither_repeated_nor_lost(
    proxied: Together, path: Proxy, committed: bool
) -> None:
    statement = proxied.worker.statement
    settle = statement.settle

    def unanswered(connection: Any, proposals: Any) -> Any:
        statement.settle = settle  # type: ignore[method-assign]
        if committed:
            settle(connection, proposals)
        path.cut()
        return settle(connection, proposals)

    ids = [proxied.kit.start_run("short", name).run_id for name in "abc"]
    statement.settle = unanswered  # type: ignore[method-assign]
    proxied.deliver(ids[0])

    assert proxied.results(ids) == ["a", "b", "c"]
    for run_id in ids:
        assert proxied.kit.event_types(run_id) == [
            "RunStarted",
            *["StepStarted", "StepFinished"] * 2,
            "RunFinished",
        ]
    settled = [s.lease.run.run_id for s in proxied.signals if isinstance(s, Settled)]
    assert sorted(settled) == sorted(ids * 2)
    proxied.kit.verify()


@pytest.fixture
def unguarded(together: Together, monkeypatch: pytest.MonkeyPatch) -> list[groups.Group]:
    """The groups of this worker, none of which a guard relieves."""
    found: list[groups.Group] = []

    class Watching:
        @contextmanager
        def watching(self, group: groups.Group) -> Iterator[None]:
            found.append(group)
            yield

    monkeypatch.setattr(together.worker, "_guard", Watching())
    return found


def test_a_turn_does_not_last_while_its_process_is_held_up(
    together: Together, unguarded: list[groups.Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among many threads each is late: to hand the others back would cost more than it spares."""

    def look(held_up_s: float) -> Callable[[StepContext], object]:
        def look(_: StepContext) -> object:
            unguarded[-1].relieve(together.kit.app.executors.connect, held_up_s=held_up_s)
            return together.states(ids)

        return look

    monkeypatch.setattr(groups, "BUSY_S", 0.0)
    ACTS.update(a=look(600.0), b=look(0.0))
    ids = [together.kit.start_run("short", name).run_id for name in "abc"]
    together.deliver(ids[0])

    together.finish(ids)

    assert together.results(ids) == [
        ["running", "running", "running"],
        ["queued", "running", "queued"],
        "c",
    ]


def free_places(together: Together) -> int:
    """How many other threads of the process may execute a group of very short bodies now."""
    free = together.worker._turnstile._free
    places = 0
    while free.acquire(blocking=False):
        places += 1
    free.release(places)
    return places


def test_few_threads_execute_groups_of_very_short_bodies_at_once(
    together: Together, unguarded: list[groups.Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But none that has a run alone, or whose body lasts, keeps others from it."""

    def last(_: StepContext) -> int:
        unguarded[-1].relieve(together.kit.app.executors.connect)
        return free_places(together)

    ACTS.update(dict.fromkeys("ab", lambda _: free_places(together)))
    most = GROUPS_AT_ONCE
    assert together.results(together.execute("a", "b")) == [most, most]
    monkeypatch.setattr(Known, "of_each_s", 0.0)
    assert together.results(together.execute("a", "b")) == [most - 1, most - 1]
    assert together.results(together.execute("a")) == [most]
    monkeypatch.setattr(groups, "BUSY_S", 0.0)
    ACTS["a"] = last
    ids = together.execute("a", "b")
    assert together.results(ids[:1]) == [most]
    together.finish(ids)
    assert free_places(together) == most


def test_a_worker_that_has_begun_to_stop_meanwhile_takes_no_further_runs(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its thread has waited until it may execute a group."""

    @contextmanager
    def passed(*, by: bool) -> Iterator[Callable[[], None]]:
        together.executor.stopping = threading.Event()
        together.executor.stopping.set()
        yield lambda: None

    monkeypatch.setattr(together.worker, "_turnstile", SimpleNamespace(passed=passed))
    ids = together.execute("a", "b")
    assert together.states(ids) == [RunState.QUEUED] * 2
    assert [together.kit.client.get_run(run_id).attempt for run_id in ids] == [1, 0]
    together.executor.stopping = threading.Event()
    together.finish(ids)


def test_a_step_that_was_never_seen_is_tried_beside_others(
    together: Together, written: list[int]
) -> None:
    """A group begins with the first step; none of its runs is handed back for the second."""

    class Learning(Known):
        seen: ClassVar[set[str]] = {"act"}

        def is_known(self, plan: Plan, step: Step) -> bool:
            return step.name in self.seen

        is_short = is_known

        def note(self, plan: Plan, step: Step, seconds: float) -> None:
            self.seen.add(step.name)

    together.executor.pace = Learning()
    ids = together.execute("a", "b", "c")
    assert together.results(ids) == ["a", "b", "c"]
    assert [together.kit.event_types(run_id).count("StepStarted") for run_id in ids] == [2, 2, 2]


def test_a_guard_tells_for_how_long_its_process_was_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: queue.SimpleQueue[float] = queue.SimpleQueue()

    class Told:
        def relieve(self, _connect: object, *, held_up_s: float) -> None:
            told.put(held_up_s)

    seconds = itertools.count()
    monkeypatch.setattr(groups, "monotonic", lambda: float(next(seconds)))
    guard = groups.GroupGuard(lambda: None)
    with guard.watching(Told()):
        found = told.get(timeout=60)
    guard.stop()
    assert found == pytest.approx(1 - groups.CHECK_INTERVAL_S)


def test_traces_of_bodies_end_no_round_and_make_no_step_a_long_one(
    together: Together, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each commit of one takes half a round, by a clock that only they move."""
    now = 0.0
    for module in (groups, body, sure_writer):
        monkeypatch.setattr(module, "monotonic", lambda: now)
    monkeypatch.setattr(groups, "ROUND_S", 0.02)
    append = together.executor.journal.append

    def slowly(*arguments: Any, **options: Any) -> Any:
        nonlocal now
        now += 0.01
        return append(*arguments, **options)

    monkeypatch.setattr(together.executor.journal, "append", slowly)
    together.executor.pace = Pace()
    ACTS.update(dict.fromkeys("abcdefgh", lambda ctx: ctx.trace("seen")))
    together.execute("a")  # its steps are known from now on
    ids = together.execute(*"abcdefgh")
    assert written == [8, 8]
    assert together.states(ids) == [RunState.COMPLETED] * 8
    together.kit.verify()


def test_a_group_of_one_is_executed_as_any_run(together: Together, written: list[int]) -> None:
    ids = together.execute("a")
    assert together.results(ids) == ["a"]
    assert written == []


def test_the_second_message_of_a_backlog_brings_others(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "LULL_S", 0.0)
    together.execute("a")
    monkeypatch.setattr(groups, "LULL_S", 600.0)
    first = together.execute("b", "c", "d")
    assert together.states(first) == [RunState.COMPLETED, RunState.QUEUED, RunState.QUEUED]
    assert together.deliver(first[1])
    assert together.states(first) == [RunState.COMPLETED] * 3


def test_a_run_that_has_waited_long_tells_of_a_backlog_however_slow_the_worker_is(
    together: Together, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "LULL_S", 0.0)
    monkeypatch.setattr(groups, "BACKLOG_S", -1.0)
    together.execute("a")
    ids = together.execute("b", "c")
    assert together.states(ids) == [RunState.COMPLETED] * 2


def test_where_celery_counts_tasks_each_run_has_its_own(beatless_app: App) -> None:
    """With `--max-tasks-per-child`, which is a number of runs."""
    executors = beatless_app.executors
    worker = SimpleNamespace(pool_cls=Prefork, concurrency=4, max_tasks_per_child=None, steps=[])
    for number, runs in ((None, 64), (2, 1)):
        worker.max_tasks_per_child = number
        GroupLimit.of(executors)(worker)
        assert executors.max_group_runs == runs


def test_a_worker_has_as_many_places_as_it_executes_messages_at_once(beatless_app: App) -> None:
    executors = beatless_app.executors
    for pool, places in ((Prefork, 4), (Threads, 4), (Solo, 1)):
        worker = SimpleNamespace(pool_cls=pool, concurrency=4, max_tasks_per_child=None, steps=[])
        GroupLimit.of(executors)(worker)
        assert executors.places == places


def test_the_collector_does_not_rest_where_other_threads_have_bodies(beatless_app: App) -> None:
    executors = beatless_app.executors
    assert executors.new_group_executor()._own_work is nullcontext
    executors._pool_child = True
    assert executors.new_group_executor()._own_work is groups.uncollected


def test_one_body_that_was_held_up_makes_no_step_a_long_one() -> None:
    pace, plan = Pace(), Plan("p", [act, then])
    assert not pace.suits_groups(plan)  # nothing is known yet
    pace.note(plan, act, 0.001)
    pace.note(plan, act, 5.0)
    assert pace.suits_groups(plan)
    for _ in range(5):
        pace.note(plan, then, 0.02)
    assert pace.is_short(plan, act)
    assert not pace.suits_groups(plan)
    once = replace(act, retry=retry(max_crashes=1))
    pace.note(Plan("q", [once]), once, 0.0)
    assert not pace.suits_groups(Plan("q", [once]))


def test_no_two_processes_of_a_pool_write_in_one_slot() -> None:
    slots = [slot for place in range(CHILDREN) for slot in slots_of(place)]
    assert len(set(slots)) == len(slots)
    assert max(slots) < SLOTS
    assert len(slots_of(0)) == 64
