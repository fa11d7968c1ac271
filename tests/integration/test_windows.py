"""How many messages of a queue are out, and that no queue or plan takes another's places."""

import psycopg
import pytest

from beatless import App, BadRequest, Plan, StepContext, step
from beatless.client import RunRequest
from beatless.outbox.drain import Drain
from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import SHARDS, shard_of
from beatless.outbox.publishers import CeleryTaskPublisher, worker_queue
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.sessions import prepare_to_drain
from beatless.testing import Kit
from tests import column_statistics
from tests.integration.test_drain_plan import read
from tests.integration.test_relay import Door, doors, lose_messages, recording

__all__ = ["doors"]

WINDOW = 64


@step
def only(ctx: StepContext) -> int:
    return 1


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("known", [only]), Plan("brand_new", [only]), Plan("newer", [only])]


@pytest.fixture
def drain(beatless_app: App, doors: tuple[Door, Door]):
    relay = recording(beatless_app, doors)
    relay.drain_once()
    yield relay._once[1]
    relay.stop()


def in_broker(app: App, queue: str = "default") -> int:
    with app._broker() as broker:
        found = worker_queue(app.settings.prefix, queue)(broker.default_channel)
        found.declare()
        return found.queue_declare().message_count


def settle(drain: Drain, shards: tuple[int, ...] = ALL_SHARDS) -> None:
    """Drain until nothing moves."""
    while drain.step(shards) or drain.tasks.await_result() or drain.crowded:
        pass


def start(kit: Kit, count: int, plan: str = "known", **options) -> list[str]:
    requests = [RunRequest(plan=plan, **options) for _ in range(count)]
    return [run.run_id for run in kit.client.start_runs(requests)]


def states(postgres: psycopg.Connection, plan: str) -> dict[str, int]:
    rows = postgres.execute(
        "SELECT state, count(*) FROM dispatches WHERE task = %s GROUP BY 1", (plan,)
    )
    return dict(rows.fetchall())


