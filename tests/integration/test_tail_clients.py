"""`Client.tail` in the app and over HTTP, and `GET /v1/stream`: one stream of all runs."""

import asyncio
import json
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from itertools import islice
from typing import Any
from urllib.parse import quote

import pytest

from beatless import (
    AccessDenied,
    App,
    BadRequest,
    Fatal,
    HistoryChanged,
    Plan,
    StepContext,
    TailedEvent,
    Unreachable,
    step,
)
from beatless import Client as AppClient
from beatless.api import sse, stream_limits
from beatless.auth import Scope, Tokens
from beatless.http import AsyncClient, Client
from beatless.orchestrator.records import Run
from beatless.outbox.backoff import Backoff
from beatless.streams import tail
from beatless.testing import Kit
from tests.http_proxy import Proxy
from tests.serving import Api, serving

AT_ONCE = Backoff(initial=0.001, cap=0.01)


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app, is_open=True) as api:
        yield api


class InLoop:
    """The tail of an asynchronous client as an iterator."""

    def __init__(self, runner: asyncio.Runner, client: AppClient | Client | AsyncClient) -> None:
        self._runner = runner
        self._client = client

    def tail(self, **options: Any) -> Generator[TailedEvent]:
        tail = self._client.atail(**options)

        async def following() -> TailedEvent | None:
            return await anext(tail, None)

        try:
            while (told := self._runner.run(following())) is not None:
                yield told
        finally:
            self._runner.run(tail.aclose())


Tailing = Callable[..., Generator[TailedEvent]]


@pytest.fixture(params=["app", "app in a loop", "http", "http in a loop", "http for a loop"])
def tailing(request: pytest.FixtureRequest, beatless: Kit) -> Iterator[Tailing]:
    """`tail` of each client."""
    with asyncio.Runner() as runner, ExitStack() as opened:
        tails: dict[str, Tailing] = {
            "app": beatless.client.tail,
            "app in a loop": InLoop(runner, beatless.client).tail,
        }
        if request.param not in tails:
            url = request.getfixturevalue("api").url
            client = opened.enter_context(Client(url, backoff=AT_ONCE))
            other = AsyncClient(url, backoff=AT_ONCE)
            opened.callback(lambda: runner.run(other.aclose()))
            tails["http"] = client.tail
            tails["http in a loop"] = InLoop(runner, client).tail
            tails["http for a loop"] = InLoop(runner, other).tail

        def tail(**options: Any) -> Generator[TailedEvent]:
            return opened.enter_context(closing(tails[request.param](**options)))

        yield tail


def of(run: Run, *seqs: int) -> list[tuple[str, int]]:
    return [(run.run_id, seq) for seq in seqs]


def seqs(tail: Iterator[TailedEvent], count: int) -> list[tuple[str, int]]:
    return [(each.event.run_id, each.event.seq) for each in islice(tail, count)]


def test_a_tail_gives_the_chosen_events_of_the_namespace(
    beatless: Kit, beatless_app: App, tailing: Tailing
) -> None:
    first = beatless.start_run("two_steps", tags={"shop": "eu"}, queue="q")
    tail = tailing(
        plan=["two_steps", "traces"],
        queue="q",
        tags={"shop": "eu"},
        event=["RunStarted", "RunFinished"],
        since=first.created_at,
    )
    chosen = {"queue": "q", "tags": {"shop": "eu", "by": "phone"}}
    beatless.start_run("agents.run", **chosen)
    beatless.start_run("two_steps", tags={"shop": "eu"})
    beatless.start_run("two_steps", tags={"shop": "us"}, queue="q")
    beatless_app.client_for("acme").start_run("two_steps", **chosen)
    run = beatless.start_run("two_steps", **chosen)
    beatless.work_until_idle()

    found = list(islice(tail, 4))

    assert {each.plan for each in found} == {"two_steps"}
    assert sorted((each.event.run_id, each.event.seq) for each in found) == sorted(
        of(first, 1, 6) + of(run, 1, 6)
    )
    for each in found:
        assert each.event in beatless.client.events(each.event.run_id)


