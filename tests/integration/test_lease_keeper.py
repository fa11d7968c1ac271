"""A body that lets no other thread of its process run keeps its run all the same."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic

import psycopg
import pytest

from beatless.orchestrator.board import SLOTS, Board, Noted
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.keeper import Keeper, works
from beatless.orchestrator.lease import Lease
from beatless.testing import Kit
from tests.valkeys import until

APP = "tests.plans:app"
LEASE_S = 300


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": LEASE_S}


@pytest.mark.long
@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
@pytest.mark.parametrize("beatless_settings", [{"lease_seconds": 15, "redispatch_seconds": 1}])
def test_a_step_that_holds_the_interpreters_lock_for_longer_than_its_lease_keeps_it(
    beatless: Kit, postgres: psycopg.Connection, tmp_path: Path, pool: str
) -> None:
    """Until its first lease would have run out: a third of it is the time that its keeper has."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    beatless.relay_process(APP)
    for _ in range(2):
        beatless.worker_process(APP, arguments=("--", "--pool", pool))
    run = beatless.start_run("holds_the_lock", {"fifo": str(fifo)})
    beatless.wait_for_event(run.run_id, "StepStarted")
    lapsed = "SELECT %s < clock_timestamp()"
    (first,) = postgres.execute("SELECT lease_expires_at FROM runs").fetchone()
    until(lambda: postgres.execute(lapsed, [first]).fetchone() == (True,))
    fifo.write_text("go")

    ended = beatless.wait_for_run_completion(run.run_id)

    assert (ended.result, ended.attempt) == ("held", 1)
    starts = [e for e in beatless.client.events(run.run_id) if e.type == "StepStarted"]
    assert [(e.step, e.attempt) for e in starts] == [("hold", 1)]
    beatless.verify()


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
def connection(beatless: Kit) -> Iterator[psycopg.Connection]:
    with beatless.app.executors.connect() as found:
        yield found


@pytest.fixture
def keeper(beatless: Kit, board: Board) -> Iterator[Keeper]:
    app, stopping = beatless.app, threading.Event()
    found = Keeper(board, app.leases, app.executors.connect, stopping)
    yield found
    stopping.set()
    found.run()  # it is told before it begins: only its connection is closed


def claim(beatless: Kit, connection: psycopg.Connection) -> Lease:
    run = beatless.start_run("two_steps")
    lease = beatless.app.leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=1
    )
    assert lease is not None
    return lease


def left(connection: psycopg.Connection, beatless: Kit, lease: Lease) -> float:
    schema = beatless.app.settings.schema
    row = connection.execute(
        "SELECT extract(epoch FROM r.lease_expires_at - clock_timestamp())::float8,"
        f" r.lease_expires_at = d.due_at FROM {schema}.runs r JOIN {schema}.dispatches d"
        " USING (run_id) WHERE run_id = %s",
        [lease.run.run_id],
    ).fetchone()
    assert row[1]
    return row[0]


def note(board: Board, lease: Lease, *, ago: float, pid: int) -> None:
    noted = Noted(pid=pid, beat=monotonic() - ago, run_id=lease.run.run_id, tokens=lease.tokens)
    board.write(0, noted)


def test_what_no_heartbeat_has_made_sure_of_in_time_is_kept(
    beatless: Kit, board: Board, connection: psycopg.Connection, keeper: Keeper
) -> None:
    lease = claim(beatless, connection)
    beatless.advance(LEASE_S - 10)

    note(board, lease, ago=100, pid=os.getpid())
    assert keeper.once() == 0  # its heartbeat is in time
    note(board, lease, ago=160, pid=os.getpid())
    assert keeper.once() == 1

    assert left(connection, beatless, lease) > LEASE_S - 100
    board.clear(0)
    assert keeper.once() == 0


def test_a_lease_of_a_process_that_has_died_or_stands_still_runs_out(
    beatless: Kit, board: Board, connection: psycopg.Connection, keeper: Keeper
) -> None:
    lease = claim(beatless, connection)
    beatless.advance(LEASE_S - 10)
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), 19)  # SIGSTOP
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    note(board, lease, ago=160, pid=pid)

    assert not works(pid)
    assert keeper.once() == 0
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    assert keeper.once() == 0

    assert left(connection, beatless, lease) < 20


def test_a_lease_that_another_worker_has_taken_over_is_not_kept(
    beatless: Kit, board: Board, connection: psycopg.Connection, keeper: Keeper
) -> None:
    lease = claim(beatless, connection)
    note(board, lease, ago=160, pid=os.getpid())
    beatless.advance(LEASE_S + 10)
    other = beatless.app.leases.claim(
        connection,
        lease.run.run_id,
        plan="two_steps",
        worker="other",
        first_step="first",
        dispatch=2,
    )
    beatless.advance(200)

    assert keeper.once() == 0

    assert left(connection, beatless, other) < 120


def test_a_heartbeat_notes_what_it_holds(beatless: Kit, connection: psycopg.Connection) -> None:
    board = Board()
    heartbeat = Heartbeat(
        beatless.app.leases, beatless.app.executors.connect, board=board, slots=[3, 7]
    )
    leases = [claim(beatless, connection) for _ in range(3)]
    for lease in leases:
        heartbeat.hold(lease)  # the third finds no slot, and is as it was without a board
    assert {(n.run_id, *n.tokens) for n in board.read()} == {
        (lease.run.run_id, lease.token) for lease in leases[:2]
    }
    before = min(noted.beat for noted in board.read())

    heartbeat.once(connection)
    assert min(noted.beat for noted in board.read()) > before
    beatless.app.leases.renew_token(connection, leases[0])
    heartbeat.hold(leases[0])
    assert leases[0].token in {token for noted in board.read() for token in noted.tokens}

    for lease in leases:
        heartbeat.release(lease)
    assert list(board.read()) == []
    heartbeat.stop()


def test_a_slot_that_is_being_written_or_was_left_so_is_skipped() -> None:
    board = Board()
    noted = Noted(pid=1, beat=1.0, run_id="r" * 160, tokens=[1, 2])
    board.write(SLOTS - 1, noted)
    assert list(board.read()) == [noted]
    place = (SLOTS - 1) * 256
    board._memory[place] |= 1  # its writer was killed
    assert list(board.read()) == []
    board.write(SLOTS - 1, noted)
    assert list(board.read()) == [noted]
    board.mark(SLOTS - 1, uncalled=True, beside=True)
    assert list(board.read()) == [replace(noted, uncalled=True, beside=True)]
    board.mark(SLOTS - 1, uncalled=False, beside=False)
    board.mark(SLOTS - 2, uncalled=True, beside=False)  # a free one stays free
    board.write(0, Noted(pid=1, beat=1.0, run_id="r" * 300, tokens=[1]))
    assert list(board.read()) == [noted]
