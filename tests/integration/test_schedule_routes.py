"""Schedules over HTTP, in `beatless doctor` and in the metrics."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from beatless import (
    App,
    BadRequest,
    Plan,
    Schedule,
    ScheduleConflict,
    ScheduleNotFound,
    StepContext,
    UnknownPlan,
    step,
)
from beatless.api import responses
from beatless.doctor.doctor import Doctor
from beatless.doctor.finding import Finding, Status
from beatless.http import Client
from beatless.observe.families import (
    SCHEDULE_LAST_FIRED,
    SCHEDULE_LATE,
    SCHEDULE_TICKS,
    SCHEDULES_STOPPED,
)
from beatless.testing import Kit
from tests.hourly import each_hour
from tests.serving import serving


@step
def note(ctx: StepContext) -> None: ...


report = Plan("report", [note])
HOURLY = Schedule("hourly", report, cron=each_hour(), input={"of": "all"}, tags={"kind": "r"})


@pytest.fixture(autouse=True)
def _minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour that ended in a test would bring a tick more."""
    monkeypatch.setitem(globals(), "HOURLY", replace(HOURLY, cron=each_hour()))


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [report]


@pytest.fixture
def client(beatless_app: App) -> Iterator[Client]:
    with (
        serving(beatless_app, is_open=True) as api,
        Client(f"http://127.0.0.1:{api.port}") as client,
    ):
        yield client


def test_the_client_over_http_gives_what_that_of_the_app_gives(
    beatless: Kit, client: Client
) -> None:
    made = client.create_schedule(HOURLY)
    assert made == beatless.client.schedule("hourly") == client.schedule("hourly")
    assert client.schedules() == beatless.client.schedules() == [made]
    assert client.pause_schedule("hourly") == beatless.client.schedule("hourly")
    assert client.resume_schedule("hourly").next_tick == made.next_tick
    assert client.run_schedule_now("hourly").input == {"of": "all"}
    start = datetime(2026, 5, 1, tzinfo=UTC)
    filled = client.backfill_schedule("hourly", start, start + timedelta(hours=3))
    assert filled.runs == 3
    assert client.cancel_backfill(filled.id) == 3
    changed = Schedule("hourly", report, every=60, overlap="skip", queue="mail")
    assert client.update_schedule(changed) == beatless.client.schedule("hourly")
    stored = beatless.client.schedule("hourly")
    assert (stored.every, stored.cron, stored.overlap, stored.queue) == (60, None, "skip", "mail")
    assert (stored.input, stored.tags) == (None, None)
    client.delete_schedule("hourly")
    assert beatless.schedules == {}


def test_many_schedules_come_page_by_page(beatless: Kit, client: Client) -> None:
    for number in range(5):
        beatless.client.create_schedule(Schedule(f"s{number}", report, every=60))
    assert [each.name for each in client.schedules(after="s1", limit=2)] == ["s2", "s3"]
    assert client.schedules(limit=1000) == beatless.client.schedules()


def test_a_page_of_schedules_ends_after_so_many_bytes(
    beatless: Kit, client: Client, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "RUNS_BYTES", 3000)
    for number in range(5):
        beatless.client.create_schedule(Schedule(f"s{number}", report, every=60, input="x" * 1400))
    with serving(beatless_app, is_open=True) as api:
        page = api("GET", "/v1/schedules?limit=1000").json
    assert ([each["name"] for each in page["schedules"]], page["next"]) == (["s0", "s1"], "s1")
    assert client.schedules(limit=1000) == beatless.client.schedules()
    assert [each.name for each in client.schedules(limit=3)] == ["s0", "s1", "s2"]


def test_errors_over_http_are_those_of_the_app(client: Client) -> None:
    with pytest.raises(ScheduleNotFound):
        client.schedule("nobody")
    with pytest.raises(UnknownPlan):
        client.create_schedule(Schedule("hourly", "reprot", every=60))
    client.create_schedule(HOURLY)
    with pytest.raises(ScheduleConflict):
        client.create_schedule(HOURLY)
    start = datetime(2096, 5, 1, tzinfo=UTC)
    with pytest.raises(BadRequest, match="future"):
        client.backfill_schedule("hourly", start, start)


