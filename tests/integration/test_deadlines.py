"""A run ends at its deadline, whoever has it or nobody; and no time is beyond all calendars."""

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from beatless import App, BadRequest, Event, Plan, RunState, Snooze, StepContext, retry, step
from beatless.observe.families import RUNS_FINISHED
from beatless.orchestrator.deadlines import AdoptsDeadlines, Deadlines
from beatless.orchestrator.events import EventType
from beatless.orchestrator.retention import REST_S, Retention
from beatless.outbox.queries import ALL_SHARDS
from beatless.testing import Kit
from tests.integration.test_relay import running, until
from tests.plans import two_steps

FAR = [3e11, 1e13, 1e300, float("inf"), float("nan"), -1, 315_360_001, "5", True, None]


@step
def snooze(ctx: StepContext) -> Any:
    return Snooze({"inf": float("inf"), "nan": float("nan")}.get(str(ctx.input), ctx.input))


@step(retry=retry(max_attempts=2, initial=100, jitter=0))
def wavers(ctx: StepContext) -> None:
    raise ValueError("again")


@step
def fine(ctx: StepContext) -> str:
    return "fine"


@step
def undo(ctx: StepContext) -> str:
    return "undone"


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        two_steps,
        Plan("snooze", [snooze]),
        Plan("wavers", [wavers]),
        Plan("undone", [fine, wavers], on_cancel=undo),
    ]


def wait_in_a_paused_queue(kit: Kit) -> str:
    kit.client.pause_queue("default")
    return kit.start_run("two_steps", deadline=500).run_id


def wait_in_a_queue_that_nobody_has(kit: Kit) -> str:
    run_id = kit.start_run("two_steps", deadline=500, queue="nobody").run_id
    kit.drain_outbox_once()
    return run_id


def wait_for_a_worker(kit: Kit) -> str:
    return kit.start_run("two_steps", deadline=500).run_id


def wait_for_its_time(kit: Kit) -> str:
    return kit.start_run("two_steps", deadline=500, delay=400).run_id


def wait_for_a_retry(kit: Kit) -> str:
    run_id = kit.start_run("wavers", deadline=500).run_id
    kit.work_once()
    return run_id


def wait_for_a_known_plan(kit: Kit) -> str:
    run_id = kit.start_run("two_steps", deadline=500).run_id
    kit.app.plans.pop("two_steps")
    return run_id


def wait_after_the_death_of_a_worker(kit: Kit) -> str:
    run_id = kit.start_run("two_steps", deadline=500).run_id
    kit.drain_outbox_once()
    with kit.crash(at="step.before"):
        kit.step(run_id)
    return run_id


def wait_between_two_steps(kit: Kit) -> str:
    run_id = kit.start_run("two_steps", deadline=500).run_id
    kit.step(run_id)
    return run_id


@pytest.mark.parametrize(
    "wait",
    [
        wait_in_a_paused_queue,
        wait_in_a_queue_that_nobody_has,
        wait_for_a_worker,
        wait_for_its_time,
        wait_for_a_retry,
        wait_for_a_known_plan,
        wait_after_the_death_of_a_worker,
        wait_between_two_steps,
    ],
)
def test_a_run_that_no_worker_has_ends_at_its_deadline(beatless: Kit, wait: Any) -> None:
    run_id = wait(beatless)
    beatless.advance(300)
    beatless.drain_outbox_once()
    assert not beatless.client.get_run(run_id).state.final

    beatless.advance(4000)
    beatless.drain_outbox_once()

    ended = beatless.client.get_run(run_id)
    assert ended.state is RunState.FAILED
    message = f"run {run_id} did not end before its deadline"
    assert ended.error == {"type": "DeadlineExceeded", "message": message}
    last = beatless.client.events(run_id)[-1]
    assert (last.type, last.source) == ("RunFinished", "relay")
    assert last.data == {"outcome": "failed", "error": ended.error}
    beatless.wait_for_outbox_flush(run_id)
    assert beatless.drain_outbox_once() == 0
    beatless.verify()


