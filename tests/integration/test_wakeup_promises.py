"""What the promises of the relay stand on: for each, a test that fails without it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest

from beatless import App
from beatless.outbox.doorbell import Ring, Sessions, State
from beatless.outbox.message import SHARDS
from beatless.outbox.observer import StalledRelayEnded
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.session_loop import SessionLoop
from beatless.settings import libpq_url
from beatless.testing import Kit
from tests.integration.test_relay import (
    Door,
    doors,
    in_shard,
    pending,
    recording,
    running,
    seqs,
    session_loop,
    shards_of,
    until,
)

__all__ = ["doors"]

SHARD = 5


@pytest.fixture
def asleep(beatless_app: App) -> Iterator[Callable[[], list[str]]]:
    """A relay that sleeps for one shard only; calling it gives the rings since the last call."""
    queries = beatless_app.queries
    with psycopg.connect(libpq_url(beatless_app.settings.listen_url), autocommit=True) as relay:
        relay.execute(f"SELECT pg_advisory_lock({queries.bell_key}, {SHARD})")
        relay.execute(f'LISTEN "{queries.channel}"')

        def rings() -> list[str]:
            relay.execute("SELECT 1")
            return [found.payload for found in relay.notifies(timeout=0)]

        yield rings


def writers(kit: Kit, run_id: str) -> Iterator[str]:
    """Each kind of writer that a run meets, one after the other."""
    kit.start_run("two_steps", run_id=run_id)
    yield "start"
    assert kit.step(run_id)
    yield "claim, step and give back"
    kit.client.cancel_run(run_id)
    yield "cancel"


def test_each_writer_rings_the_bell_of_its_own_shard_and_of_no_other(
    beatless: Kit, asleep: Callable[[], list[str]]
) -> None:
    for who in writers(beatless, in_shard(SHARD, "own")):
        assert {ring.split()[0] for ring in asleep()} == {str(SHARD)}, who
    for shard in {*ALL_SHARDS} - {SHARD}:
        for who in writers(beatless, in_shard(shard, "other")):
            assert asleep() == [], (shard, who)


@pytest.fixture
def loop(beatless_app: App) -> Iterator[SessionLoop]:
    """A relay driven by hand that leads all shards."""
    with ExitStack() as ends:
        relay = beatless_app.relay()
        ends.callback(relay.stop)
        sessions = ends.enter_context(
            Sessions(beatless_app.queries, beatless_app.direct_connection)
        )
        found = ends.enter_context(session_loop(relay, sessions))
        sessions.announce()
        found.rebalance()
        assert len(found.shards.owned) == SHARDS
        yield found


def test_what_is_committed_between_the_last_look_and_the_grant_is_published_before_it_sleeps(
    beatless: Kit,
    beatless_app: App,
    loop: SessionLoop,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its writer found the bell lock free, and has rung nobody."""
    with beatless_app.engine.connect() as caller:
        caller.begin()
        beatless.start_run("two_steps", connection=caller)
        loop.sessions.doze(loop.shards.owned)
        granted = loop.sessions.granted

        def late() -> bool:
            caller.commit()
            until(lambda: granted() or loop.sessions.state is State.ASLEEP)
            return True

        monkeypatch.setattr(loop.sessions, "granted", late)
        loop._fall_asleep()

    assert loop.sessions.state is State.ASLEEP
    assert not loop.sessions.rung
    assert pending(postgres) == 0


