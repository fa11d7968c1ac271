"""Celery's events about tasks: a worker sends them while somebody listens, and is not told who."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery.events.dispatcher import EventDispatcher
from kombu import Connection, Exchange, Queue

from beatless import App, Settings
from beatless.local.valkey import EmbeddedValkey
from beatless.worker import task_events
from tests.valkeys import until


class Monitor:
    """Hears events of a worker, as Flower and `celery events` do."""

    def __init__(self, pubsub: Any, pattern: str) -> None:
        self._pubsub = pubsub
        pubsub.psubscribe(pattern)
        until(lambda: pubsub.get_message(timeout=1.0) is not None)  # it is heard from now on

    def heard(self, last: str) -> list[str]:
        """The ids of the tasks that it hears of, up to this one."""
        ids: list[str] = []
        while last not in ids:
            message = self._pubsub.get_message(timeout=60.0)
            assert message is not None, f"{last} is not heard, only {ids}"
            # As kombu packs its messages; a prefork worker puts several events into one.
            found = json.loads(base64.b64decode(json.loads(message["data"])["body"]))
            ids += [event["uuid"] for event in (found if isinstance(found, list) else [found])]
        return ids


@contextmanager
def monitor(app: App, events: str) -> Iterator[Monitor]:
    prefix = app.settings.prefix
    with app.redis() as client, client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
        yield Monitor(pubsub, f"{prefix}:/*.{prefix}.celeryev/{events}")


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A server of which the kit is no listener."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def app(valkey: EmbeddedValkey) -> App:
    return App(Settings(database_url="postgresql://127.0.0.1:1/x", redis_url=valkey.url), [])


@pytest.fixture
def dispatcher(app: App, monkeypatch: pytest.MonkeyPatch) -> Iterator[EventDispatcher]:
    """A worker's, for which a quarter of a second is an hour."""
    monkeypatch.setattr(task_events, "UNHEARD_S", 3600.0)
    with (
        app.celery.connection_for_write() as connection,
        app.celery.events.Dispatcher(connection, hostname="worker@test") as found,
    ):
        yield found


def test_after_one_that_nobody_heard_events_of_tasks_are_not_sent(
    app: App, dispatcher: EventDispatcher
) -> None:
    dispatcher.send("task-started", uuid="unheard")
    with monitor(app, "*") as ears:
        dispatcher.send("task-started", uuid="kept")
        dispatcher.send("worker-heartbeat", uuid="heartbeat")
        assert ears.heard("heartbeat") == ["heartbeat"]


def test_a_monitor_that_comes_later_hears_the_first_event_after_the_silence(
    app: App, dispatcher: EventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_events, "UNHEARD_S", 0.0)
    dispatcher.send("task-started", uuid="unheard")
    monkeypatch.undo()
    with monitor(app, "task.*") as ears:
        for uuid in ("1", "2", "3"):
            dispatcher.send("task-started", uuid=uuid)
        assert ears.heard("3") == ["1", "2", "3"]


def test_a_worker_falls_silent_again_when_the_monitor_has_gone(
    app: App, dispatcher: EventDispatcher
) -> None:
    with monitor(app, "*") as ears:
        dispatcher.send("task-started", uuid="heard")
        assert ears.heard("heard") == ["heard"]

    def unheard() -> bool:
        dispatcher.send("task-started", uuid="unheard")
        with monitor(app, "*") as ears:
            dispatcher.send("task-started", uuid="kept")
            dispatcher.send("worker-heartbeat", uuid="heartbeat")
            return ears.heard("heartbeat") == ["heartbeat"]

    until(unheard)  # Redis may learn of its going later than we do


def test_who_hears_of_workers_alone_is_no_reason_to_tell_of_tasks(
    app: App, dispatcher: EventDispatcher
) -> None:
    """As the other workers with Celery's gossip."""
    with monitor(app, "worker.*") as gossip:
        dispatcher.send("task-started", uuid="unheard")
        dispatcher.send("worker-heartbeat", uuid="heartbeat")
        assert gossip.heard("heartbeat") == ["heartbeat"]
        with monitor(app, "*") as ears:
            dispatcher.send("task-started", uuid="kept")
            dispatcher.send("worker-heartbeat", uuid="heartbeat")
            assert ears.heard("heartbeat") == ["heartbeat"]


def test_who_hears_of_tasks_alone_is_told_of_all_of_them(
    app: App, dispatcher: EventDispatcher
) -> None:
    with monitor(app, "task.*") as ears:
        for uuid in ("1", "2"):
            dispatcher.send("task-started", uuid=uuid)
            dispatcher.send("worker-heartbeat", uuid="heartbeat")
        assert ears.heard("2") == ["1", "2"]


def test_what_a_prefork_worker_gathers_is_kept_back_too(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events go together, once in each turn of its loop."""
    monkeypatch.setattr(task_events, "UNHEARD_S", 3600.0)
    with (
        app.celery.connection_for_write() as connection,
        app.celery.events.Dispatcher(
            connection, hostname="worker@test", buffer_group=["task"]
        ) as dispatcher,
    ):
        for uuid in ("1", "2"):
            dispatcher.send("task-started", uuid=uuid)
        dispatcher.flush()
        with monitor(app, "*") as ears:
            dispatcher.send("task-started", uuid="kept")
            dispatcher.flush()
            dispatcher.send("worker-heartbeat", uuid="heartbeat")
            assert ears.heard("heartbeat") == ["heartbeat"]


def test_a_broker_that_does_not_tell_of_listeners_gets_every_event(
    app: App, tmp_path: Path
) -> None:
    folders = ("data_folder_in", "data_folder_out", "control_folder")
    options = {name: str(tmp_path) for name in folders}
    with (
        Connection("filesystem://", transport_options=options) as connection,
        app.celery.events.Dispatcher(connection, hostname="worker@test") as dispatcher,
    ):
        exchange: Exchange = dispatcher.exchange
        events = connection.SimpleQueue(Queue("heard", exchange, routing_key="#"))
        for uuid in ("1", "2", "3"):
            dispatcher.send("task-started", uuid=uuid)
        found = [events.get(timeout=60).payload["uuid"] for _ in range(3)]
        assert sorted(found) == ["1", "2", "3"]
        events.close()
