"""What a relay costs: looks, statements and Python calls, with limits that no machine changes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Self

import psycopg
import pytest

from beatless import App, Plan, StepContext, step
from beatless.client import RunRequest
from beatless.orchestrator.events import EventType
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.watch_thread import WatchThread
from beatless.outbox import session_loop as loops
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.doorbell import Ring, Sessions, State
from beatless.outbox.message import TaskMessage, shard_of
from beatless.outbox.observer import RelayAsleep
from beatless.outbox.publishers import CeleryTaskPublisher
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.session_loop import (
    FULL_BATCH_MESSAGES,
    LONGEST_PAUSE_S,
    PAUSE_PER_MESSAGE_S,
    SessionLoop,
)
from beatless.settings import libpq_url
from beatless.testing import Kit
from tests.integration.test_relay import noting, pending, running, session_loop, until
from tests.integration.test_windows import in_broker


@step
def only(ctx: StepContext) -> int:
    return 1


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("job", [only])]


class Asleep:
    """A relay driven by hand that sleeps, and the statements that it sends when it is rung."""

    def __init__(self, loop: SessionLoop, said: list[str]) -> None:
        self.loop = loop
        self._said = said
        self.fall_asleep()

    def fall_asleep(self) -> None:
        self.loop.sessions.doze(self.loop.shards.owned)
        until(lambda: self.loop._fall_asleep() or self.loop.sessions.state is State.ASLEEP)
        self.loop.sessions.rung = Ring.NOTHING

    def await_ring(self) -> None:
        until(lambda: self.loop.sessions.rung or self.loop.sessions.wait(1.0))
        self.loop.sessions.work.execute("SELECT 1")  # all that were sent until now are heard

    def at_next_wait(self, act: Callable[[], object]) -> None:
        """Do this while the relay waits the next time, which ends as the ring of it comes."""
        loop, wait = self.loop, self.loop._wait

        def met(_seconds: float) -> None:
            loop._wait = wait  # type: ignore[method-assign]
            act()
            self.await_ring()

        loop._wait = met  # type: ignore[method-assign]

    def answer(self) -> list[str]:
        """Be rung once; the tables that its statements are about, in their order."""
        self.await_ring()
        begin = len(self._said)
        self.loop._sleep()
        assert self.loop.sessions.state is State.ASLEEP
        return [kind_of(text) for text in self._said[begin:] if text != "SELECT 1"]


KINDS = {
    "DELETE FROM": "forget",
    "SET state = 'sent'": "mark",
    "doubted": "pick tasks",
    "is_left": "look ahead",
    "bytes_before": "pick events",
}


def kind_of(statement: str) -> str:
    return next((kind for word, kind in KINDS.items() if word in statement), statement)


@pytest.fixture
def asleep(beatless_app: App, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asleep]:
    monkeypatch.setattr("beatless.outbox.task_lane.INLINE_WAIT_S", 60.0)
    said: list[str] = []

    class Noting(psycopg.Cursor[Any]):
        def execute(self, statement: Any, *arguments: Any, **options: Any) -> Self:
            said.append(str(statement))
            return super().execute(statement, *arguments, **options)

    def connect() -> DirectConnection:
        dsn = libpq_url(beatless_app.settings.listen_url)
        return DirectConnection.connect(dsn, autocommit=True, cursor_factory=Noting)

    with ExitStack() as ends:
        relay = beatless_app.relay()
        ends.callback(relay.stop)
        sessions = ends.enter_context(Sessions(beatless_app.queries, connect))
        loop = ends.enter_context(session_loop(relay, sessions))
        sessions.announce()
        loop.rebalance()
        yield Asleep(loop, said)


def claimed(app: App, run_id: str) -> Lease:
    connection = app.executors.connect()
    found = app.leases.claim(
        connection, run_id, plan="job", worker="w", first_step="only", dispatch=1
    )
    connection.close()
    assert found
    return found


def traced(app: App, lease: Lease) -> None:
    event = app.journal.new_event(EventType.DEBUG_TRACE, step="only", attempt=1, where="here")
    with app.executors.connect() as connection:
        assert app.journal.append(connection, lease.run.run_id, lease.token, [event])


def test_each_commit_of_a_run_costs_a_sleeping_relay_what_it_needs(
    beatless: Kit, beatless_app: App, asleep: Asleep, postgres: psycopg.Connection
) -> None:
    """It was nineteen statements for a run of one step, and six more for each trace."""
    beatless.start_run("job")  # the first one asks for the history, too
    asleep.answer()
    run = beatless.start_run("job")
    assert asleep.answer() == ["pick tasks", "pick events", "forget", "mark", "look ahead"]
    lease = claimed(beatless_app, run.run_id)
    assert asleep.answer() == ["pick events", "forget", "look ahead"]
    traced(beatless_app, lease)
    assert asleep.answer() == ["pick events", "forget"]
    beatless.advance(60)
    beatless.drain_outbox_once()
    asleep.fall_asleep()
    assert beatless.executor().execute(beatless_app.plans["job"], run.run_id, 2)
    assert asleep.answer() == ["pick events", "forget", "look ahead"]
    assert pending(postgres) == 0


def test_messages_are_a_load_though_the_relay_sleeps_between_them(
    beatless: Kit, asleep: Asleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dies meanwhile stays where scans meet it, as long as any session awaits a lock."""
    told: list[str] = []
    monkeypatch.setattr(WatchThread, "note_load", lambda _: told.append("load"))
    monkeypatch.setattr(loops, "BURST_MESSAGES", 5)
    monkeypatch.setattr(loops, "BURST_S", 3600.0)
    for number in range(3):  # each with its message and its event
        assert told == [], number
        beatless.start_run("job")
        asleep.answer()
    assert told == ["load"]


