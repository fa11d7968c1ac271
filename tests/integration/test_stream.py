"""Streams give everything from any seq, in order, once, until RunFinished."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import pytest
import redis
import sqlalchemy
from redis import asyncio as aioredis

from beatless import App, BadRequest, Event, RunNotFound, WaitTimeout
from beatless.app import REDIS_TIMEOUTS
from beatless.cli.demo import GOLDEN
from beatless.outbox.observer import Signal, ThreadFailed
from beatless.settings import engine_url
from beatless.streams import streams as stream_module
from beatless.streams.history import History
from beatless.streams.hub import Hub, Mailbox
from beatless.streams.observer import Backfilled
from beatless.streams.streams import Streams
from beatless.testing import Kit
from tests.proxy import Proxy, proxy


def streams(app: App, **options) -> Streams:
    """Streams with other timings than the app's."""
    return Streams(
        **{
            "journal": app.journal,
            "engine": app.engine,
            "redis_client": app.redis,
            "aredis_client": app.aredis,
            "prefix": app.settings.prefix,
            **options,
        }
    )


def live_only(app: App) -> Streams:
    """Streams that read the journal when they begin and after a gap, and never for being late."""
    return streams(app, head_check=3600, without_redis=3600)


class Watcher:
    """Follows a run in a thread; `subscribed` waits until Redis knows it."""

    def __init__(self, beatless: Kit, run_id: str, stream: Iterator[Event]) -> None:
        self.events: list[Event] = []
        self._redis = beatless.app.redis()
        self._channel = beatless.app.streams.channel(run_id)
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._follow, args=(stream,))
        self._thread.start()

    def _follow(self, stream: Iterator[Event]) -> None:
        for event in stream:
            with self._news:
                self.events.append(event)
                self._news.notify_all()

    def wait_for(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.events) >= count, timeout=60)

    def end(self) -> list[Event]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._redis.close()
        return self.events


