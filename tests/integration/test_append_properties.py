"""The journal under random concurrency: whoever writes when, it stays what it promises to be."""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beatless import App
from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.events import EventType
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from beatless.outbox.message import shard_of
from beatless.testing import Kit

WRITERS = 4

acts = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 7)),
    st.tuples(st.just("append if free"), st.integers(1, 7)),
    st.tuples(st.just("settle"), st.integers(0, 3)),
    st.tuples(st.just("stale append"), st.integers(1, 3)),
    st.tuples(st.just("stale append if free"), st.integers(1, 3)),
    st.tuples(st.just("take over"), st.just(0)),
    st.tuples(st.just("extend"), st.just(0)),
    st.tuples(st.just("cancel"), st.just(0)),
    st.tuples(st.just("finish"), st.just(0)),
)
scripts = st.lists(st.lists(acts, max_size=8), min_size=2, max_size=WRITERS)


@dataclass(slots=True)
class Writer:
    """One thread with its session, its idea of the token, and what it was told."""

    app: App
    connection: psycopg.Connection
    run_id: str
    number: int
    token: int
    stored: list[tuple[int, int, int, bool]] = field(default_factory=list)
    """(first seq, last seq, token, cancelled) of each write that was acknowledged."""
    refused: list[str] = field(default_factory=list)
    """The marks of writes that found their lease gone, or their row held."""

    def play(self, script: Sequence[tuple[str, int]], begin: threading.Barrier) -> None:
        begin.wait(60)
        for place, (act, count) in enumerate(script):
            mark = f"{self.number}.{place}"
            match act:
                case "append" | "append if free":
                    self.write(mark, self.token, count, if_free="free" in act)
                case "stale append" | "stale append if free":
                    self.write(mark, self.token - 1, count, if_free="free" in act)
                case "settle" | "finish":
                    self.settle(mark, count, finish=act == "finish")
                case "take over":
                    self.take_over()
                case "extend":
                    self.extend()
                case "cancel":
                    cancels = Cancels(self.app.journal.schema, max_event_bytes=1000)
                    cancels.cancel(
                        self.connection, [self.run_id], reason=None, undo={}, source="api"
                    )

    def events(self, mark: str, token: int, count: int) -> list:
        return [
            self.app.journal.new_event(
                EventType.DEBUG_TRACE, where="here", data={"mark": mark, "token": token, "n": n}
            )
            for n in range(count)
        ]

    def write(self, mark: str, token: int, count: int, *, if_free: bool) -> None:
        events = self.events(mark, token, count)
        told = self.app.journal.append(self.connection, self.run_id, token, events, if_free=if_free)
        if told is None:
            self.refused.append(mark)
        else:
            first = told.last_seq - count + 1
            self.stored.append((first, told.last_seq, token, told.cancelled))

    def settle(self, mark: str, count: int, *, finish: bool) -> None:
        events = self.events(mark, self.token, count)
        if finish:
            end = {"outcome": "completed"}
            events.append(
                self.app.journal.new_event(EventType.RUN_FINISHED, where="here", data=end)
            )
        state = RunState.COMPLETED if finish else RunState.RUNNING
        settlement = Settlement.ignoring_cancel(Boundary(events=events, state=state))
        told = self.app.journal.settle(self.connection, self.run_id, self.token, settlement)
        if told is None:
            self.refused.append(mark)
        elif events:
            first = told.last_seq - len(events) + 1
            self.stored.append((first, told.last_seq, self.token, told.cancelled))

    def take_over(self) -> None:
        """Claim it, as another worker does after the lease has run out."""
        self.connection.execute(
            f"UPDATE {self.app.settings.schema}.runs SET lease_expires_at = now() - interval '1 s'"
            " WHERE run_id = %s AND state = 'running'",
            (self.run_id,),
        )
        lease = self.app.leases.claim(
            self.connection,
            self.run_id,
            plan="two_steps",
            worker=str(self.number),
            first_step="a",
            dispatch=1,
        )
        if lease is not None:
            self.token = lease.token

    def extend(self) -> None:
        self.connection.execute(
            f"UPDATE {self.app.settings.schema}.runs SET lease_expires_at = now() + interval '1 h'"
            " WHERE run_id = %s AND lease_token = %s AND state = 'running'",
            (self.run_id, self.token),
        )


