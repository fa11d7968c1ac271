"""`beatless.http`: the calls of an app's client, over HTTP, through whatever happens on the way."""

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from psycopg import Connection

from beatless import (
    App,
    BadPayload,
    BadRequest,
    BadSetting,
    CannotRetry,
    Event,
    EventsPruned,
    RunConflict,
    RunNotFound,
    UnknownPlan,
    Unreachable,
    WaitTimeout,
)
from beatless.api import sse
from beatless.auth import Scope, Tokens
from beatless.cli.demo import GOLDEN
from beatless.errors import AccessDenied
from beatless.http import AsyncClient, Client
from beatless.orchestrator.retention import Retention
from beatless.outbox.backoff import Backoff
from beatless.testing import Kit
from tests.http_proxy import Proxy
from tests.serving import Api, serving

AT_ONCE = Backoff(initial=0.001, cap=0.01)


@pytest.fixture
def api(beatless_app: App) -> Iterator[Api]:
    with serving(beatless_app, is_open=True) as api:  # a proxy's port is not the server's
        yield api


@pytest.fixture
def client(api: Api) -> Iterator[Client]:
    with Client(f"http://127.0.0.1:{api.port}", backoff=AT_ONCE) as client:
        yield client


@pytest.mark.slow
def test_it_gives_what_the_client_of_the_app_gives(beatless: Kit, client: Client) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    run = client.start_run("agents.run", {"device": "ü"}, key="k", priority=3, tags={"a": "b"})
    delayed = client.start_run("two_steps", delay=timedelta(hours=1), deadline=7200)
    timed = client.start_run("two_steps", not_before=later, queue="q", run_id="chosen")
    assert timed.not_before == later
    assert client.start_run("agents.run", {"device": "ü"}, key="k") == run
    assert run == beatless.client.get_run(run.run_id)

    beatless.work_until_idle()

    for given in (run, delayed, timed):
        assert client.get_run(given.run_id) == beatless.client.get_run(given.run_id)
    for options in ({}, {"limit": 2}, {"tags": {"a": "b"}}, {"queue": "q"}, {"state": "queued"}):
        assert client.list_runs(**options) == beatless.client.list_runs(**options)
    assert client.list_runs(before=timed) == beatless.client.list_runs(before=timed)
    for options in ({}, {"from_seq": 5}, {"from_seq": 5, "limit": 3}):
        found = client.events(run.run_id, **options)
        assert found == beatless.client.events(run.run_id, **options) != []
    assert client.wait_for_run(run.run_id).state == "completed"
    assert client.cancel_run(delayed.run_id, reason="no").error["message"] == "no"
    assert client.cancel_run(run.run_id) == beatless.client.get_run(run.run_id)
    assert client.retry_run(run.run_id, "Ping").retry_of == run.run_id
    client.remove_run(timed.run_id)
    with pytest.raises(RunNotFound):
        beatless.client.get_run(timed.run_id)


def test_long_lists_come_in_pages(beatless: Kit, client: Client, monkeypatch) -> None:
    monkeypatch.setattr("beatless.http.calls.PAGE", 3)
    for _ in range(7):
        run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert client.list_runs() == beatless.client.list_runs()
    assert client.list_runs(limit=5) == beatless.client.list_runs(limit=5)
    assert client.events(run.run_id) == beatless.client.events(run.run_id)
    assert len(client.events(run.run_id, 1, 4)) == 4


def test_queues_over_http(beatless: Kit, client: Client) -> None:
    run = client.start_run("two_steps", queue="q")
    client.pause_queue("q")
    assert client.queues() == beatless.client.queues()
    assert client.queues()[0].paused_at is not None
    client.resume_queue("q")
    assert client.drain_queue("q") == 1
    client.start_run("two_steps", queue="q")
    assert client.obliterate_queue("q", force=True) == 1
    with pytest.raises(BadRequest, match="queue is 'q', which no plan names"):
        client.obliterate_queue("q", force=True)
    with pytest.raises(RunNotFound):
        client.get_run(run.run_id)


def test_runs_that_ended_are_cleaned_over_http(beatless: Kit, client: Client) -> None:
    for _ in range(3):
        client.start_run("two_steps")
    beatless.work_until_idle()
    assert client.count_finished("completed", timedelta(hours=1)) == (0, 0)
    assert client.count_finished("completed", 0) == (3, 18)
    assert client.clean("completed", timedelta(hours=1)) == 0
    assert client.clean("completed", 0, limit=2) == 2
    assert beatless.client.count_finished("completed", 0) == (1, 6)


