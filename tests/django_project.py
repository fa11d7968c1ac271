"""Tests of beatless.django in a copy of examples/django_shop, by tests/integration/test_django.py.

A process has one Django: they are executed in one of their own, by pytest and Django's runner.
"""

import asyncio
import html
import io
import json
import os
import re
import urllib.request
from contextlib import redirect_stderr, redirect_stdout

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.apps import apps
from django.contrib.admin.models import LogEntry
from django.core import checks
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import call_command
from django.db import connection, connections, transaction
from django.http import HttpResponse
from django.test import Client, TestCase, override_settings
from django.test.utils import get_runner
from django.urls import path
from shop.models import Order
from shop.orders import place_order
from sqlalchemy import event

from beatless import Plan, RunRequest, RunState, Schedule, step
from beatless.django import app, client, database, signal_run, start_run, start_runs
from beatless.errors import BadSetting

REDIS_URL = "redis://localhost:6379/0"


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        call_command("beatless", *arguments)
    return ended.value.code, out.getvalue(), err.getvalue()


def test_the_client_reads_what_the_block_has_written_and_others_do_not(beatless, db):
    with transaction.atomic():
        run = start_run("fulfil", {"order": 0})
        assert client().get_run(run.run_id).state == RunState.QUEUED
        assert beatless.client.list_runs() == []
        signal_run(run.run_id, "paid", {"amount": 5})
        client().cancel_run(run.run_id)
    assert beatless.client.get_run(run.run_id).state == RunState.CANCELLED


def test_outside_of_a_block_a_start_is_a_transaction_of_its_own(beatless, db):
    connection.close()
    (run,) = start_runs([RunRequest(plan="fulfil", input={"order": 0})])
    assert beatless.client.get_run(run.run_id).state == RunState.QUEUED
    assert connection.connection is None  # in a thread without requests nobody would close it


def test_in_a_coroutine_a_start_is_refused_as_djangos_own_queries_are(beatless, db):
    async def view():
        with pytest.raises(SynchronousOnlyOperation, match="sync_to_async"):
            start_run("fulfil", {"order": 0})
        await client().astart_run("fulfil", {"order": 0})

    connection.close()
    asyncio.run(view())
    assert len(beatless.client.list_runs()) == 1


def runs_view(request, run_id):
    return HttpResponse(client().get_run(run_id).state)


def settings_view(request):
    raise BadSetting("BEATLESS_SCHEMA", "is empty", "beatless")


urlpatterns = [path("runs/<run_id>", runs_view), path("settings", settings_view)]


@override_settings(
    ROOT_URLCONF=__name__, MIDDLEWARE=["beatless.django.middleware.ProblemMiddleware"]
)
def test_the_middleware_answers_errors_of_beatless_and_no_others(beatless, db):
    browser = Client(raise_request_exception=False)
    found = browser.get("/runs/none")
    assert (found.status_code, found["Content-Type"]) == (404, "application/problem+json")
    assert found.json()["detail"] == "no run has id 'none'"
    assert browser.get("/settings").status_code == 500


def test_a_savepoint_that_is_rolled_back_takes_its_run_along(beatless, db):
    with transaction.atomic():
        kept = start_run("fulfil", {"order": 0})
        with pytest.raises(ZeroDivisionError), transaction.atomic():
            start_run("fulfil", {"order": 0})
            1 / 0
    assert [run.run_id for run in beatless.client.list_runs()] == [kept.run_id]


def test_a_block_of_another_alias_is_named(beatless, db):
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="reports"):
        start_run("fulfil", {"order": 0}, using="reports")
        1 / 0
    assert beatless.client.list_runs() == []
    with pytest.raises(ZeroDivisionError), transaction.atomic(using="reports"):
        start_run("fulfil", {"order": 0})
        1 / 0
    assert len(beatless.client.list_runs()) == 1


def test_without_autocommit_the_callers_commit_decides(beatless, db):
    transaction.set_autocommit(False)
    start_run("fulfil", {"order": 0})
    transaction.rollback()
    start_run("fulfil", {"order": 0})
    transaction.commit()
    transaction.set_autocommit(True)
    assert len(beatless.client.list_runs()) == 1


def test_a_block_whose_transaction_has_failed_is_named_by_django(beatless, db):
    with (
        pytest.raises(transaction.TransactionManagementError, match="atomic"),
        transaction.atomic(),
    ):
        transaction.set_rollback(True)
        start_run("fulfil", {"order": 0})


