"""The relay: order, doors, doorbell, shards, takeover. Real Postgres and Redis, no worker."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from time import monotonic
from typing import Any, ClassVar, TypeVar

import psycopg
import pytest

from beatless import App, BadRequest
from beatless.client import RunRequest
from beatless.outbox.backoff import Backoff
from beatless.outbox.config import RelayConfig
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.doorbell import Sessions, State
from beatless.outbox.drain import Drain
from beatless.outbox.errors import (
    DirectConnectionRequired,
    PublishFailed,
    PublishRefused,
    SchemaMissing,
)
from beatless.outbox.event_lane import MAX_REJECTIONS
from beatless.outbox.message import SHARDS, shard_of
from beatless.outbox.observer import (
    BatchFailed,
    Drained,
    QueueRefused,
    RelayAsleep,
    RelayFailed,
    RelayStarted,
    RelayWoke,
    ShardsAssigned,
    Signal,
    WatchdogRan,
)
from beatless.outbox.publishers import (
    CeleryTaskPublisher,
    EventPublisher,
    RedisEventPublisher,
    TaskPublisher,
    worker_queue,
)
from beatless.outbox.queries import ALL_SHARDS, Queries, channel_of
from beatless.outbox.relay import Relay
from beatless.outbox.session_loop import BURST_MESSAGES, LOAD_S, SessionLoop
from beatless.outbox.shards import Shards
from beatless.outbox.sockets import readable
from beatless.outbox.task_lane import MAX_STALLED_BATCHES
from beatless.settings import libpq_url
from beatless.streams.messages import parse
from beatless.testing import Kit

QUICK = Backoff(initial=0.01, cap=0.05)

S = TypeVar("S", bound=Signal)


class Announcements:
    """What a relay announced, to be waited for."""

    def __init__(self) -> None:
        self.seen: list[Signal] = []
        self._news = threading.Condition()

    def __call__(self, signal: Signal) -> None:
        with self._news:
            self.seen.append(signal)
            self._news.notify_all()

    def wait(self, kind: type[S], count: int = 1) -> S:
        with self._news:
            assert self._news.wait_for(lambda: len(self.all(kind)) >= count, timeout=60), (
                f"{kind.__name__} not announced {count} times: {self.seen[-20:]}"
            )
            return self.all(kind)[count - 1]

    def wait_until(self, condition) -> None:
        with self._news:
            if not self._news.wait_for(lambda: condition(self.seen), timeout=60):
                last = "\n".join(map(str, self.seen[-30:]))
                raise AssertionError(f"did not come true; the last announcements:\n{last}")

    def all(self, kind: type[S]) -> list[S]:
        return [signal for signal in self.seen if isinstance(signal, kind)]


class Door:
    """A real publisher, tapped: it notes what went through, and fails when told to."""

    def __init__(self, real: EventPublisher | TaskPublisher) -> None:
        self._real = real
        self.batches: list[list[Any]] = []
        self.error: Exception | None = None
        self.refused: set[str] = set()
        self.refused_queues: set[str] = set()
        self.shut = False
        self.before_refusal = lambda: None

    def waiting(self, queue: str) -> int:
        if self.error is not None:
            raise self.error
        return self._real.waiting(queue)

    def publish(self, messages) -> None:
        if any(getattr(message, "queue", None) in self.refused_queues for message in messages):
            others = [message for message in messages if message.queue not in self.refused_queues]
            if others and self.error is None:  # they arrive nevertheless
                self._real.publish(others)
                self.batches.append(others)
            self.before_refusal()
            raise PublishRefused("the broker", "406, an exchange of another type")
        if self.error is not None:
            raise self.error
        if self.shut or any(message.run_id in self.refused for message in messages):
            raise PublishRefused("Redis", "too big")
        self._real.publish(messages)
        self.batches.append(list(messages))

    @property
    def messages(self) -> list[Any]:
        """What was accepted, without the empty message that asks whether the door is open."""
        return [message for batch in self.batches for message in batch if message.run_id]


def lose_messages(app: App, queue: str = "default") -> None:
    """The broker loses what it holds of the queue."""
    with app._broker() as broker:
        worker_queue(app.settings.prefix, queue)(broker.default_channel).purge()


def seqs(door: Door) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for message in door.messages:
        found[message.run_id] += [event.seq for event in parse(message.body)]
    return found


@pytest.fixture
def doors(beatless_app: App) -> Iterator[tuple[Door, Door]]:
    prefix = beatless_app.settings.prefix
    with closing(beatless_app.redis()) as client:
        yield (
            Door(RedisEventPublisher(client, prefix)),
            Door(CeleryTaskPublisher(beatless_app.celery, prefix)),
        )


def recording(app: App, doors: tuple[Door, Door], **options) -> Relay:
    standard = {"queries": app.queries, "connect": app.direct_connection, "backoff": QUICK}
    return Relay(RelayConfig(events=doors[0], tasks=doors[1], **{**standard, **options}))


@contextmanager
def running(app: App, **options) -> Iterator[tuple[Relay, Announcements]]:
    announcements = Announcements()
    relay = app.relay(observer=announcements, backoff=QUICK, **options)
    relay.start()
    try:
        announcements.wait(RelayAsleep)
        yield relay, announcements
    finally:
        relay.stop()


def pending(postgres: psycopg.Connection) -> int:
    return postgres.execute("SELECT count(*) FROM run_outbox").fetchone()[0]


@pytest.mark.slow
def test_outbox_publishes_in_order_with_seeded_rows_and_no_worker(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, doors
) -> None:
    runs = beatless.client.start_runs([RunRequest(plan="loop", input={"turns": 5})] * 20)
    for _ in range(3):
        for run in runs:
            beatless.step(run.run_id)
    relay = recording(beatless_app, doors)

    waiting = pending(postgres)
    assert relay.drain_once() == waiting + 20  # each run is also due again

    for run in runs:
        last = beatless.client.get_run(run.run_id).last_seq
        assert seqs(doors[0])[run.run_id] == list(range(1, last + 1))
    assert pending(postgres) == 0
    assert relay.drain_once() == 0
    relay.stop()


def test_a_drain_of_one_run_leaves_the_others(beatless: Kit, beatless_app: App, doors) -> None:
    one, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)

    assert relay.drain_once(one.run_id) == 2

    assert {message.run_id for message in doors[0].messages} == {one.run_id}
    assert {message.run_id for message in doors[1].messages} == {one.run_id}
    assert relay.drain_once() == 2
    assert {message.run_id for message in doors[0].messages} == {one.run_id, other.run_id}
    relay.stop()


def test_a_task_message_names_plan_queue_run_and_attempt(
    beatless: Kit, beatless_app: App, doors
) -> None:
    run = beatless.start_run("two_steps", queue="mail")
    relay = recording(beatless_app, doors)
    relay.drain_once()
    lose_messages(beatless_app, "mail")
    beatless.advance(16)  # nobody claimed it, and it is lost: it is sent again
    relay.drain_once()
    relay.stop()

    assert [(m.task, m.queue, m.run_id, m.attempt, m.task_id) for m in doors[1].messages] == [
        ("two_steps", "mail", run.run_id, 1, f"{run.run_id}.1"),
        ("two_steps", "mail", run.run_id, 2, f"{run.run_id}.2"),
    ]


def test_a_claimed_run_is_not_sent_again_before_its_lease_ends(
    beatless: Kit, beatless_app: App, doors
) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="claim.committed"):
        beatless.work_until_idle()
    relay = recording(beatless_app, doors)
    relay.drain_once()
    assert doors[1].messages == []

    beatless.advance(31)
    relay.drain_once()
    relay.stop()
    assert [message.run_id for message in doors[1].messages] == [run.run_id]


def test_the_broker_holds_few_messages_and_priority_is_decided_in_sql(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    requests = [RunRequest(plan="two_steps", priority=n % 2) for n in range(300)]
    beatless.client.start_runs(requests)
    relay = recording(beatless_app, doors)

    relay.drain_once()
    relay.stop()

    assert len(doors[1].messages) == 64
    high = postgres.execute(
        "SELECT count(*) FROM dispatches WHERE state = 'sent' AND priority = 1"
    ).fetchone()
    assert high == (64,)


def test_a_paused_queue_is_skipped_and_holds_nobody_up(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    postgres.execute("INSERT INTO queues (name, paused_at) VALUES ('stuck', now())")
    beatless.client.start_runs([RunRequest(plan="two_steps", queue="stuck") for _ in range(100)])
    free = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)

    relay.drain_once()

    assert [message.run_id for message in doors[1].messages] == [free.run_id]
    postgres.execute("UPDATE queues SET paused_at = NULL")
    relay.drain_once()
    relay.stop()
    assert len(doors[1].messages) == 65


def test_a_closed_event_door_does_not_stop_dispatches(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    doors[0].error = PublishFailed("Redis", "gone")
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    relay.drain_once()

    assert [message.run_id for message in doors[1].messages] == [run.run_id]
    assert pending(postgres) == 1
    doors[0].error = None
    until(lambda: relay.drain_once() > 0)
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1]}


def test_a_closed_task_door_does_not_stop_events(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    doors[1].error = PublishFailed("the broker", "gone")
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    relay.drain_once()

    assert seqs(doors[0]) == {run.run_id: [1]}
    assert postgres.execute("SELECT state FROM dispatches").fetchone() == ("waiting",)
    doors[1].error = None
    until(lambda: relay.drain_once() > 0)
    relay.stop()
    assert [message.run_id for message in doors[1].messages] == [run.run_id]


@pytest.mark.parametrize("first", [0, 1])
def test_the_door_that_opens_first_has_the_other_tried_at_once(
    beatless: Kit, beatless_app: App, doors, first: int
) -> None:
    for door in doors:
        door.error = PublishFailed("Redis", "gone")
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors, backoff=Backoff(initial=3600, cap=3600))
    relay.drain_once()
    for door in doors:
        door.error = None
    assert relay.drain_once() == 0  # nobody knows yet
    drain = relay._once[1]
    (drain.events, drain.tasks)[first]._breaker.allow_now()  # its back-off has passed

    relay.drain_once()
    relay.stop()

    assert seqs(doors[0]) == {run.run_id: [1]}
    assert [message.run_id for message in doors[1].messages] == [run.run_id]


def until(condition) -> None:
    """Wait for a back-off of some hundredths of a second to pass."""
    ticking, deadline = threading.Event(), monotonic() + 60
    while not condition():
        assert monotonic() < deadline, "it did not come true within 60 s"
        ticking.wait(0.01)


def test_what_a_broker_held_is_sent_again_when_it_is_back(
    beatless: Kit, beatless_app: App, doors
) -> None:
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    relay.drain_once()
    doors[1].error = PublishFailed("the broker", "restarted empty")
    lose_messages(beatless_app)
    other = beatless.start_run("two_steps")
    relay.drain_once()
    doors[1].error = None

    until(lambda: relay.drain_once() > 0)
    relay.stop()

    sent = [(message.run_id, message.attempt) for message in doors[1].messages]
    assert sorted(sent) == [(run.run_id, 1), (run.run_id, 2), (other.run_id, 1)]


def test_what_a_broker_held_is_sent_again_if_it_answers_to_a_relay_that_stops(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    broker = Hanging(CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix))
    broker.free.set()
    relay = recording(beatless_app, (doors[0], broker))
    held = beatless.start_run("two_steps")
    relay.drain_once()
    broker.error = PublishFailed("the broker", "restarted empty")
    beatless.start_run("two_steps")
    relay.drain_once()
    broker.error = None
    broker.free.clear()
    drain = relay._once[1]
    until(lambda: drain.step(ALL_SHARDS) == 0 and drain.tasks.in_flight)
    broker.free.set()

    drain.finish(ALL_SHARDS)

    relay.stop()
    query = "SELECT state, reason FROM dispatches WHERE run_id = %s"
    assert postgres.execute(query, (held.run_id,)).fetchone() == ("sent", "broker_lost")


def test_a_refused_message_is_parked_and_the_others_flow(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    bad = beatless.start_run("two_steps")
    doors[0].refused.add(bad.run_id)
    relay = recording(beatless_app, doors)
    good = []
    for _ in range(MAX_REJECTIONS):
        good.append(beatless.start_run("two_steps").run_id)
        relay.drain_once()
    until(lambda: relay.drain_once() >= 0 and pending(postgres) == 0)
    relay.stop()

    assert set(seqs(doors[0])) == set(good)
    kind, run_id, reason = postgres.execute(
        "SELECT kind, run_id, reason FROM dead_letters"
    ).fetchone()
    assert (kind, run_id) == ("event", bad.run_id)
    assert "too big" in reason
    assert len(beatless.client.events(bad.run_id)) == 1  # viewers still get it from the journal

    (letter,) = beatless.client.dead_letters()
    assert (letter.run_id, letter.from_seq, letter.to_seq) == (bad.run_id, 1, 1)
    doors[0].refused.clear()
    beatless.client.requeue_dead_letter(letter.id)
    again = recording(beatless_app, doors)
    again.drain_once()
    again.stop()
    assert seqs(doors[0])[bad.run_id] == [1]
    assert beatless.client.dead_letters() == []
    with pytest.raises(BadRequest, match="does not exist"):
        beatless.client.discard_dead_letter(letter.id)


def test_refusals_before_an_accepted_message_do_not_count(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    relay = recording(beatless_app, doors, backoff=Backoff(initial=0, cap=0))
    for _ in range(MAX_REJECTIONS):
        doors[0].refused.add(run_id)
        relay.drain_once()
        doors[0].refused.clear()
        relay.drain_once()
        postgres.execute(
            "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (%s, %s, 1, 1)",
            (shard_of(run_id), run_id),
        )
    relay.drain_once()
    relay.stop()
    assert beatless.client.dead_letters() == []
    assert seqs(doors[0]) == {run_id: [1] * (MAX_REJECTIONS + 1)}


def test_the_letters_of_a_run_are_published_again_in_the_order_of_its_events(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    for first, last in ((4, 6), (1, 1), (2, 3)):  # parked, published again, parked again
        message = {"shard": shard_of(run.run_id), "from_seq": first, "to_seq": last}
        postgres.execute(
            "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES ('event', %s, '', %s)",
            (run.run_id, json.dumps(message)),
        )
    assert beatless.client.requeue_dead_letters() == 3
    relay = recording(beatless_app, doors)
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1, 2, 3, 4, 5, 6]}


def test_a_door_that_refuses_everything_parks_nothing(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    """As a Redis that is busy with somebody's script, or whose rights have changed."""
    runs = beatless.client.start_runs([RunRequest(plan="two_steps")] * 3)
    doors[0].shut = True
    relay = recording(beatless_app, doors, backoff=Backoff(initial=0, cap=0))
    for _ in range(MAX_REJECTIONS * 3):
        relay.drain_once()
    assert postgres.execute("SELECT count(*) FROM dead_letters").fetchone() == (0,)
    assert pending(postgres) == 3

    doors[0].shut = False
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1] for run in runs}


