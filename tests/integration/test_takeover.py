"""Runs of processes that have died go on at once: the leases here last longer than any test."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from beatless import Run, RunState
from beatless.client import RunRequest
from beatless.local.child import Child
from beatless.orchestrator.board import Board, Noted
from beatless.orchestrator.death_watch import DeathWatch
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.keeper import Keeper
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.observer import LeasesEnded
from beatless.orchestrator.progress import GIVEN_BACK, fold
from beatless.orchestrator.roster import Roster
from beatless.outbox.faults import SimulatedCrash
from beatless.testing import Kit
from tests.child_logs import await_line
from tests.integration.test_processes import await_death
from tests.valkeys import until

APP = "tests.plans:app"
LEASE_S = 600
POOLS = {"prefork": [], "threads": ["--", "--pool", "threads"], "solo": ["--", "--pool", "solo"]}


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """A lease that no run here outlives: only what notices a death gives its runs to others."""
    return {"lease_seconds": LEASE_S}


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A run whose step waits at a FIFO."""

    run: Run
    directory: Path

    def pids(self) -> list[int]:
        """The processes that its step was begun in."""
        path = self.directory / "pids"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    def begun(self, times: int) -> int:
        """The process of the latest attempt, once there were so many."""
        until(lambda: len(self.pids()) == times, 60)
        return self.pids()[-1]

    def go(self) -> None:
        """Let its step return."""
        (self.directory / "fifo").write_text("go")


@pytest.fixture
def wait(beatless: Kit, tmp_path: Path) -> Callable[[str], Waiting]:
    def begin(name: str) -> Waiting:
        directory = tmp_path / name
        directory.mkdir()
        os.mkfifo(directory / "fifo")
        paths = {"pids": str(directory / "pids"), "fifo": str(directory / "fifo")}
        return Waiting(run=beatless.start_run("at_a_fifo", paths), directory=directory)

    return begin


def ended(beatless: Kit, waiting: Waiting) -> Run:
    """The run, once its step was let go and it has completed."""
    waiting.go()
    return beatless.wait_for_run_completion(waiting.run.run_id)


