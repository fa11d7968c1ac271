"""Schedules: a run for each tick, exactly one, whatever dies and however many relays there are."""

import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    BadRequest,
    Limit,
    Plan,
    Run,
    RunContext,
    Schedule,
    ScheduleConflict,
    ScheduleNotFound,
    StepContext,
    UnknownPlan,
    plan,
    step,
    wait,
)
from beatless.namespaces import stored_id
from beatless.orchestrator.firing import GRACE_S, REPLACING_S, Firing
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.schedule import ScheduleState
from beatless.orchestrator.schedules import PAGE
from beatless.orchestrator.ticks import jitter_s, tick_key
from beatless.outbox.faults import CrashPoints
from beatless.outbox.observer import FiredTick, Signal, TicksFired
from beatless.testing import Kit, time_calls
from tests.hourly import each_hour


@step
def note_tick(ctx: StepContext) -> str | None:
    return ctx.tick and ctx.tick.isoformat()


report = Plan("report", [note_tick])
parked = Plan("parked", [wait("go")])


@plan("dated")
def dated(run: RunContext) -> str | None:
    return run.tick and run.tick.isoformat()


EACH_HOUR = each_hour()
HOURLY = Schedule(
    "hourly",
    report,
    cron=EACH_HOUR,
    input={"of": "all"},
    tags={"kind": "report"},
    group="ada",
)