def test_bodies_have_fresh_connections_and_leave_none_and_no_log_of_queries(
    beatless, db, monkeypatch
):
    """With CONN_MAX_AGE = 0, the default, a connection lasts as long as a body."""
    seen = []

    def note(execute, sql, params, many, context):
        seen.append((connection.connection.info.backend_pid, len(connection.queries)))
        return execute(sql, params, many, context)

    for _ in range(2):
        place_order("book")
    connection.close()
    connection.force_debug_cursor = True
    with connection.execute_wrapper(note):
        beatless.work_until_idle()
    connection.force_debug_cursor = False
    # Each `ship` has two statements, each `reserve` one.
    assert sorted(queries for _, queries in seen) == [0, 0, 0, 0, 1, 1]
    assert len({pid for pid, _ in seen}) == 4
    assert connection.connection is None


class TestAsync:
    @pytest.fixture
    def beatless_plans(self):
        def ask():
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_backend_pid()")
                return cursor.fetchone()[0]

        @step
        async def session(_):
            return await sync_to_async(ask)()

        return [Plan("session", [session])]

    def test_async_bodies_have_fresh_connections_too(self, beatless, db):
        runs = start_runs([RunRequest(plan="session") for _ in range(2)])
        beatless.work_until_idle()
        sessions = {beatless.client.get_run(run.run_id).result for run in runs}
        assert len(sessions - {None}) == 2


def test_the_command_has_the_plans_of_all_apps(beatless, db):
    order = place_order("book")
    assert command("plan", "check")[0] == 0
    status, out, _ = command("show", order.run_id, "--json")
    assert (status, json.loads(out)["plan"]) == (0, "fulfil")
    status, _, err = command("start", "fulfill")
    assert (status, "this app has: fulfil" in err) == (2, True)


def test_django_makes_no_migration_of_our_tables(beatless, db):
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


def test_a_migrate_tells_what_the_project_declares_no_more(beatless, db, capsys):
    removed = Schedule("removed", beatless.app.plans["fulfil"], every=60, input={"order": 1})
    beatless.client.apply_schedules([removed])
    our = apps.get_app_config("beatless")

    our.migrate(using="default", verbosity=0)
    assert capsys.readouterr().out == ""
    beatless.client.apply_schedules([removed])
    our.migrate(using="default", verbosity=1)
    assert "  schedule removed is paused: the app " in capsys.readouterr().out


def messages():
    return [(each.id, str(each.msg)) for each in checks.run_checks() if "beatless" in each.id]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"REDIS": "x"}, "BEATLESS['REDIS'] is no setting; there are: BROKER_PASSWORD, "),
        ({"DATABASE_URL": "x"}, "whose alias is DATABASE in BEATLESS"),
        ({"DATABASE": "orders"}, "'orders', and DATABASES has: default, reports"),
        ({"REDIS_URL": "http://x"}, "BEATLESS_REDIS_URL"),
        ({}, "BEATLESS_REDIS_URL is not set, and BEATLESS of Django's settings has no REDIS_URL"),
        ([], "BEATLESS is list, and must be a dict"),
    ],
)
def test_a_check_names_what_is_wrong_with_the_settings(given, said, fresh_app, monkeypatch):
    monkeypatch.delenv("BEATLESS_REDIS_URL", raising=False)
    with override_settings(BEATLESS=given):
        ((number, text),) = messages()
    assert (number, said in text) == ("beatless.E001", True), text


def test_a_check_tells_of_two_databases(fresh_app, monkeypatch):
    monkeypatch.setenv("BEATLESS_REDIS_URL", REDIS_URL)
    monkeypatch.delenv("BEATLESS_DATABASE_URL", raising=False)
    assert messages() == []
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://db.example/other")
    assert [number for number, _ in messages()] == ["beatless.W001"]


