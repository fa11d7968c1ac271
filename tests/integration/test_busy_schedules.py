"""Schedules under a relay that stays awake: it looks when a tick is due, and polls for none."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from beatless import App, Plan, Schedule, StepContext, step
from beatless.outbox import session_loop
from beatless.outbox.clock import since_boot
from beatless.outbox.due_schedules import HELD_POLL_S, STANDBY_S, DueSchedules
from beatless.outbox.observer import FiredTick, ignore
from beatless.outbox.queries import ALL_SHARDS
from beatless.testing import Kit
from tests.integration.test_relay import noting, running

RARE_S = 300 * 86_400
"""Seconds between two ticks of which none comes during a test."""


@step
def note_tick(ctx: StepContext) -> None: ...


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("report", [note_tick])]


class Looks:
    """The looks of a relay for due ticks, and what they have fired."""

    def __init__(self, app: App) -> None:
        self._fire = app.firing().fire
        self._news = threading.Condition()
        self.count = 0
        self.fired: list[FiredTick] = []

    def fire(
        self, connection: psycopg.Connection[Any], now: datetime | None
    ) -> Sequence[FiredTick]:
        fired = self._fire(connection, now)
        with self._news:
            self.count += 1
            self.fired.extend(fired)
            self._news.notify_all()
        return fired

    def wait(self, *, looks: int = 0, ticks: int = 0) -> None:
        with self._news:
            assert self._news.wait_for(
                lambda: self.count >= looks and len(self.fired) >= ticks, timeout=60
            ), (self.count, self.fired)


@dataclass
class Busy:
    """A relay that never sleeps."""

    looks: Looks
    said: list[str]

    def forecasts(self) -> int:
        """The statements by which it has asked for the next tick."""
        return sum("FROM" in text and "look_at" in text for text in self.said)

    def wait_for_steps(self, count: int) -> None:
        """Let it drain so many times more."""
        until, waiting = len(self.said) + count, threading.Event()
        for _ in range(60_000):
            if len(self.said) >= until:
                return
            waiting.wait(0.001)
        raise AssertionError("the relay drains no more")


@contextmanager
def busy(app: App) -> Iterator[Busy]:
    connect, said = noting(app)
    looks = Looks(app)
    relay = app.relay(connect=connect, fire=looks.fire, linger=3600)
    relay.start()
    try:
        looks.wait(looks=1)
        yield Busy(looks, said)
    finally:
        relay.stop()


def test_a_busy_relay_sends_nothing_about_schedules_until_one_is_due(
    beatless: Kit, beatless_app: App
) -> None:
    with busy(beatless_app) as relay:
        beatless.client.create_schedule(Schedule("rare", "report", every=RARE_S))
        relay.looks.wait(looks=2)
        relay.wait_for_steps(10)
        looks, forecasts = relay.looks.count, relay.forecasts()
        relay.wait_for_steps(300)
        assert (relay.looks.count, relay.forecasts()) == (looks, forecasts)


@pytest.mark.parametrize("change", ["create", "update", "resume"])
def test_a_busy_relay_looks_once_when_a_schedule_is_made_changed_or_resumed(
    beatless: Kit, beatless_app: App, change: str
) -> None:
    rare = Schedule("rare", "report", every=RARE_S)
    beatless.client.create_schedule(rare)
    beatless.client.pause_schedule("rare")
    changes = {
        "create": lambda: beatless.client.create_schedule(Schedule("new", "report", every=RARE_S)),
        "update": lambda: beatless.client.update_schedule(rare),
        "resume": lambda: beatless.client.resume_schedule("rare"),
    }
    with busy(beatless_app) as relay:
        relay.wait_for_steps(10)
        looks = relay.looks.count
        changes[change]()
        relay.looks.wait(looks=looks + 1)
        relay.wait_for_steps(10)
        assert relay.looks.count == looks + 1


def test_a_tick_costs_a_busy_relay_one_look_and_one_question_for_the_next(
    beatless: Kit, beatless_app: App
) -> None:
    with busy(beatless_app) as relay:
        made = beatless.client.create_schedule(
            Schedule("rare", "report", every=RARE_S, catch_up="all")
        )
        relay.looks.wait(looks=2)
        relay.wait_for_steps(10)
        looks, forecasts = relay.looks.count, relay.forecasts()
        beatless.advance(3 * RARE_S, ticks=False)
        relay.looks.wait(ticks=3)
        relay.wait_for_steps(10)
        assert relay.looks.count - looks == 3
        assert relay.forecasts() - forecasts == 3
    ticks = sorted(run.tick for run in beatless.client.list_runs())
    assert ticks == [made.next_tick + timedelta(seconds=number * RARE_S) for number in range(3)]


@pytest.fixture
def suspend(postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Suspend the machine until the next tick: only the clock of a relay's waits stands still."""
    suspended_s = [0.0]
    monkeypatch.setattr(session_loop, "since_boot", lambda: since_boot() + suspended_s[0])

    def suspend() -> None:
        postgres.execute("UPDATE schedules SET due_at = now(), look_at = now()")
        suspended_s[0] = RARE_S

    return suspend


def test_a_busy_relay_looks_again_after_a_suspend_of_the_machine(
    beatless: Kit, beatless_app: App, suspend: Callable[[], None]
) -> None:
    beatless.client.create_schedule(Schedule("rare", "report", every=RARE_S))
    with busy(beatless_app) as relay:
        suspend()
        relay.looks.wait(ticks=1)


def test_a_relay_that_sleeps_looks_again_after_a_suspend_of_the_machine(
    beatless: Kit, beatless_app: App, suspend: Callable[[], None]
) -> None:
    beatless.client.create_schedule(Schedule("rare", "report", every=RARE_S))
    looks = Looks(beatless_app)
    with running(beatless_app, fire=looks.fire, watchdog=0.3):
        suspend()
        looks.wait(ticks=1)


def test_a_look_that_finds_nothing_is_followed_by_one_when_the_next_tick_is_due(
    beatless_app: App,
) -> None:
    with beatless_app.direct_connection() as connection:
        schedules = DueSchedules(connection, lambda *_: [], "SELECT 0.3::float8", ignore)
        schedules.look(ALL_SHARDS)
        assert schedules.plan_next(0.3, ALL_SHARDS) == pytest.approx(0.3, abs=1e-6)
        standby = schedules.plan_next(0.3, ALL_SHARDS[1:])
        assert standby == pytest.approx(0.3 + STANDBY_S, abs=1e-6)


def test_a_tick_that_somebody_holds_is_looked_at_after_a_pause(beatless_app: App) -> None:
    with beatless_app.direct_connection() as connection:
        schedules = DueSchedules(connection, lambda *_: [], "SELECT 0.3::float8", ignore)
        schedules.look(ALL_SHARDS)
        assert 0 < schedules.plan_next(-RARE_S, ALL_SHARDS) <= HELD_POLL_S
        assert not schedules.due
        schedules.expect_change()
        assert schedules.due