@pytest.fixture(autouse=True)
def _minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour that ended in a test would bring a tick more."""
    monkeypatch.setitem(globals(), "EACH_HOUR", each_hour())
    monkeypatch.setitem(globals(), "HOURLY", replace(HOURLY, cron=EACH_HOUR))


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [report, parked, dated]


def runs_of(kit: Kit, name: str) -> list[Run]:
    """The runs of a schedule by tick."""
    found = [run for run in kit.client.list_runs(limit=10_000) if run.schedule == name]
    return sorted(found, key=lambda run: (run.tick, run.run_id))


def ticks_of(kit: Kit, name: str) -> list[datetime]:
    return [run.tick for run in runs_of(kit, name)]


def to_next_tick(kit: Kit, name: str) -> float:
    """Seconds until the next tick, and a little more."""
    tick = kit.schedules[name].next_tick
    assert tick is not None
    return (tick - datetime.now(UTC)).total_seconds() + 0.5


def late(kit: Kit, seconds: float) -> None:
    """Time passes in which no relay lives."""
    kit.advance(seconds, ticks=False)


# Ticks


def test_each_tick_starts_one_run_that_knows_it(beatless: Kit) -> None:
    stored = beatless.client.create_schedule(HOURLY)
    first = stored.next_tick
    beatless.advance(2 * 3600)
    beatless.work_until_idle()
    runs = runs_of(beatless, "hourly")
    assert [run.tick for run in runs] == [first, first + timedelta(hours=1)]
    assert [run.result for run in runs] == [run.tick.isoformat() for run in runs]
    assert runs[0].key == f"schedule/hourly/{first:%Y-%m-%dT%H:%MZ}"
    assert (runs[0].input, runs[0].tags) == ({"of": "all"}, {"kind": "report"})
    assert (stored.group, runs[0].group) == ("ada", "ada")
    assert beatless.schedules["hourly"].last_run_id == runs[1].run_id
    beatless.verify()


def test_a_function_knows_the_tick_of_its_run(beatless: Kit) -> None:
    beatless.client.create_schedule(Schedule("dated", dated, every=3600))
    beatless.advance(3600)
    beatless.work_until_idle()
    [run] = runs_of(beatless, "dated")
    assert run.result == run.tick.isoformat()


def test_a_run_that_no_schedule_has_started_has_no_tick(beatless: Kit) -> None:
    run = beatless.start_run("report")
    beatless.work_until_idle()
    found = beatless.client.get_run(run.run_id)
    assert (found.tick, found.schedule, found.result) == (None, None, None)


def test_a_retry_has_the_tick_of_the_run_that_failed(beatless: Kit) -> None:
    beatless.client.create_schedule(HOURLY)
    beatless.advance(3600)
    [run] = runs_of(beatless, "hourly")
    beatless.client.cancel_run(run.run_id)
    again = beatless.client.retry_run(run.run_id)
    assert (again.tick, again.schedule) == (run.tick, "hourly")


def test_no_tick_is_fired_before_its_time(beatless: Kit) -> None:
    beatless.client.create_schedule(HOURLY)
    beatless.drain_outbox_once()
    assert runs_of(beatless, "hourly") == []
    tick = beatless.schedules["hourly"].next_tick
    beatless.advance((tick - datetime.now(UTC)).total_seconds() - 300)
    assert runs_of(beatless, "hourly") == []


def test_jitter_puts_a_tick_off_and_keeps_its_name(beatless: Kit) -> None:
    stored = beatless.client.create_schedule(
        Schedule("spread", report, cron=EACH_HOUR, jitter=1800)
    )
    ((due_at, tick),) = rows(beatless, "SELECT due_at, tick FROM {schema}.schedules")
    assert 0 < (due_at - tick).total_seconds() < 1800
    beatless.advance((due_at - datetime.now(UTC)).total_seconds() + 0.5)
    assert ticks_of(beatless, "spread") == [stored.next_tick]
    ((following, name),) = rows(beatless, "SELECT due_at, tick FROM {schema}.schedules")
    assert name == tick + timedelta(hours=1)
    assert following != due_at


def rows(kit: Kit, statement: str) -> list[tuple]:
    with kit.app.engine.connect() as connection:
        text = statement.format(schema=kit.app.settings.schema)
        return [tuple(row) for row in connection.exec_driver_sql(text)]


# The caller's transaction


def test_a_schedule_that_is_rolled_back_never_was(beatless: Kit, beatless_app: App) -> None:
    with beatless_app.engine.connect() as connection:
        beatless.client.create_schedule(HOURLY, connection=connection)
        connection.rollback()
    assert beatless.schedules == {}


def test_a_schedule_is_changed_and_deleted_in_the_transaction_of_its_caller(
    beatless: Kit, beatless_app: App
) -> None:
    beatless.client.create_schedule(HOURLY)
    with beatless_app.engine.begin() as connection:
        changed = Schedule("hourly", report, every=60)
        beatless.client.update_schedule(changed, connection=connection)
        assert beatless.schedules["hourly"].cron == EACH_HOUR
    assert beatless.schedules["hourly"].every == 60
    with beatless_app.engine.begin() as connection:
        beatless.client.delete_schedule("hourly", connection=connection)
        assert beatless.schedules.keys() == {"hourly"}
    assert beatless.schedules == {}


def test_a_schedule_that_somebody_is_changing_holds_up_no_other(
    beatless: Kit, beatless_app: App
) -> None:
    beatless.client.create_schedule(HOURLY)
    beatless.client.create_schedule(Schedule("other", report, cron=EACH_HOUR))
    late(beatless, to_next_tick(beatless, "hourly"))
    with beatless_app.engine.begin() as connection:
        beatless.client.pause_schedule("hourly", connection=connection)
        beatless.drain_outbox_once()
        assert len(runs_of(beatless, "other")) == 1
    beatless.drain_outbox_once()
    assert runs_of(beatless, "hourly") == []


def test_other_input_lets_the_next_tick_stay(beatless: Kit) -> None:
    made = beatless.client.create_schedule(HOURLY)
    late(beatless, 1800)
    other = Schedule("hourly", report, cron=EACH_HOUR, input={"of": "one"})
    assert beatless.client.update_schedule(other).next_tick == made.next_tick
    beatless.advance(1800)
    assert [run.input for run in runs_of(beatless, "hourly")] == [{"of": "one"}]


def test_the_name_of_another_schedule_is_refused(beatless: Kit) -> None:
    beatless.client.create_schedule(HOURLY)
    with pytest.raises(ScheduleConflict, match="update or delete"):
        beatless.client.create_schedule(HOURLY)


@pytest.mark.parametrize("call", ["schedule", "pause_schedule", "resume_schedule"])
def test_an_unknown_schedule_is_told(beatless: Kit, call: str) -> None:
    with pytest.raises(ScheduleNotFound, match="nobody"):
        getattr(beatless.client, call)("nobody")


def test_a_schedule_of_an_unknown_plan_is_refused_where_it_is_made(beatless: Kit) -> None:
    with pytest.raises(UnknownPlan, match="reprot"):
        beatless.client.create_schedule(Schedule("hourly", "reprot", every=60))
    with pytest.raises(PlanError, match="does not have"):
        App(beatless.app.settings, [report], schedules=[Schedule("x", "reprot", every=60)])
    with pytest.raises(PlanError, match="two schedules are called hourly"):
        App(beatless.app.settings, [report], schedules=[HOURLY, HOURLY])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "either cron= or every="),
        ({"cron": "0 * * * *", "every": 60}, "either cron= or every="),
        ({"cron": "@daily"}, "five fields"),
        ({"every": 0.5}, "whole number"),
        ({"every": 60, "tz": "Mars"}, "time zone"),
        ({"every": 60, "catch_up": "some"}, "choose one, all, none"),
        ({"every": 60, "overlap": "queue"}, "choose allow, skip, replace"),
        ({"every": 60, "jitter": -1}, "jitter"),
        ({"every": 60, "jitter": 61}, "overtake"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_where_it_is_written(options, problem) -> None:
    with pytest.raises(PlanError, match=problem):
        Schedule("hourly", "report", **options)


def test_schedules_of_a_namespace_start_its_runs_and_are_seen_by_it_alone(
    beatless: Kit, beatless_app: App
) -> None:
    acme = beatless_app.client_for("acme")
    acme.create_schedule(HOURLY)
    beatless.client.create_schedule(HOURLY)
    beatless.advance(3600)
    [run] = acme.list_runs()
    assert run.run_id.startswith("acme~")
    assert run.namespace == "acme"
    assert [stored.namespace for stored in acme.schedules()] == ["acme"]
    assert len(runs_of(beatless, "hourly")) == 1


# Missed ticks


@pytest.mark.parametrize(("catch_up", "expected"), [("one", 1), ("all", 5), ("none", 0)])
def test_ticks_that_were_missed_are_fired_as_catch_up_says(
    beatless: Kit, catch_up: str, expected: int
) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", report, cron=EACH_HOUR, catch_up=catch_up)
    )
    missed = [made.next_tick + timedelta(hours=n) for n in range(5)]
    late(beatless, to_next_tick(beatless, "hourly") + 4 * 3600 + GRACE_S)
    beatless.drain_outbox_once()
    assert ticks_of(beatless, "hourly") == missed[len(missed) - expected :]
    assert beatless.schedules["hourly"].next_tick == made.next_tick + timedelta(hours=5)


@pytest.mark.parametrize("catch_up", ["one", "all", "none"])
def test_a_tick_within_the_grace_is_not_missed(beatless: Kit, catch_up: str) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", report, cron=EACH_HOUR, catch_up=catch_up)
    )
    late(beatless, to_next_tick(beatless, "hourly") + GRACE_S - 20)
    beatless.drain_outbox_once()
    assert ticks_of(beatless, "hourly") == [made.next_tick]


def test_a_tick_that_jitter_puts_off_is_not_missed_before_it_is_due(beatless: Kit) -> None:
    hour = timedelta(hours=1)
    for number in itertools.count():
        name = f"spread-{number}"
        tick = beatless.client.create_schedule(
            Schedule(name, report, cron=EACH_HOUR, jitter=3000, catch_up="none")
        ).next_tick
        assert tick is not None
        if jitter_s(name, tick, 3000) < 1500 < jitter_s(name, tick + hour, 3000):
            break
        beatless.client.delete_schedule(name)
    late(beatless, to_next_tick(beatless, name) + 3600 + 2 * GRACE_S)
    beatless.drain_outbox_once()
    assert ticks_of(beatless, name) == []
    assert beatless.schedules[name].next_tick == tick + hour
    beatless.advance(3000)  # the one behind it has not come, however little it is put off
    assert ticks_of(beatless, name) == [tick + hour]


def test_of_short_intervals_the_last_missed_tick_and_those_within_the_grace_are_fired(
    beatless: Kit,
) -> None:
    made = beatless.client.create_schedule(Schedule("often", report, every=20))
    late(beatless, to_next_tick(beatless, "often") + 600)
    beatless.drain_outbox_once()
    found = ticks_of(beatless, "often")
    # The 31 ticks of ten minutes: the last that is older than a minute, and the three younger ones.
    ages = [(made.next_tick + timedelta(seconds=600) - tick).total_seconds() for tick in found]
    assert ages == [60, 40, 20, 0]


def test_after_a_pause_ticks_of_that_time_are_passed_over(beatless: Kit) -> None:
    beatless.client.create_schedule(Schedule("hourly", report, cron=EACH_HOUR, catch_up="all"))
    assert beatless.client.pause_schedule("hourly").state is ScheduleState.PAUSED
    beatless.advance(5 * 3600)
    assert runs_of(beatless, "hourly") == []
    resumed = beatless.client.resume_schedule("hourly")
    assert resumed.state is ScheduleState.ACTIVE
    beatless.drain_outbox_once()
    assert runs_of(beatless, "hourly") == []
    beatless.advance(3600)
    assert ticks_of(beatless, "hourly") == [resumed.next_tick]


# Overlap


def test_overlap_skip_passes_over_ticks_while_a_run_waits(beatless: Kit) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", parked, cron=EACH_HOUR, overlap="skip")
    )
    beatless.advance(3600)
    beatless.work_until_idle()
    [run] = runs_of(beatless, "hourly")
    assert beatless.client.get_run(run.run_id).state.value == "waiting"
    beatless.advance(2 * 3600)
    assert ticks_of(beatless, "hourly") == [made.next_tick]
    beatless.signal(run.run_id, "go")
    beatless.work_until_idle()
    beatless.advance(3600)
    assert ticks_of(beatless, "hourly") == [made.next_tick, made.next_tick + timedelta(hours=3)]


def test_overlap_allow_starts_another_run(beatless: Kit) -> None:
    beatless.client.create_schedule(Schedule("hourly", parked, cron=EACH_HOUR))
    beatless.advance(2 * 3600)
    assert len(runs_of(beatless, "hourly")) == 2


def test_overlap_replace_cancels_the_run_and_starts_when_it_has_ended(beatless: Kit) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", report, cron=EACH_HOUR, overlap="replace")
    )
    beatless.advance(3600)
    [run] = runs_of(beatless, "hourly")
    with beatless.crash(at="step.before"):  # a worker has it
        beatless.work_until_idle()
    late(beatless, to_next_tick(beatless, "hourly") - 3600)
    beatless.drain_outbox_once()
    replaced = beatless.client.get_run(run.run_id)
    assert replaced.cancel_requested_at is not None
    assert not replaced.state.final
    assert ticks_of(beatless, "hourly") == [made.next_tick]
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state.value == "cancelled"
    beatless.advance(2)
    beatless.drain_outbox_once()
    assert ticks_of(beatless, "hourly") == [made.next_tick, made.next_tick + timedelta(hours=1)]


@pytest.mark.parametrize("plan", [report, parked], ids=["queued", "waiting"])
def test_each_tick_replaces_the_run_of_the_one_before_while_time_passes(
    beatless: Kit, plan: Plan
) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", plan, cron=EACH_HOUR, overlap="replace")
    )
    beatless.advance(to_next_tick(beatless, "hourly"))
    if plan is parked:
        beatless.work_until_idle()
    beatless.advance(4 * 3600 + 2 * REPLACING_S)
    assert ticks_of(beatless, "hourly") == [made.next_tick + timedelta(hours=n) for n in range(5)]
    *replaced, last = runs_of(beatless, "hourly")
    assert {run.state.value for run in replaced} == {"cancelled"}
    assert not last.state.final


def test_time_passes_at_once_while_a_tick_waits_for_a_run_that_a_worker_has(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    beatless.client.create_schedule(Schedule("hourly", report, cron=EACH_HOUR, overlap="replace"))
    beatless.advance(to_next_tick(beatless, "hourly"))
    with beatless.crash(at="step.before"):  # a worker has it
        beatless.work_until_idle()
    passes = []
    move = time_calls.move_into_past
    monkeypatch.setattr(
        time_calls, "move_into_past", lambda *given: (passes.append(given[-1]), move(*given))
    )
    beatless.advance(24 * 3600)
    assert len(passes) == 2
    assert sum(passes) == pytest.approx(24 * 3600)


def test_a_tick_waits_for_nobody_who_holds_the_run_that_it_replaces(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    beatless.client.create_schedule(Schedule("hourly", parked, cron=EACH_HOUR, overlap="replace"))
    beatless.advance(3600)
    [run] = runs_of(beatless, "hourly")
    late(beatless, to_next_tick(beatless, "hourly"))
    with beatless.app.direct_connection() as relay:
        relay.execute("SET lock_timeout = '20s'")
        with postgres.transaction():
            postgres.execute("SELECT FROM runs WHERE run_id = %s FOR UPDATE", (run.run_id,))
            [tick] = beatless.app.firing().fire(relay, None)
        assert tick.outcome == "replacing"
        assert beatless.client.get_run(run.run_id).cancel_requested_at is None
        late(beatless, 2)
        beatless.app.firing().fire(relay, None)
    assert beatless.client.get_run(run.run_id).state.value == "cancelled"


def test_a_drain_as_of_a_time_waits_for_no_run_that_is_to_be_replaced(beatless: Kit) -> None:
    beatless.client.create_schedule(Schedule("hourly", report, cron=EACH_HOUR, overlap="replace"))
    beatless.advance(3600)
    [run] = runs_of(beatless, "hourly")
    with beatless.crash(at="step.before"):  # a worker has it
        beatless.work_until_idle()
    beatless.relay.drain_once(now=datetime.now(UTC) + timedelta(hours=2))
    assert beatless.client.get_run(run.run_id).cancel_requested_at is not None


def test_a_tick_that_replaces_a_run_is_not_missed_however_long_that_takes(beatless: Kit) -> None:
    made = beatless.client.create_schedule(
        Schedule("hourly", report, cron=EACH_HOUR, overlap="replace", catch_up="none")
    )
    beatless.advance(3600)
    with beatless.crash(at="step.before"):  # a worker has it
        beatless.work_until_idle()
    late(beatless, to_next_tick(beatless, "hourly") - 3600)
    beatless.drain_outbox_once()
    late(beatless, beatless.app.settings.lease_seconds + 2 * GRACE_S)
    beatless.work_until_idle()
    late(beatless, 2)
    beatless.drain_outbox_once()
    assert ticks_of(beatless, "hourly") == [made.next_tick, made.next_tick + timedelta(hours=1)]


# Out of turn


def test_a_run_out_of_turn_moves_no_tick(beatless: Kit) -> None:
    made = beatless.client.create_schedule(HOURLY)
    run = beatless.client.run_schedule_now("hourly")
    assert (run.schedule, run.input) == ("hourly", {"of": "all"})
    assert abs((run.tick - datetime.now(UTC)).total_seconds()) < 60
    assert beatless.schedules["hourly"].next_tick == made.next_tick
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state.value == "completed"


DAY = datetime(2026, 5, 1, tzinfo=UTC)


def test_a_backfill_starts_each_tick_once_and_can_be_cancelled(beatless: Kit) -> None:
    beatless.client.create_schedule(
        Schedule("nightly", parked, cron="0 2 * * *", tz="Europe/Brussels", overlap="skip")
    )
    first = beatless.client.backfill_schedule("nightly", DAY, DAY + timedelta(days=3))
    assert ticks_of(beatless, "nightly") == [DAY + timedelta(days=n) for n in range(3)]
    more = beatless.client.backfill_schedule("nightly", DAY, DAY + timedelta(days=5))
    assert ticks_of(beatless, "nightly") == [DAY + timedelta(days=n) for n in range(5)]
    assert (first.runs, more.runs) == (3, 2)
    beatless.work_until_idle()
    assert beatless.client.cancel_backfill(first.id) == 3
    states = [run.state.value for run in runs_of(beatless, "nightly")]
    assert states == ["cancelled"] * 3 + ["waiting"] * 2


def test_a_backfill_passes_over_ticks_whose_runs_had_another_input(beatless: Kit) -> None:
    beatless.client.create_schedule(Schedule("nightly", report, cron="0 2 * * *", input=1))
    beatless.client.backfill_schedule("nightly", DAY, DAY + timedelta(days=2))
    beatless.client.update_schedule(Schedule("nightly", report, cron="0 2 * * *", input=2))
    more = beatless.client.backfill_schedule("nightly", DAY, DAY + timedelta(days=3))
    assert more.runs == 1
    assert [run.input for run in runs_of(beatless, "nightly")] == [1, 1, 2]


@pytest.mark.parametrize(
    ("start", "end", "problem"),
    [
        (DAY.replace(tzinfo=None), DAY, "time zone"),
        (DAY, datetime(2096, 1, 1, tzinfo=UTC), "future"),
        (DAY, DAY + timedelta(days=30), "more than 10000 runs"),
    ],
)
def test_a_backfill_that_cannot_be_is_refused(beatless: Kit, start, end, problem) -> None:
    beatless.client.create_schedule(Schedule("often", report, every=60))
    with pytest.raises(BadRequest, match=problem):
        beatless.client.backfill_schedule("often", start, end)
    assert runs_of(beatless, "often") == []


# Ticks that cannot be written


def test_a_key_that_another_run_has_stops_that_schedule_alone(beatless: Kit) -> None:
    made = beatless.client.create_schedule(HOURLY)
    beatless.client.create_schedule(Schedule("other", report, cron=EACH_HOUR))
    thief = beatless.start_run("report", key=f"schedule/hourly/{made.next_tick:%Y-%m-%dT%H:%MZ}")
    late(beatless, to_next_tick(beatless, "hourly"))
    beatless.drain_outbox_once()
    stopped = beatless.schedules["hourly"]
    assert stopped.state is ScheduleState.STOPPED
    assert "is used by another run" in stopped.reason
    assert (stopped.next_tick, stopped.failures) == (None, 1)
    assert len(runs_of(beatless, "other")) == 1
    assert beatless.client.get_run(thief.run_id).schedule is None
    beatless.client.cancel_run(thief.run_id)
    beatless.client.remove_run(thief.run_id)
    beatless.client.resume_schedule("hourly")
    beatless.advance(3600)
    assert len(runs_of(beatless, "hourly")) == 1


def test_a_row_that_cannot_be_written_stops_that_schedule_alone(
    beatless: Kit, beatless_app: App
) -> None:
    for name in ("broken", "unknown", "whole"):
        beatless.client.create_schedule(Schedule(name, report, cron=EACH_HOUR))
    with beatless_app.engine.begin() as connection:
        schema = beatless_app.settings.schema
        connection.exec_driver_sql(
            f"UPDATE {schema}.schedules SET run = run || '{{\"priority\": 99999}}' "
            "WHERE name = 'broken'"
        )
        connection.exec_driver_sql(
            f"UPDATE {schema}.schedules SET tz = 'Mars' WHERE name = 'unknown'"
        )
    late(beatless, 2 * 3600)
    beatless.drain_outbox_once()
    assert runs_of(beatless, "whole")
    states = dict(rows(beatless, "SELECT name, state FROM {schema}.schedules"))
    assert states == {"broken": "stopped", "unknown": "stopped", "whole": "active"}


# Many relays, and deaths


def firings(app: App, count: int) -> Iterator[tuple[psycopg.Connection, Firing]]:
    for _ in range(count):
        yield app.direct_connection(), app.firing()


def test_of_relays_that_fire_at_the_same_time_one_starts_the_run(
    beatless: Kit, beatless_app: App
) -> None:
    for number in range(20):
        beatless.client.create_schedule(
            Schedule(f"hourly-{number}", report, cron=EACH_HOUR, catch_up="all")
        )
    late(beatless, to_next_tick(beatless, "hourly-0") + 3 * 3600)
    barrier, fired = threading.Barrier(3), []

    def race(connection: psycopg.Connection, firing: Firing) -> None:
        with connection:
            barrier.wait(60)
            for _ in range(40):
                fired.extend(firing.fire(connection, None))

    threads = [threading.Thread(target=race, args=each) for each in firings(beatless_app, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    beatless.drain_outbox_once()
    for number in range(20):
        assert len(ticks_of(beatless, f"hourly-{number}")) == 4
    assert len([each for each in fired if each.outcome == "started"]) <= 80


def test_a_tick_whose_key_an_open_transaction_may_have_waits_alone(
    beatless: Kit, beatless_app: App
) -> None:
    held = beatless.client.create_schedule(Schedule("held", report, cron=EACH_HOUR))
    beatless.client.create_schedule(Schedule("free", report, cron=EACH_HOUR))
    late(beatless, to_next_tick(beatless, "held"))
    with beatless_app.direct_connection() as relay:
        relay.execute("SET statement_timeout = '20s'")
        with beatless_app.engine.begin() as caller:
            key = tick_key("held", held.next_tick)
            beatless.client.start_run("dated", key=key, connection=caller)
            [tick] = beatless_app.firing().fire(relay, None)
            assert (tick.schedule, tick.outcome) == ("free", "started")
            caller.rollback()
        [tick] = beatless_app.firing().fire(relay, None)
    assert (tick.schedule, tick.outcome) == ("held", "started")


def test_a_relay_that_has_read_a_tick_and_is_late_fires_nothing(
    beatless: Kit, beatless_app: App
) -> None:
    beatless.client.create_schedule(HOURLY)
    late(beatless, to_next_tick(beatless, "hourly"))

    class OvertakenThere(CrashPoints):
        def reach(self, point: str) -> None:
            if point == "schedule.before":
                with beatless_app.direct_connection() as connection:
                    [fired] = beatless_app.firing().fire(connection, None)
                assert fired.outcome == "started"

    beatless_app.faults, faults = OvertakenThere(), beatless_app.faults
    slow = beatless_app.firing()
    beatless_app.faults = faults
    with beatless_app.direct_connection() as connection:
        assert slow.fire(connection, None) == []
    assert len(runs_of(beatless, "hourly")) == 1


@pytest.mark.parametrize("point", ["schedule.before", "schedule.fired"])
def test_a_relay_that_dies_around_a_tick_neither_loses_nor_doubles_it(
    beatless: Kit, point: str
) -> None:
    made = beatless.client.create_schedule(HOURLY)
    late(beatless, to_next_tick(beatless, "hourly"))
    with beatless.crash(at=point):
        beatless.drain_outbox_once()
    beatless.work_until_idle()
    beatless.drain_outbox_once()
    assert ticks_of(beatless, "hourly") == [made.next_tick]
    assert runs_of(beatless, "hourly")[0].result is not None
    beatless.verify()


# Deploys


def declared(app: App, *schedules: Schedule, name: str = "default") -> App:
    return App(app.settings, list(app.plans.values()), schedules=schedules, name=name)


def applied(app: App) -> tuple[list[str], ...]:
    try:
        found = app.client.apply_schedules(app.schedules)
        return found.created, found.changed, found.undeclared, found.stopped
    finally:
        app.close()


def test_a_deploy_stores_changes_and_pauses_what_an_app_declares(
    beatless: Kit, beatless_app: App
) -> None:
    daily = Schedule("daily", report, cron="0 3 * * *")
    assert applied(declared(beatless_app, HOURLY, daily)) == (["hourly", "daily"], [], [], [])
    assert applied(declared(beatless_app, HOURLY, daily)) == ([], [], [], [])
    later = Schedule("daily", report, cron="0 4 * * *")
    assert applied(declared(beatless_app, later)) == ([], ["daily"], ["hourly"], [])
    states = {name: stored.state.value for name, stored in beatless.schedules.items()}
    assert states == {"daily": "active", "hourly": "undeclared"}
    assert beatless.schedules["daily"].next_tick.hour == 4
    assert applied(declared(beatless_app, later, HOURLY)) == ([], ["hourly"], [], [])
    assert beatless.schedules["hourly"].state is ScheduleState.ACTIVE


def test_a_schedule_that_a_person_paused_stays_paused_over_a_deploy(
    beatless: Kit, beatless_app: App
) -> None:
    applied(declared(beatless_app, HOURLY))
    beatless.client.pause_schedule("hourly")
    assert applied(declared(beatless_app, HOURLY)) == ([], [], [], [])
    assert beatless.schedules["hourly"].state is ScheduleState.PAUSED


def test_a_deploy_that_is_taken_back_resumes_nothing_that_a_person_paused(
    beatless: Kit, beatless_app: App
) -> None:
    daily = Schedule("daily", report, cron="0 3 * * *")
    applied(declared(beatless_app, HOURLY, daily))
    beatless.client.pause_schedule("hourly")
    assert applied(declared(beatless_app)) == ([], [], ["daily", "hourly"], [])
    assert beatless.client.pause_schedule("daily").state is ScheduleState.UNDECLARED
    assert applied(declared(beatless_app, HOURLY, daily)) == ([], ["hourly", "daily"], [], [])
    states = [beatless.schedules[name].state for name in ("hourly", "daily")]
    assert states == [ScheduleState.PAUSED, ScheduleState.PAUSED]


def test_the_schedules_of_another_app_are_left_alone(beatless: Kit, beatless_app: App) -> None:
    applied(declared(beatless_app, HOURLY, name="shop"))
    other = Schedule("other", report, every=60)
    assert applied(declared(beatless_app, other, name="mail")) == (["other"], [], [], [])
    assert {stored.state.value for stored in beatless.schedules.values()} == {"active"}
    with pytest.raises(ScheduleConflict, match="belongs to the app shop"):
        applied(declared(beatless_app, HOURLY, name="mail"))


def test_a_declared_schedule_is_changed_in_the_app_only(beatless: Kit, beatless_app: App) -> None:
    applied(declared(beatless_app, HOURLY))
    with pytest.raises(ScheduleConflict, match="is declared by the app default"):
        beatless.client.update_schedule(Schedule("hourly", report, every=60))
    with pytest.raises(ScheduleConflict, match="is declared by the app default"):
        beatless.client.delete_schedule("hourly")
    applied(declared(beatless_app))
    with pytest.raises(ScheduleConflict, match="declared no more"):
        beatless.client.resume_schedule("hourly")
    beatless.client.delete_schedule("hourly")
    assert beatless.schedules == {}


def test_a_deploy_tells_schedules_of_run_time_of_new_versions_and_lost_plans(
    beatless: Kit, beatless_app: App
) -> None:
    for plan_, name in ((report, "kept"), (parked, "lost")):
        beatless.client.create_schedule(Schedule(name, plan_, every=60))
    tenant = beatless_app.client_for("acme")
    tenant.create_schedule(Schedule("theirs", parked, every=60))

    @step
    def another(ctx: StepContext) -> None: ...

    changed = Plan("report", [note_tick, another], queue="mail")
    assert applied(App(beatless_app.settings, [changed])) == ([], [], [], ["lost", "theirs"])
    for stored in (beatless.schedules["lost"], tenant.schedule("theirs")):
        assert stored.reason == "the app default has no plan parked"
    ((run,),) = rows(beatless, "SELECT run FROM {schema}.schedules WHERE name = 'kept'")
    run = run if isinstance(run, dict) else json.loads(run)
    assert (run["plan_version"], run["queue"]) == (changed.version, "mail")


def account_of(input: dict[str, str]) -> str:
    return input["account"]


BY_ACCOUNT = Limit("stripe", key=account_of, at_once=3)


def limits_of_now(app: App, namespace: str, name: str) -> list[dict[str, Any]] | None:
    """The limits of a run that is started out of turn."""
    client = app.client_for(namespace)
    run = client.run_schedule_now(name)
    with app.engine.connect() as connection:
        return connection.exec_driver_sql(
            f"SELECT limits FROM {app.settings.schema}.runs WHERE run_id = %s",
            (stored_id(namespace, run.run_id),),
        ).scalar()


def test_a_deploy_gives_schedules_of_run_time_the_limits_of_their_plans(
    beatless: Kit, beatless_app: App
) -> None:
    for namespace in ("default", "acme"):
        beatless_app.client_for(namespace).create_schedule(
            Schedule("sync", report, every=60, input={"account": "ada"})
        )
    with_limit = App(beatless_app.settings, [Plan("report", [note_tick], limits=[BY_ACCOUNT])])
    assert applied(with_limit) == ([], [], [], [])
    slots = {"at_once": 3}
    assert limits_of_now(beatless_app, "default", "sync") == [{"id": "stripe:ada"} | slots]
    assert limits_of_now(beatless_app, "acme", "sync") == [{"id": "acme~stripe:ada"} | slots]

    assert applied(App(beatless_app.settings, [report])) == ([], [], [], [])
    for namespace in ("default", "acme"):
        assert not limits_of_now(beatless_app, namespace, "sync")


def test_limits_of_more_schedules_than_a_page_are_noted_once(
    beatless: Kit, beatless_app: App
) -> None:
    beatless.client.create_schedule(Schedule("s-", report, every=60, input={"account": "ada"}))
    with beatless_app.engine.begin() as connection:
        connection.exec_driver_sql(
            f"""
