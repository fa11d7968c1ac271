"""Somebody holds what requests need: they are told so, and the others are answered."""

import threading
from collections.abc import Iterator

import psycopg
import pytest

from beatless import App
from beatless.api import lanes, server
from beatless.auth import Scope, Tokens
from beatless.outbox.queries import execute
from beatless.settings import libpq_url
from beatless.testing import Kit
from beatless.transactions import transact_by_driver
from tests.serving import Answer, Api, serving
from tests.valkeys import until


@pytest.fixture
def api(beatless_app: App, monkeypatch) -> Iterator[Api]:
    monkeypatch.setattr(server, "LOCK_TIMEOUT_S", 0.5)
    with serving(beatless_app) as api:
        yield api


class Crowd:
    """Many who ask the same at once."""

    def __init__(self, api: Api, asked: list[tuple[str, str, object]]) -> None:
        self.answers: list[Answer] = []
        self._threads = [
            threading.Thread(target=lambda call=call: self.answers.append(api(*call)))
            for call in asked
        ]
        for thread in self._threads:
            thread.start()

    def end(self) -> list[Answer]:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.answers


def wait_for_a_lock(postgres: psycopg.Connection, sessions: int = 1) -> None:
    """Until so many do, for one that this session holds."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
    holder = postgres.info.backend_pid
    with psycopg.connect(postgres.info.dsn, password=postgres.info.password) as watch:
        while watch.execute(waiting, (holder,)).fetchone()[0] < sessions:
            watch.rollback()


def test_one_held_row_and_many_who_want_it_leave_the_others_alone(
    beatless: Kit, api: Api, postgres: psycopg.Connection, monkeypatch
) -> None:
    monkeypatch.setattr(lanes, "WAIT_S", 1.0)
    held, other, third = (beatless.start_run("two_steps").run_id for _ in range(3))
    with postgres.transaction():
        beatless.client.cancel_run(held, connection=postgres)
        crowd = Crowd(api, [("POST", f"/v1/runs/{held}/cancel", {})] * 45)
        wait_for_a_lock(postgres)
        for path in (
            "/livez",
            "/readyz",
            f"/v1/runs/{other}",
            "/v1/runs",
            "/v1/plans",
            "/v1/queues",
        ):
            assert api("GET", path).status == 200, path
        assert api("POST", f"/v1/runs/{other}/cancel").status == 202
        assert api("POST", "/v1/runs", {"plan": "two_steps"}).status == 201
        with api.stream(f"/v1/runs/{held}/stream") as stream:
            next(stream), next(stream)
        refused = crowd.end()
    assert {answer.status for answer in refused} == {503}
    assert all(answer.headers["retry-after"] for answer in refused)
    assert any("lock timeout" in answer.json["detail"] for answer in refused)
    assert {answer.json.get("error") for answer in refused} <= {"StatementTimeout", None}
    assert api("POST", f"/v1/runs/{held}/cancel").status == 202
    assert api("GET", f"/v1/runs/{third}").json["state"] == "queued"


@pytest.mark.slow
def test_every_write_is_told_that_what_it_needs_is_held(
    beatless: Kit, api: Api, postgres: psycopg.Connection
) -> None:
    failed = beatless.start_run("half").run_id
    beatless.work_until_idle()
    beatless.start_run("two_steps", key="k", run_id="w")
    with postgres.transaction():
        postgres.execute("SELECT FROM runs FOR UPDATE")
        postgres.execute("LOCK TABLE queues IN SHARE MODE")
        beatless.client.start_run("two_steps", key="held", connection=postgres)
        for method, path, body in (
            ("POST", "/v1/runs", {"plan": "two_steps", "key": "held"}),
            ("POST", "/v1/runs/w/cancel", None),
            ("DELETE", "/v1/runs/w", None),
            ("POST", "/v1/queues/default/pause", None),
            ("DELETE", "/v1/queues/default", None),
            ("POST", "/v1/queues/default/drain", None),
        ):
            answer = api(method, path, body)
            assert answer.status in (409, 503), (path, answer)
            if answer.status == 503:
                assert answer.headers["retry-after"]
    assert api("GET", f"/v1/runs/{failed}").status == 200


def test_a_statement_that_works_for_too_long_is_ended(
    beatless: Kit, beatless_app: App, monkeypatch, postgres: psycopg.Connection
) -> None:
    monkeypatch.setattr(server, "STATEMENT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(server, "LOCK_TIMEOUT_S", 60)
    with serving(beatless_app) as api, postgres.transaction():
        postgres.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
        answer = api("GET", "/v1/runs")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert api("GET", "/readyz").status == 200
        assert api("GET", "/livez").status == 200


def test_health_is_told_while_every_connection_and_lane_is_taken(
    beatless: Kit, beatless_app: App, monkeypatch, postgres: psycopg.Connection
) -> None:
    for name in ("LOCK_TIMEOUT_S", "STATEMENT_TIMEOUT_S", "POOL_TIMEOUT_S"):
        monkeypatch.setattr(server, name, 120)
    monkeypatch.setattr(lanes, "WAIT_S", 0.1)
    with serving(beatless_app) as api:
        with postgres.transaction():
            postgres.execute("LOCK TABLE runs IN ACCESS EXCLUSIVE MODE")
            crowd = Crowd(api, [("GET", f"/v1/runs/{n}", None) for n in range(30)])
            wait_for_a_lock(postgres, sessions=lanes.READS)  # nobody waits for a connection
            until(lambda: len(crowd.answers) >= 30 - lanes.READS)
            for answer in crowd.answers:
                assert answer.status == 503
                assert "as many requests as can be" in answer.json["detail"]
            until(lambda: api("GET", "/readyz").status == 200)  # it has two seconds for each look
            assert api("GET", "/livez").status == 200
        answers = crowd.end()
    assert [answer.status for answer in answers[30 - lanes.READS :]] == [404] * lanes.READS


@pytest.mark.parametrize("pooled", [False, True])
def test_limits_hold_for_direct_sessions_and_through_a_pooler(
    beatless_app: App, pooled: bool
) -> None:
    """What a pooler lends is set for a transaction only, and given back as it was."""
    settings = beatless_app.settings
    if pooled:
        listen = libpq_url(settings.database_url) + "&application_name=x"
        settings = type(settings)(**settings_of(settings) | {"listen_url": listen})
    app = App(settings, [])
    assert settings.pooled is pooled
    engine = app.bounded_engine(lock_s=1.5, statement_s=7, pool_size=1, max_overflow=0)
    try:
        with engine.begin() as connection:
            assert shown(connection) == ("1500ms", "7s")
        one = transact_by_driver(engine, shown_to_driver, twice=False, each_statement=True)
        assert one == ("1500ms", "7s")
        raw = engine.raw_connection()
        cursor = raw.cursor()
        cursor.execute("SHOW lock_timeout")
        assert cursor.fetchone() == ("0" if pooled else "1500ms",)
        raw.close()
    finally:
        app.close()


def shown(connection) -> tuple[str, str]:
    return tuple(
        connection.exec_driver_sql(f"SHOW {name}").scalar()
        for name in ("lock_timeout", "statement_timeout")
    )


def shown_to_driver(caller) -> tuple[str, str]:
    return tuple(
        execute(caller, f"SHOW {name}", {})[0][0] for name in ("lock_timeout", "statement_timeout")
    )


def settings_of(settings) -> dict:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_a_token_is_looked_up_within_the_limits(
    beatless_app: App, api: Api, postgres: psycopg.Connection
) -> None:
    api.token = Tokens(beatless_app.engine, beatless_app.settings.schema).create([Scope.ADMIN])[1]
    with postgres.transaction():
        postgres.execute("LOCK TABLE api_tokens IN ACCESS EXCLUSIVE MODE")
        assert api("GET", "/v1/plans").status == 503
    assert api("GET", "/v1/plans").status == 200
