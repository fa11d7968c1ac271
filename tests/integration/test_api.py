"""The HTTP API on a real server: runs, streams, tokens."""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from beatless import App
from beatless.api import readiness
from beatless.api.body_limit import BODY_BYTES
from beatless.auth import Tokens
from beatless.cli.demo import GOLDEN
from beatless.cursors import encode_page
from beatless.orchestrator.retention import Retention
from beatless.testing import Kit
from tests.serving import Api, serving


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app) as api:
        yield api


def test_run_over_http_persists_and_streams(beatless: Kit, api: Api) -> None:
    started = api("POST", "/v1/runs", {"plan": "agents.run", "input": {"device": "d1"}})
    assert started.status == 201
    run_id = started.json["run_id"]
    assert started.headers["location"] == f"/v1/runs/{run_id}"

    with api.stream(f"/v1/runs/{run_id}/stream") as stream:
        priming = next(stream)
        assert 2000 <= int(priming["retry"]) <= 4000
        assert priming.keys() == {"id", "retry"}  # one with data would be a message
        epoch = priming["id"].partition(".")[0]
        assert next(stream)["event"] == "RunStarted"
        beatless.work_until_idle()
        rest = list(stream)  # it ends by itself after RunFinished

    assert [frame["event"] for frame in rest] == GOLDEN[1:]
    assert [frame["id"] for frame in rest] == [f"{epoch}.{seq}" for seq in range(2, 14)]
    assert json.loads(rest[-1]["data"])["data"]["outcome"] == "completed"
    stored = api("GET", f"/v1/runs/{run_id}/events?from_seq=1").json
    assert stored["events"] == [json.loads(frame["data"]) for frame in rest]
    assert (stored["epoch"], stored["last_seq"]) == (epoch, 13)