@pytest.mark.slow
def test_failed_runs_over_http(beatless: Kit, client: Client, postgres: Connection) -> None:
    for queue in ("a", "b", "a"):
        client.start_run("fatally", queue=queue, tags={"in": queue, "all": "=="})
    odd = client.start_run("fatally", queue="b").run_id
    beatless.work_until_idle()
    for options in (
        {},
        {"queue": "a"},
        {"tags": {"in": "a", "all": "=="}},
        {"plan": "two_steps"},
        {"error": "FATAL", "limit": 2},
        {"within": timedelta(hours=1)},
    ):
        assert client.failed_runs(**options) == beatless.client.failed_runs(**options)
    assert len(client.failed_runs(queue="a")) == 2
    assert len(client.failed_runs(tags={"in": "b"})) == 1

    # As if the plan had gone since then: it cannot be retried, and the answer says which and why.
    postgres.execute("UPDATE runs SET plan = 'gone' WHERE run_id = %s", [odd])
    started, refused = client.retry_failed(queue="b")
    assert [beatless.client.get_run(run.run_id) for run in started] == started
    assert [run.queue for run in started] == ["b"]
    assert [(type(reason), reason.args[0]) for reason in refused] == [(UnknownPlan, "gone")]
    assert [run.run_id for run in client.failed_runs(queue="b")] == [odd]
    for retried in (True, False):
        of_both = client.list_runs(retried=retried), beatless.client.list_runs(retried=retried)
        assert of_both[0] == of_both[1]
    assert [run.retried_by for run in client.list_runs(retried=True)] == [started[0].run_id]
    client.remove_run(odd)
    assert len(client.failed_runs()) == 2


def test_dead_letters_over_http(beatless: Kit, client: Client, postgres: Connection) -> None:
    run = client.start_run("two_steps")
    beatless.work_until_idle()
    for reason in ("refused: NOPERM", "refused: too large", "refused: too large"):
        postgres.execute(
            "INSERT INTO dead_letters (kind, run_id, reason, message) VALUES"
            """ ('event', %s, %s, '{"shard": 1, "from_seq": 1, "to_seq": 2}')""",
            [run.run_id, reason],
        )
    letters = client.dead_letters()
    assert letters == beatless.client.dead_letters()
    assert client.dead_letters(limit=1) == letters[:1]
    client.discard_dead_letter(letters[2].id)
    assert client.requeue_dead_letters(reason="noperm") == 1
    client.requeue_dead_letter(letters[1].id)
    assert client.dead_letters() == []
    beatless.drain_outbox_once()


def test_the_calls_of_the_async_client_are_those_of_the_other(beatless: Kit, api: Api) -> None:
    for _ in range(2):
        beatless.start_run("fatally")
    beatless.start_run("two_steps")
    beatless.work_until_idle()

    async def use() -> None:
        async with AsyncClient(api.url, backoff=AT_ONCE) as client:
            assert await client.count_finished("completed", 0) == (1, 6)
            assert await client.clean("completed", 0) == 1
            assert len(await client.failed_runs(error="fatal")) == 2
            started, refused = await client.retry_failed(limit=1)
            assert (len(started), refused) == (1, [])
            assert await client.dead_letters() == []
            assert await client.requeue_dead_letters() == 0
            for call in (client.requeue_dead_letter, client.discard_dead_letter):
                with pytest.raises(BadRequest, match="77 does not exist"):
                    await call(77)

    asyncio.run(use())
    assert len(beatless.client.failed_runs()) == 1


WRONG: list[tuple[type[Exception], Callable[[Any], Any]]] = [
    (RunNotFound, lambda c: c.get_run("nobody")),
    (RunNotFound, lambda c: c.events("nobody")),
    (RunNotFound, lambda c: c.cancel_run("nobody")),
    (RunNotFound, lambda c: c.retry_run("nobody")),
    (RunNotFound, lambda c: c.remove_run("nobody")),
    (RunNotFound, lambda c: c.stream_run("nobody")),
    (UnknownPlan, lambda c: c.start_run("nothing")),
    (BadPayload, lambda c: c.start_run("two_steps", "a\0b")),
    (BadPayload, lambda c: c.start_run("two_steps", "x" * 300_000)),
    (BadRequest, lambda c: c.start_run("two_steps", run_id="a b")),
    (BadRequest, lambda c: c.start_run("two_steps", queue="a b")),
    (BadRequest, lambda c: c.start_run("two_steps", deadline=-1.0)),
    (BadRequest, lambda c: c.stream_run("old", 99)),
    (BadRequest, lambda c: c.stream_run("old", -1)),
    (BadRequest, lambda c: c.pause_queue("a b")),
    (BadRequest, lambda c: c.clean("queued", 0)),
    (BadRequest, lambda c: c.count_finished("running", 0)),
    (BadRequest, lambda c: c.requeue_dead_letter(77)),
    (BadRequest, lambda c: c.discard_dead_letter(77)),
    (RunConflict, lambda c: c.start_run("two_steps", 2, run_id="new")),
    (CannotRetry, lambda c: c.retry_run("new")),
    (CannotRetry, lambda c: c.retry_run("old", "never")),
    (EventsPruned, lambda c: c.events("old")),
    (EventsPruned, lambda c: c.stream_run("old")),
]