def test_the_message_of_a_start_is_on_its_way_before_its_events_are_selected(
    beatless: Kit, asleep: Asleep, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, tasks = asleep.loop.drain.events, asleep.loop.drain.tasks
    pick, on_their_way = events.pick, list[bool]()

    def noting_pick(*arguments: Any) -> Any:
        on_their_way.append(tasks.in_flight)
        return pick(*arguments)

    monkeypatch.setattr(events, "pick", noting_pick)
    beatless.start_run("job")
    asleep.answer()
    assert on_their_way == [True]


class TestAClaimIsFollowed:
    """The step that it has begun may end soon, so the relay waits a moment before it looks."""

    @pytest.fixture
    def lease(self, beatless: Kit, beatless_app: App, asleep: Asleep) -> Lease:
        run = beatless.start_run("job")
        asleep.answer()
        return claimed(beatless_app, run.run_id)

    def test_what_rings_in_that_moment_is_in_the_same_look(
        self, beatless_app: App, asleep: Asleep, lease: Lease, postgres: psycopg.Connection
    ) -> None:
        """A run of one step takes its relay eight statements; it was eleven."""
        asleep.at_next_wait(lambda: traced(beatless_app, lease))
        assert asleep.answer() == ["pick events", "forget", "look ahead"]
        traces = "SELECT count(*) FROM run_events WHERE type = 'DebugTrace'"
        assert postgres.execute(traces).fetchone() == (1,)
        assert pending(postgres) == 0
        assert not asleep.loop.sessions.rung

    def test_what_rings_while_it_looks_is_answered_by_itself(
        self,
        beatless_app: App,
        asleep: Asleep,
        lease: Lease,
        postgres: psycopg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        step = asleep.loop.drain.step

        def look_and_be_rung(*arguments: Any, **options: Any) -> int:
            monkeypatch.setattr(asleep.loop.drain, "step", step)
            moved = step(*arguments, **options)
            traced(beatless_app, lease)
            asleep.await_ring()
            return moved

        monkeypatch.setattr(asleep.loop.drain, "step", look_and_be_rung)
        assert asleep.answer() == ["pick events"]
        assert pending(postgres) == 2
        assert asleep.answer() == ["forget", "pick events", "forget", "look ahead"]
        assert pending(postgres) == 0

    def test_a_run_that_is_started_meanwhile_is_sent_at_once(
        self, beatless: Kit, asleep: Asleep, lease: Lease, postgres: psycopg.Connection
    ) -> None:
        asleep.at_next_wait(lambda: beatless.start_run("job"))
        assert "pick tasks" in asleep.answer()
        assert sent(postgres) == 1

    def test_nothing_else_is_waited_behind(self) -> None:
        """Of a claim and a trace the due times are read all the same."""
        assert Ring.NOTHING.beside(Ring.CLAIM) is Ring.CLAIM.beside(Ring.CLAIM) is Ring.CLAIM
        for other in (Ring.EVENTS, Ring.TIMES):
            assert Ring.CLAIM.beside(other) is other.beside(Ring.CLAIM) is Ring.TIMES
        assert Ring.CLAIM.beside(Ring.ALL) is Ring.ALL.beside(Ring.CLAIM) is Ring.ALL
        assert Ring.EVENTS.beside(Ring.NOTHING) is Ring.EVENTS


class TestOneLookIsEnough:
    """Whatever comes behind it rings, has its time, or shows in the statements that follow."""

    def test_what_is_committed_behind_the_look_is_published_by_the_next(
        self,
        beatless: Kit,
        asleep: Asleep,
        postgres: psycopg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        conclude = asleep.loop.drain.conclude

        def late(*arguments: Any, **options: Any) -> bool:
            monkeypatch.setattr(asleep.loop.drain, "conclude", conclude)
            traced(beatless.app, lease)
            return conclude(*arguments, **options)

        lease = claimed(beatless.app, beatless.start_run("job").run_id)
        asleep.answer()
        monkeypatch.setattr(asleep.loop.drain, "conclude", late)
        traced(beatless.app, lease)
        asleep.answer()
        assert pending(postgres) == 1
        asleep.answer()
        assert pending(postgres) == 0

    def test_what_becomes_due_behind_the_look_is_sent_at_once(
        self,
        beatless: Kit,
        asleep: Asleep,
        postgres: psycopg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        conclude = asleep.loop.drain.conclude

        def late(*arguments: Any, **options: Any) -> bool:
            postgres.execute("UPDATE dispatches SET due_at = now() WHERE state = 'delayed'")
            return conclude(*arguments, **options)

        beatless.start_run("job", delay=3600)
        asleep.answer()
        monkeypatch.setattr(asleep.loop.drain, "conclude", late)
        beatless.start_run("job")
        asleep.answer()
        assert sent(postgres) == 2

    def test_what_became_due_before_a_claim_is_sent_behind_it(
        self, beatless: Kit, asleep: Asleep, postgres: psycopg.Connection
    ) -> None:
        """The relay would have woken for it by itself, a moment later."""
        beatless.start_run("job", delay=3600)
        run = beatless.start_run("job")
        asleep.answer()
        postgres.execute("UPDATE dispatches SET due_at = now() WHERE state = 'delayed'")
        claimed(beatless.app, run.run_id)
        asleep.answer()
        assert sent(postgres) == 1

    @pytest.mark.parametrize("state", ["delayed", "sent"])
    def test_what_became_due_while_the_clocks_differed_is_found_by_the_next_ring(
        self, beatless: Kit, asleep: Asleep, postgres: psycopg.Connection, state: str
    ) -> None:
        """A clock was set, a machine was suspended, or a commit took longer than a lease."""
        beatless.start_run("job", delay=3600)
        run = beatless.start_run("job")
        asleep.answer()
        postgres.execute(
            "UPDATE dispatches SET due_at = now() - interval '1 hour', state = %s"
            " WHERE run_id <> %s",
            (state, run.run_id),
        )
        claimed(beatless.app, run.run_id)
        asleep.answer()
        overdue = "SELECT count(*) FROM dispatches WHERE due_at < now()"
        assert postgres.execute(overdue).fetchone() == (0,)

    def test_what_came_to_wait_for_a_wake_is_woken(
        self, beatless: Kit, asleep: Asleep, postgres: psycopg.Connection
    ) -> None:
        run = beatless.start_run("job")
        asleep.answer()
        shard = shard_of(run.run_id)
        with postgres.transaction():
            postgres.execute(
                "INSERT INTO wakes (shard, run_id) VALUES (%s, %s)", (shard, run.run_id)
            )
            claimed(beatless.app, run.run_id)
        asleep.answer()
        assert postgres.execute("SELECT count(*) FROM wakes").fetchone() == (0,)

    def test_a_claim_makes_room_for_a_run_that_waits_for_it(
        self, beatless: Kit, beatless_app: App, asleep: Asleep, postgres: psycopg.Connection
    ) -> None:
        window = beatless_app.queries.window
        asleep.loop.sessions.rouse()
        runs = beatless.client.start_runs([RunRequest(plan="job")] * (window + 2))
        while asleep.loop.drain.step(asleep.loop.shards.owned):
            pass
        asleep.fall_asleep()
        out = "SELECT run_id FROM dispatches WHERE state = 'sent'"
        first, second, *_ = [run_id for (run_id,) in postgres.execute(out).fetchall()]
        for run_id in (first, second):
            assert sent(postgres) == window
            claimed(beatless_app, run_id)
            asleep.answer()
        assert sent(postgres) == window
        assert len(runs) - 2 == window

    def test_a_message_whose_run_is_held_is_looked_for_again(
        self,
        beatless: Kit,
        asleep: Asleep,
        postgres: psycopg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        conclude = asleep.loop.drain.conclude

        def held(*arguments: Any, **options: Any) -> bool:
            with postgres.transaction():
                postgres.execute("SELECT FROM dispatches FOR UPDATE")
                return conclude(*arguments, **options)

        monkeypatch.setattr(asleep.loop.drain, "conclude", held)
        beatless.start_run("job")
        asleep.answer()
        assert sent(postgres) == 1

    def test_a_message_whose_run_is_being_claimed_is_sent_once(
        self,
        beatless: Kit,
        asleep: Asleep,
        postgres: psycopg.Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The worker has the message, and its claim the row, before the relay has marked it."""
        conclude = asleep.loop.drain.conclude

        def held(*arguments: Any, **options: Any) -> bool:
            postgres.execute("SELECT FROM dispatches FOR UPDATE")
            return conclude(*arguments, **options)

        monkeypatch.setattr(asleep.loop.drain, "conclude", held)
        beatless.start_run("job")
        with postgres.transaction():
            asleep.answer()
        assert in_broker(beatless.app) == 1


def sent(postgres: psycopg.Connection) -> int:
    row = postgres.execute("SELECT count(*) FROM dispatches WHERE state = 'sent'").fetchone()
    assert row
    return int(row[0])


@pytest.mark.parametrize("message", ["7", "", "7 news", "events", "7  events", "7 events times"])
def test_a_ring_that_does_not_say_what_it_is_for_is_for_all(message: str) -> None:
    assert Ring.of(message) is Ring.ALL
    assert Ring.of("7 events") is Ring.EVENTS
    assert Ring.of("7 times") is Ring.TIMES
    assert Ring.of("7 claim") is Ring.CLAIM


def test_a_relay_that_finds_nothing_looks_ever_more_rarely(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops, "LONGEST_NAP_S", 3600.0)
    connect, said = noting(beatless_app)
    with running(beatless_app, connect=connect, watchdog=600, linger=0.3) as (_, announcements):
        asleep = len(announcements.all(RelayAsleep))
        begin = len(said)
        beatless.client.start_runs([RunRequest(plan="job")] * 10)  # more than it sleeps on after
        announcements.wait(RelayAsleep, asleep + 1)
        looks = sum("doubted" in text for text in said[begin:])
    # 0.3 ms, doubled eleven times, are longer than it lingers; four more find and note the runs.
    assert looks <= 16


class TestGathering:
    @pytest.fixture
    def loop(self, beatless_app: App) -> Iterator[SessionLoop]:
        relay = beatless_app.relay()
        config = relay._config
        with Sessions(config.queries, config.connect) as sessions:
            found = SessionLoop(config, sessions, alarm=relay._alarm, stopping=relay._stopping)
            yield found
            found.close()
        relay.stop()

    @pytest.fixture
    def waits(self, loop: SessionLoop, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        found: list[float] = []
        monkeypatch.setattr(loop, "_wait", found.append)
        return found

    @pytest.mark.parametrize("found", [1, FULL_BATCH_MESSAGES])
    def test_nothing_is_waited_for_after_one_message_or_a_full_batch(
        self, loop: SessionLoop, waits: list[float], found: int
    ) -> None:
        loop._gather(found)
        assert waits == []

    def test_the_more_there_are_the_longer_others_are_waited_for(
        self, loop: SessionLoop, waits: list[float]
    ) -> None:
        for found in (2, 4, 8, FULL_BATCH_MESSAGES - 1):
            loop._gather(found)
        assert waits[0] == 2 * PAUSE_PER_MESSAGE_S
        assert waits == sorted(waits)
        assert waits[-1] == LONGEST_PAUSE_S


SAMPLES = 5
"""Of which the least counts: an answer that comes in two parts, or the collector, costs calls."""


def calls_of(act: Callable[[], object]) -> int:
    """Python functions that are called within, by this thread."""
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        act()
    finally:
        sys.setprofile(None)
    return calls


def test_a_look_that_finds_nothing_costs_few_calls(beatless_app: App) -> None:
    relay = beatless_app.relay()
    relay.drain_once()
    drain = relay._once[1]
    for _ in range(10):
        drain.step(ALL_SHARDS)  # its statements are prepared
    calls = min(calls_of(lambda: drain.step(ALL_SHARDS)) for _ in range(SAMPLES))
    relay.stop()
    assert calls <= 240


def test_the_events_of_one_commit_cost_few_calls(beatless_app: App) -> None:
    """Neither their look nor their deletion is a pipeline."""
    run = beatless_app.client.start_run("job")
    relay = beatless_app.relay()
    relay.drain_once()
    drain = relay._once[1]
    lease = claimed(beatless_app, run.run_id)
    while drain.step(ALL_SHARDS) or not drain.conclude(ALL_SHARDS, look_ahead=False):
        pass

    def answer() -> None:
        assert drain.step(ALL_SHARDS, only_events=True) == 1
        assert drain.conclude(ALL_SHARDS, look_ahead=False)

    def cost() -> int:
        traced(beatless_app, lease)
        return calls_of(answer)

    for _ in range(6):
        cost()  # its statements are prepared
    calls = min(cost() for _ in range(SAMPLES))
    relay.stop()
    assert calls <= 305


def test_a_message_to_the_broker_costs_few_calls(beatless_app: App) -> None:
    publisher = CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix)
    messages = [
        TaskMessage(run_id=f"run-{n}", task="job", queue="default", attempt=1) for n in range(64)
    ]
    publisher.publish(messages)  # what is made once: the connection, the queue
    calls = min(calls_of(lambda: publisher.publish(messages)) for _ in range(SAMPLES))
    with beatless_app.celery.producer_or_acquire() as producer:
        batches = getattr(producer, "supports_batch_publish", False)
    # By kombu 5.7, in batches; each message of its own before.
    assert calls / len(messages) <= (150 if batches else 700)