INSERT INTO {beatless_app.settings.schema}.schedules
  (namespace, name, app, declared, run, every, tz, catch_up, overlap, jitter, state)
SELECT namespace, name || n, app, declared,
       jsonb_set(run, '{{input,account}}', to_jsonb('a' || n)), every, tz, catch_up, overlap,
       jitter, 'paused'
  FROM {beatless_app.settings.schema}.schedules, generate_series(1, {2 * PAGE}) n"""
        )
    with_limit = Plan("report", [note_tick], limits=[BY_ACCOUNT])
    wrong = """SELECT name FROM {schema}.schedules
                WHERE run #>> '{{limits,0,id}}'
                      IS DISTINCT FROM 'stripe:' || (run #>> '{{input,account}}')"""
    assert len(rows(beatless, wrong)) == 2 * PAGE + 1
    applied(App(beatless_app.settings, [with_limit]))
    assert rows(beatless, wrong) == []
    before = rows(beatless, "SELECT name, version FROM {schema}.schedules ORDER BY name")
    applied(App(beatless_app.settings, [with_limit]))
    assert rows(beatless, "SELECT name, version FROM {schema}.schedules ORDER BY name") == before


def test_a_schedule_whose_input_has_no_key_for_a_new_limit_is_stopped_alone(
    beatless: Kit, beatless_app: App, caplog: pytest.LogCaptureFixture
) -> None:
    for name, input in (("a", {"account": "ada"}), ("b", {"of": "all"}), ("c", {"account": "cy"})):
        beatless.client.create_schedule(Schedule(name, report, every=60, input=input))
    with_limit = App(beatless_app.settings, [Plan("report", [note_tick], limits=[BY_ACCOUNT])])
    assert applied(with_limit) == ([], [], [], ["b"])
    stopped = beatless.schedules["b"]
    assert stopped.state is ScheduleState.STOPPED
    assert stopped.reason is not None
    assert "the key of limit stripe cannot be computed of this input: KeyError" in stopped.reason
    assert [each.schedule for each in caplog.records if each.name == "beatless.schedules"] == ["b"]
    for name, key in (("a", "ada"), ("c", "cy")):
        assert beatless.schedules[name].state is ScheduleState.ACTIVE
        [limit] = limits_of_now(beatless_app, "default", name) or [{}]
        assert limit["id"] == f"stripe:{key}"


# The relay


@pytest.mark.slow
def test_a_relay_that_sleeps_wakes_for_a_new_schedule_and_for_each_of_its_ticks(
    beatless: Kit, beatless_app: App
) -> None:
    fired: list[FiredTick] = []
    news = threading.Condition()

    def hear(signal: Signal) -> None:
        with news:
            if isinstance(signal, TicksFired):
                fired.extend(signal.ticks)
            news.notify_all()

    relay = beatless_app.relay(observer=hear)
    relay.start()
    try:
        made = beatless.client.create_schedule(Schedule("second", report, every=1, catch_up="all"))
        with news:
            assert news.wait_for(lambda: len(fired) >= 3, timeout=60)
    finally:
        relay.stop()
    assert all(each.late_s >= 0 for each in fired)
    found = ticks_of(beatless, "second")
    assert found == [made.next_tick + timedelta(seconds=n) for n in range(len(found))]
