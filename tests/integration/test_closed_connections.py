"""Messages over which Redis closes the connection, and outages that must not be taken for them."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import redis

from beatless import App, Plan, StepContext, step
from beatless.doctor import Doctor, Finding, Status
from beatless.local.valkey import EmbeddedValkey
from beatless.outbox import event_lane
from beatless.outbox.backoff import Backoff
from beatless.outbox.config import RelayConfig
from beatless.outbox.errors import PublishFailed
from beatless.outbox.event_lane import MAX_REJECTIONS
from beatless.outbox.message import EventMessage
from beatless.outbox.observer import RunSetAside
from beatless.outbox.publishers import (
    CeleryTaskPublisher,
    EventPublisher,
    RedisEventPublisher,
    TaskPublisher,
)
from beatless.outbox.relay import Relay
from beatless.streams.messages import parse
from beatless.testing import Kit
from tests.integration.test_relay import Announcements

MEGABYTE = 1024 * 1024


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "bus") as server:
        yield server


@step
def say(ctx: StepContext) -> None:
    """Traces as large as the input says."""
    for size in ctx.input:
        ctx.trace("said", text="x" * size)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("says", [say])]


@pytest.fixture
def beatless_settings() -> dict[str, object]:
    return {"max_event_bytes": 4 * MEGABYTE}


@pytest.fixture
def app(beatless_app: App, bus: EmbeddedValkey) -> Iterator[App]:
    """The test's app, whose events go through a Redis of the test's own."""
    settings = replace(beatless_app.settings, redis_url=bus.url)
    with closing(App(settings, list(beatless_app.plans.values()))) as found:
        yield found


class Hatch:
    """A publisher that notes what was accepted, and acts before it sends the events of a run."""

    def __init__(self, app: App) -> None:
        client = app.redis()
        self._client = client
        self._real = RedisEventPublisher(client, app.settings.prefix)
        self.seqs: dict[str, list[int]] = {}
        self.before_send = lambda: None

    def publish(self, messages: list[EventMessage]) -> None:
        if messages[0].run_id:
            self.before_send()
        self._real.publish(messages)
        for message in messages:
            if message.run_id:
                seqs = [event.seq for event in parse(message.body)]
                self.seqs.setdefault(message.run_id, []).extend(seqs)

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def hatch(app: App) -> Iterator[Hatch]:
    found = Hatch(app)
    yield found
    found.close()


@pytest.fixture
def announcements() -> Announcements:
    return Announcements()


@pytest.fixture
def relay(app: App, hatch: Hatch, announcements: Announcements, monkeypatch) -> Iterator[Relay]:
    monkeypatch.setattr(event_lane, "CLOSED_REST_S", 0.0)
    events: EventPublisher = hatch
    tasks: TaskPublisher = CeleryTaskPublisher(app.celery, app.settings.prefix)
    found = Relay(
        RelayConfig(
            queries=app.queries,
            connect=app.direct_connection,
            events=events,
            tasks=tasks,
            backoff=Backoff(initial=0.0, cap=0.0),
            observer=announcements,
        )
    )
    yield found
    found.stop()


def limit(bus: EmbeddedValkey, name: str, size: int) -> None:
    with redis.Redis.from_url(bus.url) as admin:
        admin.config_set(name, size)


def examine(app: App, name: str) -> Finding:
    (found,) = Doctor(app).examine([name])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["proto-max-bulk-len", "client-query-buffer-limit"])
def test_an_event_over_which_redis_closes_the_connection_is_a_dead_letter_that_names_its_size(
    name: str,
    beatless: Kit,
    app: App,
    bus: EmbeddedValkey,
    hatch: Hatch,
    relay: Relay,
    caplog,
) -> None:
    limit(bus, name, MEGABYTE)
    assert name in examine(app, "message size").text
    good = beatless.start_run("says").run_id
    bad = beatless.start_run("says", [2 * MEGABYTE, 1]).run_id
    beatless.step(bad)
    later = beatless.start_run("says").run_id

    relay.drain_once()
    assert hatch.seqs == {good: [1], bad: [1, 2], later: [1]}  # at once
    for _ in range(MAX_REJECTIONS):
        relay.drain_once()

    (letter,) = beatless.client.dead_letters()
    assert (letter.run_id, letter.from_seq, letter.to_seq) == (bad, 3, 3)
    assert hatch.seqs[bad] == [1, 2, 4, 5, 6]
    assert "2,097," in letter.reason
    assert name in letter.reason
    parked = [each for each in caplog.records if each.getMessage().startswith("message parked")]
    assert [each.run_id for each in parked] == [bad]
    found = examine(app, "outbox")
    assert found.status is Status.WARNING
    assert bad in found.text
    assert "2,097," in found.text

    limit(bus, name, 8 * MEGABYTE)
    beatless.client.requeue_dead_letter(letter.id)
    relay.drain_once()
    assert hatch.seqs[bad] == [1, 2, 4, 5, 6, 3]
    assert examine(app, "message size").status is Status.OK


def test_events_that_are_too_large_together_only_are_published_one_by_one(
    beatless: Kit, bus: EmbeddedValkey, hatch: Hatch, relay: Relay
) -> None:
    limit(bus, "proto-max-bulk-len", MEGABYTE)
    run = beatless.start_run("says", [MEGABYTE * 3 // 4] * 3).run_id
    other = beatless.start_run("says").run_id
    beatless.step(run)
    relay.drain_once()
    assert hatch.seqs == {run: list(range(1, 8)), other: [1]}
    assert beatless.client.dead_letters() == []


@pytest.mark.slow
def test_a_redis_that_is_killed_in_the_middle_of_every_batch_makes_no_dead_letter(
    beatless: Kit, bus: EmbeddedValkey, hatch: Hatch, relay: Relay, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("says").run_id for _ in range(3)]

    def kill() -> None:
        hatch.before_send = lambda: None
        bus.crash()

    for _ in range(MAX_REJECTIONS + 1):
        hatch.before_send = kill
        relay.drain_once()
        assert hatch.seqs == {}
        bus.start()
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (3,)
    relay.drain_once()
    assert hatch.seqs == {run: [1] for run in runs}
    assert beatless.client.dead_letters() == []


def test_connections_that_are_cut_now_and_then_make_no_dead_letter(
    beatless: Kit, hatch: Hatch, relay: Relay
) -> None:
    """As by a proxy whose idle connections are gone: the next one is taken at once."""
    sends = 0

    def cut() -> None:
        nonlocal sends
        sends += 1
        if sends % 3:
            raise PublishFailed("Redis", "Connection reset by peer", is_closed=True)

    hatch.before_send = cut
    run = beatless.start_run("says", [1] * 30).run_id
    beatless.step(run)
    for _ in range(40):
        relay.drain_once()
    assert hatch.seqs[run] == list(range(1, 35))
    assert beatless.client.dead_letters() == []


@pytest.mark.slow
def test_an_outage_in_between_begins_the_count_of_closed_connections_anew(
    beatless: Kit, bus: EmbeddedValkey, relay: Relay, announcements: Announcements
) -> None:
    limit(bus, "proto-max-bulk-len", MEGABYTE)
    beatless.step(beatless.start_run("says", [2 * MEGABYTE]).run_id)
    for times in (1, 2):
        while len(announcements.all(RunSetAside)) < times * (MAX_REJECTIONS - 1):
            relay.drain_once()
        assert beatless.client.dead_letters() == []
        bus.crash()
        relay.drain_once()
        bus.start()
        limit(bus, "proto-max-bulk-len", MEGABYTE)
