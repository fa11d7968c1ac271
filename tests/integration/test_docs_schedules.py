"""The examples of docs/schedules.md are executed as they are printed."""

import ast
import re
from pathlib import Path

import pytest
from celery import Celery
from celery.schedules import crontab

from beatless.cli.beat import arguments_of
from beatless.testing.servers import Services

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"

OF_CUSTOMERS = """
from shop.customers import add_customer, remove_customer


def test_a_customer_has_a_schedule(beatless):
    with beatless.app.engine.begin() as session:
        add_customer(session, "ada")
    assert beatless.schedules.keys() == {"sync-ada"}
    with beatless.app.engine.begin() as session:
        remove_customer(session, "ada")
    assert beatless.schedules == {}
"""


OF_DEADLINES = """
from datetime import timedelta

from beatless import Schedule


def test_a_run_with_a_deadline_ends_in_time_if_it_is_started_now(beatless):
    client = beatless.client
    daily = Schedule("daily", "report", every=86400, input={"to": "ada"}, deadline=600)
    client.create_schedule(daily)
    run = client.run_schedule_now("daily")
    beatless.work_until_idle()
    assert client.get_run(run.run_id).state == "completed"
    beatless.advance(24 * 3600)
    of_tick = client.schedule("daily").last_run_id
    assert of_tick != run.run_id
    beatless.advance(600, ticks=False)  # the tick may have been a moment ago
    beatless.work_until_idle()
    assert client.get_run(of_tick).error["type"] == "DeadlineExceeded"
"""


OF_BEAT = """
from celery import Celery
from celery.schedules import crontab

celery = Celery("shop")
celery.conf.timezone = "Europe/Brussels"


@celery.task
def send_report(to):
    return f"report to {to}"


celery.conf.beat_schedule = {
    "nightly": {
        "task": "shop.tasks.send_report",
        "schedule": crontab(hour=2, minute=0),
        "kwargs": {"to": "ada"},
        "options": {"queue": "mail"},
    },
}
"""

PRINTED = PAGE.read_text().partition("from-beat shop.tasks:celery\n")[2].partition("```")[0]

MOVED = f"""
from beatless.cli.beat import celery_app_of, lines_of
from shop.moved import app, nightly, report


def test_what_beat_has_started_is_started_by_a_schedule(beatless):
    printed = "\\n".join(lines_of(celery_app_of("shop.tasks:celery"))) + "\\n"
    assert printed == {PRINTED!r}
    found = {{}}
    exec(printed, found)
    [schedule] = found["SCHEDULES"]
    assert (schedule.cron, schedule.tz) == (nightly.cron, nightly.tz)
    assert (schedule.input, schedule.queue) == (nightly.input, nightly.queue)
    assert list(app.schedules) == [nightly]
    assert report.steps[0].name == "send_report"
"""


def test_expressions_of_the_table_are_those_that_the_command_prints() -> None:
    rows = re.findall(
        r"^\| `[^`]*(crontab\([^`]*?\))` \| `cron=(\".*?\")` \|$", PAGE.read_text(), re.MULTILINE
    )
    app = Celery()
    assert len(rows) == 2
    for theirs, ours in rows:
        entry = {"schedule": eval(theirs, {"crontab": crontab})}
        assert arguments_of(app, entry) == {"cron": ast.literal_eval(ours)}


@pytest.mark.slow
def test_the_project_of_the_page_works(
    pytester: pytest.Pytester, beatless_services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", beatless_services.database_url)
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    # What else is installed here would take the inner session seconds.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    blocks = re.findall(
        r"^```python\n# (\S+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert [name for name, _ in blocks] == [
        "shop/app.py",
        "shop/customers.py",
        "tests/test_report.py",
        "shop/moved.py",
    ]
    for name, text in (
        *blocks,
        ("shop/__init__.py", ""),
        ("tests/test_customers.py", OF_CUSTOMERS),
        ("tests/test_deadlines.py", OF_DEADLINES),
        ("shop/tasks.py", OF_BEAT),
        ("tests/test_moved.py", MOVED),
    ):
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    pytester.makeini("[pytest]\nbeatless_app = shop.app:app\npythonpath = .\n")

    result = pytester.runpytest_subprocess(
        "-p", "beatless", "-p", "no:cacheprovider", "--beatless-services=external"
    )

    result.assert_outcomes(passed=5)
