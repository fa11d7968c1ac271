"""What steps emit: many small pieces, in few events of the journal, in order, each once."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psycopg
import pytest
from psycopg import sql

from beatless import (
    AsyncStepContext,
    BadPayload,
    LeaseLost,
    Plan,
    RunState,
    StepContext,
    StepEnded,
    retry,
    step,
)
from beatless.orchestrator.events import Event
from beatless.orchestrator.step_output import EVENT_PIECES, MOST_PIECES
from beatless.outbox.clock import monotonic
from beatless.redaction import Redaction
from beatless.testing import Kit

THREADS, EACH = 6, 300
LIMIT_BYTES = 4000


@pytest.fixture
def beatless_settings() -> dict[str, Any]:
    return {"max_event_bytes": LIMIT_BYTES}


@pytest.fixture
def during() -> list[Callable[[StepContext], Any]]:
    """The test puts in what the body of `asked` shall do."""
    return []


@pytest.fixture
def beatless_plans(during: list[Callable[[StepContext], Any]]) -> list[Plan]:
    @step(retry=retry(max_attempts=2, initial=0))
    def asked(ctx: StepContext) -> Any:
        return during[0](ctx)

    @step(transactional=True)
    def stores(ctx: StepContext) -> Any:
        return during[0](ctx)

    @step
    async def awaits(ctx: AsyncStepContext) -> Any:
        return await during[0](ctx)

    return [Plan(each.name, [each]) for each in (asked, stores, awaits)]


def outputs(beatless: Kit, run_id: str) -> list[Event]:
    return [event for event in beatless.client.events(run_id) if event.type == "StepOutput"]


def pieces(events: list[Event]) -> list[Any]:
    return [piece for event in events for piece in event.data["pieces"]]


def check_dense(events: list[Event]) -> None:
    """Of one attempt: each event begins where the one before has ended."""
    assert not events or events[0].data["first"] == 0
    for before, after in pairwise(events):
        assert after.data["first"] == before.data["first"] + len(before.data["pieces"])


def emitting(*pieces: Any) -> Callable[[StepContext], None]:
    """A body that emits these."""

    def body(ctx: StepContext) -> None:
        for piece in pieces:
            ctx.emit(piece)

    return body


def finish(beatless: Kit, plan: str = "asked") -> str:
    run = beatless.start_run(plan)
    beatless.work_until_idle()
    beatless.verify()
    return run.run_id


@contextmanager
def row_held(beatless: Kit, run_id: str) -> Iterator[psycopg.Connection]:
    """Another transaction has the run's row in this block."""
    schema = sql.Identifier(beatless.app.settings.schema)
    query = sql.SQL("SELECT FROM {}.runs WHERE run_id = %s FOR UPDATE").format(schema)
    with beatless.app.executors.connect() as holder, holder.transaction():
        holder.execute(query, (run_id,))
        yield holder


def test_pieces_share_events_and_stay_before_what_the_step_writes_later(
    beatless: Kit, during: list[Any]
) -> None:
    def body(ctx: StepContext) -> None:
        with row_held(beatless, ctx.run_id):  # nobody writes them before all are there
            for number in range(200):
                ctx.emit(f"{number} ")
        ctx.trace("between")
        ctx.emit({"tool": "ls", "argv": ["-l", None, 1.5]})
        ctx.emit('quotes " and \\ and \n, é 🙂')

    during.append(body)
    run_id = finish(beatless)

    told = beatless.client.events(run_id)
    found = outputs(beatless, run_id)
    check_dense(found)
    assert pieces(found) == [
        *(f"{number} " for number in range(200)),
        {"tool": "ls", "argv": ["-l", None, 1.5]},
        'quotes " and \\ and \n, é 🙂',
    ]
    assert {(event.step, event.attempt, event.source) for event in found} == {
        ("asked", 1, "worker")
    }
    assert all(len(event.data["pieces"]) <= EVENT_PIECES for event in found)
    assert len(found) < 20
    places = {event.type: event.seq for event in told}  # of the last of each type
    (trace,) = [event.seq for event in told if event.type == "DebugTrace"]
    before = [event.seq for event in found if event.data["first"] < 200]
    assert max(before) < trace < places["StepOutput"] < places["StepFinished"]


def test_a_piece_is_stored_while_the_body_computes_on(beatless: Kit, during: list[Any]) -> None:
    def body(ctx: StepContext) -> list[Any]:
        ctx.emit("early")
        return beatless.wait_for_event(ctx.run_id, "StepOutput").data["pieces"]

    during.append(body)
    run_id = finish(beatless)
    assert beatless.client.get_run(run_id).result == ["early"]


