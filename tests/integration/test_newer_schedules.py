"""Schedules that a newer version has stored: shown as they are, and left to its relays."""

from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg
import pytest

from beatless import App, Plan, Schedule, ScheduleConflict, StepContext, step
from beatless.cli import run as run_command
from beatless.doctor.doctor import Doctor
from beatless.doctor.finding import Status
from beatless.http import Client
from beatless.orchestrator.schedule import ScheduleState
from beatless.testing import Kit
from tests.serving import serving

RARE_S = 300 * 86_400


@step
def note(ctx: StepContext) -> None: ...


report = Plan("report", [note])
FOREIGN = Schedule("foreign", report, every=RARE_S, overlap="skip")

RULES = {
    "catch_up": "catch_up = 'two'",
    "overlap": "overlap = 'queue'",
    "kind": "every = NULL",
    "state": "state = 'draining'",
}
"""What a newer version may store in the place of what this one knows."""

ZONE = "cron = '0 2 * * *', every = NULL, tz = 'Mars/Olympus'"


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


def stored_as(kit: Kit, postgres: psycopg.Connection, change: str) -> None:
    """A schedule as a newer version stores it, beside one as this version does."""
    for schedule in (FOREIGN, Schedule("own", report, every=RARE_S)):
        kit.client.create_schedule(schedule)
    postgres.execute(f"UPDATE schedules SET {change} WHERE name = 'foreign'".encode())


@pytest.mark.parametrize("change", [*RULES.values(), ZONE], ids=[*RULES, "zone"])
def test_what_a_newer_version_has_stored_is_shown(
    beatless: Kit,
    client: Client,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
) -> None:
    stored_as(beatless, postgres, change)
    for name, value in beatless.app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BEATLESS_APP", "tests.plans:app")

    for arguments in (["schedules", "ls"], ["schedules", "show", "foreign"], ["migrate"]):
        assert run_command(arguments) == 0, capsys.readouterr().err
    assert "foreign" in capsys.readouterr().out
    shown = beatless.client.schedules()
    assert client.schedules() == shown
    assert [stored.name for stored in shown] == ["foreign", "own"]
    [finding] = list(Doctor(beatless.app).examine(["schedules"]))
    assert finding.status is Status.OK, finding


@pytest.mark.parametrize("change", RULES.values(), ids=RULES)
def test_what_a_newer_version_has_stored_is_left_to_its_relays(
    beatless: Kit, postgres: psycopg.Connection, change: str
) -> None:
    stored_as(beatless, postgres, change)
    version = b"SELECT version, last_run_id FROM schedules WHERE name = 'foreign'"
    before = postgres.execute(version).fetchone()

    beatless.advance(RARE_S)
    beatless.drain_outbox_once()
    beatless.advance(RARE_S, ticks=False)
    beatless.drain_outbox_once()

    assert [run.schedule for run in beatless.client.list_runs()] == ["own", "own"]
    assert postgres.execute(version).fetchone() == before
    [finding] = list(Doctor(beatless.app).examine(["schedules"]))
    assert finding.status is Status.PROBLEM
    assert "a relay of the newest version" in finding.advice


def test_the_ticks_of_another_rule_are_computed_by_nobody_who_does_not_know_it(
    beatless: Kit, client: Client, postgres: psycopg.Connection
) -> None:
    stored_as(beatless, postgres, RULES["kind"])
    made = beatless.client.schedule("foreign")
    assert made.next_ticks() == [made.next_tick]
    assert client.pause_schedule("foreign").state is ScheduleState.PAUSED
    assert client.run_schedule_now("foreign").schedule == "foreign"
    start, end = datetime(2026, 5, 1, tzinfo=UTC), datetime(2026, 5, 2, tzinfo=UTC)
    for each in (client, beatless.client):
        with pytest.raises(ScheduleConflict, match="cannot compute"):
            each.resume_schedule("foreign")
        with pytest.raises(ScheduleConflict, match="cannot compute"):
            each.backfill_schedule("foreign", start, end)
    update = Schedule("foreign", report, every=60)
    assert beatless.client.update_schedule(update).every == 60
    assert client.resume_schedule("foreign").state is ScheduleState.ACTIVE


def test_a_schedule_of_a_newer_deploy_is_taken_back_by_an_older_one(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    app = App(beatless_app.settings, [report], schedules=[FOREIGN])
    app.client.apply_schedules(app.schedules)
    postgres.execute("UPDATE schedules SET every = NULL, catch_up = 'two', overlap = 'queue'")
    assert app.client.apply_schedules(app.schedules).changed == ["foreign"]
    app.close()
    assert beatless.schedules["foreign"].defines(FOREIGN)
    beatless.advance(RARE_S)
    assert len(beatless.client.list_runs()) == 1


@pytest.mark.parametrize("member", ["catch_up", "overlap"])
def test_a_rule_that_is_not_known_is_refused_where_it_is_asked_for(
    beatless_app: App, member: str
) -> None:
    with serving(beatless_app, is_open=True) as api:
        body = {"name": "new", "plan": "report", "every": 60, member: "some"}
        answer = api("POST", "/v1/schedules", body)
        assert (answer.status, "choose" in answer.text) == (422, True), answer.text
        assert member in answer.text