@pytest.mark.parametrize("http", [False, True])
def test_a_tail_begins_when_it_is_called(beatless: Kit, api: Api, http: bool) -> None:
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    with Client(api.url) as client:
        tail = (client if http else beatless.client).tail()
        run = beatless.start_run("two_steps")
        beatless.work_until_idle()
        assert seqs(tail, 6) == of(run, 1, 2, 3, 4, 5, 6)
        tail.close()


def test_a_tail_ends_in_time(beatless: Kit, tailing: Tailing) -> None:
    assert list(tailing(timeout=0.05)) == []


BAD: list[tuple[dict[str, Any], str]] = [
    ({"event": "RunEnded"}, "event is 'RunEnded'; choose RunStarted"),
    ({"since": datetime(2026, 1, 1)}, "since is 2026-01-01.*time zone"),  # noqa: DTZ001
    ({"since": datetime(1969, 1, 1, tzinfo=UTC)}, "since is 1969"),
    ({"timeout": -1}, "timeout"),
    ({"plan": "a\0"}, "plan has a NUL"),
    ({"tags": {"a": 1}}, "tags"),
]


def test_bad_options_are_refused_alike(beatless: Kit, tailing: Tailing) -> None:
    for options, problem in BAD:
        with pytest.raises(BadRequest, match=problem):
            list(tailing(**options))


def test_another_history_is_an_error_or_is_told(
    beatless: Kit, beatless_app: App, tailing: Tailing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beatless_app.streams, "_head_check", 0.02)
    monkeypatch.setattr(sse, "ROTATION_S", 0.0)
    runs = [beatless.start_run("two_steps")]

    def told() -> None:
        runs.append(beatless.start_run("two_steps"))
        beatless.drain_outbox_once()

    def renew() -> None:
        with beatless_app.engine.begin() as connection:
            beatless_app.journal.renew(connection)

    tail = tailing(since=runs[0].created_at, on_reset=told)
    assert seqs(tail, 1) == of(runs[0], 1)
    renew()
    assert seqs(tail, 1) == of(runs[1], 1)

    tail = tailing(since=runs[0].created_at)
    assert seqs(tail, 2) == of(runs[0], 1) + of(runs[1], 1)
    renew()
    with pytest.raises(HistoryChanged, match="tail them anew, or pass on_reset"):
        next(tail)


def test_an_api_that_is_not_there_or_refuses_is_told_at_once(
    beatless: Kit, beatless_app: App, api: Api, shut_port: int
) -> None:
    with (
        Client(f"http://127.0.0.1:{shut_port}", backoff=AT_ONCE) as nowhere,
        pytest.raises(Unreachable),
    ):
        nowhere.tail()
    Tokens(beatless_app.engine, beatless_app.settings.schema).create([Scope.RUNS_READ])
    with Client(api.url) as nobody, pytest.raises(AccessDenied):
        nobody.tail()


def test_a_tail_goes_on_after_the_server_has_ended_it(
    beatless: Kit, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each connection ends as soon as it has given what there was."""
    monkeypatch.setattr(sse, "ROTATION_S", 0.0)
    with Client(api.url, backoff=AT_ONCE) as client:
        tail = client.tail()
        for _ in range(3):
            run = beatless.start_run("two_steps")
            beatless.work_until_idle()
            assert seqs(tail, 6) == of(run, 1, 2, 3, 4, 5, 6)
        tail.close()


def test_a_connection_does_not_end_before_the_past_was_given(
    beatless: Kit, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would begin anew, from the same place, for ever; heartbeats come meanwhile."""
    monkeypatch.setattr(sse, "ROTATION_S", 0.0)
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.0)
    monkeypatch.setattr(tail, "PAGE_RUNS", 1)
    runs = [beatless.start_run("two_steps") for _ in range(3)]
    beatless.work_until_idle()
    since = quote(runs[0].created_at.isoformat())
    with api.stream(f"/v1/stream?since={since}&event=RunFinished") as stream:
        told = [json.loads(each["data"])["run_id"] for each in stream if "data" in each]
    assert told == [run.run_id for run in runs]