def test_what_a_failed_attempt_has_emitted_stays_and_the_next_begins_anew(
    beatless: Kit, during: list[Any]
) -> None:
    def body(ctx: StepContext) -> None:
        for number in range(3):
            ctx.emit(number)
        if ctx.attempt == 1:
            raise ValueError("the model hung up")

    during.append(body)
    run_id = finish(beatless)
    found = outputs(beatless, run_id)
    for attempt in (1, 2):
        mine = [event for event in found if event.attempt == attempt]
        check_dense(mine)
        assert pieces(mine) == [0, 1, 2]
    types = [event.type for event in beatless.client.events(run_id)]
    assert types.index("StepOutput") < types.index("StepFailed")


def test_what_a_killed_attempt_has_emitted_stays(beatless: Kit, during: list[Any]) -> None:
    during.append(lambda ctx: [ctx.emit(f"{ctx.attempt}/{number}") for number in range(100)])
    run = beatless.start_run("asked")
    with beatless.crash(at="step.effect_done"):
        beatless.work_once()
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    found = pieces(outputs(beatless, run.run_id))
    assert found == [f"{attempt}/{number}" for attempt in (1, 2) for number in range(100)]
    beatless.verify()


def test_output_of_a_transactional_step_outlives_its_transaction(
    beatless: Kit, during: list[Any]
) -> None:
    def body(ctx: StepContext) -> None:
        ctx.emit("said")
        ctx.connection.exec_driver_sql("SELECT 1 / 0")

    during.append(body)
    run_id = finish(beatless, "stores")
    assert pieces(outputs(beatless, run_id)) == ["said"]
    assert beatless.client.get_run(run_id).state is RunState.FAILED


def test_an_event_is_no_larger_than_the_limit(beatless: Kit, during: list[Any]) -> None:
    texts = ["é" * 900, "b" * 1800, *("c" * 500 for _ in range(9))]
    during.append(emitting(*texts))
    found = outputs(beatless, finish(beatless))
    check_dense(found)
    assert pieces(found) == texts
    sizes = [len(str(event.data).encode()) for event in found]
    assert max(sizes) <= LIMIT_BYTES


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("x" * LIMIT_BYTES, "the limit is 3936"),
        ("nul \0", "NUL"),
        ("half \ud800", "surrogate"),
        ({"at": float("nan")}, "not JSON"),
        (b"bytes", "bytes, which is not JSON"),
    ],
)
def test_a_piece_that_cannot_be_stored_is_refused_and_the_step_may_go_on(
    beatless: Kit, during: list[Any], piece: Any, reason: str
) -> None:
    def body(ctx: StepContext) -> str:
        ctx.emit("before")
        with pytest.raises(BadPayload, match="step asked: a piece of output") as refused:
            ctx.emit(piece)
        ctx.emit("after")
        return str(refused.value)

    during.append(body)
    run_id = finish(beatless)
    assert reason in beatless.client.get_run(run_id).result
    assert pieces(outputs(beatless, run_id)) == ["before", "after"]


def test_threads_of_one_step_emit_at_once_while_connections_die(
    beatless: Kit, during: list[Any], postgres: psycopg.Connection
) -> None:
    executor = beatless.executor()

    def emits(ctx: StepContext, number: int) -> None:
        for mark in range(EACH):
            ctx.emit([number, mark])
            if mark % 100 == 50:
                connection = executor.connections.current
                if connection is not None and not connection.closed:
                    backend = connection.info.backend_pid
                    postgres.execute("SELECT pg_terminate_backend(%s)", (backend,))
                ctx.trace("cut", number=number)

    def body(ctx: StepContext) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda number: emits(ctx, number), range(THREADS)))

    during.append(body)
    run_id = finish(beatless)
    found = outputs(beatless, run_id)
    check_dense(found)
    said = pieces(found)
    assert len(said) == THREADS * EACH
    for number in range(THREADS):  # each thread's own in its order, each once
        assert [mark for mine, mark in said if mine == number] == list(range(EACH))
    assert beatless.client.get_run(run_id).attempt == 1


