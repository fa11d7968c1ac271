"""Redis as it is run elsewhere: Sentinel, TLS, ACL users, Cluster. Real servers, each time."""

import asyncio
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import psycopg
import pytest
import redis

from beatless import App, BadSetting, Event
from beatless.cli.processes import check_rights, check_servers
from beatless.errors import Unreachable
from beatless.flower import Listener
from beatless.local.valkey import EmbeddedValkey
from beatless.outbox.errors import PublishRefused
from beatless.streams.subscription import Subscription
from beatless.system import look
from beatless.testing import Kit
from tests.integration.test_stream import streams
from tests.valkeys import CERTIFICATES, Watched, behind_tls, cluster, until, watched

MakeKit = Callable[..., Kit]


@pytest.fixture
def kit_on(beatless_app: App, tmp_path: Path) -> Iterator[MakeKit]:
    """Makes a kit of the test's app with other servers for Redis and the broker."""
    kits: list[Kit] = []

    def make(redis_url: str, broker_url: str | None = None) -> Kit:
        settings = replace(
            beatless_app.settings, redis_url=redis_url, broker_url=broker_url or redis_url
        )
        app = App(settings, list(beatless_app.plans.values()))
        app.celery.conf.broker_transport_options["polling_interval"] = 0.05
        kits.append(Kit(app, directory=tmp_path))
        return kits[-1]

    yield make
    for kit in kits:
        kit.close()


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(tmp_path / "valkey") as server:
        yield server


def hears(kit: Kit, run_id: str) -> Subscription:
    """A subscription that is acknowledged."""
    subscription = Subscription(kit.app.redis, kit.app.streams.channel(run_id))
    assert subscription.ensure()
    return subscription


def heard_to_the_end(subscription: Subscription) -> list[int]:
    """What came of a run of 13 events, in the order in which it came."""
    live: list[int] = []
    while 13 not in live:
        events = subscription.next(60)
        assert events, live
        live += [event.seq for event in events]
    subscription.close()
    return live


def whole_run(kit: Kit) -> None:
    """A run through the relay's doors and a worker's queue, and its events live."""
    run = kit.start_run("agents.run")
    subscription = hears(kit, run.run_id)
    kit.work_until_idle()
    live: list[int] = []
    while len(live) < 13:
        events = subscription.next(60)
        assert events, live
        live += [event.seq for event in events]
    subscription.close()
    assert live == list(range(1, 14))
    assert [event.seq for event in kit.collect_stream(run.run_id)] == live
    kit.verify()


# Sentinel


class Followed:
    """A run whose stream is collected in a thread."""

    def __init__(self, kit: Kit, run_id: str) -> None:
        self.run_id = run_id
        self.events: list[Event] = []
        self._stream = kit.client.stream_run(run_id, timeout=300)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        self.events.extend(self._stream)

    def seqs(self) -> list[int]:
        self._thread.join()
        return [event.seq for event in self.events]


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Watched]:
    with watched(tmp_path) as servers:
        yield servers


@pytest.mark.long
def test_runs_survive_the_death_of_the_master_and_streams_stay_exact(
    kit_on: MakeKit, sentinels: Watched, tmp_path: Path
) -> None:
    kit, go = kit_on(sentinels.url), tmp_path / "go"
    kit.relay_process("tests.plans:app")
    kit.worker_process("tests.plans:app", concurrency=2)
    options = {"input": {"go": str(go)}}
    before = [Followed(kit, kit.start_run("gated", **options).run_id) for _ in range(4)]
    whole = Followed(kit, kit.start_run("agents.run").run_id)  # waits behind two that wait

    sentinels.kill_master()
    during = [Followed(kit, kit.start_run("agents.run").run_id) for _ in range(4)]
    go.touch()

    for run in (*before, *during, whole):
        last = kit.wait_for_run_completion(run.run_id).last_seq
        assert run.seqs() == list(range(1, last + 1))
    # Live again, and not only through the journal: the new master has the subscriber.
    after = kit.start_run("agents.run", delay=3600)
    subscription = hears(kit, after.run_id)
    with redis.Redis.from_url(sentinels.replica.url) as master:
        channel = kit.app.streams.channel(after.run_id)
        assert master.pubsub_numsub(channel) == [(channel.encode(), 1)]
    kit.advance(3600)
    assert set(range(2, 14)) <= set(heard_to_the_end(subscription))
    kit.verify()
    # And nobody's password is in a log.
    for log in tmp_path.glob("*.log"):
        assert "-secret" not in log.read_text(), log.name