@pytest.mark.slow
def test_errors_are_those_of_the_client_of_the_app(beatless: Kit, client: Client) -> None:
    beatless.start_run("agents.run", run_id="old")
    beatless.work_until_idle()
    beatless.advance(31 * 86_400)
    with beatless.app.direct_connection() as session:
        schema = beatless.app.settings.schema
        Retention(schema, events_days=30, runs_days=0, batch=10).step(session)
    beatless.start_run("two_steps", 1, run_id="new")
    for kind, wrong in WRONG:
        with pytest.raises(kind) as here:
            wrong(beatless.client)
        with pytest.raises(kind) as there:
            wrong(client)
        assert (there.value.args, str(there.value)) == (here.value.args, str(here.value))


def test_what_only_http_can_refuse(beatless: Kit, client: Client, api: Api) -> None:
    with pytest.raises(BadRequest, match=r"refused \(413\)"):
        client.start_run("two_steps", "x" * 2_000_000)
    with pytest.raises(BadRequest, match="priority"):
        client.start_run("two_steps", priority=11)
    for run_id in ("..", "../queues", ""):
        with pytest.raises(BadRequest, match="part of a URL"):
            client.get_run(run_id)
    _, secret = Tokens(beatless.app.engine, beatless.app.settings.schema).create([Scope.RUNS_READ])
    with pytest.raises(AccessDenied, match="401"):
        client.list_runs()
    with Client(f"http://127.0.0.1:{api.port}", token=secret) as reader:
        assert reader.list_runs() == []
        with pytest.raises(AccessDenied, match="403"):
            reader.start_run("two_steps")


def test_an_api_that_is_not_there(monkeypatch, shut_port: int) -> None:
    with Client(f"http://127.0.0.1:{shut_port}", backoff=AT_ONCE) as client:
        for call in (
            client.list_runs,
            lambda: client.retry_run("x"),
            lambda: client.stream_run("x"),
        ):
            with pytest.raises(Unreachable, match="the API at http"):
                call()
    monkeypatch.setenv("BEATLESS_API_URL", "http://beatless.example")
    Client.from_env().close()
    monkeypatch.delenv("BEATLESS_API_URL")
    with pytest.raises(BadSetting, match="BEATLESS_API_URL"):
        Client.from_env()


def test_who_waits_between_two_tries_ends_when_the_client_is_closed(shut_port: int) -> None:
    client = Client(f"http://127.0.0.1:{shut_port}", backoff=Backoff(initial=3600, cap=3600))
    ended: list[Exception] = []

    def call() -> None:
        try:
            client.list_runs()
        except Exception as error:
            ended.append(error)

    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    client.close()
    calling.join(60)
    assert len(ended) == 1


@pytest.mark.slow
def test_streams_from_any_seq(beatless: Kit, client: Client) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    everything = beatless.client.events(run.run_id)

    async def follow(seq: int) -> list[Event]:
        return [event async for event in client.astream_run(run.run_id, seq)]

    for seq in (0, 1, 6, 12, 13):
        assert list(client.stream_run(run.run_id, seq)) == everything[seq:]
        assert asyncio.run(follow(seq)) == everything[seq:]


def test_streams_live(beatless: Kit, client: Client) -> None:
    runs = [beatless.start_run("agents.run") for _ in range(3)]
    stream = client.stream_run(runs[0].run_id)
    first = next(stream)

    async def main() -> list[list[Event]]:
        async with AsyncClient(str(client._http.base_url)) as other:

            async def follow(run_id: str) -> list[Event]:
                return [event async for event in other.astream_run(run_id)]

            following = [asyncio.create_task(follow(run.run_id)) for run in runs]
            await asyncio.to_thread(beatless.work_until_idle)
            return await asyncio.wait_for(asyncio.gather(*following), 60)

    found = asyncio.run(main())
    assert [first, *stream] == found[0]
    assert [event.type for event in found[1]] == GOLDEN
    assert found == [beatless.client.events(run.run_id) for run in runs]