def test_a_tail_that_is_cut_at_random_bytes_gives_each_event_once(
    beatless: Kit, api: Api, record_property: Any
) -> None:
    seed, cuts = 20_261_130, 30
    record_property("seed", seed)
    chance = random.Random(seed)
    first = beatless.start_run("two_steps")
    runs = [first, *(beatless.start_run("traces", {"traces": 20}) for _ in range(3))]
    beatless.work_until_idle()
    wanted = [
        (event.run_id, event.seq) for run in runs for event in beatless.client.events(run.run_id)
    ]

    def cut(number: int) -> int | None:
        # The first also brings the answer of the call before; headers and priming are 500 bytes.
        return chance.randrange(1, 20_000) + 1500 * (number == 1) if number <= cuts else None

    with (
        Proxy(api.port, cut=cut) as proxy,
        Client(proxy.url, backoff=AT_ONCE) as client,
    ):
        tail = client.tail(since=first.created_at)
        found = seqs(tail, len(wanted))
        last = beatless.start_run("two_steps")
        beatless.work_until_idle()
        found += seqs(tail, 6)
        tail.close()
    assert sorted(found[:-6]) == sorted(wanted)
    assert found[-6:] == of(last, 1, 2, 3, 4, 5, 6)
    for run in runs:
        assert [seq for run_id, seq in found if run_id == run.run_id] == [
            event.seq for event in beatless.client.events(run.run_id)
        ]


def refusal(api: Api, path: str = "/v1/stream", **headers: str) -> tuple[int, str]:
    """The status of what is no stream, and its problem: one would not end."""
    response = api.open("GET", path, **headers)
    with response.connection:
        if response.headers["Content-Type"].startswith("text/event-stream"):
            return response.status, ""
        assert response.headers["Content-Type"] == "application/problem+json"
        return response.status, response.read().decode()


def frames(stream: Iterator[dict[str, str]], count: int) -> list[dict[str, str]]:
    """So many frames with data."""
    return list(islice((each for each in stream if "data" in each), count))


def test_frames_have_events_with_plans_and_the_place_to_go_on_from(beatless: Kit, api: Api) -> None:
    with api.stream("/v1/stream?plan=two_steps") as stream:
        assert next(stream).keys() == {"id", "retry"}
        run = beatless.start_run("two_steps")
        beatless.work_until_idle()
        found = frames(stream, 6)
    events = [event.to_dict() for event in beatless.client.events(run.run_id)]
    assert [json.loads(each["data"]) for each in found] == [
        {"plan": "two_steps", **event} for event in events
    ]
    assert [each["event"] for each in found] == [event["type"] for event in events]

    away = beatless.start_run("two_steps")
    beatless.work_until_idle()
    for given in ({"Last_Event_ID": found[-1]["id"]}, {}):
        query = "" if given else f"?after={found[-1]['id']}"
        with api.stream(f"/v1/stream{query}", **given) as stream:
            told = [json.loads(each["data"]) for each in frames(stream, 12)]
        assert {(each["run_id"], each["seq"]) for each in told} == {
            *of(run, 1, 2, 3, 4, 5, 6),
            *of(away, 1, 2, 3, 4, 5, 6),
        }


def test_a_place_of_another_history_is_told_before_its_id_is_given(beatless: Kit, api: Api) -> None:
    with api.stream("/v1/stream", Last_Event_ID="another.1.1") as stream:
        first, reset = next(stream), next(stream)
    assert first.keys() == {"retry"}
    assert reset["event"] == "reset"
    epoch = beatless.client.epoch()
    assert json.loads(reset["data"]) == {"epoch": epoch}
    assert reset["id"].startswith(f"{epoch}.")


