"""A worker of which nothing is left is noticed by others, and one that lives never is."""

import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest

from beatless import App
from beatless.local.child import Child
from beatless.local.processes import children_of
from beatless.orchestrator import fleet_watch
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.fleet_watch import (
    BUSY_RECHECK_S,
    KEEPER,
    PROOF_S,
    RECHECK_S,
    WORKER,
    FleetWatch,
)
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.observer import LeasesEnded
from beatless.orchestrator.progress import GIVEN_BACK, SUSPECT
from beatless.outbox.clock import monotonic
from beatless.outbox.direct_connection import DirectConnection
from beatless.outbox.sockets import readable
from beatless.testing import Kit
from tests.integration.test_takeover import APP, LEASE_S, POOLS, Waiting, due, ended, wait
from tests.valkeys import until

__all__ = ["wait"]


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


def kill_all(worker: Child) -> None:
    """As the end of a container: the keeper too."""
    for pid in (*children_of(worker.pid), worker.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def watched(connection: psycopg.Connection[Any], schema: str) -> bool:
    """Whether a relay has seen a worker: it waits for its end, or looks again and again."""
    row = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'beatless watch'"
        " AND query LIKE %s AND (state = 'idle' OR wait_event = 'advisory')",
        [f"%'{schema}.workers'%"],
    ).fetchone()
    return row is not None and row[0] > 0


@pytest.mark.long
@pytest.mark.parametrize("pool", POOLS)
def test_the_run_of_a_worker_of_which_nothing_is_left_goes_on_at_once(
    beatless: Kit, postgres: psycopg.Connection[Any], wait: Callable[[str], Waiting], pool: str
) -> None:
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP, arguments=POOLS[pool])
    waiting = wait("run")
    waiting.begun(1)
    until(lambda: watched(postgres, beatless.app.settings.schema))

    kill_all(worker)
    beatless.worker_process(APP, arguments=POOLS[pool])
    waiting.begun(2)

    assert ended(beatless, waiting).attempt == 2
    beatless.verify()


class Fleet:
    """Sessions as those of workers' processes, and watches, which the test steps."""

    def __init__(self, app: App, stack: ExitStack) -> None:
        self.app, self.stack = app, stack
        self.signals: list[Any] = []
        self.watches: list[FleetWatch] = []
        self.sessions: list[DirectConnection] = []

    @staticmethod
    def name() -> str:
        """A worker: other tests have theirs on the same server."""
        return secrets.token_hex(4)

    def connect(self, name: str) -> DirectConnection:
        connection = self.app.watch_connection(name)
        self.stack.callback(connection.close)
        self.sessions.append(connection)
        return connection

    def terminate(self, *names: str) -> None:
        """End the sessions of these names, as an operator can."""
        mine = {each.info.backend_pid for each in self.sessions if not each.closed}
        with self.app.executors.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = ANY(%s) AND pid = ANY(%s)",
                [list(names), list(mine)],
            )

    def watch(self, worker: str = "") -> FleetWatch:
        """Of the keeper of this worker, or of a relay; it has looked once."""
        found = FleetWatch(
            self.app.settings.schema,
            self.app.leases,
            self.connect,
            worker=worker,
            observer=self.signals.append,
        )
        self.stack.callback(found.close)
        self.watches.append(found)
        found.once()
        return found

    def process(self, worker: str) -> DirectConnection:
        """A session of a process of a worker that executes runs."""
        return self.connect(f"{WORKER}{worker}")

    def run(self, seconds: float, *, leases: int = 1) -> None:
        """Let the watches do what is due, for so long or until so many leases were ended."""
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0 and self.ended() < leases:
            sockets = [each for watch in self.watches for each in watch.descriptors()]
            readable(sockets, min(left, *(watch.patience() for watch in self.watches)))
            for watch in self.watches:
                watch.once()

    def ended(self) -> int:
        return sum(each.leases for each in self.signals if isinstance(each, LeasesEnded))


