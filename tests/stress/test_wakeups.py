"""No wake-up is lost and nothing reordered, whoever dies and whenever; and the test can fail.

Writers hold their transactions open, roll some back and go on; relays are killed, sessions ended.
"""

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from time import monotonic
from typing import Any

import psycopg
import pytest
import redis

from beatless import App
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.journal import Journal
from beatless.outbox.backoff import Backoff
from beatless.outbox.config import RelayConfig
from beatless.outbox.doorbell import State
from beatless.outbox.publishers import CeleryTaskPublisher, RedisEventPublisher
from beatless.outbox.relay import Relay
from beatless.outbox.session_loop import SessionLoop
from beatless.outbox.statements import fragment
from beatless.streams.messages import parse
from beatless.testing import Kit
from tests.integration.test_relay import pending, until
from tests.integration.test_wakeup_promises import loop

__all__ = ["loop"]

QUICK = Backoff(initial=0.005, cap=0.02)
ROUNDS = 5
"""How often a relay's process is killed."""

GRACE = 60.0
"""Seconds after the last commit; one that no one rang for would lie there till the watchdog, which
looks after ten minutes."""


class Door:
    """The real publisher, tapped: it notes what was published, in order."""

    def __init__(self, app: App, client: redis.Redis) -> None:
        self.seqs: dict[str, list[int]] = defaultdict(list)
        self._real = RedisEventPublisher(client, app.settings.prefix)

    def publish(self, messages) -> None:
        self._real.publish(messages)
        for message in messages:
            self.seqs[message.run_id] += [event.seq for event in parse(message.body)]


@pytest.fixture
def client(beatless_app: App) -> Iterator[redis.Redis]:
    with closing(beatless_app.redis()) as found:
        yield found


def careless(app: App) -> Journal:
    """A journal whose probe lets go at once, instead of with the commit."""
    journal = Journal(app.settings.schema, max_event_bytes=app.settings.max_event_bytes)
    key = f"'{app.settings.schema}.run_outbox'::regclass::oid::int4"
    bell = fragment("events_doorbell", app.settings.schema)
    probe = f"pg_try_advisory_xact_lock_shared({key}, %(shard)s)"
    assert probe in bell
    broken = bell.replace(
        probe,
        f"(pg_try_advisory_lock_shared({key}, %(shard)s)"
        f" AND pg_advisory_unlock_shared({key}, %(shard)s)::text IS NOT NULL)",
    )
    journal.sql["append"] = journal.sql["append"].replace(bell, broken)
    return journal


def lease_runs(postgres: psycopg.Connection, prefix: str, count: int) -> list[str]:
    """Runs that a worker holds with token 1."""
    names = [f"{prefix}-{number}" for number in range(count)]
    postgres.execute(
        "INSERT INTO runs (run_id, plan, plan_version, queue, state, last_seq, lease_token)"
        " SELECT id, 'two_steps', 'v', 'default', 'running', 0, 1 FROM unnest(%s::text[]) AS id",
        (names,),
    )
    return names


def write(
    connect: Callable[[], psycopg.Connection[Any]],
    journal: Journal,
    names: list[str],
    each: int,
    seed: int,
    hold: float,
) -> None:
    """Appends to its own runs, with random holds before the commit and some rollbacks."""
    chance, pause = random.Random(seed), threading.Event()
    done = dict.fromkeys(names, 0)
    with connect() as connection:
        connection.autocommit = False
        while any(count < each for count in done.values()):
            name = chance.choice([name for name, count in done.items() if count < each])
            k = min(chance.choice([1, 1, 2, 10]), each - done[name])
            events = [
                journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": n})
                for n in range(k)
            ]
            assert journal.append(connection, name, 1, events)
            if chance.random() < 0.3:
                pause.wait(chance.random() * hold)
            if chance.random() < 0.1:
                connection.rollback()
                continue
            connection.commit()
            done[name] += k
            if chance.random() < 0.2:
                pause.wait(chance.random() * hold)


def empty_in_time(postgres: psycopg.Connection, seconds: float) -> bool:
    pause, deadline = threading.Event(), monotonic() + seconds
    while postgres.execute("SELECT 1 FROM run_outbox LIMIT 1").fetchone():
        if monotonic() > deadline:
            return False
        pause.wait(0.005)
    return True