def test_a_row_that_is_committed_after_many_later_ones_is_published(
    beatless: Kit,
    beatless_app: App,
    doors: tuple[Door, Door],
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ids commit out of order: the last one that was seen is no floor."""
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 1)
    relay = recording(beatless_app, doors)
    with beatless_app.engine.connect() as caller:
        caller.begin()
        late = beatless.start_run("two_steps", run_id=in_shard(SHARD, "late"), connection=caller)
        for number in range(10):
            beatless.start_run("two_steps", run_id=in_shard(SHARD, f"soon-{number}"))
            relay.drain_once()
        caller.commit()
    relay.drain_once()
    relay.stop()

    assert seqs(doors[0])[late.run_id] == [1]
    assert pending(postgres) == 0


def test_the_floor_rises_to_its_candidate_and_not_to_what_was_picked_since(
    beatless: Kit,
    beatless_app: App,
    loop: SessionLoop,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below the id that the last pick saw there may be one that is not committed yet."""
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 1)
    floor = loop.drain.events.floor

    def step() -> None:
        loop.drain.step(loop.shards.owned)

    def decided() -> bool:  # another test's transaction may hold it down for a moment
        beatless.start_run("two_steps")
        step()
        return floor._decided

    until(decided)
    with beatless_app.engine.connect() as caller:
        caller.begin()
        beatless.start_run("two_steps", connection=caller)
        beatless.start_run("two_steps")
        step()
        caller.commit()
    step()
    loop.drain.finish(loop.shards.owned)

    assert floor.id > 0
    assert pending(postgres) == 0


def test_the_floor_rises_when_nobody_holds_it_down(
    beatless: Kit, beatless_app: App, doors: tuple[Door, Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the test above would say nothing."""
    monkeypatch.setattr("beatless.outbox.scan_floor.FLOOR_INTERVAL_ROWS", 1)
    relay = recording(beatless_app, doors)

    def risen() -> bool:  # another test's transaction may hold it down for a moment
        beatless.client.start_run("two_steps")
        relay.drain_once()
        return relay._once[1].events.floor.id > 0

    until(risen)
    relay.stop()


def test_a_relay_that_says_nothing_for_too_long_loses_its_shards(
    beatless: Kit, beatless_app: App
) -> None:
    """As one that is frozen, whose kernel answers for it."""
    frozen = Sessions(beatless_app.queries, beatless_app.direct_connection)
    try:
        key = beatless_app.queries.leader_key
        for shard in ALL_SHARDS[:8]:
            frozen.work.execute(f"SELECT pg_advisory_lock({key}, {shard})")
        with running(beatless_app, watchdog=0.2) as (_, announcements):
            assert announcements.wait(StalledRelayEnded).pid == frozen.pid
            announcements.wait_until(lambda seen: shards_of(seen) == SHARDS)
            run = beatless.start_run("two_steps", run_id=in_shard(3, "his"))
            beatless.wait_for_outbox_flush(run.run_id)
    finally:
        for connection in (frozen.work, frozen.bell, frozen.watch):
            connection.close()


def test_a_relay_that_has_just_said_something_is_not_taken_for_frozen(beatless_app: App) -> None:
    connect = beatless_app.direct_connection
    with (
        Sessions(beatless_app.queries, connect) as one,
        Sessions(beatless_app.queries, connect) as two,
    ):
        one.work.execute("SELECT 1")
        assert two.end_silent(60) == []
        assert two.end_silent(0) == [one.pid]


def test_a_relay_whose_shards_change_looks_at_all_of_their_rows_again(
    beatless: Kit, loop: SessionLoop, postgres: psycopg.Connection
) -> None:
    beatless.start_run("two_steps")
    loop.drain.events.floor.id = 2**40  # as high as the rows of others that it has not led
    loop.drain.step(loop.shards.owned)
    assert pending(postgres) == 1

    loop.rebalance()
    loop.drain.step(loop.shards.owned)
    loop.drain.finish(loop.shards.owned)

    assert pending(postgres) == 0


def test_a_ring_that_comes_while_a_drowsy_relay_looks_is_not_forgotten(
    beatless: Kit, loop: SessionLoop, postgres: psycopg.Connection
) -> None:
    sessions, look = loop.sessions, loop._drain_all

    def look_and_be_rung() -> int:
        moved = look()
        sessions.rung = Ring.ALL  # of a row that this look did not see
        return moved

    loop._drain_all = look_and_be_rung
    with psycopg.connect(libpq_url(beatless.app.settings.listen_url)) as writer:
        writer.execute(f"SELECT pg_advisory_xact_lock_shared({sessions.queries.bell_key}, {SHARD})")
        sessions.doze(loop.shards.owned)
        loop._fall_asleep()
        assert sessions.state is State.DROWSY
        assert sessions.rung
    sessions.rouse()