@pytest.fixture
def fleet(beatless: Kit, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Its watches take no load for granted when they come."""
    monkeypatch.setattr(fleet_watch, "LOAD_S", 0.0)
    with ExitStack() as stack:
        yield Fleet(beatless.app, stack)


@pytest.fixture
def connection(beatless: Kit) -> Iterator[psycopg.Connection[Any]]:
    with beatless.app.executors.connect() as found:
        yield found


def claim(beatless: Kit, connection: psycopg.Connection[Any], worker: str) -> Lease:
    run = beatless.start_run("two_steps")
    lease = beatless.app.leases.claim(
        connection,
        run.run_id,
        plan="two_steps",
        worker=f"host:1:{worker}",
        first_step="first",
        dispatch=1,
    )
    assert lease is not None
    return lease


LONG_ENOUGH_S = 3 * PROOF_S
"""For any watch to find a worker dead."""


def test_a_worker_without_any_session_is_dead(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    keeper, process = fleet.watch(name), fleet.process(name)
    fleet.watch()
    dead, other = claim(beatless, connection, name), claim(beatless, connection, fleet.name())

    fleet.watches.remove(keeper)
    keeper.close()
    process.close()
    fleet.run(60)

    assert due(beatless, connection, dead)
    assert not due(beatless, connection, other)
    assert fleet.ended() == 1


def test_a_worker_whose_keeper_alone_is_gone_lives(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    keeper, process = fleet.watch(name), fleet.process(name)
    fleet.watch()
    lease = claim(beatless, connection, name)

    fleet.watches.remove(keeper)
    keeper.close()
    fleet.run(LONG_ENOUGH_S)
    assert not due(beatless, connection, lease)

    process.close()
    fleet.run(60)
    assert due(beatless, connection, lease)


def test_a_worker_all_of_whose_sessions_were_ended_lives_if_its_keeper_connects_again(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    fleet.watch(name)
    fleet.process(name)
    fleet.watch()
    lease = claim(beatless, connection, name)

    fleet.terminate(f"{WORKER}{name}", f"{KEEPER}{name}")
    fleet.run(LONG_ENOUGH_S)

    assert not due(beatless, connection, lease)


def test_a_watch_that_was_cut_off_itself_accuses_nobody(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    """As after a restart of Postgres: all sessions are gone, and everybody lives."""
    name = fleet.name()
    keeper = fleet.watch(name)
    fleet.process(name)
    fleet.watch()
    lease = claim(beatless, connection, name)

    fleet.watches.remove(keeper)
    fleet.terminate("beatless watch", f"{KEEPER}{name}", f"{WORKER}{name}")
    fleet.run(LONG_ENOUGH_S)

    assert not due(beatless, connection, lease)


def test_a_worker_that_no_watch_has_seen_is_left_to_its_leases(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    lease = claim(beatless, connection, fleet.name())
    fleet.watch(fleet.name())
    fleet.watch()

    fleet.run(LONG_ENOUGH_S)

    assert not due(beatless, connection, lease)


def test_workers_that_die_at_once_are_noticed_though_one_was_to_notice_the_other(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    names = [fleet.name() for _ in range(3)]
    keepers = [fleet.watch(name) for name in names]
    fleet.watch()
    leases = [claim(beatless, connection, names[number]) for number in (0, 2)]
    survivor = claim(beatless, connection, names[1])

    for keeper in (keepers[0], keepers[2]):
        fleet.watches.remove(keeper)
        keeper.close()
    fleet.run(60, leases=2)

    assert [due(beatless, connection, lease) for lease in leases] == [True, True]
    assert not due(beatless, connection, survivor)
    assert fleet.ended() == 2


def died(fleet: Fleet, name: str, leases: int) -> None:
    """The worker of this name dies, keeper and all, and is noticed."""
    keeper = fleet.watches[0]
    fleet.watch()
    fleet.watches.remove(keeper)
    keeper.close()
    fleet.run(60, leases=leases)


def noted(beatless: Kit, lease: Lease) -> list[object]:
    """What its journal says of the deaths of its workers: whether it was there."""
    events = beatless.client.events(lease.run.run_id)
    traces = [event.data for event in events if event.type == "DebugTrace"]
    return [data["process_died"] for data in traces if data["name"] == GIVEN_BACK]


def test_of_the_runs_of_a_dead_worker_none_has_crashed_if_there_were_several(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    fleet.watch(name)
    leases = [claim(beatless, connection, name) for _ in range(3)]
    died(fleet, name, 3)

    assert [noted(beatless, lease) for lease in leases] == [[True]] * 3


def test_the_only_run_of_a_dead_worker_has_crashed(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    fleet.watch(name)
    lease = claim(beatless, connection, name)
    died(fleet, name, 1)

    assert noted(beatless, lease) == []


def test_a_suspect_that_was_alone_has_crashed_and_those_that_waited_for_it_were_not_there(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    fleet.watch(name)
    first, journal = fleet.name(), beatless.app.journal
    suspects = [claim(beatless, connection, first) for _ in range(2)]
    beatless.app.leases.end(
        connection,
        [(lease.run.run_id, lease.token) for lease in suspects],
        uncalled={lease.token for lease in suspects},
        beside={lease.token for lease in suspects},
    )
    again = [
        beatless.app.leases.claim(
            connection,
            lease.run.run_id,
            plan="two_steps",
            worker=f"host:1:{name}",
            first_step=None,
            dispatch=2,
        )
        for lease in suspects
    ]
    for lease in again:
        assert lease is not None
        started = NewEvent(type=EventType.STEP_STARTED, step="first", attempt=1)
        journal.append(connection, lease.run.run_id, lease.token, [started])
    alone, waits = filter(None, again)
    data = {"name": SUSPECT, "alone": True}
    note = journal.new_event(
        EventType.DEBUG_TRACE, step="first", attempt=1, where="here", data=data
    )
    journal.append(connection, alone.run.run_id, alone.token, [note])
    died(fleet, name, 2)

    assert noted(beatless, alone) == [True]  # of the death before
    assert noted(beatless, waits) == [True, False]


def test_the_next_keeper_notices_without_a_relay(
    beatless: Kit, fleet: Fleet, connection: psycopg.Connection[Any]
) -> None:
    name = fleet.name()
    first, _ = fleet.watch(name), fleet.watch(fleet.name())
    lease = claim(beatless, connection, name)

    fleet.watches.remove(first)
    first.close()
    fleet.run(60)

    assert due(beatless, connection, lease)


def test_a_keepers_session_outlasts_a_network_that_is_cut(fleet: Fleet) -> None:
    fleet.watch(fleet.name())
    (session,) = fleet.sessions
    found = [
        session.execute(f"SHOW {name}".encode()).fetchone()
        for name in ("tcp_keepalives_idle", "tcp_user_timeout")
    ]
    assert found == [(str(2 * LEASE_S),), ("0",)]


def test_a_relay_has_no_session_for_it_while_there_is_no_worker(fleet: Fleet) -> None:
    watch = fleet.watch()
    assert watch.descriptors() == []
    assert watch.patience() == float("inf")
    fleet.watch(fleet.name())
    watch.look_soon()
    watch.once()
    assert len(watch.descriptors()) == 1


def holds_snapshot(fleet: Fleet, connection: psycopg.Connection[Any]) -> bool:
    """Whether a session of these watches keeps dead rows from being removed."""
    pids = [each.info.backend_pid for each in fleet.sessions if not each.closed]
    row = connection.execute(
        "SELECT bool_or(backend_xmin IS NOT NULL) FROM pg_stat_activity WHERE pid = ANY(%s)", [pids]
    ).fetchone()
    assert row is not None
    return bool(row[0])


def write(connection: psycopg.Connection[Any]) -> None:
    """A hundred transactions with an id of their own."""
    for _ in range(100):
        connection.execute("SELECT pg_current_xact_id()")


def test_a_watch_keeps_no_dead_rows_while_much_is_written(
    fleet: Fleet, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each scan of a queue would meet them."""
    fleet.watch(fleet.name())
    keeper = fleet.watch(fleet.name())
    until(lambda: holds_snapshot(fleet, connection))

    monkeypatch.setattr(fleet_watch, "BUSY_XIDS_PER_S", 0.01)
    write(connection)
    keeper.look_soon()
    keeper.once()
    assert not holds_snapshot(fleet, connection)
    assert 0 < keeper.patience() <= BUSY_RECHECK_S

    monkeypatch.setattr(fleet_watch, "BUSY_XIDS_PER_S", 1e9)
    keeper.look_soon()
    keeper.once()
    until(lambda: holds_snapshot(fleet, connection))


def test_a_watch_that_looks_again_and_again_notices_a_death(
    beatless: Kit,
    fleet: Fleet,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_watch, "BUSY_XIDS_PER_S", -1.0)
    name = fleet.name()
    dying, keeper = fleet.watch(name), fleet.watch(fleet.name())
    lease = claim(beatless, connection, name)
    keeper.look_soon()
    keeper.once()
    assert keeper.patience() <= BUSY_RECHECK_S

    fleet.watches.remove(dying)
    dying.close()
    fleet.run(60)

    assert due(beatless, connection, lease)


def test_a_relay_with_much_to_do_has_its_watch_wait_for_nothing(
    fleet: Fleet, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_watch, "BUSY_XIDS_PER_S", 1e9)
    monkeypatch.setattr(fleet_watch, "LOAD_S", 3600.0)
    fleet.watch(fleet.name())
    watch = fleet.watch()
    until(lambda: holds_snapshot(fleet, connection))
    assert watch.note_load()
    assert not watch.note_load()  # no news: its thread is not woken again
    watch.once()
    assert not holds_snapshot(fleet, connection)
    assert 0 < watch.patience() <= BUSY_RECHECK_S


def test_a_relay_with_much_to_do_ends_the_waits_of_the_others(
    beatless: Kit,
    fleet: Fleet,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_watch, "BUSY_XIDS_PER_S", 1e9)
    name = fleet.name()
    dying, keeper = fleet.watch(name), fleet.watch(fleet.name())
    asleep, relay = fleet.watch(), fleet.watch()
    until(lambda: holds_snapshot(fleet, connection))
    number_of_sessions = len(fleet.sessions)

    monkeypatch.setattr(fleet_watch, "LOAD_S", 3600.0)
    relay.note_load()
    relay.once()
    for each in (keeper, asleep):
        assert readable(each.descriptors(), 60)
        each.once()
        assert 0 < each.patience() <= BUSY_RECHECK_S
    assert not holds_snapshot(fleet, connection)

    # They have lost neither their session nor sight of who was there.
    assert len(fleet.sessions) == number_of_sessions
    lease = claim(beatless, connection, name)
    fleet.watches.remove(dying)
    dying.close()
    fleet.run(60)
    assert due(beatless, connection, lease)


def test_a_cancel_that_comes_when_the_wait_has_ended_costs_a_watch_nothing(
    beatless: Kit,
    fleet: Fleet,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two relays may have seen the same wait."""
    name = fleet.name()
    dying, keeper = fleet.watch(name), fleet.watch(fleet.name())
    number_of_sessions = len(fleet.sessions)

    def cancelled(_: Any) -> Any:
        raise psycopg.errors.QueryCanceled

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "_members", cancelled)
        keeper.look_soon()
        assert keeper.once()
    assert 0 < keeper.patience() <= RECHECK_S

    lease = claim(beatless, connection, name)
    fleet.watches.remove(dying)
    dying.close()
    fleet.run(60)
    assert due(beatless, connection, lease)
    assert len(fleet.sessions) == number_of_sessions


def test_the_number_of_a_dead_worker_is_given_back_though_that_is_cancelled_once(
    fleet: Fleet, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, keeper = fleet.watch(fleet.name()), fleet.watch(fleet.name())
    granted, cancels = fleet_watch._granted, [psycopg.errors.QueryCanceled()]

    def cancelled_once(*arguments: Any) -> bool:
        if cancels:
            raise cancels.pop()
        return granted(*arguments)

    monkeypatch.setattr(fleet_watch, "_granted", cancelled_once)
    fleet.watches.remove(dying)
    dying.close()
    assert readable(keeper.descriptors(), 60)
    keeper.once()
    assert cancels == []
    row = connection.execute(
        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = %s",
        [fleet.sessions[1].info.backend_pid],
    ).fetchone()
    assert row == (1,)


def test_a_keeper_that_comes_amid_a_burst_waits_for_nothing(
    fleet: Fleet, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.watch(fleet.name())
    monkeypatch.setattr(fleet_watch, "LOAD_S", 3600.0)
    keeper = fleet.watch(fleet.name())
    assert 0 < keeper.patience() <= BUSY_RECHECK_S
    assert not holds_snapshot(fleet, connection)


def test_an_idle_watch_sends_nothing_for_a_minute(fleet: Fleet) -> None:
    fleet.watch(fleet.name())
    fleet.watch(fleet.name())
    watch = fleet.watch()
    assert all(each.patience() > 50 for each in fleet.watches)
    assert watch.patience() < 61