@pytest.mark.parametrize("cuts", [40, pytest.param(200, marks=pytest.mark.long)])
def test_a_connection_cut_at_random_bytes_costs_nothing(
    beatless: Kit, api: Api, record_property, cuts: int
) -> None:
    seed = 20_261_121
    record_property("seed", seed)
    chance = random.Random(seed)
    run = beatless.start_run("traces", {"traces": 4 * cuts})  # more than they can bring
    threads = threading.Thread(target=beatless.work_until_idle)

    def cut(number: int) -> int | None:
        if number == 1:
            return 1500  # it also brings the answer of the call before the stream
        # Headers and priming are about 450 bytes: some connections bring nothing, some a few.
        return chance.randrange(1, 1500) if number <= cuts else None

    with Proxy(api.port, cut=cut) as proxy, Client(proxy.url, backoff=AT_ONCE) as client:
        threads.start()
        found = list(client.stream_run(run.run_id))
        threads.join()
        assert proxy.cuts == cuts
    assert found == beatless.client.events(run.run_id)


@pytest.mark.slow
def test_a_cut_async_viewer_misses_nothing_either(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("traces", {"traces": 50})
    beatless.work_until_idle()

    async def main(url: str) -> list[Event]:
        async with AsyncClient(url, backoff=AT_ONCE) as client:
            return [event async for event in client.astream_run(run.run_id)]

    def cut(number: int) -> int | None:
        return 1500 if number == 1 else 300 + 37 * number if number < 20 else None

    with Proxy(api.port, cut=cut) as proxy:
        assert asyncio.run(main(proxy.url)) == beatless.client.events(run.run_id)
        assert proxy.cuts == 19


def test_a_connection_that_brings_nothing_is_given_up(beatless: Kit, api: Api) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    with (
        Proxy(api.port, cut={1: 1200, 2: 0, 3: 0}.get) as proxy,
        Client(proxy.url, backoff=AT_ONCE, stall=0.3) as client,
    ):
        assert len(list(client.stream_run(run.run_id))) == 6
        assert proxy.accepted >= 4


def test_a_wait_has_the_bounds_of_all_times(
    beatless: Kit, client: Client, api: Api, subtests: pytest.Subtests
) -> None:
    run = beatless.start_run("two_steps")

    async def follow(timeout: Any) -> None:
        async with AsyncClient(api.url, token=api.token) as other:
            await other.wait_for_run(run.run_id, timeout=timeout)

    for timeout in (-1, float("nan"), float("inf"), 3e11, True, "60"):
        for wait in (
            lambda value: client.wait_for_run(run.run_id, timeout=value),
            lambda value: client.stream_run(run.run_id, timeout=value),
            lambda value: beatless.client.wait_for_run(run.run_id, timeout=value),
            lambda value: asyncio.run(follow(value)),
        ):
            with (
                subtests.test(timeout=timeout),
                pytest.raises(BadRequest, match=r"timeout.*(ten years|: give seconds, as)"),
            ):
                wait(timeout)


def test_a_viewer_gives_up_in_time(
    beatless: Kit, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not at the next heartbeat, which comes late here."""
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 120.0)
    monkeypatch.setattr(client, "_stall", 240.0)
    run = beatless.start_run("two_steps")

    async def follow() -> None:
        async for _ in client.astream_run(run.run_id, timeout=0.1):
            pass

    for wait in (
        lambda: client.wait_for_run(run.run_id, timeout=0.1),
        lambda: list(client.stream_run(run.run_id, timeout=0.1)),
        lambda: asyncio.run(follow()),
    ):
        begin = monotonic()
        with pytest.raises(WaitTimeout, match=r"within 0\.1 s: it is unfinished at seq [01]"):
            wait()
        assert monotonic() - begin < 60


def test_a_run_that_is_removed_ends_its_streams(beatless: Kit, client: Client) -> None:
    run = beatless.start_run("two_steps")
    stream = client.stream_run(run.run_id)
    next(stream)
    beatless.client.remove_run(run.run_id)
    with pytest.raises(RunNotFound):
        next(stream)