def test_every_cursor_gives_exactly_the_rest_and_204_at_the_end(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    path = f"/v1/runs/{run.run_id}/stream"
    for seq in range(13):
        for query, headers in (
            (f"?from_seq={seq}", {}),
            (f"?fromSeq={seq}", {}),
            ("?from_seq=0", {"Last_Event_ID": str(seq)}),
        ):
            with api.stream(path + query, **headers) as stream:
                ids = [frame["id"].rpartition(".")[2] for frame in stream]
            assert ids == [str(number) for number in range(seq, 14)]
    for seq in (13, 14, 99):
        assert api("GET", f"{path}?from_seq={seq}").status == 204
    epoch = api("GET", f"/v1/runs/{run.run_id}/events").json["epoch"]
    assert api("GET", path, Last_Event_ID=f"{epoch}.13").status == 204


def test_another_epoch_resets_the_viewer(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    with api.stream(f"/v1/runs/{run.run_id}/stream", Last_Event_ID="0t9.13") as stream:
        # Whoever is cut off here has heard of nothing, and must be told when it comes again.
        assert next(stream)["id"] == "0t9.13"
        reset = next(stream)
        assert (reset["event"], reset["id"].rpartition(".")[2]) == ("reset", "0")
        assert [frame["event"] for frame in stream] == GOLDEN


def test_a_cursor_that_cannot_be_read_is_refused(
    beatless: Kit, api: Api, subtests: pytest.Subtests
) -> None:
    run = beatless.start_run("two_steps")
    for cursor in ("x", "-1", "1.2.3", "1e3", "a.", "é", "9999999999"):
        with subtests.test(cursor):
            sent = cursor.encode().decode("latin1")
            answer = api("GET", f"/v1/runs/{run.run_id}/stream", Last_Event_ID=sent)
            assert answer.status == 400
            assert answer.headers["content-type"] == "application/problem+json"


def test_a_cursor_beyond_the_head_is_refused(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("two_steps")
    answer = api("GET", f"/v1/runs/{run.run_id}/stream?from_seq=2")
    assert (answer.status, answer.json["last_seq"]) == (409, 1)


def test_starting_twice_is_one_run(beatless: Kit, api: Api) -> None:
    body = {"plan": "two_steps", "input": 1, "run_id": "mine"}
    assert api("POST", "/v1/runs", body).status == 201
    assert api("POST", "/v1/runs", body).status == 200
    assert api("POST", "/v1/runs", body | {"input": 2}).status == 409
    keyed = {"plan": "two_steps", "key": "order:1"}
    first, second = api("POST", "/v1/runs", keyed), api("POST", "/v1/runs", keyed)
    assert (first.status, second.status) == (201, 200)
    assert first.json["run_id"] == second.json["run_id"]


BAD: list[tuple[Any, int]] = [
    ({"plan": "nope"}, 404),
    ({"plan": "no'pe\""}, 404),
    ({}, 422),
    ({"plan": "two_steps", "bogus": 1}, 422),
    ({"plan": "two_steps", "run_id": "a b"}, 422),
    ({"plan": "two_steps", "priority": 11}, 422),
    ({"plan": "two_steps", "input": "a\0b"}, 422),
    ({"plan": "two_steps", "input": "x" * 300_000}, 422),
    ({"plan": "two_steps", "not_before": "2030-01-01T00:00:00"}, 422),
    ({"plan": "\ud800"}, 404),
    ({"plan": "\0"}, 404),
    ({"plan": "two_steps", "run_id": "\ud800"}, 422),
    ({"plan": "two_steps", "run_id": "\0"}, 422),
    ({"plan": "two_steps", "queue": "\ud800"}, 422),
    ({"plan": "two_steps", "tags": {"\ud800": ""}}, 422),
    ({"plan": "two_steps", "\ud800": "\0"}, 422),
    (b"{broken", 422),
    (b"[]", 422),
    (b'"x" * ' + b"x" * BODY_BYTES, 413),
]


def test_bad_requests_are_problems(api: Api, subtests: pytest.Subtests) -> None:
    for body, status in BAD:
        with subtests.test(body=repr(body)[:80]):
            answer = api("POST", "/v1/runs", body)
            assert answer.status == status
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json["status"] == status
            assert answer.json["detail"]


UNKNOWN: list[tuple[str, str, Any, str]] = [
    ("POST", "runs", {"plan": "two_steps", "tag": {}}, "it has no 'tag' (did you mean tags?)"),
    ("POST", "runs", {"runid": "r", "plna": "p"}, "'runid' (did you mean run_id?), 'plna' (did"),
    ("POST", "runs/r/signals", {"name": "x", "zzz": 1}, "no 'zzz'; its members: name, data, key"),
    ("POST", "schedules/s/backfill", {"form": "2026-11-01T00:00:00Z"}, "(did you mean from?)"),
    ("PATCH", "schedules/s", {"crom": "@daily"}, "'crom' (did you mean cron?)"),
    ("GET", "failed-runs?plam=x", None, "query: it has no 'plam' (did you mean plan?)"),
    ("POST", "runs/r/cancel", {"{told}{known}": 1}, "no '{told}{known}'; its members: reason"),
    ("POST", "runs", {"x" * 100_000: 1}, "'" + "x" * 64 + "'; its"),
]


def test_a_member_that_a_body_does_not_have_is_named_with_the_nearest_one(api: Api) -> None:
    for method, path, body, told in UNKNOWN:
        answer = api(method, f"/v1/{path}", body)
        assert answer.status == 422, path
        assert told in answer.json["detail"], path
    assert len(answer.json["detail"]) < 1000


def test_a_form_of_another_site_cannot_start_anything(beatless: Kit, api: Api) -> None:
    answer = api("POST", "/v1/runs", b'{"plan": "two_steps"}', Content_Type="text/plain")
    assert answer.status == 422
    assert beatless.client.list_runs() == []
    assert api("GET", "/v1/runs", Host="evil.example:80").status == 401


@pytest.mark.parametrize("run_id", ["\ud800", "\0"])
def test_a_cursor_of_a_list_that_no_run_can_have_is_refused(api: Api, run_id: str) -> None:
    cursor = encode_page(datetime.now(UTC), run_id)
    assert api("GET", f"/v1/runs?cursor={cursor}").status == 400


@pytest.mark.parametrize("zone", ["-23:59", "+23:59", "+15:59"])
def test_a_time_is_taken_from_every_time_zone(beatless: Kit, api: Api, zone: str) -> None:
    moment = datetime.fromisoformat(f"2999-12-31T23:59:59{zone}")
    answer = api("POST", "/v1/runs", {"plan": "two_steps", "not_before": moment.isoformat()})
    assert beatless.client.get_run(answer.json["run_id"]).not_before == moment

    assert len(api("GET", f"/v1/runs?cursor={encode_page(moment, 'r')}").json["runs"]) == 1


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59"])
def test_a_cursor_beyond_all_time_is_refused(api: Api, moment: str) -> None:
    cursor = encode_page(datetime.fromisoformat(moment), "r")
    assert api("GET", f"/v1/runs?cursor={cursor}").status == 400


@pytest.mark.parametrize("text", ["\ud800", "\0"])
def test_what_postgres_cannot_hold_is_refused_everywhere(
    beatless: Kit, api: Api, text: str
) -> None:
    beatless.start_run("two_steps", run_id="r")
    for path, name in (
        ("runs/r/cancel", "reason"),
        ("runs/r/retry", "from_step"),
        ("failed-runs/retry", "plan"),
        ("failed-runs/retry", "queue"),
        ("failed-runs/retry", "error"),
        ("dead-letters/requeue", "reason"),
    ):
        assert api("POST", f"/v1/{path}", {name: text}).status == 422, (path, name)
    for sent in ("%ED%A0%80", "%00"):  # the first is not UTF-8, and read as other text
        for rest in ("", "/events", "/stream"):
            assert api("GET", f"/v1/runs/{sent}{rest}").status in (404, 422)
        assert api("POST", f"/v1/queues/{sent}/pause").status == 422


def test_listing_pages_with_a_stable_cursor(beatless: Kit, api: Api) -> None:
    expected = [beatless.start_run("two_steps", tags={"n": str(n % 2)}).run_id for n in range(7)]
    expected.reverse()
    found, cursor = [], ""
    while cursor is not None:
        page = api(
            "GET", f"/v1/runs?limit=3&cursor={cursor}" if cursor else "/v1/runs?limit=3"
        ).json
        found += [run["run_id"] for run in page["runs"]]
        cursor = page["next"]
        beatless.start_run("traces", {"traces": 0})  # newer runs do not shift the pages
    assert found == expected
    assert len(api("GET", "/v1/runs?tag=n=1&plan=two_steps&state=queued").json["runs"]) == 3
    assert api("GET", "/v1/runs?cursor=bogus").status == 400
    assert api("GET", "/v1/runs?state=bogus").status == 422
    assert api("GET", "/v1/runs?tag=bogus").status == 422


def test_cancel_over_http(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("two_steps")
    path = f"/v1/runs/{run.run_id}/cancel"
    assert api("POST", path, {"reason": "no more"}).json["state"] == "cancelled"
    assert api("POST", path).status == 202  # again: nothing changes
    done = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert api("POST", f"/v1/runs/{done.run_id}/cancel").status == 409
    assert api("POST", "/v1/runs/nobody/cancel").status == 404


def test_retry_over_http(beatless: Kit, api: Api) -> None:
    failed = beatless.start_run("half", deadline=60)
    assert api("POST", f"/v1/runs/{failed.run_id}/retry").status == 409
    beatless.work_until_idle()

    for body in ({}, {"from_step": "first"}):
        answer = api("POST", f"/v1/runs/{failed.run_id}/retry", body)
        assert answer.status == 201
        assert answer.json["retry_of"] == failed.run_id
    assert api("POST", "/v1/runs/nobody/retry").status == 404
    assert api("POST", f"/v1/runs/{failed.run_id}/retry", {"from_step": "never"}).status == 409


def test_failed_runs_are_listed_and_retried_over_http(beatless: Kit, api: Api) -> None:
    failed = [beatless.start_run("fatally", queue=queue).run_id for queue in ("a", "b", "a")]
    beatless.work_until_idle()

    def listed(query: str) -> list[str]:
        answer = api("GET", f"/v1/failed-runs?{query}")
        assert answer.status == 200
        return [run["run_id"] for run in answer.json["runs"]]

    assert sorted(listed("")) == sorted(failed)
    assert sorted(listed("queue=a&within=3600&error=fatal")) == sorted([failed[0], failed[2]])
    assert listed("plan=two_steps") == listed("error=nothing%20of%20it") == []
    for bad in ("within=-1", "within=nan", "limit=0", "queue=%00", "colour=red"):
        assert api("GET", f"/v1/failed-runs?{bad}").status == 422, bad

    answer = api("POST", "/v1/failed-runs/retry", {"queue": "a"})
    assert answer.status == 202
    assert {run["retry_of"] for run in answer.json["runs"]} == {failed[0], failed[2]}
    assert answer.json["refused"] == []
    assert listed("") == [failed[1]]
    assert api("POST", "/v1/failed-runs/retry", {"queue": "a"}).json["runs"] == []


def test_runs_that_ended_are_counted_and_cleaned_over_http(
    beatless: Kit, beatless_app: App, api: Api
) -> None:
    for plan in ("two_steps", "two_steps", "fatally"):
        beatless.start_run(plan)
    beatless.work_until_idle()
    waiting = beatless.start_run("two_steps").run_id
    path, clean = "/v1/finished-runs", "/v1/finished-runs/clean"

    assert api("GET", f"{path}?state=completed&older_than=0").json == {"runs": 2, "events": 12}
    assert api("GET", f"{path}?state=completed&older_than=3600").json == {"runs": 0, "events": 0}
    assert api("POST", clean, {"state": "completed", "older_than": 3600}).json == {"removed": 0}
    answer = api("POST", clean, {"state": "completed", "older_than": 0, "limit": 1})
    assert (answer.status, answer.json) == (202, {"removed": 1})
    for bad in (
        {"state": "queued", "older_than": 0},
        {"state": "completed"},
        {"state": "completed", "older_than": -1},
        {"state": "completed", "older_than": 0, "limit": 0},
        {"state": "completed", "older_than": 0, "queue": "a"},
    ):
        assert api("POST", clean, bad).status == 422, bad
    assert api("GET", f"{path}?state=running&older_than=0").status == 422
    assert api("GET", f"{path}?state=completed&older_than=nan").status == 422

    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, theirs = tokens.create(["admin"], namespace="theirs")
    _, reader = tokens.create(["runs:read"])
    wanted = {"state": "completed", "older_than": 0}
    api.token = theirs
    assert api("POST", clean, wanted).json == {"removed": 0}
    api.token = reader
    assert api("POST", clean, wanted).status == 403
    assert api("GET", f"{path}?state=completed&older_than=0").json["runs"] == 1
    assert {run.state for run in beatless.client.list_runs()} == {"completed", "failed", "queued"}
    assert beatless.client.get_run(waiting).state == "queued"


@pytest.mark.parametrize(
    ("given", "namespace", "scopes"),
    [
        (["runs:read"], "default", ["runs:read"]),
        (["runs:write"], "default", ["runs:read", "runs:write"]),
        (["queues"], "default", ["queues"]),
        (["admin"], "default", ["runs:read", "runs:write", "queues", "admin"]),
        (["admin"], "acme", ["runs:read", "runs:write", "admin"]),
    ],
)
def test_a_token_is_told_what_it_may_do(
    beatless_app: App, api: Api, given: list[str], namespace: str, scopes: list[str]
) -> None:
    assert api("GET", "/v1/token").json == {
        "namespace": "default",
        "scopes": ["runs:read", "runs:write", "queues", "admin"],
    }
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, secret = tokens.create(given, namespace=namespace)
    assert api("GET", "/v1/token").status == 401
    api.token = secret
    assert api("GET", "/v1/token").json == {"namespace": namespace, "scopes": scopes}


def test_many_messages_are_published_again_over_http(
    beatless: Kit, api: Api, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    for reason in ("Redis refused: NOPERM", "Redis refused: too large", "noperm again"):
        postgres.execute(
            "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES"
            """ ('event', %s, %s, '{"shard": 1, "from_seq": 1, "to_seq": 2}')""",
            [run.run_id, reason],
        )
    path = "/v1/dead-letters/requeue"
    assert api("POST", path, {"reason": "noperm", "limit": 1}).json == {"requeued": 1}
    assert api("POST", path, {"reason": "NoPerm"}).json == {"requeued": 1}
    (left,) = api("GET", "/v1/dead-letters").json["dead_letters"]
    assert left["reason"] == "Redis refused: too large"
    assert api("POST", path, {"reason": "\0"}).status == 422
    assert api("POST", path, {}).json == {"requeued": 1}
    beatless.drain_outbox_once()
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (0,)


def test_once_there_is_a_token_everybody_needs_one(
    beatless: Kit, beatless_app: App, api: Api
) -> None:
    run = beatless.start_run("two_steps")
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    assert api("GET", "/v1/runs").status == 200
    token_id, secret = tokens.create(["runs:read"], note="viewer")

    refused = api("GET", "/v1/runs")
    assert refused.status == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert secret not in str(tokens.list())

    api.token = secret
    assert api("GET", f"/v1/runs/{run.run_id}").status == 200
    assert api("POST", "/v1/runs", {"plan": "two_steps"}).status == 403
    assert api("GET", "/v1/runs", Authorization="Bearer bl_wrong").status == 401
    # A token of a person does not belong into a URL.
    assert api("GET", f"/v1/runs?token={secret}", Authorization="").status == 401

    other_id, _ = tokens.create(["admin"])
    tokens.revoke(token_id)
    assert api("GET", "/v1/runs").status == 401
    tokens.revoke(other_id)


def test_a_tenant_never_learns_of_anothers_run(beatless: Kit, beatless_app: App, api: Api) -> None:
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, ours = tokens.create(["admin"], namespace="ours")
    _, theirs = tokens.create(["admin"], namespace="theirs")
    api.token = ours
    run_id = api("POST", "/v1/runs", {"plan": "two_steps"}).json["run_id"]
    api.token = theirs

    unknown = api("GET", "/v1/runs/nobody")
    for method, path in (
        ("GET", f"/v1/runs/{run_id}"),
        ("GET", f"/v1/runs/{run_id}/events"),
        ("GET", f"/v1/runs/{run_id}/stream"),
        ("POST", f"/v1/runs/{run_id}/cancel"),
        ("POST", f"/v1/runs/{run_id}/stream-token"),
    ):
        answer = api(method, path)
        assert answer.status == 404
        assert answer.text.replace(run_id, "nobody") == unknown.text
    assert api("GET", "/v1/runs").json["runs"] == []


def test_a_stream_token_follows_one_run_and_does_nothing_else(
    beatless: Kit, beatless_app: App, api: Api
) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    beatless.work_until_idle()
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, api.token = tokens.create(["runs:read"])
    made = api("POST", f"/v1/runs/{run.run_id}/stream-token").json
    api.token = None

    with api.stream(f"/v1/runs/{run.run_id}/stream?token={made['token']}") as stream:
        assert len(list(stream)) == 7
    assert api("GET", f"/v1/runs/{other.run_id}/stream?token={made['token']}").status == 403
    assert api("GET", f"/v1/runs/{run.run_id}?token={made['token']}").status == 403
    assert api("GET", f"/v1/token?token={made['token']}").status == 403


def test_health_page_and_document(api: Api) -> None:
    assert api("GET", "/livez").json == {"status": "ok"}
    assert api("GET", "/readyz").json == {"status": "ok"}
    page = api("GET", "/")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert api("GET", "/static/page.js").status == 200
    assert api("GET", "/static/../server.py").status == 404
    document = api("GET", "/openapi.json").json
    assert {"/v1/runs", "/v1/runs/{run_id}/stream"} <= document["paths"].keys()
    assert api("GET", "/nothing").headers["content-type"] == "application/problem+json"


def test_pruned_events_are_gone_and_the_answer_says_what_is_kept(
    beatless: Kit, beatless_app: App, api: Api
) -> None:
    run_id = beatless.start_run("agents.run").run_id
    beatless.work_until_idle()
    beatless.advance(31 * 86_400)
    retention = Retention(beatless_app.settings.schema, events_days=30, runs_days=0, batch=10)
    with beatless_app.direct_connection() as session:
        retention.step(session)
        for path in ("events", "stream"):
            answer = api("GET", f"/v1/runs/{run_id}/{path}?from_seq=9")
            assert (answer.status, answer.json["oldest_seq"]) == (410, 11)
            assert "events from 11 on are kept" in answer.json["detail"]
        assert len(api("GET", f"/v1/runs/{run_id}/events?from_seq=10").json["events"]) == 3
        with api.stream(f"/v1/runs/{run_id}/stream?from_seq=10") as stream:
            assert [frame["event"] for frame in stream if "event" in frame][-1] == "RunFinished"
        retention.step(session)
    answer = api("GET", f"/v1/runs/{run_id}/stream", last_event_id="11")
    assert (answer.status, answer.json["oldest_seq"]) == (410, None)
    assert api("GET", f"/v1/runs/{run_id}").json["pruned_seq"] == 13
    assert api("GET", f"/v1/runs/{run_id}/stream?from_seq=13").status == 204


def test_a_server_that_stops_ends_its_streams_in_order(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps")
    with ExitStack() as stack:
        with serving(beatless_app) as api:
            stream = stack.enter_context(api.stream(f"/v1/runs/{run.run_id}/stream"))
            priming, started = next(stream), next(stream)
            assert started["event"] == "RunStarted"
        assert list(stream) == []  # whole: an answer that breaks off raises IncompleteRead
        with serving(beatless_app) as again:
            path = f"/v1/runs/{run.run_id}/stream"
            with again.stream(path, Last_Event_ID=started["id"]) as resumed:
                assert next(resumed)["id"] == started["id"] != priming["id"]
                beatless.work_until_idle()
                assert [frame["event"] for frame in resumed][-1] == "RunFinished"


def test_a_redis_that_hangs_is_told_before_a_probe_gives_up(
    beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel accepts the connection, and nobody answers: as of a process that is frozen."""
    assert 2 * readiness.REDIS_TIMEOUT_S < 5  # seconds: of a probe in deploy/kubernetes
    monkeypatch.setattr(readiness, "REDIS_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        url = f"redis://127.0.0.1:{hangs.getsockname()[1]}/0"
        app = App(replace(beatless_app.settings, redis_url=url, broker_url=url), [])
        with closing(app), serving(app) as api:
            assert api("GET", "/readyz").json["status"] == "degraded"


def test_json_that_is_sent_as_a_form_is_told_how_to_be_sent(api: Api) -> None:
    """As `curl -d` sends it."""
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    answer = api("POST", "/v1/runs", b'{"plan": "two_steps"}', **form)
    assert answer.status == 422
    assert "Content-Type: application/json" in answer.json["detail"]
    assert "Content-Type" not in api("POST", "/v1/runs", b"[]").json["detail"]