def test_a_relay_that_dies_after_publishing_publishes_again(
    beatless: Kit, beatless_app: App, doors
) -> None:
    run = beatless.start_run("two_steps")
    dying = recording(beatless_app, doors, faults=beatless_app.faults)
    with beatless.crash(at="relay.after_publish"):
        dying.drain_once()
    dying.stop()

    relay = recording(beatless_app, doors)
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1, 1]}  # doubled on the wire, dropped by the cursor


def test_a_relay_that_dies_before_publishing_loses_nothing(
    beatless: Kit, beatless_app: App, doors
) -> None:
    run = beatless.start_run("two_steps")
    dying = recording(beatless_app, doors, faults=beatless_app.faults)
    with beatless.crash(at="relay.after_claim"):
        dying.drain_once()
    dying.stop()

    relay = recording(beatless_app, doors)
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1]}


def test_a_sleeping_relay_is_woken_by_a_commit(beatless: Kit, beatless_app: App) -> None:
    with running(beatless_app) as (_, announcements):
        run = beatless.start_run("two_steps")
        beatless.wait_for_outbox_flush(run.run_id)
        assert announcements.wait(RelayWoke).source == "notify"


def test_a_sleeping_relay_wakes_when_a_dispatch_is_due(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its clock runs faster than the rows' one: however slow all is, it sleeps before they do."""
    earliest, asked = Drain._earliest, list[float]()

    def sooner(
        self: Drain, ahead: psycopg.Cursor[Any] | None, shards: Sequence[int]
    ) -> float | None:
        due = earliest(self, ahead, shards)
        if due is None:
            return None
        asked.append(due)
        return due / 36_000  # an hour is a tenth of a second

    monkeypatch.setattr(Drain, "_earliest", sooner)
    timer = RelayWoke(source="timer")
    with running(beatless_app, watchdog=600) as (_, announcements):
        beatless.start_run("two_steps", delay=3600)
        announcements.wait_until(lambda seen: timer in seen)
        assert 3000 < asked[0] <= 3600
        assert tasks_of(announcements.seen) == 0
        before = announcements.seen.index(timer)
        postgres.execute("UPDATE dispatches SET due_at = now()")  # nobody rings
        announcements.wait_until(lambda seen: sent_by(seen[before:]) is not None)
    woken = {signal.source for signal in announcements.seen[before:] if type(signal) is RelayWoke}
    assert woken - {"broker"} == {"timer"}  # which may answer later


def sent_by(seen: list[Signal]) -> str | None:
    """What had woken the relay when it sent its first dispatches: it is announced after them."""
    sent = False
    for signal in seen:
        sent |= isinstance(signal, Drained) and signal.tasks > 0
        if sent and isinstance(signal, RelayWoke):
            return signal.source
    return None


def tasks_of(seen: list[Signal]) -> int:
    """How many dispatches have been sent and marked."""
    return sum(signal.tasks for signal in seen if isinstance(signal, Drained))


class Noted(DirectConnection):
    """Notes every statement that goes through it, beside those that libpq sends by itself."""

    statements: ClassVar[list[str]]

    def execute(self, query, *args, **kwargs):
        self.statements.append(str(query))
        return super().execute(query, *args, **kwargs)

    def cursor(self, *args, **kwargs):
        self.statements.append("a cursor")
        return super().cursor(*args, **kwargs)


def noting(app: App) -> tuple[Callable[[], DirectConnection], list[str]]:
    """Connections for a relay, and all that it says through them."""
    statements: list[str] = []
    kind = type("NotedHere", (Noted,), {"statements": statements})
    dsn = libpq_url(app.settings.listen_url)
    return lambda: kind.connect(dsn, autocommit=True, prepare_threshold=0), statements


def test_an_idle_relay_sends_nothing_but_its_watchdog(beatless: Kit, beatless_app: App) -> None:
    connect, statements = noting(beatless_app)
    with running(beatless_app, connect=connect, watchdog=0.2) as (_, announcements):
        begin = len(statements)
        announcements.wait(WatchdogRan, 3)
        said = [text for text in statements[begin:] if text != "a cursor"]
        watched = len(announcements.all(WatchdogRan))
    assert all("FROM pg_locks" in text for text in said), said
    # Who is silent, and whether all shards are led.
    assert len(said) <= 2 * (watched + 1)


def test_a_shut_door_is_left_alone_until_it_is_time(
    beatless: Kit, beatless_app: App, doors
) -> None:
    """The rows behind it are due all the time, and must not keep the relay busy."""
    doors[0].error = PublishFailed("Redis", "gone")
    connect, statements = noting(beatless_app)
    announcements = Announcements()
    relay = recording(
        beatless_app,
        doors,
        connect=connect,
        watchdog=0.2,
        backoff=Backoff(initial=600, cap=600),
        observer=announcements,
    )
    beatless.start_run("two_steps")
    relay.start()
    announcements.wait(BatchFailed)
    announcements.wait_until(lambda seen: tasks_of(seen) == 1)
    for _ in range(20):  # a slow relay has a look or two before it; a busy one has them for ever
        begin = len(statements)
        announcements.wait(WatchdogRan, len(announcements.all(WatchdogRan)) + 2)
        said = [text for text in statements[begin:] if "FROM pg_locks" not in text]
        if set(said) <= {"a cursor"}:
            break
    relay.stop()
    assert set(said) <= {"a cursor"}


def test_a_transaction_that_stays_open_does_not_hold_up_the_others(
    beatless: Kit, beatless_app: App
) -> None:
    with running(beatless_app), beatless_app.engine.connect() as caller:
        transaction = caller.begin()
        held = beatless.start_run("two_steps", connection=caller)
        for _ in range(5):
            free = beatless.start_run("two_steps")
            beatless.wait_for_outbox_flush(free.run_id)
        transaction.commit()
        beatless.wait_for_outbox_flush(held.run_id)


@pytest.mark.parametrize("session", ["work", "bell", "watch"])
def test_a_relay_whose_session_is_terminated_starts_over_and_drains(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, session: str
) -> None:
    pids: list[int] = []

    def connect() -> DirectConnection:
        connection = beatless_app.direct_connection()
        pids.append(connection.pgconn.backend_pid)
        return connection

    announcements = Announcements()
    relay = beatless_app.relay(connect=connect, observer=announcements, backoff=QUICK)
    errors: list[Exception] = []
    relay.start(errors.append)
    announcements.wait(RelayAsleep)

    place = ["work", "bell", "watch"].index(session)
    postgres.execute("SELECT pg_terminate_backend(%s)", (pids[place],))
    run = beatless.start_run("two_steps")
    announcements.wait(RelayStarted, 2)
    beatless.wait_for_outbox_flush(run.run_id)
    relay.stop()

    assert [type(error) for error in errors] == [psycopg.OperationalError]


def test_two_relays_share_the_shards_and_one_takes_over_when_the_other_goes(
    beatless: Kit, beatless_app: App
) -> None:
    first, second = Announcements(), Announcements()
    one = beatless_app.relay(observer=first, backoff=QUICK)
    two = beatless_app.relay(observer=second, backoff=QUICK)
    one.start()
    first.wait(RelayAsleep)
    assert first.wait(ShardsAssigned).shards == tuple(range(SHARDS))

    two.start()
    second.wait_until(lambda seen: shards_of(seen) == SHARDS // 2)
    first.wait_until(lambda seen: shards_of(seen) == SHARDS // 2)
    runs = [beatless.start_run("two_steps") for _ in range(40)]
    assert len({shard_of(run.run_id) for run in runs}) > SHARDS // 2
    for run in runs:
        beatless.wait_for_outbox_flush(run.run_id)

    one.stop()
    second.wait_until(lambda seen: shards_of(seen) == SHARDS)
    for run in [beatless.start_run("two_steps") for _ in range(20)]:
        beatless.wait_for_outbox_flush(run.run_id)
    two.stop()


def shards_of(seen: list[Signal]) -> int:
    leads = [signal.shards for signal in seen if isinstance(signal, ShardsAssigned)]
    return len(leads[-1]) if leads else 0


def test_a_thousand_appends_wake_a_relay_a_few_times_only(beatless: Kit, beatless_app: App) -> None:
    with running(beatless_app, watchdog=600) as (relay, announcements):
        object.__setattr__(relay._config, "linger", 3600.0)  # however slowly they come
        for _ in range(10):
            runs = beatless.client.start_runs([RunRequest(plan="two_steps")] * 100)
            beatless.wait_for_outbox_flush(runs[-1].run_id)
        # The second may be what it takes to see that there is more.
        assert 1 <= len(announcements.all(RelayWoke)) <= 2


def test_a_relay_whose_work_does_not_end_gives_the_bell_back_meanwhile(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """While it holds the bell's locks every writer rings, and under load there is always more."""
    held: list[int] = []

    class Feeding(Announcements):
        def __call__(self, signal: Signal) -> None:
            if isinstance(signal, Drained) and len(held) < 40:
                found = postgres.execute(
                    "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND "
                    "mode = 'ExclusiveLock' AND classid = 'run_outbox'::regclass::oid"
                ).fetchone()
                held.append(found[0])
                beatless.start_run("two_steps")
            super().__call__(signal)

    announcements = Feeding()
    relay = beatless_app.relay(observer=announcements, backoff=QUICK)
    relay.start()
    announcements.wait(RelayAsleep)
    # It must not fall asleep again because the machine is slow between two of its steps.
    object.__setattr__(relay._config, "linger", 3600.0)
    beatless.start_run("two_steps")
    announcements.wait(Drained, 41)
    relay.stop()
    assert held[0] == SHARDS
    assert not any(held[10:])


def test_start_and_stop_in_any_order_leave_nothing(beatless: Kit, beatless_app: App) -> None:
    for _ in range(10):
        relay = beatless_app.relay()
        relay.start()
        with pytest.raises(RuntimeError, match="started before"):
            relay.start()
        relay.stop()
        relay.stop()


def test_a_relay_refuses_a_schema_without_tables(beatless_app: App) -> None:
    relay = beatless_app.relay(queries=Queries("no_such_schema"))
    with pytest.raises(SchemaMissing, match="beatless migrate"):
        relay.run()
    relay.stop()


@pytest.mark.slow
def test_a_relay_refuses_a_connection_that_hears_nothing(beatless_app: App) -> None:
    settings = beatless_app.settings
    relay = beatless_app.relay(
        connect=lambda: Unlistening.connect(libpq_url(settings.listen_url), autocommit=True)
    )
    with pytest.raises(DirectConnectionRequired, match="BEATLESS_LISTEN_URL"):
        relay.run()
    relay.stop()


class Unlistening(DirectConnection):
    """Accepts LISTEN and never delivers, as PgBouncer in transaction mode does."""

    def execute(self, query, *args, **kwargs):
        if isinstance(query, str) and query.startswith("LISTEN"):
            query = "SELECT 1"
        return super().execute(query, *args, **kwargs)


def test_a_channel_that_listen_would_truncate_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 63 bytes"):
        channel_of("s" * 60)


def test_a_run_that_waits_for_a_place_in_the_window_has_a_time(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    """Another relay's claims may free the place, and ring nobody."""
    beatless.client.start_runs([RunRequest(plan="two_steps") for _ in range(65)])
    relay = recording(beatless_app, doors)
    relay.drain_once()
    assert len(doors[1].messages) == 64

    due = postgres.execute(
        beatless_app.queries.next_due_sql, {"shards": list(range(SHARDS))}
    ).fetchone()
    relay.stop()
    assert 0 < due[0] <= 0.25


def test_messages_that_nobody_claims_are_sent_more_rarely_when_they_are_lost_again(
    beatless: Kit, beatless_app: App, doors
) -> None:
    beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    for _ in range(20):
        relay.drain_once()
        lose_messages(beatless_app)  # as a worker that does not have the plan
        beatless.advance(15.1)
    relay.stop()
    assert 6 <= len(doors[1].messages) <= 7


def in_shard(shard: int, name: str) -> str:
    """A run id of this shard."""
    return next(f"{name}-{n}" for n in range(10_000) if shard_of(f"{name}-{n}") == shard)


def test_an_open_transaction_in_one_shard_holds_up_no_writer_of_the_later_ones(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    """The bell locks are asked for one after another; behind the held one nobody rings."""
    relay = recording(beatless_app, doors, watchdog=600)
    with beatless_app.engine.connect() as caller:
        transaction = caller.begin()
        held = beatless.start_run("two_steps", run_id=in_shard(0, "held"), connection=caller)
        relay.start()
        drowsy = (
            "SELECT EXISTS (SELECT FROM pg_locks WHERE classid = 'run_outbox'::regclass"
            " AND mode = 'ExclusiveLock' AND NOT granted)"
        )
        until(lambda: postgres.execute(drowsy).fetchone()[0])
        for shard in (15, 1, 8):
            free = beatless.start_run("two_steps", run_id=in_shard(shard, "free"))
            beatless.wait_for_outbox_flush(free.run_id)
        transaction.commit()
        beatless.wait_for_outbox_flush(held.run_id)
    relay.stop()


def test_five_relays_leave_no_shard_without_a_leader_whoever_dies(beatless_app: App) -> None:
    seen = Announcements()
    relays: dict[int, Relay] = {}
    led: dict[int, Sequence[int]] = {}

    def observe(number: int, signal: Signal) -> None:
        if isinstance(signal, ShardsAssigned):
            led[number] = signal.shards
        seen(signal)

    for number in range(5):
        relays[number] = beatless_app.relay(
            backoff=QUICK, watchdog=600, observer=partial(observe, number)
        )
        relays[number].start()

    def all_led(_: list[Signal]) -> bool:
        theirs = {number: shards for number, shards in led.copy().items() if number in relays}
        shards = [shard for each in theirs.values() for shard in each]
        return len(theirs) == len(relays) and sorted(shards) == list(range(SHARDS))

    seen.wait_until(all_led)
    for number in (0, 3, 1, 4):
        gone = relays.pop(number)
        gone.stop()
        seen.wait_until(all_led)
    relays.pop(2).stop()


@contextmanager
def session_loop(relay: Relay, sessions: Sessions) -> Iterator[SessionLoop]:
    """A relay's, driven by hand."""
    loop = SessionLoop(relay._config, sessions, alarm=relay._alarm, stopping=threading.Event())
    with closing(loop):
        yield loop
        loop.drain.tasks.await_result()  # else it may arrive when the names of the test are gone


@pytest.fixture
def five(beatless_app: App) -> Iterator[list[SessionLoop]]:
    """Relays driven by hand that have settled: four lead all shards, the last of the list none."""
    with ExitStack() as ends:
        loops = []
        for _ in range(5):
            relay = beatless_app.relay()
            ends.callback(relay.stop)
            sessions = Sessions(beatless_app.queries, beatless_app.direct_connection)
            ends.enter_context(sessions)
            loops.append(ends.enter_context(session_loop(relay, sessions)))
            loops[-1].sessions.announce()
        while any(loop.sessions.members_changed or not loop.shards.members for loop in loops):
            for loop in loops:
                loop.rebalance()
            for loop in loops:
                rung(loop)
        yield sorted(loops, key=lambda loop: -len(loop.shards.owned))


def rung(loop: SessionLoop) -> bool:
    """Whether the relay was told that others came or went, by all that was said until now."""
    loop.sessions.ping()
    while not loop.sessions.pong():
        loop.sessions.wait(60)
    return loop.sessions.members_changed


def test_a_relay_that_goes_while_its_watcher_counts_leaves_its_shards_to_the_others(
    five: list[SessionLoop], beatless_app: App, postgres: psycopg.Connection
) -> None:
    """The watcher has as many as it may; who may have more would hear of nothing."""
    *full, idle = five
    assert [len(loop.shards.owned) for loop in five] == [4, 4, 4, 4, 0]
    gone = next(loop for loop in full if idle.sessions._watching not in loop.shards.owned)
    watcher = next(s for s in full if s is not gone and s.sessions._watching in gone.shards.owned)

    watcher.sessions.watch_shard(None)  # as each count begins
    gone.sessions.__exit__()
    alive = "SELECT FROM pg_stat_activity WHERE pid = %s"
    while postgres.execute(alive, (gone.sessions.pid,)).fetchone() is not None:
        pass
    watcher.rebalance()

    assert rung(idle)
    idle.rebalance()
    assert idle.shards.owned == gone.shards.owned


def holds_snapshot(loop: SessionLoop, postgres: psycopg.Connection) -> bool:
    """Whether the session that awaits a lock of another relay keeps dead rows."""
    row = postgres.execute(
        "SELECT backend_xmin IS NOT NULL FROM pg_stat_activity WHERE pid = %s",
        (loop.sessions.watch.info.backend_pid,),
    ).fetchone()
    assert row is not None
    return bool(row[0])


def test_a_relay_in_a_burst_keeps_no_dead_rows_and_finds_that_another_has_gone(
    five: list[SessionLoop], postgres: psycopg.Connection
) -> None:
    busy, *_, idle = five
    gone = next(loop for loop in five[1:] if busy.sessions._watching in loop.shards.owned)
    while not holds_snapshot(busy, postgres):
        pass
    busy._count(BURST_MESSAGES + 1)
    assert not holds_snapshot(busy, postgres)

    gone.sessions.__exit__()
    alive = "SELECT FROM pg_stat_activity WHERE pid = %s"
    while postgres.execute(alive, (gone.sessions.pid,)).fetchone() is not None:
        pass
    busy._stay_awake()
    assert busy.sessions.members_changed
    assert rung(idle)
    idle.rebalance()
    assert idle.shards.owned == gone.shards.owned


def test_a_relay_awaits_the_lock_of_another_again_when_the_load_is_over(
    five: list[SessionLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, *_ = five
    watched = busy.sessions._watching
    busy._count(BURST_MESSAGES + 1)
    busy._stay_awake()
    assert busy.sessions._watching is None
    assert busy._patience() <= LOAD_S

    monkeypatch.setattr("beatless.outbox.session_loop.LOAD_S", 0.0)
    busy._count(1)
    busy._look_at_neighbours()
    assert busy.sessions._watching == watched


def test_a_relay_that_cannot_fall_asleep_after_a_load_awaits_the_lock_of_another_too(
    beatless: Kit,
    beatless_app: App,
    five: list[SessionLoop],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it is to do at once would keep it from waiting at all."""
    busy, *_ = five
    watched = busy.sessions._watching
    busy._count(BURST_MESSAGES + 1)
    monkeypatch.setattr("beatless.outbox.session_loop.LOAD_S", 0.0)
    busy._count(1)
    with beatless_app.engine.begin() as caller:  # who rings the bell of this shard until the commit
        run_id = in_shard(busy.shards.owned[0], "held")
        beatless.start_run("two_steps", run_id=run_id, connection=caller)
        busy.sessions.doze(busy.shards.owned)
        until(lambda: busy._fall_asleep() or busy.sessions._watching == watched)
        assert busy.sessions.state is State.DROWSY


def test_a_shard_that_nobody_leads_is_found_by_those_who_may_not_lead_it(
    five: list[SessionLoop], beatless_app: App
) -> None:
    full, *_, idle = five
    watched = {loop.sessions._watching for loop in five}
    shard = next(s for s in range(SHARDS) if s not in watched and s not in full.shards.owned)
    leader = next(loop for loop in five if shard in loop.shards.owned)
    key = beatless_app.queries.leader_key
    leader.sessions.work.execute(f"SELECT pg_advisory_unlock({key}, {shard})")

    full._watchdog_at = 0
    full._run_watchdog()

    assert rung(idle)
    idle.rebalance()
    assert idle.shards.owned == (shard,)


def test_a_shard_that_is_freed_while_a_relay_counts_is_led(
    beatless_app: App, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells of it: who held it was not a relay any more, and the relay awaits nothing."""
    key = beatless_app.queries.leader_key
    postgres.execute(f"SELECT pg_advisory_lock({key}, 2)")
    count = Shards._leaders

    def leaders(self: Shards) -> tuple[dict[int, int], list[int]]:
        found = count(self)
        postgres.execute("SELECT pg_advisory_unlock_all()")
        return found

    monkeypatch.setattr(Shards, "_leaders", leaders)
    with running(beatless_app) as (_, announcements):
        announcements.wait_until(lambda _: 2 in announcements.all(ShardsAssigned)[-1].shards)


def test_the_share_of_a_member_that_goes_without_a_shard_is_led(
    beatless_app: App, postgres: psycopg.Connection
) -> None:
    """A backend that ends releases its locks one by one: the shards first, its membership last."""
    key = beatless_app.queries.leader_key
    postgres.execute(f"SELECT pg_advisory_lock_shared({key}, -1)")
    with running(beatless_app, watchdog=600) as (_, announcements):
        half = SHARDS // 2
        announcements.wait_until(
            lambda _: len(announcements.all(ShardsAssigned)[-1].shards) == half
        )
        postgres.execute("SELECT pg_advisory_unlock_all()")
        announcements.wait_until(
            lambda _: len(announcements.all(ShardsAssigned)[-1].shards) == SHARDS
        )


def test_the_scan_floor_does_not_pass_what_waits_behind_a_shut_door(
    beatless: Kit, beatless_app: App, doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 0)  # raised at each look
    relay = recording(beatless_app, doors)
    before = beatless.start_run("two_steps")
    relay.drain_once()
    doors[0].error = PublishFailed("Redis", "gone")
    behind = beatless.start_run("two_steps")
    for _ in range(8):
        relay.drain_once()
    doors[0].error = None

    until(lambda: relay.drain_once() >= 0 and set(seqs(doors[0])) == {before.run_id, behind.run_id})
    relay.stop()


@pytest.mark.parametrize("others", [0, 3])
def test_the_scan_floor_does_not_pass_a_transaction_that_runs_still(
    beatless: Kit,
    beatless_app: App,
    doors,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    others: int,
) -> None:
    """It drew its id before those that were committed and published meanwhile."""
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 0)
    relay = recording(beatless_app, doors)
    with beatless_app.engine.connect() as caller:
        transaction = caller.begin()
        late = beatless.start_run("two_steps", connection=caller)
        for _ in range(others):
            beatless.start_run("two_steps")
        for _ in range(8):
            relay.drain_once()
        transaction.commit()
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0])[late.run_id] == [1]
    assert pending(postgres) == 0


def test_a_relay_survives_what_nobody_foresaw(beatless: Kit, beatless_app: App, doors) -> None:
    announcements = Announcements()
    relay = recording(beatless_app, doors, observer=announcements, watchdog=600)
    relay.start()
    announcements.wait(RelayAsleep)
    doors[0].error = ZeroDivisionError("in a library")
    run = beatless.start_run("two_steps")
    announcements.wait(RelayFailed, 2)
    doors[0].error = None
    beatless.wait_for_outbox_flush(run.run_id)
    relay.stop()


def test_an_outbox_row_without_events_is_forgotten(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    postgres.execute(
        "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (%s, 'nobody', 1, 1)",
        (shard_of("nobody"),),
    )
    run = beatless.start_run("two_steps")
    relay = recording(beatless_app, doors)
    relay.drain_once()
    relay.stop()
    assert seqs(doors[0]) == {run.run_id: [1], "nobody": []}
    assert pending(postgres) == 0


def test_a_long_open_snapshot_does_not_make_the_picks_ever_dearer(
    beatless: Kit,
    beatless_app: App,
    doors,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps VACUUM, and the index, from forgetting what was published: the floor skips it."""
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 100)
    relay = recording(beatless_app, doors)
    with beatless_app.engine.connect() as reader:
        reader = reader.execution_options(isolation_level="REPEATABLE READ")
        reader.exec_driver_sql("SELECT pg_current_snapshot()")
        started = []

        def last_id() -> int:
            return postgres.execute("SELECT last_value FROM run_outbox_id_seq").fetchone()[0]

        def publish_more() -> None:
            started.extend(beatless.client.start_runs([RunRequest(plan="two_steps")] * 100))
            relay.drain_once()

        for _ in range(10):
            publish_more()
        # It also waits for the transactions of other tests that began before a row was written.
        deadline = monotonic() + 60
        while relay._once[1].events.floor.id < last_id() - 0.2 * len(started):
            assert monotonic() < deadline
            publish_more()
        assert seqs(doors[0]) == {run.run_id: [1] for run in started}
        assert pending(postgres) == 0
        floor = relay._once[1].events.floor.id
        fewest, pick, most = (
            pages(beatless_app, postgres, above) for above in (last_id(), floor, 0)
        )
    relay.stop()
    # Beyond the way down to each shard's last entry: a fifth of the dead entries, not all of them.
    assert (pick - fewest) * 3 < most - fewest, (fewest, pick, most)


def pages(app: App, postgres: psycopg.Connection, floor: int) -> int:
    """Pages that one pick of all shards looks at."""
    postgres.execute("SET enable_seqscan = off")
    (plan,) = postgres.execute(
        "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) " + app.queries.pick_events_sql,
        {"shards": list(range(SHARDS)), "floor": floor, "aside": []},
    ).fetchone()
    top = plan[0]["Plan"]
    return top["Shared Hit Blocks"] + top["Shared Read Blocks"]


def test_ten_thousand_dispatches_of_a_paused_queue_hold_nobody_up(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    """They are due before all others and of a higher priority."""
    postgres.execute("INSERT INTO queues (name, paused_at) VALUES ('stuck', now())")
    postgres.execute(
        "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)"
        " SELECT 'stuck-' || n, n %% %s, 'two_steps', 'stuck', 9, 'waiting',"
        " now() - interval '1 day', 'start' FROM generate_series(1, 10000) AS n",
        (SHARDS,),
    )
    requests = [RunRequest(plan="two_steps", queue=f"lane_{n % 4}") for n in range(80)]
    free = beatless.client.start_runs(requests)
    relay = recording(beatless_app, doors)
    relay.drain_once()
    assert sorted(message.run_id for message in doors[1].messages) == sorted(
        run.run_id for run in free
    )

    postgres.execute("DELETE FROM queues")
    relay.drain_once()
    relay.stop()
    stuck = [message for message in doors[1].messages if message.queue == "stuck"]
    assert len(stuck) == 64
    assert len(doors[1].messages) == 144


class Hanging(Door):
    """Takes tasks and does not answer, until it is let go."""

    def __init__(self, real: TaskPublisher) -> None:
        super().__init__(real)
        self.asked = threading.Semaphore(0)
        self.free = threading.Event()
        self.hung: list[Any] = []

    def publish(self, messages) -> None:
        self.hung.append(messages)
        self.asked.release()
        assert self.free.wait(60)
        super().publish(messages)

    def let_go(self, relay: Relay) -> None:
        """End the relay, and what hung is sent after all: before the test ends, not after it."""
        relay.stop()
        until(lambda: len(self.batches) == len(self.hung))


def test_a_broker_that_never_answers_is_asked_again_and_stops_no_event(
    beatless: Kit, beatless_app: App, doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a RabbitMQ that is short of memory: nothing ends that publish."""
    monkeypatch.setattr("beatless.outbox.task_lane.PUBLISH_TIMEOUT_S", 0.1)
    announcements = Announcements()
    broker = Hanging(CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix))
    relay = recording(beatless_app, (doors[0], broker), observer=announcements, watchdog=0.3)
    relay.start()
    run = beatless.start_run("two_steps")
    for _ in range(MAX_STALLED_BATCHES + 1):
        assert broker.asked.acquire(timeout=60)
    announcements.wait(WatchdogRan, len(announcements.all(WatchdogRan)) + 2)
    assert not broker.asked.acquire(blocking=False)  # enough threads hang
    beatless.wait_for_outbox_flush(run.run_id)
    assert announcements.wait(BatchFailed, 2).publisher == "broker"
    assert announcements.all(RelayFailed) == []

    broker.free.set()
    announcements.wait_until(lambda seen: tasks_of(seen) > 0)
    broker.let_go(relay)
    assert {message.run_id for message in broker.messages} == {run.run_id}


def test_a_sleeping_relay_notices_that_what_it_sends_again_does_not_arrive(
    beatless: Kit, beatless_app: App, doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that was sent before has no time of its own any more, by which it would look."""
    monkeypatch.setattr("beatless.outbox.task_lane.PUBLISH_TIMEOUT_S", 1.0)
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    lose_messages(beatless_app)
    beatless.advance(60)
    announcements = Announcements()
    broker = Hanging(CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix))
    relay = recording(beatless_app, (doors[0], broker), observer=announcements, watchdog=600)
    relay.start()
    announcements.wait(RelayAsleep)
    for _ in range(2):
        assert broker.asked.acquire(timeout=60)
    broker.free.set()
    broker.let_go(relay)
    assert {(message.run_id, message.attempt) for message in broker.messages} == {(run.run_id, 2)}


def test_what_rings_for_another_reason_does_not_shorten_the_back_off(beatless_app: App) -> None:
    """A batch that the broker has taken rings, and may do so while Postgres goes away."""
    announcements = Announcements()
    tries = threading.Semaphore(0)

    def connect() -> DirectConnection:
        tries.release()
        raise psycopg.OperationalError("not now")

    relay = beatless_app.relay(
        observer=announcements, backoff=Backoff(initial=600, cap=600), connect=connect
    )
    relay._alarm.ring()
    relay.start()
    announcements.wait(RelayFailed)
    assert tries.acquire(timeout=60)
    relay._alarm.ring()
    until(lambda: not readable([relay._alarm], 0))  # it has been heard

    assert not tries.acquire(blocking=False)
    relay.stop()


def test_a_shard_that_was_a_strangers_for_a_moment_is_led_after_it(beatless_app: App) -> None:
    """As by the session of a relay that has gone, to which the lock was granted nevertheless."""
    with beatless_app.direct_connection() as stranger:
        stranger.execute(f"SELECT pg_advisory_lock({beatless_app.queries.leader_key}, 3)")
        with running(beatless_app, watchdog=600) as (_, announcements):
            assert len(announcements.wait(ShardsAssigned).shards) == SHARDS - 1
            stranger.close()
            announcements.wait_until(lambda seen: shards_of(seen) == SHARDS)


def test_what_becomes_due_while_a_relay_looks_is_sent(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lease that runs out just after the last look, which was told so and nobody rings for."""
    dead = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    postgres.execute(
        "UPDATE dispatches SET state = 'running', reason = 'lease', due_at = now() + '1 day'"
    )
    ask = Drain._look_ahead

    with running(beatless_app, redispatch=600.0) as (_, announcements):

        def look_ahead(self: Drain, shards: Sequence[int]) -> psycopg.Cursor[Any]:
            if tasks_of(announcements.seen) == 1:
                postgres.execute(
                    "UPDATE dispatches SET due_at = clock_timestamp() + '50 ms'"
                    " WHERE run_id = %s AND due_at > now() + '1 hour'",
                    [dead.run_id],
                )
            return ask(self, shards)

        monkeypatch.setattr(Drain, "_look_ahead", look_ahead)
        beatless.start_run("two_steps")
        announcements.wait_until(lambda seen: tasks_of(seen) == 2)


def test_a_queue_that_the_broker_refuses_holds_up_no_other(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    doors[1].refused_queues.add("bad")
    bad = [beatless.start_run("two_steps", queue="bad", priority=9) for _ in range(3)]
    good = [beatless.start_run("two_steps", queue=queue) for queue in ("one", "two", "one")]
    announcements = Announcements()
    relay = recording(beatless_app, doors, observer=announcements)
    relay.drain_once()

    assert {message.run_id for message in doors[1].messages} == {run.run_id for run in good}
    states = "SELECT run_id, state FROM dispatches WHERE reason = 'refused' AND due_at > now()"
    assert sorted(postgres.execute(states)) == [(run.run_id, "delayed") for run in bad]
    assert announcements.all(QueueRefused) == [QueueRefused(queue="bad", messages=3)]
    assert announcements.all(BatchFailed) == []
    assert "(reason: refused)" in str(beatless.client.explain(bad[0].run_id))

    later = beatless.start_run("two_steps")
    relay.drain_once()  # at once: no door is shut, and the refused are not tried again
    assert doors[1].messages[-1].run_id == later.run_id
    assert len(announcements.all(QueueRefused)) == 1

    doors[1].refused_queues.clear()  # the broker has been mended
    beatless.advance(16)
    relay.drain_once()
    relay.stop()
    sent = {message.run_id for message in doors[1].messages}
    assert sent == {run.run_id for run in (*bad, *good, later)}
    # No first attempt any more: it declares its queue anew.
    attempts = {message.attempt for message in doors[1].messages if message.queue == "bad"}
    assert attempts == {2}


def test_a_queue_that_was_refused_is_sent_by_itself_until_it_is_accepted(
    beatless: Kit, beatless_app: App, doors, caplog: pytest.LogCaptureFixture
) -> None:
    def start(queue: str) -> str:
        return beatless.start_run("two_steps", queue=queue).run_id

    doors[1].refused_queues.add("bad")
    relay = recording(beatless_app, doors)
    start("bad"), start("good")
    relay.drain_once()
    good = set()
    for _ in range(3):
        start("bad")
        good.add(start("good"))
        relay.drain_once()

    sent = [message.run_id for message in doors[1].messages if message.run_id in good]
    assert sorted(sent) == sorted(good)  # each once
    lines = [record for record in caplog.records if getattr(record, "action", "") == "refused"]
    assert len(lines) == 1  # and not one for each batch

    doors[1].refused_queues.clear()  # the broker has been mended
    for expected in (["bad"], ["bad", "good"]):
        doors[1].batches.clear()
        start("bad"), start("good")
        relay.drain_once()
        assert sorted({message.queue for message in doors[1].batches[-1]}) == expected
    relay.stop()


def test_what_arrived_of_a_refused_batch_and_was_claimed_keeps_its_lease(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")

    def claim() -> None:
        with closing(beatless_app.executors.connect()) as connection:
            assert beatless_app.leases.claim(
                connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
            )

    doors[1].refused_queues.add("default")
    doors[1].before_refusal = claim
    relay = recording(beatless_app, doors)
    relay.drain_once()
    relay.stop()

    query = (
        "SELECT d.state, d.reason, d.attempts, d.due_at = r.lease_expires_at "
        "FROM dispatches d JOIN runs r USING (run_id)"
    )
    assert postgres.execute(query).fetchone() == ("running", "lease", 1, True)


def test_a_broker_that_goes_away_while_a_batch_is_sent_by_queue_is_a_shut_door(
    beatless: Kit, beatless_app: App, doors, postgres: psycopg.Connection
) -> None:
    doors[1].refused_queues.add("bad")
    beatless.start_run("two_steps", queue="bad")
    beatless.start_run("two_steps")
    doors[1].error = PublishFailed("the broker", "gone")
    announcements = Announcements()
    once = Backoff(initial=600, cap=600)
    relay = recording(beatless_app, doors, observer=announcements, backoff=once)
    relay.drain_once()
    relay.stop()

    assert announcements.all(BatchFailed) == [BatchFailed(publisher="broker", failures=1)]
    assert postgres.execute("SELECT DISTINCT reason FROM dispatches").fetchall() == [("start",)]


@pytest.mark.parametrize("queue", ["celeryev", "control.pidbox"])
def test_the_names_of_celerys_own_exchanges_are_no_queues(beatless: Kit, queue: str) -> None:
    with pytest.raises(BadRequest, match="Celery's own"):
        beatless.start_run("two_steps", queue=queue)


def test_a_batch_has_a_limit_in_bytes_and_nothing_is_left_out_for_ever(
    beatless: Kit,
    beatless_app: App,
    doors,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After an outage of Redis, 2,048 events of 200 kB would be one batch."""
    limit, size = 100_000, 30_000
    for module in ("beatless.outbox.queries", "beatless.outbox.event_lane"):
        monkeypatch.setattr(f"{module}.BATCH_BYTES", limit)
    monkeypatch.setattr(
        "beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 0
    )  # what is left out is above the floor
    schema = beatless_app.settings.schema
    relay = recording(beatless_app, doors, queries=Queries(schema))
    first = beatless.start_run("two_steps")
    for _ in range(3):
        relay.drain_once()
    run = beatless.start_run("two_steps")
    for number in range(40):
        text = 2 * limit if number == 10 else size
        seq = postgres.execute(
            "UPDATE runs SET last_seq = last_seq + 1 WHERE run_id = %s RETURNING last_seq",
            (run.run_id,),
        ).fetchone()[0]
        postgres.execute(
            "INSERT INTO run_events (run_id, seq, type, source, data)"
            " VALUES (%s, %s, 'Note', 'worker', jsonb_build_object('text', repeat('x', %s)))",
            (run.run_id, seq, text),
        )
        postgres.execute(
            "INSERT INTO run_outbox (shard, run_id, from_seq, to_seq) VALUES (%s, %s, %s, %s)",
            (shard_of(run.run_id), run.run_id, seq, seq),
        )
    relay.drain_once()

    sizes = [sum(len(message.body) for message in batch) for batch in doors[0].batches]
    # One that is larger than a batch goes out all the same, as the last of its batch.
    assert 2 * limit < max(sizes) < 3 * limit + 1_000
    assert sorted(sizes)[-2] < limit + size + 1_000
    assert seqs(doors[0]) == {first.run_id: [1], run.run_id: list(range(1, 42))}
    assert pending(postgres) == 0
    relay.stop()


def test_few_rows_are_looked_at_while_events_are_large(
    beatless: Kit,
    beatless_app: App,
    doors,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Postgres builds the events of all rows that are looked at, also of those left out."""
    for module in ("beatless.outbox.queries", "beatless.outbox.event_lane"):
        monkeypatch.setattr(f"{module}.BATCH_BYTES", 20_000)
    shard = [in_shard(3, f"run-{number}") for number in range(60)]
    queries = Queries(beatless_app.settings.schema, per_shard=32)
    relay = recording(beatless_app, doors, queries=queries)

    beatless.client.start_runs([RunRequest(plan="two_steps", run_id=name) for name in shard])
    postgres.execute(
        "UPDATE run_events SET data = jsonb_build_object('text', repeat('x', 5000))"
        " WHERE run_id = ANY(%s)",
        (shard[:20],),
    )
    relay.drain_once()
    relay.stop()

    rows = [len(batch) for batch in doors[0].batches]
    assert rows[:2] == [4, 2]  # as many as the limit lets, then a sixteenth of 32
    assert max(rows[-3:]) > 10  # small ones are many again
    assert sum(rows) == 60