def test_a_relay_ends_it_in_time_and_tells_its_viewers(beatless: Kit, beatless_app: App) -> None:
    ended: list[Event] = []
    counted = beatless_app.metrics.relay
    beatless_app.metrics.relay.active = True
    relay = beatless_app.relay()
    relay.start()
    try:
        for deadline in (0.4, 3600):
            beatless.start_run("two_steps", deadline=deadline, queue="nobody")
        ended += beatless.client.stream_run(_first(beatless), timeout=60)
    finally:
        relay.stop()

    assert ended[-1].data["error"]["type"] == "DeadlineExceeded"
    labels = ("two_steps", "failed")
    assert sum(counted.counts.read()[RUNS_FINISHED.name, labels]) == 1
    states = sorted(run.state.value for run in beatless.client.list_runs())
    assert states == ["failed", "queued"]


def test_a_relay_that_is_woken_all_the_time_ends_it_in_time_too(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks for the next deadline at each awakening, and once put its look off each time."""
    monkeypatch.setattr("beatless.outbox.overdue.OVERDUE_POLL_S", 0.2)
    with running(beatless_app):
        run = beatless.start_run("two_steps", deadline=0.3, queue="nobody")

        def ended() -> bool:
            postgres.execute("SELECT pg_notify(%s, '')", (beatless_app.queries.channel,))
            return beatless.client.get_run(run.run_id).state is RunState.FAILED

        until(ended)


def _first(kit: Kit) -> str:
    return min(kit.client.list_runs(), key=lambda run: run.created_at).run_id


def test_who_holds_a_lease_ends_the_run_itself(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps", deadline=5)
    beatless.drain_outbox_once()
    with beatless_app.executors.connect() as connection:
        lease = beatless_app.leases.claim(
            connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
        )
        beatless.advance(6)
        beatless.drain_outbox_once()
        assert beatless.client.get_run(run.run_id).state is RunState.RUNNING

        beatless.advance(30)  # it was dead
        beatless.drain_outbox_once()
        assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"
        trace = beatless_app.journal.new_event(
            EventType.DEBUG_TRACE, where="x", data={"name": "late"}
        )
        assert not beatless_app.journal.append(connection, run.run_id, lease.token, [trace])
    beatless.verify()


def test_a_cancelled_run_is_undone_after_its_deadline(beatless: Kit) -> None:
    run = beatless.start_run("undone", deadline=5)
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    beatless.advance(60)
    beatless.drain_outbox_once()

    beatless.work_until_idle()

    ended = beatless.client.get_run(run.run_id)
    assert (ended.state, ended.error["type"]) == (RunState.CANCELLED, "RunCancelled")
    beatless.verify()


def test_a_row_that_somebody_holds_keeps_no_other_run_from_its_deadline(
    beatless: Kit, beatless_app: App
) -> None:
    held, free = (beatless.start_run("two_steps", deadline=5) for _ in range(2))
    beatless.advance(6)
    with beatless_app.executors.connect() as somebody:
        somebody.autocommit = False
        beatless.client.cancel_run(held.run_id, connection=somebody)
        beatless.drain_outbox_once()
        assert beatless.client.get_run(free.run_id).state is RunState.FAILED
        assert beatless.client.get_run(held.run_id).state is RunState.QUEUED
        somebody.rollback()
    beatless.drain_outbox_once()
    assert beatless.client.get_run(held.run_id).state is RunState.FAILED


def test_overdue_runs_are_ended_batch_by_batch_and_only_of_the_shards_that_are_led(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [beatless.start_run("two_steps", deadline=5) for _ in range(8)]
    beatless.advance(6)
    deadlines = Deadlines(beatless.app.settings.schema)
    shards = dict(postgres.execute("SELECT run_id, shard FROM dispatches").fetchall())
    mine = shards[runs[0].run_id]

    ended = {run_id for run_id, _, _ in deadlines.end(postgres, [mine], None)}

    assert ended == {run_id for run_id, shard in shards.items() if shard == mine}
    deadlines.end(postgres, ALL_SHARDS, None)
    beatless.drain_outbox_once()
    beatless.verify()


def test_deadlines_that_an_older_version_has_not_noted_are_found(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps", deadline=5)
    beatless.start_run("two_steps")
    postgres.execute("UPDATE dispatches SET deadline_at = NULL")
    beatless.advance(6)
    beatless.drain_outbox_once()
    assert beatless.client.get_run(run.run_id).state is RunState.QUEUED

    assert AdoptsDeadlines(beatless.app.settings.schema).step(postgres) == 3600
    beatless.drain_outbox_once()

    assert beatless.client.get_run(run.run_id).error["type"] == "DeadlineExceeded"


def test_a_snooze_that_ends_beyond_all_calendars_fails_its_step_and_lists_go_on(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    given = [str(each) if str(each) in ("inf", "nan") else each for each in FAR]
    runs = [beatless.start_run("snooze", each) for each in given]
    beatless.work_until_idle()

    for seconds, run in zip(given, runs, strict=True):
        with subtests.test(str(seconds)):
            ended = beatless.client.get_run(run.run_id)
            assert (ended.state, ended.error["type"]) == (RunState.FAILED, "ValueError")
            assert "which is not 0 seconds to ten years" in ended.error["message"]
    assert len(beatless.client.list_runs()) == len(runs)
    beatless.verify()


def test_a_start_that_lies_beyond_is_refused(beatless: Kit, subtests: pytest.Subtests) -> None:
    told = "which is not 0 seconds to ten years|give seconds, as 90, or a timedelta"
    for name, seconds in itertools.product(["delay", "deadline"], FAR):
        if seconds is None:
            continue
        with (
            subtests.test(name, seconds=str(seconds)),
            pytest.raises(BadRequest, match=rf"{name} is .*({told})"),
        ):
            beatless.start_run("two_steps", **{name: seconds})


@pytest.mark.parametrize(
    "moment", [datetime.max.replace(tzinfo=UTC), datetime(999, 1, 1, tzinfo=UTC), "2030-01-01"]
)
def test_a_moment_that_lies_beyond_is_refused(beatless: Kit, moment: Any) -> None:
    with pytest.raises(
        BadRequest, match=r"not_before is .* which is not (in the years|a datetime)"
    ):
        beatless.start_run("two_steps", not_before=moment)


@pytest.mark.parametrize("seconds", [1e13, float("inf"), -1, "5"])
def test_waits_and_moves_of_time_are_bounded_too(beatless: Kit, seconds: Any) -> None:
    run = beatless.start_run("two_steps")
    for wait in (
        lambda: beatless.client.wait_for_run(run.run_id, timeout=seconds),
        lambda: beatless.client.stream_run(run.run_id, timeout=seconds),
        lambda: beatless.client.astream_run(run.run_id, timeout=seconds),
        lambda: beatless.client.clean(older_than=seconds, state="failed"),
    ):
        with pytest.raises(BadRequest, match=r"is not 0 seconds to ten years|is '5': give seconds"):
            wait()
    with pytest.raises(ValueError, match="0 seconds to a thousand years"):
        beatless.advance(seconds)
    with pytest.raises(BadRequest):
        beatless.start_run("two_steps", deadline=timedelta(days=10_000))


def test_retention_of_no_days_keeps_everything(beatless: Kit, postgres: psycopg.Connection) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    beatless.advance(86_400)

    retention = Retention(beatless.app.settings.schema, events_days=0, runs_days=0.5)

    assert retention.step(postgres) == REST_S
    assert len(beatless.client.events(run.run_id)) == beatless.client.get_run(run.run_id).last_seq
