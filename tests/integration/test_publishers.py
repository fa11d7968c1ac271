"""The two real doors: what they carry, and what they say when they are shut."""

import socket
import threading
from contextlib import closing, suppress
from dataclasses import replace

import pytest
import redis
from amqp.exceptions import AccessRefused, PreconditionFailed, ResourceError
from celery import Celery
from kombu import Message

from beatless import App
from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import EventMessage, TaskMessage
from beatless.outbox.publishers import (
    CeleryTaskPublisher,
    RedisEventPublisher,
    channel_for,
    worker_queue,
)
from beatless.streams.messages import parse
from beatless.testing import Kit


def elsewhere(app: App, shut_port: int) -> App:
    """The same app, with its Redis and its broker where nobody listens."""
    url = f"redis://127.0.0.1:{shut_port}/0"
    settings = replace(app.settings, redis_url=url, broker_url=url)
    return App(settings, list(app.plans.values()))


def test_a_redis_that_has_forgotten_the_script_is_told_again(beatless_app: App) -> None:
    """As after a restart."""
    client = beatless_app.redis()
    prefix = beatless_app.settings.prefix
    door = RedisEventPublisher(client, prefix)
    ear = client.pubsub(ignore_subscribe_messages=True)
    ear.subscribe(channel_for(prefix, "o", "r"))
    ear.get_message(timeout=60)
    for body in (b"one", b"two"):
        door.publish([EventMessage(origin="o", run_id="r", body=body)])
        assert ear.get_message(timeout=60)["data"] == body
        client.script_flush()
    ear.close()
    client.close()


def test_a_batch_goes_to_each_runs_own_channel_in_order(beatless: Kit) -> None:
    runs = [beatless.start_run("agents.run") for _ in range(3)]
    client = beatless.app.redis()
    ear = client.pubsub(ignore_subscribe_messages=True)
    ear.psubscribe(beatless.app.streams.channel("*"))
    ear.get_message(timeout=60)
    beatless.work_until_idle()

    heard: dict[bytes, list[int]] = {}
    while sum(map(len, heard.values())) < 39:
        message = ear.get_message(timeout=60)
        heard.setdefault(message["channel"], []).extend(e.seq for e in parse(message["data"]))
    channels = [beatless.app.streams.channel(run.run_id) for run in runs]
    assert heard == {channel.encode(): list(range(1, 14)) for channel in channels}
    ear.close()
    client.close()


def test_a_redis_that_is_away_is_a_failure_that_can_be_repeated(
    beatless_app: App, shut_port: int
) -> None:
    app = elsewhere(beatless_app, shut_port)
    client = app.redis()
    with pytest.raises(PublishFailed, match="Redis cannot be reached"):
        RedisEventPublisher(client, "p").publish([EventMessage(origin="o", run_id="r", body=b"x")])
    client.close()
    app.close()


def take(app: App, queue: str = "default") -> list[Message]:
    """What lies in a queue of the broker, in order, as a consumer gets it."""
    found = []
    with app.celery.connection_for_read() as connection:
        bound = worker_queue(app.settings.prefix, queue)(connection.default_channel)
        bound.declare()
        while (message := bound.get(accept=["json"])) is not None:
            message.ack()
            found.append(message)
    return found