def test_an_engine_that_is_not_postgres_is_refused(fresh_app, settings_of_alias):
    with pytest.raises(BadSetting, match=r"has the engine django\.db.backends.sqlite3"):
        settings_of_alias({"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"})


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("postgresql://a%40b:p%20w%2F@db.example:5433/shop?sslmode=require", {"PORT": "5433"}),
        ("postgresql:///shop?host=/var/run/postgresql&port=5433", {"HOST": "/var/run/postgresql"}),
        ("postgresql:///?service=shop", {"NAME": "", "OPTIONS": {"service": "shop"}}),
        ("postgresql+psycopg://db.example/shop", {"HOST": "db.example"}),
    ],
)
def test_a_url_becomes_an_entry_of_databases_and_the_same_url_again(url, given, settings_of_alias):
    entry = database(url)
    assert given.items() <= entry.items()
    again = database(settings_of_alias(entry))
    assert again.items() <= entry.items()  # Django adds defaults to its own


def test_a_text_that_is_no_url_is_refused():
    with pytest.raises(BadSetting, match="the database's URL cannot be read"):
        database("shop")


@pytest.fixture
def settings_of_alias():
    """Gives the URL that an alias with these settings has."""
    from django.db import ConnectionHandler

    from beatless.django.databases import url_of

    return lambda entry: url_of(ConnectionHandler({"default": entry})["default"])


@pytest.fixture
def fresh_app():
    """The next use of the App makes it."""
    from django.apps import apps

    config = apps.get_app_config("beatless")
    before, config._app = vars(config).copy(), None
    yield
    vars(config).update(before)


def test_a_page_follows_a_run(beatless, db):
    from django.contrib.auth.models import User
    from django.http import Http404
    from django.test import Client, RequestFactory
    from shop.asgi import host
    from shop.following import stream_token
    from starlette.testclient import TestClient

    browsers = {}
    for user in (User.objects.create_user("someone"), User.objects.create_superuser("admin")):
        browser = Client()
        browser.force_login(user)
        cookies = {"sessionid": browser.cookies["sessionid"].value}
        browsers[user.username] = TestClient(host, cookies=cookies)
    order = place_order("book")
    beatless.work_until_idle()

    stream = f"/jobs/v1/runs/{order.run_id}/stream"
    assert browsers["admin"].get(f"/orders/{order.pk}").json()["run"] == "completed"
    assert browsers["admin"].get(stream).text.count("event: RunFinished") == 1
    assert browsers["someone"].get(stream).status_code == 401
    assert TestClient(host).get("/static/admin/css/base.css").status_code == 200

    asked = RequestFactory().get("/")
    asked.session = {"orders": [order.pk]}
    token = json.loads(stream_token(asked, order.pk).content)["token"]
    assert TestClient(host).get(stream, params={"token": token}).status_code == 200
    asked.session = {}
    with pytest.raises(Http404):
        stream_token(asked, order.pk)


def test_the_fixtures_of_pytest_django_work_in_the_tests_schema(
    beatless, admin_client, live_server
):
    order = place_order("book")
    assert admin_client.get(f"/orders/{order.pk}").json()["state"] == "new"
    with urllib.request.urlopen(f"{live_server.url}/orders/{order.pk}") as answer:
        assert json.load(answer)["run"] == "queued"


RUNS = "/admin/beatless/run/"


def test_the_admin_shows_runs_and_acts_on_them(beatless, admin_client, monkeypatch):
    monkeypatch.setattr("beatless.django.admin.PAGE_RUNS", 1)
    old, order = place_order("<b>book"), place_order("book")
    page = f"{RUNS}{order.run_id}/change/"
    listed = admin_client.get(RUNS, {"plan": "fulfil"}).content.decode()
    assert page in listed
    assert old.run_id not in listed.partition("paginator")[0]
    (older,) = re.findall(r'href="(\?[^"]*before=[^"]*)"', listed)
    assert old.run_id in admin_client.get(RUNS + html.unescape(older)).content.decode()
    assert b"beatless/run/" in admin_client.get("/admin/").content
    assert 'class="error"' in admin_client.get(RUNS, {"state": "lost"}).content.decode()
    shown = admin_client.get(page).content.decode()
    assert "RunStarted" in shown
    assert f"http://localhost:8400/#/run/{order.run_id}" in shown
    assert 'value="cancel"' in shown
    assert 'value="retry"' not in shown

    cancelled = admin_client.post(page, {"action": "cancel"}, follow=True).content.decode()
    assert "Its cancel is stored." in cancelled
    assert 'value="retry"' in cancelled
    retried = admin_client.post(page, {"action": "retry"}, follow=True)
    assert order.run_id not in retried.redirect_chain[0][0]
    assert [run.retry_of for run in client().list_runs(limit=1)] == [order.run_id]
    again = admin_client.post(page, {"action": "cancel"}, follow=True)
    assert 'class="success"' in again.content.decode()  # what has ended stays as it is
    (entry,) = LogEntry.objects.filter(change_message="retry")
    assert (entry.object_id, entry.get_admin_url()) == (order.run_id, page)
    assert admin_client.get(f"{RUNS}no-such-run/change/").status_code == 404
    beatless.work_until_idle()
    done = admin_client.get(f"{RUNS}{old.run_id}/change/").content.decode()
    assert "&lt;b&gt;book" in done
    assert 'name="action"' not in done