async def followed(kit: Kit, run_id: str) -> list[int]:
    """The seqs that an asynchronous viewer sees who has subscribed before the run is executed."""
    seen = []
    async for event in kit.client.astream_run(run_id, timeout=60):
        seen.append(event.seq)
        if event.seq == 1:
            await asyncio.to_thread(kit.work_until_idle)
    await kit.app.streams.aclose()
    return seen


@pytest.mark.slow
def test_asynchronous_streams_go_through_sentinels_too(kit_on: MakeKit, sentinels: Watched) -> None:
    kit = kit_on(sentinels.url)
    run = kit.start_run("agents.run")

    assert asyncio.run(followed(kit, run.run_id)) == list(range(1, 14))


@pytest.mark.slow
def test_a_sentinel_that_does_not_answer_keeps_no_stream_from_the_others(
    kit_on: MakeKit, sentinels: Watched
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        first = f"sentinel://127.0.0.1:{silent.getsockname()[1]}"
        kit = kit_on(f"{first};{sentinels.url}", sentinels.url)
        run = kit.start_run("agents.run")
        # Nothing but what comes live brings it on.
        following = streams(kit.app, without_redis=600, head_check=600)

        async def follow() -> list[int]:
            seen = []
            async for event in following.afollow(run, 0, timeout=60):
                seen.append(event.seq)
                if event.seq == 1:
                    await asyncio.to_thread(kit.work_until_idle)
            await following.aclose()
            return seen

        assert asyncio.run(follow()) == list(range(1, 14))


# TLS


def secure(server: EmbeddedValkey, port: int, host: str = "localhost", **options: str) -> str:
    given = {"ssl_ca_certs": str(CERTIFICATES / "ca.pem")} | options
    query = "&".join(f"{name}={value}" for name, value in given.items())
    return f"rediss://:{server.password}@{host}:{port}/0?{query}"


def test_a_run_over_tls_with_an_authority_of_our_own(
    kit_on: MakeKit, valkey: EmbeddedValkey
) -> None:
    with behind_tls(valkey) as port:
        kit = kit_on(secure(valkey, port))
        whole_run(kit)

        async def hello() -> bool:
            async with kit.app.aredis() as client:
                return await client.ping()

        assert asyncio.run(hello())
        kit.close()


@pytest.mark.parametrize("door", ["redis_url", "broker_url"])
def test_a_certificate_that_nobody_vouches_for_is_refused_at_both_doors(
    kit_on: MakeKit, valkey: EmbeddedValkey, door: str
) -> None:
    with behind_tls(valkey) as port:
        urls = {"redis_url": valkey.url, "broker_url": valkey.url}
        urls[door] = f"rediss://:{valkey.password}@localhost:{port}/0"
        kit = kit_on(**urls)
        with pytest.raises(Unreachable, match="certificate verify failed"):
            check_servers(kit.app)
        kit.close()


# A socket


def test_a_run_over_a_socket(kit_on: MakeKit, tmp_path: Path) -> None:
    # The path of a socket may have no more than 107 bytes.
    with (
        TemporaryDirectory(prefix="valkey-") as short,
        EmbeddedValkey(tmp_path / "v", settings={"unixsocket": f"{short}/s"}) as server,
    ):
        whole_run(kit_on(f"unix://:{server.password}@{short}/s?db=0"))


# One that hangs


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_worker_ends_though_its_broker_accepts_connections_and_answers_nothing(
    kit_on: MakeKit, valkey: EmbeddedValkey, pool: str
) -> None:
    kit = kit_on(valkey.url)
    worker = kit.worker_process(
        "tests.plans:app", grace_seconds=3000, arguments=["--", "--pool", pool]
    )
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        worker.terminate()
        worker.reap(monotonic() + 300)
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert "its broker does not answer, and it holds no lease" in worker.last_words()


# ACL users


def rights(prefix: str) -> dict[str, list[str]]:
    """The ACL of docs/settings.md: what each user needs, and nothing more."""
    text = (Path(__file__).parents[2] / "docs" / "settings.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("ACL SETUSER ")]
    return {
        line.split()[2]: line.replace("beatless:", f"{prefix}:")
        .replace("beatless.", f"{prefix}.")
        .replace("PASSWORD", "p")
        .split()[3:]
        for line in lines
    }


@pytest.fixture
def users(beatless_app: App, valkey: EmbeddedValkey) -> dict[str, str]:
    """The URL of each documented user."""
    with redis.Redis.from_url(valkey.url) as admin:
        for name, rules in rights(beatless_app.settings.prefix).items():
            admin.execute_command("ACL SETUSER", name, *rules)
    return {name: f"redis://{name}:p@127.0.0.1:{valkey.port}/0" for name in rights("")}


@pytest.mark.slow
def test_the_documented_rights_are_enough_for_processes_and_viewers(
    kit_on: MakeKit, valkey: EmbeddedValkey, users: dict[str, str]
) -> None:
    relay, viewer = (
        kit_on(users["relay"], users["broker"]),
        kit_on(users["viewer"], users["broker"]),
    )
    relay.relay_process("tests.plans:app")
    viewer.worker_process("tests.plans:app")
    # We are subscribed before it may begin: what comes then comes live.
    run = viewer.start_run("agents.run", delay=3600)
    subscription = hears(viewer, run.run_id)
    viewer.advance(3600)
    assert set(range(2, 14)) <= set(heard_to_the_end(subscription))

    assert viewer.app.celery.control.inspect(timeout=60, limit=1).ping()
    viewer.client.drain_queue("default")
    viewer.verify()
    assert (look(viewer.app, viewer.app.engine).redis or "").startswith("Valkey ")
    with redis.Redis.from_url(valkey.url) as admin:
        assert admin.acl_log() == []


def test_the_documented_rights_are_enough_for_flower(
    kit_on: MakeKit,
    valkey: EmbeddedValkey,
    users: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay, flower = kit_on(users["relay"], valkey.url), kit_on(users["flower"], valkey.url)
    heard: list[Event] = []
    live = threading.Event()

    def tell(event: Event) -> None:
        heard.append(event)
        if event.final:
            live.set()

    listener = Listener(flower.app, tell)
    listener.start()
    try:
        run = relay.start_run("two_steps")
        with redis.Redis.from_url(valkey.url) as admin:
            until(lambda: admin.pubsub_numpat() == 1)
            # Of another database on the same Redis: not even looked at.
            strange = flower.app.streams.channel(run.run_id).replace(":events:", ":events:0")
            admin.publish(strange, b'{"seq": 1}')
            assert admin.acl_log() == []
        relay.work_until_idle()
        assert live.wait(60)
    finally:
        listener.stop()
        relay.app.redis().publish(flower.app.streams.channel("x"), b"")  # it waits for a message
    assert [event.seq for event in heard] == [1, 2, 3, 4, 5, 6]
    assert "a message on a run's channel is not ours" not in caplog.messages


@pytest.mark.parametrize(("name", "right"), [("relay", "publish"), ("relay", "evalsha")])
def test_a_user_that_may_not_publish_is_told_what_it_needs_and_nothing_is_lost(
    kit_on: MakeKit,
    valkey: EmbeddedValkey,
    users: dict[str, str],
    postgres: psycopg.Connection,
    name: str,
    right: str,
) -> None:
    kit = kit_on(users[name], valkey.url)
    with redis.Redis.from_url(valkey.url) as admin:
        admin.execute_command("ACL SETUSER", name, f"-{right}")
        with pytest.raises(PublishRefused, match=r"no permissions .* needs \+publish"):
            check_rights(kit.app)
        run = kit.start_run("agents.run")
        kit.work_until_idle()  # dispatches go on: that is another door
        assert kit.client.get_run(run.run_id).state == "completed"
        waiting = postgres.execute("SELECT sum(to_seq - from_seq + 1) FROM run_outbox").fetchone()
        assert waiting == (13,)

        admin.execute_command("ACL SETUSER", name, f"+{right}")
    check_rights(kit.app)
    until(lambda: kit.drain_outbox_once() > 0)
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (0,)
    assert kit.client.dead_letters() == []


def test_a_viewer_without_the_right_to_subscribe_reads_the_journal(
    kit_on: MakeKit,
    valkey: EmbeddedValkey,
    users: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kit = kit_on(users["relay"], valkey.url)  # it may publish, not subscribe
    run = kit.start_run("agents.run")
    kit.work_until_idle()
    assert [event.seq for event in kit.collect_stream(run.run_id)] == list(range(1, 14))
    (record,) = [r for r in caplog.records if getattr(r, "action", "") == "stream_without_redis"]
    assert "subscribe" in record.reason
    assert record.message.startswith("Redis refuses this user the subscription")


def test_an_asynchronous_viewer_without_the_right_to_subscribe_is_told_so(
    kit_on: MakeKit,
    valkey: EmbeddedValkey,
    users: dict[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kit = kit_on(users["relay"], valkey.url)
    run = kit.start_run("agents.run")

    assert asyncio.run(followed(kit, run.run_id)) == list(range(1, 14))
    told = [r for r in caplog.records if getattr(r, "action", "") == "stream_without_redis"]
    assert told
    for record in told:
        assert record.message.startswith("Redis refuses this user the subscription")


def test_a_subscription_tells_of_each_outage_once(
    beatless: Kit, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0.0, 10.0)  # between two looks more than any wait for a next try
    monkeypatch.setattr("beatless.streams.subscription.monotonic", lambda: next(clock))
    clients = [lambda: redis.Redis.from_url("redis://127.0.0.1:1/0"), beatless.app.redis]
    there = 0

    def client() -> redis.Redis:
        return clients[there]()

    subscription = Subscription(client, beatless.app.streams.channel("r"))
    for outage in (1, 2):
        there = 0
        subscription.close()
        assert [subscription.ensure() for _ in range(3)] == [False] * 3
        told = [r for r in caplog.records if getattr(r, "action", "") == "stream_without_redis"]
        assert [record.message for record in told] == [
            "Redis is unreachable, stream reads the journal"
        ] * outage
        there = 1
        assert subscription.ensure()
    subscription.close()


# Cluster


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[EmbeddedValkey]]:
    with cluster(tmp_path) as found:
        yield found


@pytest.mark.slow
def test_events_reach_the_viewers_at_every_node_of_a_cluster(
    beatless: Kit, kit_on: MakeKit, nodes: list[EmbeddedValkey]
) -> None:
    broker = beatless.app.settings.broker_url
    kits = [kit_on(node.url, broker) for node in nodes]
    run = kits[0].start_run("agents.run")
    subscriptions = [hears(kit, run.run_id) for kit in kits]

    kits[0].work_until_idle()

    for subscription in subscriptions:
        live: list[int] = []
        while len(live) < 13:
            events = subscription.next(60)
            assert events, live
            live += [event.seq for event in events]
        assert live == list(range(1, 14))
        subscription.close()


@pytest.mark.slow
def test_a_broker_on_a_cluster_is_refused_with_the_name_of_the_setting(
    kit_on: MakeKit, nodes: list[EmbeddedValkey], caplog: pytest.LogCaptureFixture
) -> None:
    kit = kit_on(nodes[0].url)
    with pytest.raises(BadSetting, match="BEATLESS_BROKER_URL is a Redis Cluster"):
        check_servers(kit.app)
    # Whoever starts Celery by hand hears it from the relay.
    kit.start_run("agents.run")
    kit.drain_outbox_once()
    assert "it is a Redis Cluster" in caplog.text