Check = Callable[[list], None]


@pytest.fixture
def check(beatless: Kit, beatless_app: App, postgres: psycopg.Connection) -> Iterator[Check]:
    """Plays the writers' scripts at once on a new run, and holds the journal to its promises."""
    numbers = itertools.count()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(WRITERS))
        sessions = [stack.enter_context(beatless_app.executors.connect()) for _ in range(WRITERS)]

        def play(scripts: list) -> None:
            run_id = beatless.start_run("two_steps", run_id=f"p{next(numbers)}").run_id
            lease = beatless_app.leases.claim(
                sessions[0],
                run_id,
                plan="two_steps",
                worker="first",
                first_step="first",
                dispatch=1,
            )
            begin = threading.Barrier(len(scripts))
            writers = [
                Writer(beatless_app, session, run_id, number, lease.token)
                for number, (session, _) in enumerate(zip(sessions, scripts, strict=False))
            ]
            done = [
                threads.submit(writer.play, script, begin)
                for writer, script in zip(writers, scripts, strict=True)
            ]
            for each in done:
                each.result(60)
            judge(postgres, run_id, writers)

        yield play


def judge(postgres: psycopg.Connection, run_id: str, writers: list[Writer]) -> None:
    last, state = postgres.execute(
        "SELECT last_seq, state FROM runs WHERE run_id = %s", (run_id,)
    ).fetchone()
    events = postgres.execute(
        "SELECT seq, type, data FROM run_events WHERE run_id = %s ORDER BY seq", (run_id,)
    ).fetchall()
    outbox = postgres.execute(
        "SELECT from_seq, to_seq FROM run_outbox WHERE shard = %s AND run_id = %s ORDER BY id",
        (shard_of(run_id), run_id),
    ).fetchall()

    # Dense, and the run knows its head.
    assert [seq for seq, _, _ in events] == list(range(1, last + 1))
    # One outbox row for each write, in their order, and together they are the journal.
    assert [first for first, _ in outbox] == [1, *(last + 1 for _, last in outbox[:-1])]
    assert outbox[-1][1] == last
    stored = sorted(write for writer in writers for write in writer.stored)
    assert {(first, last) for first, last, _, _ in stored} <= set(outbox)
    others = [row for row in outbox if row not in {(write[0], write[1]) for write in stored}]
    kinds = [events[first - 1][1] for first, _ in others]
    assert set(kinds) <= {"RunStarted", "StepStarted", "CancelRequested"}
    assert len(kinds) == len(set(kinds))
    # Whoever was told that it had written has; whoever was told that it had not, has not.
    marked = {seq: data for seq, _, data in events if data and "mark" in data}
    for first, upto, token, _ in stored:
        mine = [marked[seq] for seq in range(first, upto + 1) if seq in marked]
        assert [data["n"] for data in mine] == list(range(len(mine)))
        assert {data["token"] for data in mine} <= {token}
    assert {data["mark"] for data in marked.values()}.isdisjoint(
        mark for writer in writers for mark in writer.refused
    )
    # Once a token was taken over, nothing was written with the one before.
    owners = [token for token, _ in itertools.groupby(token for _, _, token, _ in stored)]
    assert len(owners) == len(set(owners))
    # Who writes after a cancel is told of it, and nobody before it.
    cancels = [seq for seq, type, _ in events if type == "CancelRequested"]
    for first, _, _, cancelled in stored:
        assert cancelled == bool(cancels and cancels[0] < first)
    # The end is the end.
    ends = [seq for seq, type, _ in events if type == "RunFinished"]
    assert ends == ([last] if state == "completed" else [])


@pytest.mark.slow
def test_the_journal_keeps_its_promises_whoever_writes_when(check: Check) -> None:
    @settings(max_examples=40)
    @given(scripts)
    def property(found: list) -> None:
        check(found)

    property()


@pytest.mark.long
def test_the_journal_keeps_its_promises_in_many_more_cases(check: Check) -> None:
    @settings(max_examples=600)
    @given(scripts)
    def property(found: list) -> None:
        check(found)

    property()