def test_a_change_over_http_keeps_the_members_that_it_does_not_have(beatless_app: App) -> None:
    with serving(beatless_app, is_open=True) as api:
        body = {"name": "hourly", "plan": "report", "every": 60, "tags": {"a": "b"}, "priority": 3}
        assert api("POST", "/v1/schedules", body).status == 201
        answer = api("PATCH", "/v1/schedules/hourly", {"cron": "0 2 * * *", "tz": "CET"})
        assert answer.status == 200
        found = json.loads(answer.text)
        assert (found["cron"], found["every"], found["tz"]) == ("0 2 * * *", None, "CET")
        assert (found["tags"], found["priority"]) == ({"a": "b"}, 3)
        assert len(found["next_ticks"]) == 5
        refused = api("PATCH", "/v1/schedules/hourly", {"cron": "@daily"})
        assert refused.status == 422
        assert "five fields" in refused.text


# Doctor


def examine(app: App) -> list[Finding]:
    return [each for each in Doctor(app).examine(["schedules"]) if each.check == "schedules"]


def test_the_doctor_compares_what_is_declared_with_what_is_stored(
    beatless: Kit, beatless_app: App
) -> None:
    [fine] = examine(beatless_app)
    assert fine.status is Status.OK
    app = App(beatless_app.settings, [report], schedules=[HOURLY])
    try:
        [missing] = examine(app)
        assert missing.status is Status.WARNING
        assert "hourly" in missing.text
        assert "beatless migrate" in missing.advice
        app.client.apply_schedules(app.schedules)
        [stored] = examine(app)
        assert stored.status is Status.OK, stored
        [left] = examine(beatless_app)
        assert "otherwise" in left.text
    finally:
        app.close()


def test_the_doctor_names_schedules_that_are_stopped_or_late(
    beatless: Kit, beatless_app: App
) -> None:
    made = beatless.client.create_schedule(HOURLY)
    beatless.client.create_schedule(Schedule("late", report, every=3600))
    beatless.start_run("report", key=f"schedule/hourly/{made.next_tick:%Y-%m-%dT%H:%MZ}")
    beatless.advance(3600)
    beatless.advance(2 * 3600, ticks=False)
    stopped, late = examine(beatless_app)
    assert stopped.status is late.status is Status.PROBLEM
    assert "hourly: the key" in stopped.text
    assert "schedule late has been due" in late.text


# Metrics


def test_metrics_tell_of_ticks_that_are_fired_late_or_not_written(
    beatless: Kit, beatless_app: App
) -> None:
    app = App(beatless_app.settings, [report], schedules=[HOURLY])
    app.metrics.postgres.wanted = lambda: True
    app.client.apply_schedules(app.schedules)
    relay = app.relay()

    def read(name: str) -> dict[tuple[str, ...], float]:
        app.metrics.postgres.forget()
        return {
            tuple(sample.labels.values()): sample.value
            for metric in app.metrics.postgres.collect()
            for sample in metric.samples
            if sample.name == name
        }

    try:
        assert read(SCHEDULE_LATE.name) == {(): 0}
        assert read(SCHEDULE_LAST_FIRED.name) == {}
        beatless.advance(2 * 3600, ticks=False)
        assert read(SCHEDULE_LATE.name)[()] > 3000
        relay.drain_once()
        [last] = read(SCHEDULE_LAST_FIRED.name).items()
        assert last[0] == ("hourly",)
        assert abs(last[1] - datetime.now(UTC).timestamp()) < 60
        tick = app.client.schedule("hourly").next_tick
        beatless.start_run("report", key=f"schedule/hourly/{tick:%Y-%m-%dT%H:%MZ}")
        beatless.advance(3600, ticks=False)
        relay.drain_once()
        assert read(SCHEDULES_STOPPED.name) == {(): 1}
        counts = app.metrics.relay.counts.read()
        assert sum(counts[SCHEDULE_TICKS.name, ("started",)]) == 1
        assert sum(counts[SCHEDULE_TICKS.name, ("failed",)]) == 1
    finally:
        relay.stop()
        app.close()