def test_permissions_decide_what_the_admin_shows_and_does(beatless, db):
    from django.contrib.auth.models import Permission, User
    from django.test import Client

    run_id = place_order("book").run_id
    page = f"{RUNS}{run_id}/change/"
    staff = User.objects.create_user("clerk", is_staff=True)
    browser = Client()
    browser.force_login(staff)
    assert browser.get(page).status_code == browser.get(RUNS).status_code == 403
    staff.user_permissions.add(Permission.objects.get(codename="view_run"))
    assert 'name="action"' not in browser.get(page).content.decode()
    assert browser.post(page, {"action": "cancel"}).status_code == 403
    assert browser.post(page, {"action": "view"}).status_code == 403
    staff.user_permissions.add(Permission.objects.get(codename="cancel_run"))
    assert browser.post(page, {"action": "cancel"}).status_code == 302
    assert client().get_run(run_id).state == RunState.CANCELLED


class OrderTests(TestCase):
    """Executed by Django's own runner, in a test database."""

    __test__ = False  # for pytest

    def test_the_run_of_an_order_is_in_the_transaction_of_the_test(self):
        answer = self.client.post("/orders", {"title": "book"}).json()
        assert self.client.get(f"/orders/{answer['order']}").json()["run"] == "queued"
        NAMES.append(connection.settings_dict["NAME"])

    def test_nothing_is_left_for_another_test(self):
        assert client().list_runs() == []
        assert app.settings.database_url.endswith(connection.settings_dict["NAME"])

    def test_a_plan_is_started_from_sql(self):
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {app.settings.schema}.start_run('fulfil')")
            (run_id,) = cursor.fetchone()
        assert client().get_run(run_id).plan == "fulfil"


NAMES = []


def test_djangos_own_test_databases_have_our_schema(
    beatless_services, monkeypatch, django_db_blocker
):
    django_db_blocker.unblock()
    monkeypatch.setenv("BEATLESS_REDIS_URL", beatless_services.redis_url)
    given = database(beatless_services.database_url)
    name = f"shop_of_{beatless_services.database_url[-4:]}_{os.getpid()}"
    for alias in connections:
        monkeypatch.setattr(
            connections[alias], "settings_dict", {**connections[alias].settings_dict, **given}
        )
        connections[alias].settings_dict["TEST"] = {
            **connections[alias].settings_dict["TEST"],
            "NAME": name,
            "TEMPLATE": "template0",
        }
    suite = get_runner(None, "django.test.runner.DiscoverRunner")(verbosity=0)
    databases = suite.setup_databases()
    opened, closed = [], []
    event.listen(app.engine, "connect", lambda *_: opened.append(1))
    event.listen(app.engine, "close", lambda *_: closed.append(1))
    try:
        failed = suite.run_suite(suite.test_loader.loadTestsFromTestCase(OrderTests))
        with connection.cursor() as cursor:
            tables = connection.introspection.table_names(cursor)
        Order.objects.create(title="kept by a flush? no")
        place_order("book")
        call_command("flush", interactive=False, verbosity=0)
        runs = client().list_runs()
    finally:
        connection.close()
        with psycopg.connect(beatless_services.database_url) as server:
            # Sessions whose client has gone may still end, and Postgres drops no database before.
            server.execute(
                "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = %s",
                [name],
            )
        suite.teardown_databases(databases)
        django_db_blocker.restore()
    assert (failed.testsRun, failed.errors, failed.failures) == (3, [], [])
    assert [name] == NAMES
    assert "shop_order" in tables
    assert "runs" not in tables  # inspectdb, which asks the same, sees none of ours
    assert [run.plan for run in runs] == ["fulfil"]
    assert len(opened) == len(closed) > 0