@pytest.mark.slow
def test_a_queue_without_a_worker_has_a_windows_messages_for_ever(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    start(beatless, 100)
    for _ in range(6):
        settle(drain)
        assert in_broker(beatless_app) == WINDOW
        beatless.advance(600)
    assert states(postgres, "known") == {"sent": WINDOW, "waiting": 36}
    assert beatless.work_until_idle() == 100
    beatless.verify()


def test_two_relays_have_one_window(beatless: Kit, beatless_app: App, doors) -> None:
    """Neither sees what the other has sent and not marked yet."""
    start(beatless, 400)
    relays = [recording(beatless_app, doors) for _ in range(2)]
    drains = []
    for relay in relays:
        relay.drain_once("no such run")
        drains.append(relay._once[1])
    for place, drain in enumerate(drains):
        drain.step(ALL_SHARDS[place::2])
        drain.tasks.await_result()
    assert in_broker(beatless_app) == WINDOW
    for _ in range(3):
        for place, drain in enumerate(drains):
            settle(drain, ALL_SHARDS[place::2])
        assert in_broker(beatless_app) == WINDOW
        beatless.advance(600)
    for relay in relays:
        relay.stop()


@pytest.mark.slow
def test_a_relay_that_takes_over_shards_adds_nothing_to_a_full_window(
    beatless: Kit, beatless_app: App, drain: Drain
) -> None:
    """What is out is spread unevenly: fewer of its shards than it has places for."""
    start(beatless, 150)
    settle(drain)
    for shard in ALL_SHARDS:
        settle(drain, (shard,))
        assert in_broker(beatless_app) == WINDOW
    assert beatless.work_until_idle() == 150


@pytest.mark.slow
def test_many_runs_whose_workers_died_at_once_come_through_the_window(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    start(beatless, 150)
    postgres.execute("UPDATE runs SET state = 'running', lease_expires_at = now()")
    postgres.execute("UPDATE dispatches SET state = 'running', reason = 'lease', due_at = now()")
    settle(drain)
    assert in_broker(beatless_app) == WINDOW
    assert states(postgres, "known") == {"sent": WINDOW, "running": 86}
    for _ in range(4):
        beatless.work_until_idle()
        beatless.advance(3)
    assert states(postgres, "known") == {}


def work_without(kit: Kit, *plans: str) -> None:
    """What a worker does that does not have these plans."""
    while (message := kit._inbox.take()) is not None:
        if message.headers["task"] in plans:
            message.ack()
        else:
            assert kit._execute(message)


@pytest.mark.slow
def test_a_plan_that_no_worker_has_takes_no_places_for_long(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    start(beatless, 100, "brand_new", priority=9)
    start(beatless, 100, "newer", priority=9)
    known = start(beatless, 3)
    for _ in range(4):
        settle(drain)
        work_without(beatless, "brand_new", "newer")
        beatless.advance(16)
    settle(drain)
    assert {beatless.client.get_run(run_id).state.final for run_id in known} == {True}
    for plan in ("brand_new", "newer"):
        assert states(postgres, plan) == {"sent": 1, "waiting": 99}
    work_without(beatless, "brand_new", "newer")

    beatless.advance(61)  # the workers have been upgraded
    assert beatless.work_until_idle() == 200
    beatless.verify()


@pytest.mark.slow
def test_what_the_broker_lost_without_a_word_is_sent_again(
    beatless: Kit, beatless_app: App, drain: Drain
) -> None:
    start(beatless, 100)
    settle(drain)
    lose_messages(beatless_app)
    beatless.advance(16)
    assert beatless.work_until_idle() == 100
    beatless.verify()


def test_a_broker_that_was_away_and_lost_nothing_gets_nothing_twice(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], drain: Drain
) -> None:
    start(beatless, 80)
    settle(drain)
    drain.tasks._breaker.failures = 1
    beatless.advance(1)
    beatless.work_once()
    settle(drain)
    assert in_broker(beatless_app) <= WINDOW


def test_a_paused_queue_with_many_runs_that_become_due_hides_no_other(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    start(beatless, 200, queue="stuck", delay=60)
    other = start(beatless, 1, queue="other", delay=100)
    beatless.client.pause_queue("stuck")
    beatless.advance(200)
    settle(drain)
    sent = postgres.execute("SELECT run_id FROM dispatches WHERE state = 'sent'").fetchall()
    assert [run_id for (run_id,) in sent] == other
    beatless.client.resume_queue("stuck")
    settle(drain)
    assert in_broker(beatless_app, "stuck") == WINDOW


@pytest.mark.slow
def test_priority_decides_among_runs_that_have_become_due(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    start(beatless, 150, delay=60)
    high = start(beatless, 20, delay=70, priority=9)
    beatless.advance(100)
    settle(drain)
    assert in_broker(beatless_app) == WINDOW
    for _ in range(WINDOW + len(high)):
        beatless.work_once()
    assert {beatless.client.get_run(run_id).state.final for run_id in high} == {True}


@pytest.mark.parametrize("statement", ["pick_tasks_sql", "pick_free_tasks_sql", "next_due_sql"])
def test_a_look_reads_nothing_of_queues_whose_runs_are_all_for_later(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, statement: str
) -> None:
    column_statistics.forget(postgres)
    postgres.execute(
        "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason)"
        " SELECT 'later-' || n, n %% %s, 'known', 'q' || n, 0, 'delayed',"
        " now() + interval '1 day', 'delay' FROM generate_series(1, 5000) n",
        (SHARDS,),
    )
    (due,) = start(beatless, 1)
    prepare_to_drain(postgres)
    parameters = {
        "shards": [shard_of(due)],
        "run_id": None,
        "now": None,
        "aside": [],
        "held": [],
        "places": WINDOW,
    }
    assert read(postgres, getattr(beatless_app.queries, statement), parameters) < 100
    postgres.execute("DELETE FROM dispatches WHERE run_id LIKE 'later-%'")


def test_what_was_accepted_of_a_batch_is_not_sent_again_when_the_door_shuts_behind_it(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    class Shutting(Door):
        def publish(self, messages) -> None:
            if any(message.queue == "bad" for message in messages) and not self.refused_queues:
                raise PublishFailed("the broker", "gone in between")
            super().publish(messages)

    door = Shutting(CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix))
    door.refused_queues.add("bad")
    relay = recording(beatless_app, (doors[0], door))
    start(beatless, 1, queue="bad")
    relay.drain_once()  # from now on the queue is sent by itself, behind the others
    door.refused_queues.clear()
    start(beatless, 1, queue="bad")
    good = start(beatless, 3)
    relay.drain_once()
    sent = postgres.execute("SELECT run_id FROM dispatches WHERE state = 'sent'").fetchall()
    relay.stop()

    assert sorted(run_id for (run_id,) in sent) == sorted(good)
    assert sorted(message.run_id for message in door.messages) == sorted(good)


def test_a_queue_whose_name_is_a_key_of_somebody_else_shuts_no_door(
    beatless: Kit, beatless_app: App, drain: Drain, postgres: psycopg.Connection
) -> None:
    with beatless_app._broker() as broker:
        client = broker.default_channel.client
        client.set(f"{beatless_app.settings.prefix}.taken", "a string")
        start(beatless, 3, queue="taken", priority=9)
        good = start(beatless, 3)
        settle(drain)
        client.delete(f"{beatless_app.settings.prefix}.taken")
    assert drain.tasks._breaker.failures == 0
    sent = postgres.execute("SELECT run_id FROM dispatches WHERE state = 'sent'").fetchall()
    assert sorted(run_id for (run_id,) in sent) == sorted(good)


def test_a_message_that_cannot_be_sent_costs_its_own_run(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> None:
    """As a run id that is too long for AMQP."""

    class Encoding(Door):
        def publish(self, messages) -> None:
            if any(message.run_id in self.refused for message in messages):
                raise PublishRefused("the broker", "too long", of_message=True)
            super().publish(messages)

    door = Encoding(CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix))
    culprit, *others = start(beatless, 4)
    door.refused.add(culprit)
    relay = recording(beatless_app, (doors[0], door))
    relay.drain_once()
    relay.stop()
    states = dict(postgres.execute("SELECT run_id, state FROM dispatches").fetchall())
    assert states == {culprit: "delayed"} | dict.fromkeys(others, "sent")


class TestQueueLimit:
    @pytest.fixture
    def beatless_settings(self) -> dict[str, object]:
        return {"max_queues": 3}

    @pytest.mark.parametrize("namespace", ["default", "acme"])
    def test_a_namespace_has_runs_in_so_many_queues_and_no_more(
        self, beatless: Kit, beatless_app: App, namespace: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client, other = beatless_app.client_for(namespace), beatless_app.client_for("other")
        other.start_runs([RunRequest(plan="known", queue=f"theirs-{n}") for n in range(3)])
        first = client.start_run("known", queue="one", delay=3600)
        client.start_runs([RunRequest(plan="known", queue=queue) for queue in ("two", "three")])
        with pytest.raises(BadRequest, match="BEATLESS_MAX_QUEUES"):
            client.start_run("known", queue="four")
        client.start_run("known")  # the plan's own
        client.start_run("known", queue="two")
        monkeypatch.setattr("beatless.client.queue_limit.FULL_FOR_S", 0.0)
        with pytest.raises(BadRequest, match="BEATLESS_MAX_QUEUES"):
            client.start_run("known", queue="four")
        client.cancel_run(first.run_id)
        client.start_run("known", queue="four")
