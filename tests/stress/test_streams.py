"""Streams through what goes wrong around them: every viewer ends with exactly the journal."""

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest

from beatless import App, Plan, StepContext, step
from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.local.valkey import EmbeddedValkey
from beatless.testing import Kit
from tests.http_proxy import Proxy
from tests.serving import serving
from tests.viewers import Viewers

RUNS = [
    pytest.param(8, id="8 runs"),
    pytest.param(100, id="100 runs", marks=pytest.mark.long(minutes=1)),
]


@step
def big(ctx: StepContext) -> None:
    """250 KB that hardly compress, 200 times."""
    for _ in range(200):
        ctx.trace("big", text=os.urandom(125_000).hex())


@pytest.fixture
def beatless_plans(beatless_plans: Sequence[Plan]) -> list[Plan]:
    return [*beatless_plans, Plan("big", [big])]


def work(kit: Kit, run_ids: list[str]) -> None:
    """Execute these runs and publish what they say, without the broker's help."""
    for run_id in run_ids:
        while kit.step(run_id):
            pass


def exactly(kit: Kit, run_ids: list[str], viewers: Viewers) -> None:
    for run_id, seen in zip(run_ids, viewers.end(), strict=True):
        assert seen == kit.client.events(run_id)
        assert seen[-1].final


@contextmanager
def on_redis(beatless: Kit, server: EmbeddedValkey) -> Iterator[App]:
    """The test's app with its events, and nothing else, on a Redis of their own."""
    app = App(
        replace(beatless.app.settings, redis_url=server.url), list(beatless.app.plans.values())
    )
    relay = app.relay()
    relay.start()
    try:
        yield app
    finally:
        relay.stop()
        app.close()


@contextmanager
def served(app: App, directory: Path) -> Iterator[tuple[Child, int]]:
    """The app's API in a process of its own."""
    port = free_port()
    child = Child(
        "api",
        ["serve", "--port", str(port), "--open"],
        environ=os.environ | app.settings.to_env(),
        log=directory / "api.log",
    )
    child.start()
    try:
        child.wait_ready()
        yield child, port
    finally:
        child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("count", RUNS)
def test_subscriptions_that_are_killed_every_50_ms(
    beatless: Kit, tmp_path: Path, count: int
) -> None:
    run_ids = [beatless.start_run("traces", {"traces": 20}).run_id for _ in range(count)]
    done, killed = threading.Event(), threading.Event()

    def kill() -> None:
        control = app.redis()
        while not done.wait(0.05):
            if control.client_kill_filter(_type="pubsub"):
                killed.set()
        control.close()

    with (
        EmbeddedValkey(tmp_path / "valkey") as server,
        on_redis(beatless, server) as app,
        serving(app) as api,
    ):
        viewers = Viewers(api.url, run_ids)
        viewers.wait_for(lambda found: found.seen >= count)
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            assert killed.wait(60)
            work(beatless, run_ids)
            exactly(beatless, run_ids, viewers)
        finally:
            done.set()
            killer.join()


@pytest.mark.parametrize("count", RUNS)
def test_redis_is_away_and_comes_back_at_the_same_address(
    beatless: Kit, tmp_path: Path, count: int
) -> None:
    run_ids = [beatless.start_run("traces", {"traces": 20}).run_id for _ in range(count)]
    parts = [run_ids[part::4] for part in range(4)]
    with (
        EmbeddedValkey(tmp_path / "valkey") as server,
        on_redis(beatless, server) as app,
        serving(app) as api,
    ):
        viewers = Viewers(api.url, run_ids)
        work(beatless, parts[0])
        viewers.wait_for(lambda found: found.finished == len(parts[0]))
        server.crash()
        work(beatless, parts[1])
        # Without Redis the journal tells.
        viewers.wait_for(lambda found: found.finished == len(parts[0] + parts[1]))
        if count == 100:
            assert not threading.Event().wait(8)  # so that back-offs grow to their caps
        work(beatless, parts[2])
        server.start()
        work(beatless, parts[3])
        exactly(beatless, run_ids, viewers)


@pytest.mark.long
def test_the_api_is_restarted_in_order_and_killed(
    beatless: Kit, beatless_app: App, tmp_path: Path
) -> None:
    count = 100
    run_ids = [beatless.start_run("traces", {"traces": 20}).run_id for _ in range(count)]
    parts = [run_ids[part::4] for part in range(4)]
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(0))
        viewers: Viewers | None = None
        for part in parts[:2]:
            with serving(beatless_app, is_open=True) as api:
                accepted = proxy.turn_to(api.port)
                if viewers is None:
                    viewers = Viewers(proxy.url, run_ids)
                    viewers.wait_for(lambda found: found.seen >= count)
                proxy.wait_for_more(accepted)
                work(beatless, part[::2])
                beatless.drain_outbox_once()
            work(beatless, part[1::2])
        for part in parts[2:]:
            with served(beatless_app, tmp_path) as (child, port):
                proxy.wait_for_more(proxy.turn_to(port))
                work(beatless, part[::2])
                beatless.drain_outbox_once()
                child.kill()
            work(beatless, part[1::2])
        proxy.turn_to(stack.enter_context(serving(beatless_app, is_open=True)).port)
        assert viewers is not None
        exactly(beatless, run_ids, viewers)


