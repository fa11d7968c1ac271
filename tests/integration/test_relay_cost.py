"""What a relay costs: looks, statements and Python calls, with limits that no machine changes."""

import sys
from collections.abc import Callable, Iterator

import pytest

from beatless import App, Plan, StepContext, step
from beatless.client import RunRequest
from beatless.outbox import session_loop
from beatless.outbox.doorbell import Sessions
from beatless.outbox.message import TaskMessage
from beatless.outbox.observer import RelayAsleep, RelayWoke
from beatless.outbox.publishers import CeleryTaskPublisher
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.session_loop import (
    FULL_BATCH_MESSAGES,
    LONGEST_PAUSE_S,
    PAUSE_PER_MESSAGE_S,
    SessionLoop,
)
from beatless.testing import Kit
from tests.integration.test_relay import noting, running


@step
def only(ctx: StepContext) -> int:
    return 1


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("job", [only])]


def test_a_start_costs_a_sleeping_relay_two_round_trips(beatless: Kit, beatless_app: App) -> None:
    """One finds its event and its message, the other notes that both have gone."""
    connect, said = noting(beatless_app)
    with running(beatless_app, connect=connect, watchdog=600) as (_, announcements):
        begin = len(said)
        beatless.start_run("job")
        announcements.wait(RelayWoke)
        statements = said[begin:].count("a cursor")
    # Twice events and tasks; once each to delete, to mark, and when the next is due.
    assert statements <= 2 * 2 + 3


def test_a_relay_that_finds_nothing_looks_ever_more_rarely(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_loop, "LONGEST_NAP_S", 3600.0)
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
    calls = calls_of(lambda: drain.step(ALL_SHARDS))
    relay.stop()
    assert calls <= 240


def test_a_message_to_the_broker_costs_few_calls(beatless_app: App) -> None:
    publisher = CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix)
    messages = [
        TaskMessage(run_id=f"run-{n}", task="job", queue="default", attempt=1) for n in range(64)
    ]
    publisher.publish(messages)  # what is made once: the connection, the queue
    calls = calls_of(lambda: publisher.publish(messages))
    with beatless_app.celery.producer_or_acquire() as producer:
        batches = getattr(producer, "supports_batch_publish", False)
    # By kombu 5.7, in batches; each message of its own before.
    assert calls / len(messages) <= (150 if batches else 700)
