"""`beatless schedules`, and what `beatless migrate` says of them."""

from pathlib import Path

import pytest
from sqlalchemy.exc import ProgrammingError

from beatless import App, Plan, Schedule, step
from beatless.cli import run
from beatless.testing import Kit
from tests.commands import Command


def test_schedules_are_listed_shown_paused_resumed_and_deleted(
    beatless: Kit, command: Command
) -> None:
    made = beatless.client.create_schedule(
        Schedule("nightly", "two_steps", cron="0 2 * * *", tz="Europe/Brussels", input={"n": 1})
    )
    listed = command("schedules")
    assert "nightly" in listed
    assert "0 2 * * * Europe/Brussels" in listed
    assert " 02:00:00" in listed
    [document] = command.documents("schedules", "ls")
    assert document["next_tick"] == made.next_tick.isoformat()
    shown = command("schedules", "show", "nightly")
    assert shown.count("02:00:00") == 5
    assert '{"n": 1}' in shown
    command("schedules", "pause", "nightly")
    assert "is paused" in command.error
    assert command.documents("schedules", "show", "nightly")[0]["state"] == "paused"
    command("schedules", "resume", "nightly")
    assert "goes on: next tick" in command.error
    command("schedules", "delete", "nightly")
    assert command("schedules", "ls").count("nightly") == 0
    command("schedules", "show", "nightly", status=2)
    assert "no schedule is called 'nightly'" in command.error


def test_runs_are_started_out_of_turn_and_for_the_past(beatless: Kit, command: Command) -> None:
    beatless.client.create_schedule(Schedule("nightly", "two_steps", cron="0 2 * * *"))
    run_id = command("schedules", "run-now", "nightly").strip()
    assert beatless.client.get_run(run_id).schedule == "nightly"
    filled = command("schedules", "backfill", "nightly", "2026-05-01", "2026-05-04").strip()
    assert "3 runs started" in command.error
    assert len(beatless.client.list_runs(tags={"backfill": filled})) == 3
    assert command("schedules", "cancel-backfill", filled).strip() == "3"
    command("schedules", "backfill", "nightly", "yesterday", "today", status=2)
    assert "write it like" in command.error


def test_migrate_stores_the_schedules_of_the_app_and_tells_of_those_that_it_lacks(
    beatless: Kit, command: Command
) -> None:
    gone = Schedule("gone", "two_steps", every=60)
    beatless.client.apply_schedules([gone])
    command("migrate")
    assert "schedule gone is paused: the app default declares it no more" in command.error
    assert beatless.schedules["gone"].state.value == "undeclared"
    assert "undeclared" in command("schedules", "ls")
    command("schedules", "resume", "gone", status=1)
    assert "declare it and migrate, or delete it" in command.error


def test_migrate_without_an_app_leaves_the_stored_schedules_as_they_are(
    beatless: Kit, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    beatless.client.apply_schedules([Schedule("nightly", "two_steps", cron="0 2 * * *")])
    assert run(["migrate"]) == 0  # its plans are those of the demo, and its name is "default"
    assert "stay as they are; those of yours: beatless --app" in capsys.readouterr().err
    assert beatless.schedules["nightly"].state.value == "active"


def test_migrate_registers_the_plans_of_the_app_and_tells_of_those_that_it_lacks(
    beatless: Kit, command: Command
) -> None:
    former = App(beatless.app.settings, [Plan("gone", [step(name="one")(lambda ctx: None)])])
    former.client.apply_plans()
    former.close()
    start = f"SELECT {beatless.app.settings.schema}.start_run('%s')"

    def starts(plan: str) -> str:
        with beatless.app.engine.begin() as connection:
            return connection.exec_driver_sql(start % plan).scalar_one()

    command("migrate", "--check")
    assert starts("gone")
    command("migrate")
    assert "plan gone cannot be started from SQL any more: the app default" in command.error
    assert run(["migrate"]) == 0  # without an app: it registers nothing, and takes nothing away
    assert beatless.client.get_run(starts("two_steps")).plan == "two_steps"
    with pytest.raises(ProgrammingError, match="declared no more by the app default"):
        starts("gone")


BEAT = """
from datetime import timedelta
from celery import Celery
from celery.schedules import BaseSchedule, crontab, schedule

class Sunset(BaseSchedule): ...

app = Celery("shop")

@app.task(shared=False, name="shop.sync")
def sync(name, page=1, *, limit): ...

@app.task(shared=False, name="shop.bound", bind=True, autoretry_for=(OSError,))
def bound(self, name, limit): ...

@app.task(shared=False, name="shop.rest")
def rest(*names, limit): ...

@app.task(shared=False, name="shop.options")
def options(name, **options): ...

@app.task(shared=False, name="shop.place")
def place(name, /, limit): ...

BOTH = {"schedule": 60, "args": ["x"], "kwargs": {"limit": 1}}
app.conf.timezone = "Europe/Brussels"
app.conf.beat_schedule = {
    "nightly report": {"task": "shop.report", "schedule": crontab(minute=0, hour=2)},
    "weekdays": {
        "task": "shop.mail",
        "schedule": crontab(minute="*/15", hour={8, 12}, day_of_week="mon-fri"),
        "kwargs": {"to": "ada"},
        "options": {"queue": "mail", "expires": 600},
    },
    "often": {"task": "shop.ping", "schedule": 30.0, "args": [1, 2]},
    "minutes": {"task": "shop.ping", "schedule": timedelta(minutes=5)},
    "interval": {"task": "shop.ping", "schedule": schedule(run_every=60)},
    "too often": {"task": "shop.ping", "schedule": 0.5},
    "sunset": {"task": "shop.ping", "schedule": Sunset()},
    **{name: {"task": f"shop.{name}", **BOTH}
       for name in ("sync", "bound", "rest", "options", "place", "elsewhere")},
    "unfit": {"task": "shop.sync", **BOTH, "args": ["x", 2, 3]},
}
"""


def test_a_beat_schedule_is_printed_as_schedules(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop_of_beat.py").write_text(BEAT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    printed = command("schedules", "from-beat", "shop_of_beat:app")
    names: dict[str, list[Schedule]] = {}
    exec(printed, names)
    found = {each.name: each for each in names["SCHEDULES"]}
    assert found.keys() == {
        *("nightly-report", "weekdays", "often", "minutes", "interval"),
        *("sync", "bound", "options"),
    }
    assert (found["nightly-report"].cron, found["nightly-report"].tz) == (
        "0 2 * * *",
        "Europe/Brussels",
    )
    weekdays = found["weekdays"]
    assert weekdays.cron == "*/15 8,12 * * mon-fri"
    assert (weekdays.plan, weekdays.input) == ("shop.mail", {"to": "ada"})
    assert (weekdays.queue, weekdays.deadline) == ("mail", 600)
    assert [found[name].every for name in ("often", "minutes", "interval")] == [30, 300, 60]
    assert found["often"].input == [1, 2]
    assert all(
        found[name].input == {"name": "x", "limit": 1} for name in ("sync", "bound", "options")
    )
    assert "# rest: shop.rest takes *names by position alone, not by name: give Plan" in printed
    assert "# place: shop.place takes name by position" in printed
    assert "# elsewhere: its args and kwargs cannot be bound to shop.elsewhere (NotReg" in printed
    assert "# unfit: its args and kwargs cannot be bound to shop.sync (TypeError: too" in printed
    assert "# too often: schedule too-often: every is 0.5" in printed
    assert "# sunset: Sunset is neither" in printed
    command("schedules", "from-beat", "shop_of_beat:nothing", status=2)
    assert "cannot be loaded" in command.error