@pytest.mark.long
def test_ten_thousand_events_under_fire_are_neither_lost_nor_reordered(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, client: redis.Redis
) -> None:
    chance = random.Random(7)
    total = 0
    for round in range(20):
        names = lease_runs(postgres, f"round-{round}", 8)
        door = Door(beatless_app, client)
        relay = Relay(
            RelayConfig(
                connect=beatless_app.direct_connection,
                queries=beatless_app.queries,
                events=door,
                tasks=CeleryTaskPublisher(beatless_app.celery, beatless_app.settings.prefix),
                backoff=QUICK,
                linger=chance.choice([0.0, 0.001, 0.01]),
                watchdog=600,
            )
        )
        relay.start()
        writers = [
            threading.Thread(
                target=write,
                args=(
                    beatless_app.executors.connect,
                    beatless_app.journal,
                    names[n::4],
                    65,
                    round * 10 + n,
                    0.03,
                ),
            )
            for n in range(4)
        ]
        for writer in writers:
            writer.start()
        while round % 2 and any(writer.is_alive() for writer in writers):
            victims = postgres.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'beatless relay%%'"
                " AND pid IN (SELECT pid FROM pg_locks WHERE classid IN"
                " ('dispatches'::regclass, 'run_outbox'::regclass))"
            ).fetchall()
            if victims:
                postgres.execute("SELECT pg_terminate_backend(%s)", chance.choice(victims))
            writers[0].join(chance.random() * 0.2)
        for writer in writers:
            writer.join()
        assert postgres.execute(
            "SELECT min(last_seq) FROM runs WHERE run_id = ANY(%s)", (names,)
        ).fetchone() == (65,), "a writer has failed"
        came = empty_in_time(postgres, GRACE)
        relay.stop()
        assert came, f"a wake-up was lost in round {round}"
        for name in names:
            assert first_arrivals(door.seqs[name]) == list(range(1, 66))
            total += 65
    assert total >= 10_000


def first_arrivals(seqs: list[int]) -> list[int]:
    """What a viewer sees: doubles are dropped."""
    seen: list[int] = []
    for seq in seqs:
        if not seen or seq > seen[-1]:
            seen.append(seq)
    return seen


@pytest.mark.parametrize("careful", [True, False])
def test_a_probe_that_lets_go_before_the_commit_loses_wake_ups(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    loop: SessionLoop,
    careful: bool,
) -> None:
    """The one interleaving that matters, by hand: a writer that began while the relay was awake."""
    journal = beatless_app.journal if careful else careless(beatless_app)
    (name,) = lease_runs(postgres, "control", 1)
    sessions = loop.sessions
    with beatless_app.executors.connect() as writer:
        writer.autocommit = False
        event = journal.new_event(EventType.DEBUG_TRACE, where="here", data={"n": 1})
        assert journal.append(writer, name, 1, [event])
        sessions.doze(loop.shards.owned)
        if careful:
            loop._fall_asleep()
            assert sessions.state is State.DROWSY
        else:
            until(lambda: loop._fall_asleep() or sessions.state is State.ASLEEP)
        writer.commit()
    if careful:
        until(lambda: loop._fall_asleep() or sessions.state is not State.DROWSY)
    else:
        # A notification that was sent after the commit: one of the writer would be here as well.
        sessions.work.execute("SELECT pg_notify(%s, %s)", (sessions.queries.channel, "{"))
        sessions.wait(0)
        assert not sessions.rung
    assert (pending(postgres) == 0) is careful


@pytest.mark.long
def test_relay_processes_killed_with_sigkill_lose_and_reorder_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, client: redis.Redis
) -> None:
    """Two of them share the shards; one at a time is killed, wherever it is, and started again."""
    chance, each = random.Random(11), 60 * ROUNDS
    names = lease_runs(postgres, "process", 8)
    heard: dict[str, list[int]] = defaultdict(list)
    complete = threading.Event()

    def hear() -> None:
        while not complete.is_set():
            message = ear.get_message(timeout=0.2)
            for event in parse(message["data"]) if message else ():
                heard[Event.from_json(event.text).run_id].append(event.seq)
            if all(heard[name] and max(heard[name]) == each for name in names):
                complete.set()

    with closing(client.pubsub(ignore_subscribe_messages=True)) as ear:
        ear.psubscribe(beatless_app.streams.channel("*"))
        ear.get_message(timeout=60)
        hearing = threading.Thread(target=hear)
        hearing.start()
        relays = [beatless.relay_process("tests.plans:app") for _ in range(2)]
        connect, journal = beatless_app.executors.connect, beatless_app.journal
        for round in range(ROUNDS):
            writers = [
                threading.Thread(
                    target=write,
                    args=(connect, journal, names[n::4], each // ROUNDS, round * 10 + n, 0.1),
                )
                for n in range(4)
            ]
            for writer in writers:
                writer.start()
            writers[0].join(chance.random() * 0.3)
            victim = chance.choice(relays)
            victim.kill()
            victim.restart()
            victim.wait_ready()
            for writer in writers:
                writer.join()
        came = empty_in_time(postgres, 60) and complete.wait(60)
        complete.set()
        hearing.join(60)
    assert came, "an event was lost"
    for name in names:
        assert first_arrivals(heard[name]) == list(range(1, each + 1))