def keeper_of(worker: Child) -> int:
    """The process beside a worker that leads a session of its own."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    (keeper,) = [int(pid) for pid in children if os.getsid(int(pid)) == int(pid)]
    return keeper


def test_the_run_of_a_child_that_dies_goes_on_at_once(
    beatless: Kit, wait: Callable[[str], Waiting]
) -> None:
    beatless.relay.start()
    worker = beatless.worker_process(APP)
    waiting = wait("run")

    os.kill(waiting.begun(1), signal.SIGKILL)
    assert waiting.begun(2) != waiting.pids()[0]

    run = ended(beatless, waiting)
    assert (run.result, run.attempt) == (waiting.pids()[1], 2)
    await_line(worker, "its lease is ended, the run goes on at once")
    beatless.verify()


@pytest.mark.long
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kill", [os.kill, os.killpg], ids=["main", "group"])
def test_the_run_of_a_worker_that_dies_goes_on_at_once_in_another(
    beatless: Kit, wait: Callable[[str], Waiting], pool: str, kill: Callable[[int, int], None]
) -> None:
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP, arguments=POOLS[pool])
    waiting = wait("run")
    waiting.begun(1)
    keeper = keeper_of(worker)

    kill(worker.pid, signal.SIGKILL)
    beatless.worker_process(APP, arguments=POOLS[pool])
    waiting.begun(2)

    run = ended(beatless, waiting)
    assert (run.result, run.attempt) == (waiting.pids()[1], 2)
    await_death(keeper)
    beatless.verify()


@pytest.mark.slow
def test_the_run_of_a_process_that_stands_still_is_left_to_its_lease(
    beatless: Kit, wait: Callable[[str], Waiting]
) -> None:
    beatless.relay.start()
    beatless.worker_process(APP, concurrency=2)
    frozen, killed = wait("frozen"), wait("killed")
    stopped = frozen.begun(1)
    os.kill(stopped, signal.SIGSTOP)

    os.kill(killed.begun(1), signal.SIGKILL)
    killed.begun(2)  # whoever took this one over saw the other at the same time
    assert ended(beatless, killed).attempt == 2
    assert beatless.client.get_run(frozen.run.run_id).attempt == 1

    beatless.advance(LEASE_S + 1)
    frozen.begun(2)
    assert ended(beatless, frozen).attempt == 2
    os.kill(stopped, signal.SIGCONT)
    beatless.verify()


@pytest.mark.long
def test_children_of_a_main_process_that_stands_still_keep_their_runs(
    beatless: Kit, wait: Callable[[str], Waiting]
) -> None:
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP, concurrency=2)
    living, killed = wait("living"), wait("killed")
    living.begun(1)
    killed.begun(1)
    os.kill(worker.pid, signal.SIGSTOP)
    beatless.worker_process(APP)

    os.kill(killed.begun(1), signal.SIGKILL)
    killed.begun(2)

    assert ended(beatless, killed).attempt == 2
    assert ended(beatless, living).attempt == 1
    os.kill(worker.pid, signal.SIGCONT)
    beatless.verify()


@pytest.mark.long
def test_a_worker_whose_keeper_dies_alone_keeps_its_runs_and_says_so(
    beatless: Kit, wait: Callable[[str], Waiting]
) -> None:
    beatless.relay_process(APP)
    worker = beatless.worker_process(APP)
    waiting = wait("run")
    waiting.begun(1)

    os.kill(keeper_of(worker), signal.SIGKILL)
    await_line(worker, "the process that keeps leases has ended")

    assert ended(beatless, waiting).attempt == 1
    beatless.verify()


# The watch itself, on a board that the test writes


class Watched:
    """A death watch in this process, over processes that the test forks."""

    def __init__(self, beatless: Kit) -> None:
        self.signals: list[Any] = []
        self.board, self.roster = Board(), Roster()
        self.roster.prepare()
        leases, connect = beatless.app.leases, beatless.app.executors.connect
        self.watch = DeathWatch(
            self.board,
            leases,
            connect,
            roster=self.roster,
            keeper=Keeper(self.board, leases, connect, None),  # type: ignore[arg-type]  # not run
            main=os.pidfd_open(os.getpid()),
            observer=self.signals.append,
        )

    def process(self) -> tuple[int, int]:
        """The pid and the life of a process that has announced itself."""
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(tell, str(self.roster.announce()).encode())
            signal.pause()
            os._exit(0)
        life = int(os.read(told, 64))
        os.close(told)
        os.close(tell)
        return pid, life

    def note(
        self,
        slot: int,
        lease: Lease,
        pid: int,
        life: int,
        *,
        uncalled: bool = False,
        beside: bool = False,
    ) -> None:
        self.board.write(
            slot,
            Noted(
                pid=pid,
                life=life,
                beat=0.0,
                run_id=lease.run.run_id,
                tokens=lease.tokens,
                uncalled=uncalled,
                beside=beside,
            ),
        )

    def ended(self) -> int:
        return sum(each.leases for each in self.signals if isinstance(each, LeasesEnded))


@pytest.fixture
def watched(beatless: Kit) -> Iterator[Watched]:
    found = Watched(beatless)
    yield found
    found.roster.end()


@pytest.fixture
def connection(beatless: Kit) -> Any:
    with beatless.app.executors.connect() as found:
        yield found


def claim(beatless: Kit, connection: psycopg.Connection[Any], number: int = 1) -> Lease:
    run = beatless.start_run("two_steps")
    lease = beatless.app.leases.claim(
        connection, run.run_id, plan="two_steps", worker="w", first_step="first", dispatch=number
    )
    assert lease is not None
    return lease


def due(beatless: Kit, connection: psycopg.Connection[Any], lease: Lease) -> bool:
    """Whether the lease has run out and the run is dispatched now."""
    schema = beatless.app.settings.schema
    row = connection.execute(
        "SELECT r.lease_expires_at <= clock_timestamp(), d.due_at <= clock_timestamp()"
        f" FROM {schema}.runs r JOIN {schema}.dispatches d USING (run_id) WHERE run_id = %s",
        [lease.run.run_id],
    ).fetchone()
    assert row is not None
    assert row[0] == row[1]
    return bool(row[0])


def die(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_process_with_the_pid_of_a_dead_one_keeps_its_leases(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    pid, life = watched.process()
    dead, successor = claim(beatless, connection), claim(beatless, connection)
    watched.note(0, dead, pid, life)
    watched.note(1, successor, pid, life + 1)
    watched.watch.once()  # it has announced itself

    die(pid)
    watched.watch.once()

    assert due(beatless, connection, dead)
    assert not due(beatless, connection, successor)
    assert watched.ended() == 1


def test_a_process_that_only_stands_still_keeps_its_leases(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    (frozen, frozen_life), (killed, killed_life) = watched.process(), watched.process()
    theirs, dead = claim(beatless, connection), claim(beatless, connection)
    watched.note(0, theirs, frozen, frozen_life)
    watched.note(1, dead, killed, killed_life)
    os.kill(frozen, signal.SIGSTOP)
    os.waitpid(frozen, os.WUNTRACED)

    die(killed)
    until(lambda: watched.watch.once() or watched.ended())

    assert due(beatless, connection, dead)
    assert not due(beatless, connection, theirs)
    die(frozen)


def test_a_lease_that_another_worker_has_is_not_ended_by_the_token_before(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    pid, life = watched.process()
    lease = claim(beatless, connection)
    watched.note(0, lease, pid, life)
    beatless.advance(LEASE_S + 1)
    other = beatless.app.leases.claim(
        connection,
        lease.run.run_id,
        plan="two_steps",
        worker="other",
        first_step="first",
        dispatch=2,
    )
    assert other is not None
    watched.watch.once()

    die(pid)
    watched.watch.once()

    assert not due(beatless, connection, other)
    assert watched.ended() == 0


def test_a_row_that_a_transaction_holds_is_not_waited_for_and_not_forgotten(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    pid, life = watched.process()
    held, free = claim(beatless, connection), claim(beatless, connection)
    watched.note(0, held, pid, life)
    watched.note(1, free, pid, life)
    watched.watch.once()
    with beatless.app.executors.connect() as holder, holder.transaction():
        holder.execute(
            f"SELECT FROM {beatless.app.settings.schema}.runs WHERE run_id = %s FOR UPDATE",
            [held.run.run_id],
        )
        die(pid)
        watched.watch.once()
        assert (due(beatless, connection, held), due(beatless, connection, free)) == (False, True)

    until(lambda: watched.watch.once() or watched.ended() == 2)

    assert due(beatless, connection, held)


def test_a_run_that_the_dead_process_had_settled_is_left_alone(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    pid, life = watched.process()
    lease = claim(beatless, connection)
    watched.note(0, lease, pid, life)
    connection.execute(
        f"UPDATE {beatless.app.settings.schema}.runs SET state = 'completed' WHERE run_id = %s",
        [lease.run.run_id],
    )
    watched.watch.once()

    die(pid)
    watched.watch.once()

    assert not due(beatless, connection, lease)
    assert watched.ended() == 0


def test_only_the_runs_whose_bodies_were_called_count_a_crash(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    """The others waited for their turn in a group: the process has not died of them."""
    pid, life = watched.process()
    called, uncalled = claim(beatless, connection), claim(beatless, connection)
    watched.note(0, called, pid, life)
    watched.note(1, uncalled, pid, life, uncalled=True)
    watched.watch.once()

    die(pid)
    watched.watch.once()
    assert watched.ended() == 2
    beatless.work_until_idle()

    def starts(lease: Lease) -> list[int | None]:
        events = beatless.client.events(lease.run.run_id)
        return [event.attempt for event in events if event.type == "StepStarted"]

    assert starts(called) == [1, 2, 1]
    assert starts(uncalled) == [1, 1, 1]
    beatless.verify()


def test_a_body_is_a_suspect_if_it_was_beside_others_and_not_if_it_waited_for_its_turn(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    pid, life = watched.process()
    ran, waited = claim(beatless, connection), claim(beatless, connection)
    watched.note(0, ran, pid, life, uncalled=True, beside=True)
    watched.note(1, waited, pid, life, uncalled=True)
    watched.watch.once()

    die(pid)
    watched.watch.once()

    def deaths(lease: Lease) -> int:
        return fold(
            beatless.app.plans["two_steps"], beatless.client.events(lease.run.run_id)
        ).deaths

    assert (deaths(ran), deaths(waited)) == (1, 0)


def given_back(beatless: Kit, run_id: str) -> int:
    """How often attempts were given back, of a run of which each was begun as the first."""
    beatless.work_until_idle()
    events = beatless.client.events(run_id)
    assert {event.attempt for event in events if event.type == "StepStarted"} == {1}
    beatless.verify()
    return sum((event.data or {}).get("name") == GIVEN_BACK for event in events)


def end(beatless: Kit, connection: psycopg.Connection[Any], lease: Lease) -> dict[int, bool]:
    """End the lease of a process that has died before it called the body."""
    held = [(lease.run.run_id, lease.token)]
    return beatless.app.leases.end(connection, held, uncalled={lease.token})


def test_an_attempt_is_given_back_once_though_the_next_claim_dies_before_it_begins_one(
    beatless: Kit, connection: psycopg.Connection[Any]
) -> None:
    lease = claim(beatless, connection)
    for dispatch in 2, 3:
        assert end(beatless, connection, lease) == {lease.token: True}
        again = beatless.app.leases.claim(
            connection,
            lease.run.run_id,
            plan="two_steps",
            worker="w",
            first_step=None,
            dispatch=dispatch,
        )
        assert again is not None
        assert not again.ran_out
        lease = again
    assert end(beatless, connection, lease) == {lease.token: True}

    assert given_back(beatless, lease.run.run_id) == 1


def test_a_process_that_keeps_its_lease_is_not_dead_when_the_lease_runs_out_later(
    beatless: Kit, connection: psycopg.Connection[Any]
) -> None:
    """It was taken for dead once."""
    lease = claim(beatless, connection)
    beatless.app.leases.note_death(connection, "w")
    assert beatless.app.leases.extend(connection, [lease]) == []  # kept
    beatless.advance(beatless.app.settings.lease_seconds + 1)

    again = beatless.app.leases.claim(
        connection, lease.run.run_id, plan="two_steps", worker="v", first_step=None, dispatch=2
    )

    assert again is not None
    assert again.ran_out


def test_a_process_that_lives_writes_nothing_of_an_attempt_that_was_given_back_for_it(
    beatless: Kit, connection: psycopg.Connection[Any]
) -> None:
    """It was taken for dead: it would give it back too, and keep the lease for the next one to."""
    lease = claim(beatless, connection)
    assert end(beatless, connection, lease) == {lease.token: True}

    assert beatless.app.leases.extend(connection, [lease]) == [lease]
    assert not beatless.app.leases.inspect(connection, lease, after=2).committed_since
    journal = beatless.app.journal
    trace = journal.new_event(
        EventType.DEBUG_TRACE, step="first", attempt=1, where="here", data={"name": GIVEN_BACK}
    )
    assert journal.append(connection, lease.run.run_id, lease.token, [trace]) is None
    assert end(beatless, connection, lease) == {}

    assert given_back(beatless, lease.run.run_id) == 1


@pytest.mark.parametrize("meanwhile", ["ended", "gone on"])
def test_a_lease_under_which_somebody_has_written_meanwhile_is_left_for_the_next_try(
    beatless: Kit,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    meanwhile: str,
) -> None:
    """By the other one of two who notice the death, or by what the dead process had sent."""
    lease = claim(beatless, connection)
    leases, run_id = beatless.app.leases, lease.run.run_id
    seen = "WHERE r.lease_expires_at > clock_timestamp()\n)"
    assert seen in leases.sql["end"]
    gate = seen.replace("\n", "\n AND pg_advisory_xact_lock_shared(4712)::text IS NOT NULL\n")
    gated = leases.sql | {"end": leases.sql["end"].replace(seen, gate)}
    with (
        ThreadPoolExecutor(1) as beside,
        beatless.app.executors.connect() as late,
        beatless.app.executors.connect() as holder,
    ):
        with holder.transaction(), monkeypatch.context() as patched:
            holder.execute("SELECT pg_advisory_xact_lock(4712)")
            patched.setattr(leases, "sql", gated)
            found = beside.submit(end, beatless, late, lease)
            waits = "SELECT 1 FROM pg_locks WHERE pid = %s AND objid = 4712 AND NOT granted"
            until(lambda: connection.execute(waits, [late.info.backend_pid]).fetchone())
            patched.undo()
            if meanwhile == "ended":
                assert end(beatless, connection, lease) == {lease.token: True}
            else:
                finished = NewEvent(
                    type=EventType.STEP_FINISHED, step="first", attempt=1, data='{"result": null}'
                )
                started = NewEvent(type=EventType.STEP_STARTED, step="second", attempt=1)
                events = [finished, started]
                assert beatless.app.journal.append(connection, run_id, lease.token, events)
        assert found.result(60) == {lease.token: False}

    again = end(beatless, connection, lease)
    assert again == ({} if meanwhile == "ended" else {lease.token: True})
    assert given_back(beatless, run_id) == 1


@pytest.mark.long
def test_a_run_that_ends_its_process_costs_its_neighbours_nothing(
    beatless: Kit, tmp_path: Path, postgres: psycopg.Connection
) -> None:
    """In groups of sixteen; those that had returned before it were not committed, and count.

    The first 64 are in the broker, and each brings others of those that wait.
    """
    postgres.execute("CREATE TABLE effects (key text)")
    ledger = tmp_path / "ledger"
    input = {"ledger": str(ledger), "table": f"{beatless.app.settings.schema}.effects"}
    worker = beatless.worker_process("tests.grouped:app")
    beatless.relay_process("tests.grouped:app")
    first = beatless.start_run("six", input)  # from which the worker learns how short it is
    assert beatless.wait_for_run_completion(first.run_id).attempt == 1
    inputs = [input | ({"kill_in": "s2"} if n == 70 else {}) for n in range(96)]
    runs = beatless.client.start_runs([RunRequest(plan="six", input=each) for each in inputs])

    ended = [beatless.wait_for_run_completion(run.run_id) for run in runs]
    assert {(run.state, run.result) for run in ended} == {(RunState.COMPLETED, 6)}
    assert sum(run.attempt == 2 for run in ended) > 8  # they were in one group
    crashed = {
        run.run_id
        for run in runs
        if any(event.attempt == 2 for event in beatless.client.events(run.run_id))
    }
    called = {
        run_id
        for run_id, step, attempt in map(json.loads, ledger.read_text().splitlines())
        if (step, attempt) == ("s2", 2)
    }
    assert runs[70].run_id in crashed
    assert crashed == called
    assert len(crashed) < 16
    keys = postgres.execute("SELECT count(*), count(DISTINCT key) FROM effects").fetchone()
    assert keys == (97, 97)
    postgres.execute("DROP TABLE effects")
    assert worker.alive
    beatless.verify()


def test_only_a_lease_whose_holder_is_not_known_to_be_dead_is_taken_as_one_that_ran_out(
    beatless: Kit, watched: Watched, connection: psycopg.Connection[Any]
) -> None:
    first = claim(beatless, connection)
    assert not first.ran_out

    def again() -> Lease:
        beatless.advance(LEASE_S + 1)
        lease = beatless.app.leases.claim(
            connection,
            first.run.run_id,
            plan="two_steps",
            worker="w",
            first_step="first",
            dispatch=1,
        )
        assert lease is not None
        return lease

    second = again()
    assert second.ran_out
    pid, life = watched.process()
    watched.note(0, second, pid, life)
    watched.watch.once()
    die(pid)
    watched.watch.once()
    assert watched.ended() == 1

    assert not again().ran_out
    assert again().ran_out  # what is known of one holder says nothing of the next


def test_a_frozen_worker_costs_its_run_no_attempt_and_a_dead_one_does(beatless: Kit) -> None:
    run_id = beatless.start_run("two_steps").run_id
    for _ in range(6):
        beatless.app.faults.arm("step.before", action="raise")
        with pytest.raises(SimulatedCrash):  # it says nothing more, and nobody saw it die
            beatless.work_once()
        beatless.advance(LEASE_S + 1)
    with beatless.crash(at="step.before"):
        beatless.work_once()
    beatless.advance(LEASE_S + 1)
    beatless.work_until_idle()

    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    first = [e for e in beatless.client.events(run_id) if e.step == "first"]
    started = [event.attempt for event in first if event.type == "StepStarted"]
    assert started == [1] * 7 + [2]
    told = [moment.text for moment in beatless.client.explain(run_id)]
    assert sum("its lease ran out" in text for text in told) == 6
    beatless.verify()
