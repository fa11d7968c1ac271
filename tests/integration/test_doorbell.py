"""The wake-up protocol, state by state, and that a broken probe would lose messages.

The relay's side is driven by hand here, so that each interleaving is exact.
"""

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from time import monotonic

import psycopg
import pytest

from beatless import App
from beatless.outbox import doorbell
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.doorbell import Ring, Sessions, State
from beatless.outbox.message import SHARDS, shard_of
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.sockets import Alarm
from beatless.settings import libpq_url
from beatless.testing import Kit


@pytest.fixture
def sessions(beatless_app: App) -> Iterator[Sessions]:
    with Sessions(beatless_app.queries, beatless_app.direct_connection) as sessions:
        yield sessions


@pytest.fixture
def writer(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session that decides itself when it commits."""
    connection = beatless_app.executors.connect()
    connection.autocommit = False
    yield connection
    connection.close()


def await_condition(condition: Callable[[], bool]) -> None:
    """Ask Postgres until it says so; nobody announces that a session waits for a lock."""
    deadline = monotonic() + 60
    while not condition():
        assert monotonic() < deadline


def rings(sessions: Sessions) -> bool:
    """Whether a notification has come. One that was sent after it proves that it would be here."""
    # Not `sessions.ping`: the bell session may be waiting for its locks.
    sessions._ping, sessions._ponged = json.dumps({"ping": secrets.token_hex(8)}), False
    sessions.work.execute("SELECT pg_notify(%s, %s)", (sessions.queries.channel, sessions._ping))
    while not sessions._ponged:
        sessions.wait(60)
    rung, sessions.rung = sessions.rung, Ring.NOTHING
    return bool(rung)


def doze(sessions: Sessions, postgres: psycopg.Connection) -> None:
    """Ask for the bell locks; return when one is waited for, behind somebody's transaction."""
    sessions.doze(ALL_SHARDS)
    waits = "SELECT FROM pg_locks WHERE pid = %s AND locktype = 'advisory' AND NOT granted"
    bell = (sessions.bell.info.backend_pid,)
    await_condition(lambda: bool(postgres.execute(waits, bell).fetchall()))


def sleep(sessions: Sessions) -> None:
    sessions.doze(ALL_SHARDS)
    while not sessions.granted():
        sessions.wait(60)


def test_awake_nobody_rings(beatless: Kit, sessions: Sessions) -> None:
    for _ in range(20):
        beatless.start_run("two_steps")
    assert not rings(sessions)


def test_asleep_every_commit_rings(beatless: Kit, sessions: Sessions) -> None:
    sleep(sessions)
    assert sessions.state is State.ASLEEP
    for _ in range(3):
        beatless.start_run("two_steps")
        assert rings(sessions)


def test_a_rolled_back_transaction_rings_nobody(
    beatless: Kit, sessions: Sessions, writer: psycopg.Connection
) -> None:
    sleep(sessions)
    beatless.start_run("two_steps", connection=writer)
    writer.rollback()
    assert not rings(sessions)


def test_a_silent_writer_keeps_the_relay_from_falling_asleep_until_its_rows_are_visible(
    beatless: Kit, sessions: Sessions, writer: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    beatless.start_run("two_steps", connection=writer)  # its probe found nobody asleep
    doze(sessions, postgres)
    assert not sessions.granted()
    assert sessions.state is State.DROWSY

    writer.commit()

    while not sessions.granted():
        sessions.wait(60)
    # Nobody rang: this last look is what finds the rows.
    assert not rings(sessions)
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (1,)


def test_drowsy_new_writers_ring(
    beatless: Kit, sessions: Sessions, writer: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    blocker = beatless.start_run("two_steps", connection=writer)
    doze(sessions, postgres)
    assert not rings(sessions)
    same_shard = next(
        f"other-{n}" for n in range(1000) if shard_of(f"other-{n}") == shard_of(blocker.run_id)
    )

    beatless.client.start_run("two_steps", run_id=same_shard)

    assert rings(sessions)
    assert not sessions.granted()


def test_roused_from_drowsy_or_asleep_nobody_rings_any_more(
    beatless: Kit, sessions: Sessions, writer: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    beatless.start_run("two_steps", connection=writer)
    doze(sessions, postgres)
    sessions.rouse()
    writer.commit()
    beatless.start_run("two_steps")
    assert not rings(sessions)

    sleep(sessions)
    sessions.rouse()
    beatless.start_run("two_steps")
    assert not rings(sessions)


class Unheard(DirectConnection):
    """Its first cancel overtakes the statement it is meant for: Postgres has nothing to cancel."""

    cancels = 0

    def cancel_safe(self, *, timeout: float = 30.0) -> None:
        self.cancels += 1
        if self.cancels > 1:
            super().cancel_safe(timeout=timeout)


def test_a_cancel_that_overtakes_its_statement_costs_no_session(
    beatless: Kit, beatless_app: App, writer: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    def connect() -> Unheard:
        return Unheard.connect(libpq_url(beatless_app.settings.listen_url), autocommit=True)

    key = beatless_app.queries.leader_key
    beatless.start_run("two_steps", connection=writer)  # its transaction holds a bell lock
    postgres.execute(f"SELECT pg_advisory_lock({key}, 1)")
    with Sessions(beatless_app.queries, connect) as sessions:
        doze(sessions, postgres)
        sessions.watch_shard(1)

        sessions.rouse()
        sessions.watch_shard(None)

        assert sessions.state is State.AWAKE
        assert not sessions.watch_granted
        assert min(sessions.bell.cancels, sessions.watch.cancels) > 1  # again until it is heard
    postgres.execute("SELECT pg_advisory_unlock_all()")


def test_the_shards_of_others_ring_for_others(beatless: Kit, sessions: Sessions) -> None:
    mine = [shard for shard in ALL_SHARDS if shard % 2]
    sessions.doze(mine)
    while not sessions.granted():
        sessions.wait(60)
    foreign = next(f"run-{n}" for n in range(100) if shard_of(f"run-{n}") not in mine)
    beatless.client.start_run("two_steps", run_id=foreign)
    assert not rings(sessions)


def test_a_savepoint_that_is_taken_back_takes_its_ring_with_it(
    beatless: Kit, sessions: Sessions, writer: psycopg.Connection
) -> None:
    sleep(sessions)
    writer.execute("SAVEPOINT s")
    beatless.start_run("two_steps", connection=writer)
    writer.execute("ROLLBACK TO s")
    writer.commit()
    assert not rings(sessions)


def test_the_channel_and_the_locks_are_the_schemas_own(
    beatless: Kit, sessions: Sessions, postgres: psycopg.Connection
) -> None:
    """Two schemas in one database: the locks and channels of one are nothing to the other."""
    postgres.execute(f"NOTIFY beatless_{beatless.app.settings.schema}x, 'other'")
    assert not rings(sessions)
    keys = {
        name: postgres.execute(
            f"SELECT '{beatless.app.settings.schema}.{name}'::regclass::oid::bigint"
        ).fetchone()[0]
        for name in ("run_outbox", "dispatches")
    }
    sleep(sessions)
    held = postgres.execute(
        "SELECT classid::bigint, count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted "
        "AND pid = ANY(%s) GROUP BY classid",
        ([sessions.work.info.backend_pid, sessions.bell.info.backend_pid],),
    ).fetchall()
    assert dict(held) == {keys["run_outbox"]: SHARDS, keys["dispatches"]: 1}


def test_an_alarm_interrupts_every_wait_and_never_blocks_who_rings(sessions: Sessions) -> None:
    alarm = Alarm()
    for _ in range(100_000):
        alarm.ring()
    waits = [threading.Thread(target=sessions.wait, args=(3600, alarm), daemon=True)]
    waits[0].start()
    waits[0].join(60)
    alarm.quiet()
    waits.append(threading.Thread(target=sessions.wait, args=(3600, alarm), daemon=True))
    waits[1].start()
    timer = threading.Timer(0.01, alarm.ring)
    timer.start()
    waits[1].join(60)
    timer.join()
    assert not any(wait.is_alive() for wait in waits)
    alarm.close()
    alarm.ring()


@pytest.mark.parametrize("name", ["watch", "bell", "work"])
def test_a_session_that_is_terminated_ends_the_waiting(
    sessions: Sessions, postgres: psycopg.Connection, name: str
) -> None:
    pid = getattr(sessions, name).info.backend_pid
    postgres.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    sessions.wait(60)  # the last words of the server
    with pytest.raises(psycopg.OperationalError):
        sessions.wait(60)


# The negative control: what the tests above protect is really needed.


@pytest.mark.parametrize("careful", [True, False])
def test_a_probe_that_lets_go_before_the_commit_would_lose_the_message(
    beatless: Kit,
    sessions: Sessions,
    writer: psycopg.Connection,
    postgres: psycopg.Connection,
    careful: bool,
) -> None:
    run = beatless.start_run("two_steps", connection=writer)
    if not careful:
        # As if the probe had been released at once instead of with the transaction.
        writer.execute("ROLLBACK")
        schema = beatless.app.settings.schema
        writer.execute(
            f"INSERT INTO {schema}.run_outbox (shard, run_id, from_seq, to_seq) VALUES (%s,%s,1,1)",
            (shard_of(run.run_id), run.run_id),
        )
        writer.execute(
            "SELECT pg_try_advisory_lock_shared(key, %(s)s), pg_advisory_unlock_shared(key, %(s)s) "
            f"FROM (SELECT '{schema}.run_outbox'::regclass::oid::int4 AS key) k",
            {"s": shard_of(run.run_id)},
        )

    def look() -> int:
        return postgres.execute("SELECT count(*) FROM run_outbox").fetchone()[0]

    sessions.doze(ALL_SHARDS)
    while not (asleep := sessions.granted()) and not careful:
        sessions.wait(60)  # nobody is in the way
    found = look() if asleep else None
    writer.commit()
    while not asleep:
        sessions.wait(60)
        asleep = sessions.granted()
        found = look() if asleep else None
    woken = rings(sessions)

    noticed = bool(found) or woken
    assert noticed is careful
    assert look() == 1


def test_sessions_that_cannot_all_be_opened_leave_none_open(beatless_app: App) -> None:
    opened: list[DirectConnection] = []

    def connect() -> DirectConnection:
        if len(opened) == 2:
            raise psycopg.OperationalError("too many connections")
        opened.append(beatless_app.direct_connection())
        return opened[-1]

    with pytest.raises(psycopg.OperationalError, match="too many"):
        Sessions(beatless_app.queries, connect)
    assert [connection.closed for connection in opened] == [True, True]


def test_the_server_as_well_notices_a_relay_whose_host_has_vanished(sessions: Sessions) -> None:
    for connection in (sessions.work, sessions.bell, sessions.watch):
        found = connection.execute(
            "SELECT name, setting FROM pg_settings WHERE name LIKE 'tcp_keepalives%'"
        ).fetchall()
        assert dict(found) == {
            "tcp_keepalives_idle": "5",
            "tcp_keepalives_interval": "1",
            "tcp_keepalives_count": "3",
        }


def test_a_standby_does_not_keep_vacuum_from_its_work(
    beatless_app: App,
    sessions: Sessions,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A session that waits for a lock has a snapshot as old as its wait."""

    def horizon() -> int:
        row = postgres.execute(
            "SELECT backend_xmin::text::bigint FROM pg_stat_activity WHERE pid = %s",
            (sessions.watch.info.backend_pid,),
        ).fetchone()
        assert row
        return int(row[0])

    def write() -> int:
        row = postgres.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
        assert row
        return int(row[0])

    def waits() -> bool:
        return bool(
            postgres.execute(
                "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'advisory'",
                (sessions.watch.info.backend_pid,),
            ).fetchall()
        )

    key = beatless_app.queries.leader_key
    with Sessions(beatless_app.queries, beatless_app.direct_connection) as other:
        other.work.execute(f"SELECT pg_advisory_lock({key}, 3)")
        sessions.watch_shard(3)
        await_condition(waits)
        written = write()
        sessions.renew_watch()  # it is not time yet
        assert horizon() <= written

        monkeypatch.setattr(doorbell, "WATCH_RENEWAL_S", 0.0)

        def renewed() -> bool:
            sessions.renew_watch()
            await_condition(waits)
            return horizon() > written

        await_condition(renewed)  # transactions of other tests keep it back as well
        assert not sessions.watch_granted
    while not sessions.watch_granted:  # and the wait still tells of the other's end
        sessions.wait(60)


@pytest.mark.slow
def test_a_session_that_waits_ends_when_its_relay_is_gone(
    beatless_app: App,
    sessions: Sessions,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Postgres does not read from a client while it waits for a lock."""
    monkeypatch.setattr("beatless.outbox.sessions.CLIENT_CHECK_INTERVAL", "10ms")
    sessions.work.execute(f"SELECT pg_advisory_lock({beatless_app.queries.leader_key}, 3)")
    other = Sessions(beatless_app.queries, beatless_app.direct_connection)
    other.watch_shard(3)
    pid = other.watch.info.backend_pid
    found = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event = 'advisory'"
    await_condition(lambda: bool(postgres.execute(found, (pid,)).fetchall()))

    for connection in (other.work, other.bell, other.watch):
        connection.pgconn.finish()  # as the death of the process

    await_condition(lambda: not postgres.execute(found, (pid,)).fetchall())


def test_a_silent_relay_is_ended_with_all_of_its_sessions_and_nobody_else(
    beatless: Kit,
    beatless_app: App,
    sessions: Sessions,
    writer: psycopg.Connection,
    postgres: psycopg.Connection,
) -> None:
    """Silent is who has sent no statement for so long, with or without a lock in its hands."""
    run = beatless.start_run("two_steps", connection=writer)
    shard = (shard_of(run.run_id) + 1) % SHARDS  # the writer holds the bell of the run's own
    key = beatless_app.queries.leader_key
    with Sessions(beatless_app.queries, beatless_app.direct_connection) as other:
        other.work.execute(f"SELECT pg_advisory_lock({key}, {shard})")
        sessions.watch_shard(shard)
        other.doze([shard])
        while not other.granted():
            other.wait(60)
        theirs = [other.work.info.backend_pid, other.bell.info.backend_pid]

        assert sessions.end_silent(3600) == []
        assert sessions.end_silent(0) == [other.pid]

        left = "SELECT FROM pg_stat_activity WHERE pid = ANY(%s)"
        await_condition(lambda: not postgres.execute(left, (theirs,)).fetchall())
    while not sessions.watch_granted:
        sessions.wait(60)
    assert sessions.end_silent(0) == []
    writer.commit()  # it waited for longer than that, too, and is no relay
    assert len(beatless.client.list_runs()) == 1
