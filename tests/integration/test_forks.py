"""An app that was used before its process forked: parent and children never share a connection."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from redis.client import PubSub

from beatless import App
from beatless.http import Client as HttpClient
from beatless.outbox.backoff import Backoff
from beatless.outbox.relay import Relay
from beatless.streams.subscription import Subscription
from beatless.testing import Kit
from tests.forking import ForkedChild
from tests.serving import serving

MANY = 100


def backend(app: App) -> int:
    with app.engine.connect() as connection:
        pid: int = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    return pid


def read_many(app: App, run_id: str) -> list[str]:
    return sorted({app.client.get_run(run_id).run_id for _ in range(MANY)})


def test_children_and_their_parent_read_their_own_runs_at_the_same_time(beatless: Kit) -> None:
    ids = [beatless.start_run("two_steps").run_id for _ in range(3)]
    children = [ForkedChild(lambda mine=run_id: read_many(beatless.app, mine)) for run_id in ids]
    try:
        assert read_many(beatless.app, ids[0]) == [ids[0]]
        assert [child.answer() for child in children] == [[run_id] for run_id in ids]
    finally:
        for child in children:
            child.__exit__()


def test_a_child_has_a_session_of_its_own_and_leaves_its_parents_open(beatless: Kit) -> None:
    app = beatless.app
    before = backend(app)

    def act() -> int:
        mine = backend(app)
        app.close()
        return mine

    with ForkedChild(act) as child:
        assert child.answer() != before
    assert backend(app) == before


def test_a_session_ends_with_its_process_although_a_child_of_it_lives(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    app = beatless.app

    def act() -> int:
        connection = app.direct_connection()
        connection.execute("SELECT pg_advisory_lock(hashtext(%s))", (app.settings.schema,))
        grandchild = os.fork()
        if not grandchild:
            signal.pause()
        return grandchild

    with ForkedChild(act) as child:
        grandchild = child.answer()
    try:
        postgres.execute("SET lock_timeout TO '20s'")
        postgres.execute("SELECT pg_advisory_lock(hashtext(%s))", (app.settings.schema,))
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_transaction_that_was_open_is_the_parents_alone(beatless: Kit) -> None:
    app = beatless.app
    with app.engine.begin() as connection:
        app.client.start_run("two_steps", run_id="mine", connection=connection)

        def act() -> None:
            connection.commit()

        with ForkedChild(act) as child:
            assert child.told()["raised"] == "OperationalError"
    assert app.client.get_run("mine").run_id == "mine"


def test_a_stream_that_was_open_goes_on_in_parent_and_child(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    stream: Iterator = beatless.client.stream_run(run.run_id, timeout=60)
    first = next(stream)

    with ForkedChild(lambda: [event.seq for event in stream]) as child:
        beatless.work_until_idle()
        rest = [event.seq for event in stream]
        assert child.answer() == rest
    assert [first.seq, *rest] == [1, 2, 3, 4, 5, 6]


def test_locks_that_threads_of_the_parent_held_do_not_stop_a_child(beatless: Kit) -> None:
    app = beatless.app
    beatless.start_run("two_steps", queue="here")

    def act() -> list[str]:
        return [state.name for state in app.client.queues()]

    with (
        app.streams._choosing,
        app.executors._mutex,
        ForkedChild(act) as child,
    ):
        assert child.answer() == ["here"]


@pytest.mark.parametrize("call", ["start", "run", "drain_once"])
def test_a_relay_that_was_made_before_a_fork_is_refused(beatless: Kit, call: str) -> None:
    relay: Relay = beatless.relay
    beatless.drain_outbox_once()

    with ForkedChild(getattr(relay, call)) as child:
        told = child.told()
    assert told["raised"] == "RuntimeError"
    assert f"made in process {os.getpid()} before it forked" in told["text"]
    beatless.drain_outbox_once()


def test_a_relay_may_be_made_in_a_child(beatless: Kit) -> None:
    beatless.drain_outbox_once()
    beatless.start_run("two_steps")

    def act() -> int:
        beatless.relay.stop()
        relay = beatless.app.relay()
        return relay.drain_once()

    with ForkedChild(act) as child:
        assert child.answer() == 2
    assert beatless.work_until_idle() == 1


def test_the_kit_acts_as_no_worker_in_a_child(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)

    with ForkedChild(lambda: beatless.step(run.run_id)) as child:
        assert child.told()["raised"] == "RuntimeError"
    with ForkedChild(lambda: beatless.event_types(run.run_id)) as child:
        assert child.answer() == beatless.event_types(run.run_id)
    beatless.work_until_idle()


def test_an_http_client_and_its_streams_go_on_in_parent_and_child(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    at_once = Backoff(initial=0.001, cap=0.01)
    with serving(beatless.app) as api, HttpClient(api.url, backoff=at_once) as client:
        stream = client.stream_run(run.run_id, timeout=60)
        first = next(stream)

        def act() -> tuple[list[str], list[int]]:
            read = sorted({client.get_run(run.run_id).run_id for _ in range(20)})
            return read, [event.seq for event in stream]

        with ForkedChild(act) as child:
            beatless.work_until_idle()
            rest = [event.seq for event in stream]
            assert child.answer() == [[run.run_id], rest]
    assert [first.seq, *rest] == [1, 2, 3, 4, 5, 6]


def test_a_child_does_not_wait_for_a_lock_that_a_stream_of_its_parent_holds(beatless: Kit) -> None:
    lock = threading.Lock()

    class Subscriber(PubSub):
        def reset(self) -> None:
            with lock:
                super().reset()  # type: ignore[no-untyped-call]  # redis-py's gap

    class Client(redis.Redis):
        def pubsub(self, **options: Any) -> PubSub:
            return Subscriber(self.connection_pool, **options)

    url = beatless.app.settings.redis_url
    subscription = Subscription(lambda: Client.from_url(url), "beatless:events:none:none")
    assert subscription.ensure()
    with lock:  # as another thread would that ends its own stream
        child = ForkedChild(lambda: "goes on")
    with child:
        assert child.answer() == "goes on"
    subscription.close()