@pytest.mark.parametrize("viewers_of_each", [3, pytest.param(20, marks=pytest.mark.long)])
def test_two_servers_share_an_address(
    beatless: Kit, beatless_app: App, viewers_of_each: int
) -> None:
    run_ids = [beatless.start_run("traces", {"traces": 10}).run_id for _ in range(10)]
    watched = run_ids * viewers_of_each
    other = App(beatless_app.settings, list(beatless_app.plans.values()))
    with (
        serving(beatless_app, reuse_port=True) as api,
        serving(other, api.port, reuse_port=True) as second,
    ):
        viewers = Viewers(api.url, watched)
        viewers.wait_for(lambda found: found.seen >= len(watched))
        streams = [each.state.services.now().streams.open_streams for each in (api, second)]
        assert sum(streams) == len(watched)
        assert all(streams)
        work(beatless, run_ids)
        beatless.drain_outbox_once()
        exactly(beatless, watched, viewers)
    other.close()


def decoded(raw: bytes) -> tuple[bytes, bytes]:
    """The head and the body of a raw answer in chunks, which must be whole."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if not int(size, 16):
            assert rest == b"\r\n"  # the end of the answer, and then of the connection
            return head, body
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]


async def curl(port: int, path: str, last_event_id: str | None = None) -> bytes:
    """Every byte of an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    header = "" if last_event_id is None else f"Last-Event-ID: {last_event_id}\r\n"
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    writer.write(f"{head}{header}\r\n".encode())
    raw = await reader.read(-1)
    writer.close()
    return raw


def seqs(raw: bytes) -> list[int]:
    head, body = decoded(raw)
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"text/event-stream" in head
    ids = [line for line in body.split(b"\n") if line.startswith(b"id: ")]
    return [int(line.rpartition(b".")[2]) for line in ids]


@pytest.mark.parametrize("turns", [9, pytest.param(99, marks=pytest.mark.long)])
def test_every_cursor_while_it_runs_and_after(beatless: Kit, beatless_app: App, turns: int) -> None:
    last = 2 * turns + 2  # 200 events
    run = beatless.start_run("loop", {"turns": turns, "finish": True})
    path = f"/v1/runs/{run.run_id}/stream"

    async def live(port: int) -> list[tuple[int, bytes]]:
        asked: list[tuple[int, asyncio.Task[bytes]]] = []
        head = 1
        while head < last:
            for seq in (head - 1, head):
                asked.append((seq, asyncio.create_task(curl(port, f"{path}?from_seq={seq}"))))
                resumed = curl(port, f"{path}?from_seq=0", str(seq))
                asked.append((seq, asyncio.create_task(resumed)))
            await asyncio.to_thread(beatless.step, run.run_id)
            await asyncio.to_thread(beatless.drain_outbox_once)
            head = (await asyncio.to_thread(beatless.client.get_run, run.run_id)).last_seq
        return [(seq, await asyncio.wait_for(task, 60)) for seq, task in asked]

    async def after(port: int) -> list[tuple[int, bytes]]:
        return [
            (seq, raw)
            for seq in range(last)
            for raw in (
                await curl(port, f"{path}?from_seq={seq}"),
                await curl(port, path, str(seq)),
            )
        ]

    async def beyond(port: int) -> list[bytes]:
        return [await curl(port, path, str(seq)) for seq in (last, last + 1)]

    with serving(beatless_app) as api:
        while_it_ran = asyncio.run(live(api.port))
        assert len(while_it_ran) >= 2 * turns
        for seq, raw in while_it_ran + asyncio.run(after(api.port)):
            assert seqs(raw) == list(range(seq, last + 1))
        assert all(raw.startswith(b"HTTP/1.1 204 ") for raw in asyncio.run(beyond(api.port)))


def peak(pid: int) -> int:
    """KiB of memory that a process has ever had at once."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@pytest.mark.long
def test_a_viewer_of_50_mb_that_hardly_reads(
    beatless: Kit, beatless_app: App, tmp_path: Path, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("big")
    worker = threading.Thread(target=work, args=(beatless, [run.run_id]))

    async def crawl(port: int) -> None:
        """1 KB for each six events that the others see."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        path = f"/v1/runs/{run.run_id}/stream"
        writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        for number in range(100):
            assert await reader.read(1024)
            if number == 0:
                worker.start()
            await asyncio.to_thread(viewers.wait_for, partial(have_seen, 6 * number))
        writer.close()

    # Its own Redis: nobody who listens to the shared one is ready for so much.
    with (
        EmbeddedValkey(tmp_path / "valkey") as server,
        on_redis(beatless, server) as app,
        served(app, tmp_path) as (child, port),
    ):
        viewers = Viewers(f"http://127.0.0.1:{port}", [run.run_id] * 3)
        viewers.wait_for(partial(have_seen, 3))
        before = peak(child.pid)
        crawler = threading.Thread(target=lambda: asyncio.run(crawl(port)))
        crawler.start()
        crawler.join(120)
        exactly(beatless, [run.run_id] * 3, viewers)
        size = postgres.execute("SELECT sum(octet_length(data::text)) FROM run_events").fetchone()
        assert size[0] > 50_000_000
        assert peak(child.pid) - before < 50_000


def have_seen(count: int, viewers: Viewers) -> bool:
    return viewers.seen >= count
