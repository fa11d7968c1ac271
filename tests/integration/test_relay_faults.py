"""Relays as processes, frozen and killed in the middle of a batch; Redis and a broker that go away.

Each test has the server that it hurts for itself: others use the shared ones meanwhile.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic

import psycopg
import pytest
import redis

from beatless import App, RunState
from beatless.local.valkey import EmbeddedValkey
from beatless.outbox.backoff import Backoff
from beatless.outbox.message import SHARDS
from beatless.outbox.observer import BatchFailed, Drained, RelayAsleep, StalledRelayEnded
from beatless.outbox.relay import Relay
from beatless.streams.messages import parse
from beatless.testing import Kit
from tests.integration.test_relay import Announcements, shards_of

APP = "tests.plans:app"
QUICK = Backoff(initial=0.01, cap=0.05)

WATCHDOG = 1.0


class Wire:
    """Everything that is published of one run, doubles and all."""

    def __init__(self, client: redis.Redis, channel: str) -> None:
        self.seqs: list[int] = []
        self._ear = client.pubsub(ignore_subscribe_messages=True)
        self._ear.subscribe(channel)
        self._ear.get_message(timeout=60)

    def hear(self, count: int) -> list[int]:
        """Wait for so many events."""
        deadline = monotonic() + 60
        while len(self.seqs) < count:
            assert monotonic() < deadline, self.seqs
            if message := self._ear.get_message(timeout=1):
                self.seqs += [event.seq for event in parse(message["data"])]
        return self.seqs

    def close(self) -> None:
        self._ear.close()


@contextmanager
def wire(app: App, run_id: str) -> Iterator[Wire]:
    client = app.redis()
    listening = Wire(client, app.streams.channel(run_id))
    try:
        yield listening
    finally:
        listening.close()
        client.close()


@contextmanager
def standby(app: App, **options) -> Iterator[tuple[Relay, Announcements]]:
    announcements = Announcements()
    relay = app.relay(observer=announcements, backoff=QUICK, **options)
    relay.start()
    try:
        yield relay, announcements
    finally:
        relay.stop()


def wait_stopped(child: subprocess.Popen[bytes]) -> None:
    """Return when the process has been stopped, by itself or by us."""
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


RELAY = f"from tests.plans import app; app.relay(watchdog={WATCHDOG}).run()"


@contextmanager
def freezing(app: App) -> Iterator[subprocess.Popen[bytes]]:
    """A relay that looks after others as often as its standby, and stops with a batch in hand."""
    child = subprocess.Popen(
        [sys.executable, "-c", RELAY],
        env=os.environ | app.settings.to_env() | {"BEATLESS_FAULT": "relay.after_claim@1:stop"},
    )
    try:
        wait_stopped(child)
        yield child
    finally:
        child.kill()
        child.wait()


@pytest.mark.long(minutes=1)
def test_a_relay_frozen_in_the_middle_of_a_batch_is_replaced_and_harms_nothing_when_it_wakes(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps", delay=3600)  # before, and with no task: it has the event
    with wire(beatless_app, run.run_id) as published, freezing(beatless_app) as frozen:
        leaders = postgres.execute(
            "SELECT DISTINCT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
            f" AND classid = ({beatless_app.queries.leader_key})::oid AND objsubid = 2"
        ).fetchall()
        with standby(beatless_app, watchdog=WATCHDOG) as (_, announcements):
            assert [(announcements.wait(StalledRelayEnded).pid,)] == leaders
            announcements.wait_until(lambda seen: shards_of(seen) == SHARDS)
            beatless.wait_for_outbox_flush(run.run_id)
            beatless.advance(3600)
            while beatless.step(run.run_id):
                beatless.wait_for_outbox_flush(run.run_id)
            assert published.hear(6) == [1, 2, 3, 4, 5, 6]
            sent = postgres.execute("SELECT run_id FROM dispatches").fetchall()

            os.kill(frozen.pid, signal.SIGCONT)

            assert published.hear(7) == [1, 2, 3, 4, 5, 6, 1]  # what it had in its hands
            assert postgres.execute("SELECT run_id FROM dispatches").fetchall() == sent
            # It has noticed, and is a member again.
            announcements.wait_until(lambda seen: shards_of(seen) == SHARDS // 2)
            runs = [beatless.start_run("two_steps") for _ in range(20)]
            for each in runs:
                beatless.wait_for_outbox_flush(each.run_id)
        last = beatless.start_run("two_steps")
        beatless.wait_for_outbox_flush(last.run_id)  # now it leads all
    beatless.verify()


def test_a_leader_killed_between_publish_and_delete_doubles_on_the_wire_and_loses_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("two_steps") for _ in range(3)]
    with wire(beatless_app, runs[0].run_id) as published:
        dying = beatless.relay_process(APP, fault="relay.after_publish@1:kill")
        dying.reap(monotonic() + 60)
        assert published.hear(1) == [1]
        with standby(beatless_app):
            for run in runs:
                beatless.wait_for_outbox_flush(run.run_id)
            assert published.hear(2) == [1, 1]
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (0,)
    assert beatless.work_until_idle() >= 3
    beatless.verify()


class TestBrokerThatHangs:
    @pytest.fixture
    def broker(self, tmp_path: Path) -> Iterator[EmbeddedValkey]:
        with EmbeddedValkey(tmp_path / "broker") as server:
            yield server

    @pytest.fixture
    def beatless_settings(self, broker: EmbeddedValkey) -> dict[str, object]:
        return {"broker_url": broker.url}

    def test_a_broker_that_hangs_stops_no_event(
        self, beatless: Kit, beatless_app: App, broker: EmbeddedValkey
    ) -> None:
        with standby(beatless_app, redispatch=3600) as (_, announcements):
            announcements.wait(RelayAsleep)
            before = beatless.start_run("two_steps")
            beatless.wait_for_outbox_flush(before.run_id)
            announcements.wait_until(lambda seen: tasks_in(seen) >= 1)
            os.kill(broker.pid, signal.SIGSTOP)
            try:
                for _ in range(3):
                    run = beatless.start_run("two_steps")
                    beatless.wait_for_outbox_flush(run.run_id, timeout=60)
                assert tasks_in(announcements.seen) == 1
            finally:
                os.kill(broker.pid, signal.SIGCONT)
            announcements.wait_until(lambda seen: tasks_in(seen) >= 4)
        assert beatless.work_until_idle() >= 4
        beatless.verify()


def tasks_in(seen) -> int:
    return sum(signal.tasks for signal in seen if isinstance(signal, Drained))


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "bus") as server:
        yield server


@pytest.mark.slow
def test_redis_refused_then_back_loses_no_event_and_stops_no_dispatch(
    beatless: Kit, beatless_app: App, bus: EmbeddedValkey, postgres: psycopg.Connection
) -> None:
    """Events go through a Redis of the test's own, tasks through the shared one."""
    settings = replace(beatless_app.settings, redis_url=bus.url)
    app = App(settings, list(beatless_app.plans.values()))
    with standby(app, redispatch=3600) as (_, announcements):
        announcements.wait(RelayAsleep)
        first = beatless.start_run("two_steps")
        announcements.wait_until(lambda seen: tasks_in(seen) >= 1 and events_in(seen) >= 1)
        bus.stop()

        runs = [beatless.start_run("two_steps") for _ in range(3)]
        announcements.wait(BatchFailed, 2)
        announcements.wait_until(lambda seen: tasks_in(seen) >= 4)
        for run in runs:
            while beatless.step(run.run_id):
                pass
        waiting = postgres.execute("SELECT count(*) FROM run_outbox").fetchone()[0]
        assert waiting > 3

        bus.start()
        announcements.wait_until(lambda seen: events_in(seen) >= 1 + waiting)
    app.close()
    assert beatless.client.get_run(first.run_id).state is RunState.QUEUED
    for run in runs:
        assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    beatless.drain_outbox_once()
    beatless.verify()


def events_in(seen) -> int:
    return sum(signal.events for signal in seen if isinstance(signal, Drained))