def test_a_commit_whose_answer_was_lost_is_not_repeated(
    beatless: Kit, during: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write has happened, and another one of the step before it that is in doubt as well."""
    journal = beatless.app.journal
    append, lost = journal.append, []

    def append_and_lose(connection: Any, *arguments: Any, **options: Any) -> Any:
        appended = append(connection, *arguments, **options)
        if len(lost) < 2:
            lost.append(arguments)
            raise psycopg.OperationalError("the answer is lost")
        return appended

    monkeypatch.setattr(journal, "append", append_and_lose)

    def body(ctx: StepContext) -> None:
        ctx.emit("one")
        ctx.trace("two")
        ctx.emit("three")

    during.append(body)
    run_id = finish(beatless)
    assert len(lost) == 2
    assert pieces(outputs(beatless, run_id)) == ["one", "three"]
    types = [event.type for event in beatless.client.events(run_id)]
    assert types[2:5] == ["StepOutput", "DebugTrace", "StepOutput"]


def test_a_step_that_emits_faster_than_postgres_stores_waits(
    beatless: Kit, during: list[Any]
) -> None:
    """Its run's row is held: no more than so many pieces are in memory, and none is lost."""
    emitted = [0]

    def body(ctx: StepContext) -> None:
        ctx.emit("first")
        beatless.wait_for_event(ctx.run_id, "StepOutput")
        with row_held(beatless, ctx.run_id) as holder:
            thread = threading.Thread(target=floods, args=(ctx,))
            thread.start()
            deadline = monotonic() + 60
            while emitted[0] < MOST_PIECES - 1:
                assert monotonic() < deadline
            for _ in range(50):  # round trips, in which a thread that could would go on
                holder.execute("SELECT 1")
            held = emitted[0]
        thread.join(60)
        assert held <= 2 * MOST_PIECES

    def floods(ctx: StepContext) -> None:
        for number in range(4 * MOST_PIECES):
            ctx.emit(number)
            emitted[0] += 1

    during.append(body)
    run_id = finish(beatless)
    found = outputs(beatless, run_id)
    check_dense(found)
    assert pieces(found) == ["first", *range(4 * MOST_PIECES)]


def test_a_thread_that_outlives_its_step_cannot_emit(beatless: Kit, during: list[Any]) -> None:
    kept: list[StepContext] = []

    def body(ctx: StepContext) -> None:
        kept.append(ctx)
        ctx.emit("in time")

    during.append(body)
    run_id = finish(beatless)
    with pytest.raises(StepEnded):
        kept[0].emit("late")
    assert pieces(outputs(beatless, run_id)) == ["in time"]


def test_an_attempt_whose_run_was_taken_over_stores_no_more(
    beatless: Kit, during: list[Any]
) -> None:
    said: list[str] = []

    def body(ctx: StepContext) -> str:
        if len(said) == 0:
            said.append("frozen")
            ctx.emit("of the first")
            beatless.wait_for_event(ctx.run_id, "StepOutput")
            beatless.advance(beatless.app.settings.lease_seconds)
            other = beatless.app.executors.new()
            beatless.drain_outbox_once()
            assert other.execute(beatless.app.plans["asked"], ctx.run_id, 0)
            other.disconnect()
            ctx.emit("of the zombie")
            with pytest.raises(LeaseLost):
                ctx.trace("zombie")
            with pytest.raises(LeaseLost):
                ctx.emit("again")
            return "zombie"
        ctx.emit("of the second")
        return "second"

    during.append(body)
    run = beatless.start_run("asked")
    beatless.work_once()
    assert beatless.client.get_run(run.run_id).result == "second"
    assert pieces(outputs(beatless, run.run_id)) == ["of the first", "of the second"]
    beatless.verify()


@pytest.mark.parametrize("awaited", [True, False])
def test_an_async_step_emits_without_blocking_its_loop(
    beatless: Kit, during: list[Any], awaited: bool
) -> None:
    """Its run's row is held, so nothing can be written: an emit that waited would stay inside."""

    async def body(ctx: AsyncStepContext) -> int:
        await ctx.trace("first")
        written = []
        with beatless.app.executors.connect() as holder, holder.transaction():
            schema = sql.Identifier(beatless.app.settings.schema)
            query = sql.SQL("SELECT FROM {}.runs WHERE run_id = %s FOR UPDATE").format(schema)
            holder.execute(query, (ctx.run_id,))
            written += [ctx.emit(number) for number in range(2 * MOST_PIECES)]
        if awaited:
            for each in written:
                await each
        return len(written)

    during.append(body)
    run_id = finish(beatless, "awaits")
    assert beatless.client.get_run(run_id).result == 2 * MOST_PIECES
    found = outputs(beatless, run_id)
    check_dense(found)
    assert pieces(found) == list(range(2 * MOST_PIECES))


def test_output_is_streamed_as_every_event_is(beatless: Kit, during: list[Any]) -> None:
    during.append(emitting(*range(300)))
    run_id = finish(beatless)
    beatless.wait_for_outbox_flush(run_id)
    for from_seq in (0, 3, 5):
        told = beatless.collect_stream(run_id, from_seq=from_seq)
        assert [event.seq for event in told] == list(range(from_seq + 1, told[-1].seq + 1))
        assert told == beatless.client.events(run_id, from_seq=from_seq)


def test_redaction_sees_the_pieces(beatless: Kit, during: list[Any]) -> None:
    during.append(emitting("secret", "plain"))
    (event,) = outputs(beatless, finish(beatless))
    redaction = Redaction(
        lambda kind, value: [v.replace("secret", "*") for v in value] if kind == "output" else value
    )
    assert redaction.event(event).data == {"first": 0, "pieces": ["*", "plain"]}
    assert Redaction(lambda kind, value: "gone").event(event).data["pieces"] == ["gone"]