def test_a_task_message_is_what_any_celery_app_sends(beatless_app: App) -> None:
    """So that every worker, Flower and every other tool read it as their own."""
    prefix = beatless_app.settings.prefix
    order = TaskMessage(run_id="r1", task="two_steps", queue="mail", attempt=2)
    CeleryTaskPublisher(beatless_app.celery, prefix).publish([order])
    (ours,) = take(beatless_app, "mail")
    with Celery("plain", broker=beatless_app.settings.broker_url, set_as_current=False) as plain:
        plain.conf.broker_transport_options = {"global_keyprefix": f"{prefix}:"}
        plain.send_task(
            "two_steps",
            ("r1", 2),
            task_id="r1.2",
            queue=worker_queue(prefix, "mail"),
            ignore_result=True,
            retry=False,
        )
    (theirs,) = take(beatless_app, "mail")

    assert ours.headers == theirs.headers
    assert ours.payload == theirs.payload == [["r1", 2], {}, CHORDS_AND_THE_LIKE]
    assert (ours.content_type, ours.content_encoding) == ("application/json", "utf-8")
    assert (theirs.content_type, theirs.content_encoding) == ("application/json", "utf-8")
    varying = {"delivery_tag", "reply_to"}
    assert {k: v for k, v in ours.properties.items() if k not in varying} == {
        k: v for k, v in theirs.properties.items() if k not in varying
    }
    # Protocol 2: what a worker needs to know before it reads the body is in the headers.
    headers = ours.headers
    assert (headers["task"], headers["id"], headers["root_id"]) == ("two_steps", "r1.2", "r1.2")
    assert (headers["retries"], headers["eta"], headers["expires"]) == (0, None, None)
    assert headers["argsrepr"] == "('r1', 2)"
    assert ours.properties["correlation_id"] == "r1.2"
    assert ours.properties["delivery_mode"] == 2
    assert ours.delivery_info == theirs.delivery_info
    assert ours.delivery_info["routing_key"] == f"{prefix}.mail"


CHORDS_AND_THE_LIKE = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def test_a_batch_lies_in_the_broker_in_its_order_each_under_its_own_id(beatless_app: App) -> None:
    orders = [
        TaskMessage(run_id=f"r{n}", task="two_steps", queue="default", attempt=1) for n in range(20)
    ]
    CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix).publish(orders)

    messages = take(beatless_app)
    assert [message.payload[0] for message in messages] == [[o.run_id, 1] for o in orders]
    assert [message.headers["id"] for message in messages] == [f"r{n}.1" for n in range(20)]


def test_a_priority_is_kept_out_of_the_broker(beatless: Kit) -> None:
    """It is decided when the relay dispatches; on Redis, priorities would be lists of their own."""
    for priority in (0, 3, 9):
        beatless.start_run("two_steps", priority=priority)
    beatless.drain_outbox_once()

    prefix = beatless.app.settings.prefix
    with closing(beatless.app.redis()) as client:
        lists = [key for key in client.scan_iter(f"{prefix}:*") if client.type(key) == b"list"]
        assert lists == [f"{prefix}:{prefix}.default".encode()]
        assert client.llen(lists[0]) == 3
    messages = take(beatless.app)
    assert {message.properties["priority"] for message in messages} == {0}
    sent = [beatless.client.get_run(message.payload[0][0]).priority for message in messages]
    assert sent == [9, 3, 0]


@pytest.mark.parametrize("count", [1, 3])
def test_a_broker_that_is_away_is_a_failure_that_can_be_repeated(
    beatless_app: App, shut_port: int, count: int
) -> None:
    app = elsewhere(beatless_app, shut_port)
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
                door.publish([EventMessage(origin="o", run_id="r", body=b"x")])
        listener.shutdown(socket.SHUT_RDWR)
        answering.join(60)
    assert calls == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ResourceError("short of memory"), PublishFailed, "cannot be reached: .*short of memory"),
        (PreconditionFailed("inequivalent arg", (40, 10)), PublishRefused, "refuses .*inequivale"),
        (AccessRefused("Login was refused", (0, 0)), PublishFailed, "reached: .*Login was refused"),
    ],
)
def test_whatever_a_brokers_library_raises_is_a_failure_of_the_broker_or_of_a_queue(
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    kind: type[Exception],
    message: str,
) -> None:
    """amqp's errors have no base in common with kombu's, nor with the system's."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(beatless_app.celery.amqp, "send_task_message", refuse)
    door = CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix)
    with pytest.raises(kind, match=message):
        door.publish([TaskMessage(run_id="r", task="t", queue="default", attempt=1)])
