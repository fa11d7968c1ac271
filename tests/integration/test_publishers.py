"""The two real doors: what they carry, and what they say when they are shut."""

import socket
import threading
from contextlib import closing, suppress
from dataclasses import replace

import pytest
import redis
from amqp.exceptions import PreconditionFailed

from jobs import App
from jobs.services import free_port
from jobs.stream import parse
from jobs.testing import Kit
from outbox.errors import PublishFailed
from outbox.message import EventMessage, TaskMessage
from outbox.publishers import CeleryTaskPublisher, RedisEventPublisher, channel_for


def elsewhere(app: App) -> App:
    """The same app, with its Redis and its broker where nobody listens."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    settings = replace(app.settings, redis_url=url, broker_url=url)
    return App(settings, list(app.plans.values()))


def test_a_redis_that_has_forgotten_the_script_is_told_again(beatless_app: App) -> None:
    """As after a restart."""
    client = beatless_app.redis()
    prefix = beatless_app.settings.prefix
    door = RedisEventPublisher(client, prefix)
    ear = client.pubsub(ignore_subscribe_messages=True)
    ear.subscribe(channel_for(prefix, "r"))
    ear.get_message(timeout=5)
    for body in (b"one", b"two"):
        door.publish([EventMessage(run_id="r", body=body)])
        assert ear.get_message(timeout=5)["data"] == body
        client.script_flush()
    ear.close()
    client.close()


def test_a_batch_goes_to_each_runs_own_channel_in_order(beatless: Kit) -> None:
    runs = [beatless.start_run("agents.run") for _ in range(3)]
    prefix = beatless.app.settings.prefix
    client = beatless.app.redis()
    ear = client.pubsub(ignore_subscribe_messages=True)
    ear.psubscribe(channel_for(prefix, "*"))
    ear.get_message(timeout=5)
    beatless.work_until_idle()

    heard: dict[bytes, list[int]] = {}
    while sum(map(len, heard.values())) < 39:
        message = ear.get_message(timeout=5)
        heard.setdefault(message["channel"], []).extend(e.seq for e in parse(message["data"]))
    assert heard == {channel_for(prefix, run.run_id).encode(): list(range(1, 14)) for run in runs}
    ear.close()
    client.close()


def test_a_redis_that_is_away_is_a_failure_that_can_be_repeated(beatless_app: App) -> None:
    app = elsewhere(beatless_app)
    client = app.redis()
    with pytest.raises(PublishFailed, match="Redis cannot be reached"):
        RedisEventPublisher(client, "p").publish([EventMessage(run_id="r", body=b"x")])
    client.close()
    app.close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_broker_that_is_away_is_a_failure_that_can_be_repeated(
    beatless_app: App, count: int
) -> None:
    app = elsewhere(beatless_app)
    door = CeleryTaskPublisher(app.celery, "p")
    with pytest.raises(PublishFailed, match="the broker cannot be reached"):
        door.publish(
            [TaskMessage(run_id=f"r{n}", task="t", queue="q", attempt=1) for n in range(count)]
        )
    app.close()


def test_a_redis_that_hangs_up_is_asked_once_and_not_again_behind_the_relays_back(
    beatless_app: App,
) -> None:
    """The relay has a back-off of its own; redis-py's would block its drains for seconds."""
    calls = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal calls
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()
                    calls += 1

        answering = threading.Thread(target=hang_up)
        answering.start()
        with closing(redis.Redis(port=listener.getsockname()[1])) as client:
            door = RedisEventPublisher(client, "p")
            with pytest.raises(PublishFailed, match="Redis cannot be reached"):
                door.publish([EventMessage(run_id="r", body=b"x")])
        listener.shutdown(socket.SHUT_RDWR)
        answering.join(10)
    assert calls == 1


def test_whatever_a_brokers_library_raises_is_a_failure_that_can_be_repeated(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """amqp's errors have no base in common with kombu's, nor with the system's."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise PreconditionFailed("inequivalent arg 'x-max-priority'")

    monkeypatch.setattr(beatless_app.celery, "send_task", refuse)
    door = CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix)
    with pytest.raises(PublishFailed, match=r"broker cannot be reached: .*inequivalent arg"):
        door.publish([TaskMessage(run_id="r", task="t", queue="default", attempt=1)])