def test_bad_queries_and_ids_are_refused(api: Api) -> None:
    for given in ("5", "e.5", "e.1.x", "e.1.1.1", "x" * 200):
        for status, told in (
            refusal(api, Last_Event_ID=given),
            refusal(api, f"/v1/stream?after={given}"),
        ):
            assert status == 400
            assert "the id of a frame of this stream" in told
    for query, problem in (
        ("event=RunEnded", "event"),
        ("tag=shop", "write it like name=value"),
        ("since=2026-01-01T00:00:00", "since"),
        ("since=1960-01-01T00:00:00Z", "after 1970"),
    ):
        status, told = refusal(api, f"/v1/stream?{query}")
        assert status == 422
        assert problem in told


def test_a_token_sees_its_namespace_and_one_for_a_stream_of_a_run_nothing(
    beatless: Kit, beatless_app: App, api: Api
) -> None:
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    acme = beatless_app.client_for("acme")
    first = acme.start_run("two_steps")
    beatless.start_run("two_steps")
    _, api.token = tokens.create([Scope.RUNS_READ], namespace="acme")
    with api.stream(f"/v1/stream?since={quote(first.created_at.isoformat())}") as stream:
        beatless.work_until_idle()
        last = acme.start_run("two_steps")
        beatless.work_until_idle()
        told = [json.loads(each["data"]) for each in frames(stream, 12)]
    assert {(each["run_id"], each["seq"]) for each in told} == {
        *of(first, 1, 2, 3, 4, 5, 6),
        *of(last, 1, 2, 3, 4, 5, 6),
    }

    secret = api("POST", f"/v1/runs/{first.run_id}/stream-token").json["token"]
    _, queues = tokens.create([Scope.QUEUES])
    api.token = None
    assert refusal(api)[0] == 401
    assert refusal(api, f"/v1/stream?token={secret}")[0] == 403
    api.token = queues
    assert refusal(api)[0] == 403


def test_a_process_has_only_so_many_tails(
    api: Api, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_limits, "MAX_TAILS", 1)
    run = beatless.start_run("two_steps")
    with api.stream("/v1/stream") as stream:
        next(stream)
        status, problem = refusal(api)
        assert status == 503
        assert "too many streams are open" in problem
        with api.stream(f"/v1/runs/{run.run_id}/stream") as other:
            next(other)


def test_the_tails_of_one_namespace_leave_room_for_those_of_others(
    api: Api, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_limits, "MAX_TAILS_PER_NAMESPACE", 1)
    tokens = Tokens(beatless_app.engine, beatless_app.settings.schema)
    _, api.token = tokens.create([Scope.RUNS_READ], namespace="acme")
    with api.stream("/v1/stream") as stream:
        next(stream)
        _, api.token = tokens.create([Scope.RUNS_READ], namespace="acme")
        assert refusal(api)[0] == 503
        _, api.token = tokens.create([Scope.RUNS_READ])
        with api.stream("/v1/stream") as other:
            next(other)


@step
def refuse(ctx: StepContext) -> None:
    raise Fatal(f"no such card: {ctx.input}")


def hidden(what: str, value: Any) -> Any:
    return json.loads(json.dumps(value).replace("4111", f"hidden {what}"))


def test_what_redact_hides_is_hidden_in_a_tail(beatless_app: App, tmp_path: Any) -> None:
    app = App(beatless_app.settings, [Plan("refuses", [refuse])], redact=hidden)
    kit = Kit(app, directory=tmp_path)
    run = kit.start_run("refuses", "4111")
    kit.work_until_idle()

    shown = app.client_for("default", shown=True)
    with closing(shown.tail(since=run.created_at)) as tail:
        told = [str(each.event) for each in islice(tail, 4)]
    since = quote(run.created_at.isoformat())
    with serving(app, is_open=True) as api, api.stream(f"/v1/stream?since={since}") as stream:
        told += [each["data"] for each in frames(stream, 4)]
    stored = str(kit.client.events(run.run_id))
    kit.close()

    assert "4111" in stored
    assert "4111" not in str(told)
    assert str(told).count("hidden error") >= 4