def test_backfill_from_every_seq_gives_exactly_the_rest(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    everything = beatless.client.events(run.run_id)

    for seq in range(14):
        assert beatless.collect_stream(run.run_id, seq) == everything[seq:]


def test_backfill_from_seq_and_live_without_duplicates(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    for _ in range(2):
        beatless.step(run.run_id)
    watcher = Watcher(beatless, run.run_id, live_only(beatless.app).follow(run, 5))
    watcher.wait_for(1)

    while not beatless.client.get_run(run.run_id).state.final:
        beatless.step(run.run_id)
        beatless.drain_outbox_once()

    assert [event.seq for event in watcher.end()] == list(range(6, 14))


def test_subscribe_for_live_after_backfill(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    watcher = Watcher(beatless, run.run_id, live_only(beatless.app).follow(run, 0))
    watcher.wait_for(1)  # the journal had one event; the rest comes live

    beatless.work_until_idle()

    assert [event.type for event in watcher.end()] == GOLDEN


def test_a_viewer_that_reconnects_at_seq_5_sees_the_rest_once(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    beatless.work_until_idle()
    first = beatless.client.stream_run(run.run_id)
    seen = [next(first) for _ in range(5)]
    first.close()

    seen += beatless.client.stream_run(run.run_id, seen[-1].seq)

    assert [event.seq for event in seen] == list(range(1, 14))


def test_run_finished_lost_on_redis_is_found_in_the_journal(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    stream = streams(beatless_app, head_check=0.2).follow(run, 0)
    watcher = Watcher(beatless, run.run_id, stream)
    watcher.wait_for(1)

    # Executed, and the messages taken away before any relay could publish them.
    while beatless.step(run.run_id):
        pass
    with beatless_app.engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM {beatless_app.settings.schema}.run_outbox")

    assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]


def test_a_killed_subscription_misses_nothing(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("traces", {"traces": 50})
    settings = beatless_app.settings
    following = streams(
        beatless_app, redis_client=lambda: settings.redis.client(client_name=settings.prefix)
    )
    watcher = Watcher(beatless, run.run_id, following.follow(run, 0))
    watcher.wait_for(1)
    control = beatless_app.redis()
    killed = [
        control.client_kill_filter(_id=client["id"])
        for client in control.client_list(_type="pubsub")
        if client["name"] == settings.prefix  # and nobody else's
    ]
    assert killed == [1]
    beatless.work_until_idle()

    assert [event.seq for event in watcher.end()] == list(range(1, 55))
    control.close()


def test_streams_work_without_redis(beatless: Kit, beatless_app: App, shut_port: int) -> None:
    run = beatless.start_run("two_steps")

    def no_redis() -> redis.Redis:
        return redis.Redis(host="127.0.0.1", port=shut_port)

    stream = streams(beatless_app, redis_client=no_redis, without_redis=0.05).follow(run, 0)
    watcher = Watcher(beatless, run.run_id, stream)
    watcher.wait_for(1)

    beatless.work_until_idle()

    assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("part", ["_read", "_check_heads", "_check_redis", "client"])
def test_what_fails_unforeseen_beside_the_streams_of_a_loop_ends_none_of_them(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """As a command that gives the password of Redis, and is not there at first."""
    monkeypatch.setattr("beatless.streams.hub.RESTART_S", 0.01)
    run = beatless.start_run("two_steps")
    failures, failed = iter([ValueError("unforeseen")] * 3), threading.Event()
    counted: list[Signal] = []

    def fail() -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        failed.set()

    def client() -> aioredis.Redis:
        if part == "client":
            fail()
        return beatless_app.aredis()

    if part != "client":
        work = getattr(Hub, part)

        async def failing_work(hub: Hub) -> None:
            fail()
            await work(hub)

        monkeypatch.setattr(Hub, part, failing_work)
    following = streams(
        beatless_app,
        aredis_client=client,
        head_check=0.05,
        without_redis=0.05,
        observer=counted.append,
    )

    async def main() -> list[int]:
        seen = []
        async for event in following.afollow(run, 0):
            seen.append(event.seq)
            if event.seq == 1:
                await asyncio.to_thread(failed.wait, 60)
                await asyncio.to_thread(beatless.work_until_idle)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [1, 2, 3, 4, 5, 6]
    failures = [signal for signal in counted if isinstance(signal, ThreadFailed)]
    assert len(failures) == (0 if part == "client" else 3)


def test_doubled_and_reordered_messages_are_put_right(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps")
    watcher = Watcher(beatless, run.run_id, beatless.client.stream_run(run.run_id))
    watcher.wait_for(1)
    while beatless.step(run.run_id):
        pass

    # The bodies as a relay would publish them, backwards, and then again in order.
    with beatless_app.engine.begin() as connection:
        schema = beatless_app.settings.schema
        connection.exec_driver_sql(f"DELETE FROM {schema}.run_outbox")
    publisher = beatless_app.redis()
    channel = beatless_app.streams.channel(run.run_id)
    bodies = [
        str(event.to_dict()).replace("'", '"') for event in beatless.client.events(run.run_id)
    ]
    for body in [*reversed(bodies), *bodies]:
        publisher.publish(channel, body)

    assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]
    publisher.close()


def test_a_stream_of_a_finished_run_ends_at_once(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert list(beatless.client.stream_run(run.run_id, 6)) == []


def test_a_stream_beyond_the_head_is_refused(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with pytest.raises(BadRequest, match="from_seq is 2, beyond the last event 1"):
        beatless.client.stream_run(run.run_id, 2)
    with pytest.raises(BadRequest, match="negative"):
        beatless.client.stream_run(run.run_id, -1)
    with pytest.raises(RunNotFound):
        beatless.client.stream_run("nobody")


def test_waiting_gives_up_in_time_and_says_where_the_run_is(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with pytest.raises(WaitTimeout, match="at seq 1"):
        beatless.client.wait_for_run(run.run_id, timeout=0.05)
    with pytest.raises(AssertionError, match=r"dispatch \('waiting'"):
        beatless.wait_for_run_completion(run.run_id, timeout=0.05)


def test_astream_gives_the_same_as_stream(beatless: Kit) -> None:
    runs = [beatless.start_run("agents.run") for _ in range(5)]

    async def follow(run_id: str) -> list[Event]:
        return [event async for event in beatless.client.astream_run(run_id)]

    async def main() -> list[list[Event]]:
        following = [asyncio.create_task(follow(run.run_id)) for run in runs]
        await asyncio.to_thread(beatless.work_until_idle)
        return await asyncio.wait_for(asyncio.gather(*following), 60)

    for run, seen in zip(runs, asyncio.run(main()), strict=True):
        assert seen == beatless.collect_stream(run.run_id)
        assert [event.type for event in seen] == GOLDEN


def test_astream_live_from_the_middle(beatless: Kit) -> None:
    run = beatless.start_run("agents.run")
    beatless.step(run.run_id)

    async def main() -> list[int]:
        seen = []
        async for event in live_only(beatless.app).afollow(run, 2):
            seen.append(event.seq)
            if event.seq == 4:
                await asyncio.to_thread(beatless.work_until_idle)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 60)) == list(range(3, 14))


def test_astream_survives_killed_subscriptions_and_works_without_redis(
    beatless: Kit, beatless_app: App, shut_port: int
) -> None:
    run = beatless.start_run("traces", {"traces": 30})
    without = streams(
        beatless_app,
        aredis_client=lambda: aioredis.Redis(host="127.0.0.1", port=shut_port),
        without_redis=0.05,
    )

    settings = beatless_app.settings
    following = streams(
        beatless_app, aredis_client=lambda: settings.redis.aclient(client_name=settings.prefix)
    )

    async def kill() -> None:
        control = beatless_app.aredis()
        for client in await control.client_list(_type="pubsub"):
            if client["name"] == settings.prefix:  # and nobody else's
                await control.client_kill_filter(_id=client["id"])
        await control.aclose()

    async def follow(stream) -> list[int]:
        seen = []
        async for event in stream:
            seen.append(event.seq)
            if event.seq == 1:
                await kill()
                beatless.step(run.run_id)
                await asyncio.to_thread(beatless.work_until_idle)
        return seen

    async def main() -> list[list[int]]:
        return await asyncio.gather(
            follow(following.afollow(run, 0)), follow(without.afollow(run, 0))
        )

    for seen in asyncio.run(asyncio.wait_for(main(), 60)):
        assert seen == list(range(1, 35))


@pytest.fixture
def path(beatless_app: App) -> Iterator[Proxy]:
    """The way to Redis."""
    with proxy(beatless_app.settings.redis.hosts[0][1]) as found:
        yield found


def through(path: Proxy, app: App) -> Callable[[], aioredis.Redis]:
    """Makes clients of Redis whose connections can be held."""
    return replace(app.settings.redis, hosts=(("127.0.0.1", path.port),)).aclient


def subscribed(app: App, run_id: str) -> None:
    """Wait until Redis knows that somebody follows the run."""
    channel = app.streams.channel(run_id)
    deadline = monotonic() + 60
    with app.redis() as client:
        while not client.pubsub_numsub(channel)[0][1]:
            assert monotonic() < deadline


async def numbers(stream: AsyncIterator[Event]) -> list[int]:
    return [event.seq async for event in stream]


def test_viewers_go_on_when_their_redis_connection_falls_silent(
    beatless: Kit, beatless_app: App, path: Proxy
) -> None:
    """Redis is stopped, or gone without a word: no end of the connection is ever seen."""
    ended = beatless.start_run("two_steps")
    beatless.work_until_idle()
    run = beatless.start_run("two_steps")
    following = streams(
        beatless_app,
        aredis_client=through(path, beatless_app),
        # Nobody shall find out by the check of heads.
        head_check=1000,
        without_redis=1000,
        patience=0.5,
    )

    async def main() -> None:
        first = following.afollow(run, 0)
        assert (await anext(first)).seq == 1
        await asyncio.to_thread(subscribed, beatless_app, run.run_id)
        path.hold()
        assert await numbers(following.afollow(ended, 0)) == [1, 2, 3, 4, 5, 6]
        await asyncio.to_thread(beatless.work_until_idle)
        assert await numbers(first) == [2, 3, 4, 5, 6]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_viewer_does_not_wait_for_a_silent_redis_longer_than_it_may(
    beatless: Kit, beatless_app: App, path: Proxy
) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    following = streams(beatless_app, aredis_client=through(path, beatless_app), patience=1000)

    async def main() -> None:
        first = following.afollow(run, 0)
        await anext(first)
        await asyncio.to_thread(subscribed, beatless_app, run.run_id)
        path.hold()
        with pytest.raises(WaitTimeout, match="at seq 1"):
            await numbers(following.afollow(other, 0, timeout=0.05))
        await first.aclose()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_one_app_is_followed_in_several_loops_at_once(beatless: Kit, beatless_app: App) -> None:
    runs = [beatless.start_run("two_steps") for _ in range(2)]
    # Nobody shall be helped by the check of heads.
    following = streams(beatless_app, head_check=1000, without_redis=1000)
    watchers = [
        Watcher(beatless, run.run_id, step_by_step(following.afollow(run, 0))) for run in runs
    ]
    for watcher in watchers:
        watcher.wait_for(1)
    assert following.open_streams == 2

    beatless.work_until_idle()

    for watcher in watchers:
        assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]
    assert following.open_streams == 0


def test_a_viewer_who_goes_while_redis_takes_nothing_leaves_no_place_behind(
    beatless: Kit, beatless_app: App
) -> None:
    run, other = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    following = streams(beatless_app)

    async def main() -> None:
        first = following.afollow(run, 0)
        await anext(first)
        hub, asked = following._hub(), asyncio.Event()
        command = hub._command

        async def stuck(*_words: str) -> None:
            asked.set()
            await asyncio.Event().wait()  # the buffers of the connection are full

        hub._command = stuck
        second = asyncio.create_task(numbers(following.afollow(other, 0)))
        await asked.wait()
        assert following.open_streams == 2
        hub._command = command
        second.cancel()
        await asyncio.wait([second])
        assert following.open_streams == 1
        await first.aclose()
        assert following.open_streams == 0

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_viewer_who_goes_before_redis_answers_leaves_the_next_one_no_dead_channel(
    beatless: Kit, beatless_app: App
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    streams_here = streams(beatless_app, head_check=3600, without_redis=3600, patience=60)
    channel = streams_here.channel(run_id)

    def viewer(of: str) -> Mailbox:
        return streams_here._hub().subscribe(streams_here.channel(of), of, 0, History(of, None))

    async def follow() -> tuple[bool, list[tuple[bytes, int]]]:
        async with viewer("before") as before:
            await before.ready(None)
            async with viewer(run_id):
                pass
            async with viewer("after") as after:  # Redis answers in order
                await after.ready(None)
            async with viewer(run_id) as again:
                await again.ready(None)
                with beatless_app.redis() as client:
                    return again.live, client.pubsub_numsub(channel)

    assert asyncio.run(follow()) == (True, [(channel.encode(), 1)])


class Swallowing(aioredis.Connection):
    """Its first write swallows a cancellation, as asyncio.wait_for can before Python 3.12."""

    def __init__(self, *, written: asyncio.Event, cancelled: asyncio.Event, **options: Any) -> None:
        super().__init__(**options)
        self._written, self._cancelled, self.goes_on = written, cancelled, asyncio.Event()

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        await super().send_packed_command(command, check_health)
        if self._written.is_set():
            return
        self._written.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self._cancelled.set()
            await self.goes_on.wait()


def test_a_viewer_who_goes_while_redis_is_connected_leaves_no_reader_behind(
    beatless: Kit, beatless_app: App
) -> None:
    run_id = beatless.start_run("two_steps").run_id

    async def follow() -> None:
        written, cancelled = asyncio.Event(), asyncio.Event()
        pools: list[aioredis.ConnectionPool] = []

        def client() -> aioredis.Redis:
            made = beatless_app.aredis()
            pool = made.connection_pool
            pool.connection_class = partial(Swallowing, written=written, cancelled=cancelled)
            pools.append(pool)
            return made

        following = streams(
            beatless_app, aredis_client=client, head_check=3600, without_redis=3600, patience=60
        )
        channel = following.channel(run_id)

        def viewer(of: str) -> Mailbox:
            return following._hub().subscribe(following.channel(of), of, 0, History(of, None))

        async def view(of: str) -> None:
            async with viewer(of) as mailbox:
                await mailbox.ready(None)

        gone = asyncio.create_task(view("gone"))
        await written.wait()
        gone.cancel()
        await cancelled.wait()
        async with viewer(run_id) as stays:
            await stays.ready(None)
            assert stays.live
            for connection in pools[0]._in_use_connections:
                connection.goes_on.set()
            await asyncio.wait([gone])
            async with viewer("next") as after:
                await after.ready(None)
                assert after.live
            with beatless_app.redis() as redis_client:
                assert redis_client.pubsub_numsub(channel) == [(channel.encode(), 1)]

    asyncio.run(asyncio.wait_for(follow(), 60))


def test_a_redis_that_accepts_and_never_answers_is_left_for_one_that_does(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    with socket.create_server(("127.0.0.1", 0)) as hole:
        port = hole.getsockname()[1]
        clients = iter([aioredis.Redis(host="127.0.0.1", port=port, socket_timeout=None)])
        following = streams(
            beatless_app,
            aredis_client=lambda: next(clients, None) or beatless_app.aredis(),
            without_redis=1000,
            patience=1,
        )

        async def main() -> None:
            stream = following.afollow(run, 0)
            assert (await anext(stream)).seq == 1
            await asyncio.to_thread(subscribed, beatless_app, run.run_id)
            await asyncio.to_thread(beatless.work_until_idle)
            assert await numbers(stream) == [2, 3, 4, 5, 6]

        asyncio.run(asyncio.wait_for(main(), 60))


def test_a_slow_async_reader_falls_back_to_the_journal(beatless: Kit, monkeypatch) -> None:
    monkeypatch.setattr(Mailbox, "MAX_BYTES", 500)
    run = beatless.start_run("traces", {"traces": 60})

    async def main() -> list[int]:
        seen = []
        async for event in beatless.client.astream_run(run.run_id):
            seen.append(event.seq)
            if event.seq == 1:
                await asyncio.to_thread(beatless.work_until_idle)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 60)) == list(range(1, 65))


@pytest.fixture
def crowded(beatless_app: App) -> Iterator[sqlalchemy.Engine]:
    """An engine whose pool has one connection only."""
    engine = sqlalchemy.create_engine(
        engine_url(beatless_app.settings.database_url),
        pool_size=1,
        max_overflow=0,
        pool_timeout=0.01,
    )
    yield engine
    engine.dispose()


def failing(owner: Any, name: str) -> threading.Event:
    """Set when this method of the owner has raised."""
    original, failed = getattr(owner, name), threading.Event()

    def watched(*arguments: Any) -> Any:
        try:
            return original(*arguments)
        except Exception:
            failed.set()
            raise

    setattr(owner, name, watched)
    return failed


def finish_unheard(beatless: Kit, run_id: str) -> None:
    """Execute the run; its messages are taken away before any relay could publish them."""
    while beatless.step(run_id):
        pass
    with beatless.app.engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM {beatless.app.settings.schema}.run_outbox")


def test_a_full_pool_does_not_end_a_stream(
    beatless: Kit, beatless_app: App, crowded: sqlalchemy.Engine
) -> None:
    run = beatless.start_run("two_steps")
    following = streams(beatless_app, engine=crowded, head_check=0.02)
    failed = failing(following, "_read")
    with crowded.connect():
        watcher = Watcher(beatless, run.run_id, following.follow(run, 0))
        assert failed.wait(60)
    finish_unheard(beatless, run.run_id)
    assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]


def test_a_full_pool_does_not_end_the_head_checks_of_a_loop(
    beatless: Kit, beatless_app: App, crowded: sqlalchemy.Engine
) -> None:
    run = beatless.start_run("two_steps")
    following = streams(beatless_app, engine=crowded, head_check=0.02)
    failed = failing(following, "_heads")

    def crowd() -> None:
        with crowded.connect():
            assert failed.wait(60)
        finish_unheard(beatless, run.run_id)

    async def main() -> list[int]:
        seen = []
        async for event in following.afollow(run, 0):
            seen.append(event.seq)
            if event.seq == 1:
                await asyncio.to_thread(crowd)
        return seen

    assert asyncio.run(asyncio.wait_for(main(), 60)) == [1, 2, 3, 4, 5, 6]


def test_a_stream_of_a_run_that_is_removed_ends_with_an_error(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    following = streams(beatless_app, head_check=0.02)
    stream = following.follow(run, 0)
    next(stream)

    async def main() -> None:
        async for event in following.afollow(run, 0):
            if event.seq == 1:
                await asyncio.to_thread(beatless.client.remove_run, run.run_id)

    with pytest.raises(RunNotFound, match=run.run_id):
        asyncio.run(asyncio.wait_for(main(), 60))
    with pytest.raises(RunNotFound, match=run.run_id):
        next(stream)


def test_a_stream_gives_up_in_time_without_postgres(
    beatless: Kit, beatless_app: App, crowded: sqlalchemy.Engine
) -> None:
    run = beatless.start_run("two_steps")
    following = streams(beatless_app, engine=crowded)

    async def main() -> None:
        async for _ in following.afollow(run, 0, timeout=0.05):
            pass

    with crowded.connect():
        with pytest.raises(WaitTimeout, match="it is unknown"):
            next(following.follow(run, 0, timeout=0.05))
        with pytest.raises(WaitTimeout, match="it is unknown"):
            asyncio.run(main())


def test_a_strange_message_does_not_end_a_stream(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps")
    stream = beatless.client.stream_run(run.run_id, timeout=60)
    assert next(stream).seq == 1
    channel = beatless_app.streams.channel(run.run_id)
    deadline = monotonic() + 60
    with beatless_app.redis() as client:
        while not client.pubsub_numsub(channel)[0][1]:  # the stream's thread subscribes
            assert monotonic() < deadline
        client.publish(channel, b"hello")
        client.publish(channel, b'{"run_id":"r","seq":"2","ts":0,"type":"x","source":"y"}')
    beatless.work_until_idle()
    assert [event.seq for event in stream] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_forged_seq_that_no_run_reaches_has_the_journal_read_once(
    beatless: Kit, beatless_app: App, asynchronous: bool
) -> None:
    run = beatless.start_run("two_steps")
    reads: list[str] = []
    looked = threading.Event()

    def observe(signal: Signal) -> None:
        if isinstance(signal, Backfilled):
            reads.append(signal.reason)
            if signal.reason == "gap":
                looked.set()

    following = streams(beatless_app, observer=observe)
    stream = step_by_step(following.afollow(run, 0)) if asynchronous else following.follow(run, 0)
    watcher = Watcher(beatless, run.run_id, stream)
    watcher.wait_for(1)
    with beatless_app.redis() as client:
        client.publish(
            beatless_app.streams.channel(run.run_id),
            json.dumps({"run_id": run.run_id, "seq": 10**6, "ts": 0, "type": "x", "source": "y"}),
        )
    assert looked.wait(60)

    beatless.work_until_idle()

    assert [event.seq for event in watcher.end()] == [1, 2, 3, 4, 5, 6]
    assert reads.count("gap") == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_pause_between_two_looks_for_a_forged_seq_ends_with_the_timeout(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr(stream_module, "GAP_PAUSE_S", 3600.0)
    run = beatless.start_run("two_steps")
    following = streams(beatless_app)
    stream = (
        step_by_step(following.afollow(run, 0, timeout=2))
        if asynchronous
        else following.follow(run, 0, timeout=2)
    )
    event = {"run_id": run.run_id, "ts": 0, "type": "x", "source": "y"}

    def meet_forged() -> None:
        assert next(stream).seq == 1
        with beatless_app.redis() as client:
            for seq in (10**6, 10**6 + 1):
                message = json.dumps(event | {"seq": seq})
                client.publish(beatless_app.streams.channel(run.run_id), message)
        next(stream)

    with pytest.raises(WaitTimeout):  # on a machine that stands still it comes before all that
        meet_forged()


def test_a_redis_that_accepts_and_says_nothing_delays_no_timeout(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REDIS_TIMEOUTS, "socket_timeout", 120)
    monkeypatch.setattr("beatless.streams.subscription.SUBSCRIBE_TIMEOUT_S", 120.0)
    run = beatless.start_run("two_steps")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://:p@127.0.0.1:{silent.getsockname()[1]}/0"
        app = App(replace(beatless_app.settings, redis_url=url), [])
        stream = app.streams.follow(run, 0, timeout=0.2)
        began = monotonic()
        with pytest.raises(WaitTimeout):
            list(stream)
        assert monotonic() - began < 60
        app.close()


def test_a_stream_that_waits_for_postgres_ends_when_it_is_told_to(beatless_app: App) -> None:
    async def ends() -> None:
        hub = streams(beatless_app)._hub()
        mailbox = hub.subscribe("channel", "run", 0, History("run", None))
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(mailbox.rest(3600))
            mailbox.end()
        assert mailbox.ended

    asyncio.run(ends())


def step_by_step(events: AsyncIterator[Event]) -> Iterator[Event]:
    """An asynchronous stream for a thread."""
    with asyncio.Runner() as runner:

        async def following() -> Event | None:
            return await anext(events, None)

        while event := runner.run(following()):
            yield event
