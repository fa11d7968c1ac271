"""Threads of ours go on after anything, and it is counted."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from beatless.observe.counters import RelayCounters, StreamCounters, WorkerCounters
from beatless.orchestrator.board import Board
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.keeper import Keeper
from beatless.orchestrator.lease import Lease, Leases
from beatless.orchestrator.watchdog import Attempt, Watchdog
from beatless.outbox import threads
from beatless.outbox.async_publisher import AsyncTaskPublisher, Batch
from beatless.outbox.chores import Chores
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import RelayFailed, RelayStarted, ThreadFailed
from beatless.outbox.queries import Queries
from beatless.outbox.threads import LastingThread, submitted


class Untold(Exception):
    """Who asks what it says gets another error."""

    def __str__(self) -> str:
        raise ValueError("cannot be told")


ERRORS = [ValueError("unforeseen"), SystemExit(3), Untold(), MemoryError()]


@pytest.fixture(params=ERRORS, ids=lambda error: type(error).__name__)
def error(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BaseException:
    monkeypatch.setattr(threads, "RESTART_S", 0.01)
    monkeypatch.setattr("beatless.orchestrator.heartbeat.RETRY_INTERVAL_S", 0.01)
    monkeypatch.setattr("beatless.orchestrator.watchdog.RETRY_INTERVAL_S", 0.01)
    return request.param


@pytest.fixture
def counts() -> WorkerCounters:
    return WorkerCounters([])


def counted(counts: Any, thread: str) -> tuple[float, float]:
    """Its failures, and whether it fails now."""
    read = counts.counts.read()
    return tuple(
        read[name, (thread,)][0]
        for name in ("beatless_thread_failures_total", "beatless_threads_failing")
    )


class Fails:
    """Raises the first three times that it is called."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.calls = 0
        self.after = threading.Event()

    def __call__(self, *_arguments: Any) -> None:
        self.calls += 1
        if self.calls <= 3:
            raise self.error
        self.after.set()


class Connection:
    closed = False

    def close(self) -> None:
        self.closed = True


def lease() -> Lease:
    return Lease(run=None, token=1)  # type: ignore[arg-type]  # never looked at


def test_a_thread_begins_again_after_anything(
    error: BaseException, counts: WorkerCounters, caplog: pytest.LogCaptureFixture
) -> None:
    work = Fails(error)
    thread = LastingThread("grace", work, observer=counts)
    with caplog.at_level(logging.CRITICAL):
        thread.start()
        assert work.after.wait(60)
    thread.end()
    assert counted(counts, "grace") == (3, 1)
    assert counts.failing() == ["grace"]
    assert len([record for record in caplog.records if record.exc_info]) == 3
    thread.works()
    assert counted(counts, "grace") == (3, 0)
    assert counts.failing() == []


def test_a_thread_that_is_told_to_end_ends_between_two_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "RESTART_S", 3600.0)
    failed = threading.Event()

    def fails(_thread: LastingThread) -> None:
        failed.set()
        raise ValueError

    thread = LastingThread("x", fails)
    thread.start()
    assert failed.wait(60)
    thread.end(60)
    assert not thread.is_alive()


def test_a_heartbeat_beats_after_anything(error: BaseException, counts: WorkerCounters) -> None:
    work = Fails(error)

    class Extended(Leases):
        def extend(self, connection: Any, leases: Sequence[Lease]) -> list[Lease]:
            work()
            return []

    heartbeat = Heartbeat(Extended("s", seconds=0.03), Connection, observer=counts)  # type: ignore[arg-type]
    heartbeat.hold(lease())
    assert work.after.wait(60)
    heartbeat.stop()
    assert counted(counts, "heartbeat")[0] >= 3


def test_a_watchdog_watches_after_anything(error: BaseException, counts: WorkerCounters) -> None:
    work, settled = Fails(error), threading.Event()

    def settle(_connection: Any, _reason: Exception) -> bool:
        work()
        settled.set()
        return True

    held = lease()
    held.run = type("Run", (), {"run_id": "r"})  # type: ignore[assignment]
    watchdog = Watchdog(
        Leases("s", seconds=3),
        Connection,
        own_process=False,
        observer=counts,  # type: ignore[arg-type]
    )
    attempt = Attempt(
        lease=held,
        ends_at=monotonic(),
        late=TimeoutError("late"),
        terminate_on_cancel=False,
        interruptible=False,
        settle=settle,
    )
    with pytest.raises(Exception, match="lease"):
        watchdog.call(attempt, lambda: settled.wait(60))
    watchdog.stop()
    assert counted(counts, "watchdog")[0] >= 3


def test_a_keeper_keeps_after_anything(error: BaseException, counts: WorkerCounters) -> None:
    work, stopping = Fails(error), threading.Event()

    class Read(Board):
        def read(self) -> Iterator[Any]:
            work()
            return iter(())

    keeper = Keeper(Read(), Leases("s", seconds=0.06), Connection, stopping)  # type: ignore[arg-type]
    thread = LastingThread("keeper", keeper.run, observer=counts)
    thread.start()
    assert work.after.wait(60)
    stopping.set()
    thread.end()
    failures, failing = counted(counts, "keeper")
    assert (failures >= 3, failing) == (True, 0)


def test_chores_are_done_after_anything(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, done = RelayCounters([]), threading.Event()
    failures = iter([error] * 3)

    def connect() -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        done.set()
        raise psycopg.OperationalError("enough")

    monkeypatch.setattr(
        "beatless.outbox.chores.Backoff", lambda **_: type("B", (), {"delay": lambda *_: 0.0})()
    )
    chores = Chores([None], queries=Queries("s"), connect=connect, observer=counts, after=0)  # type: ignore[list-item]
    chores.start()
    assert done.wait(60)
    chores.stop()
    assert counted(counts, "chores")[0] >= 3


def test_a_batch_has_a_result_after_anything(error: BaseException) -> None:
    def fails(*_arguments: Any) -> Any:
        raise error

    counts = RelayCounters([])
    door = SimpleNamespace(publish=fails, waiting=fails)
    publisher = AsyncTaskPublisher(door, lambda: None, observer=counts)
    for messages in ([None], [None, None]):
        publisher.send(Batch(messages=messages))
        assert publisher.wait(60)
        result = publisher.collect_result()
        assert result is not None
        assert result.error is not None
    assert publisher.alive
    publisher.close()


def full(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_what_had_no_thread_is_not_done_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as context:
            context.setattr(threading.Thread, "start", full)
            with pytest.raises(RuntimeError):
                submitted(pool, done.append, "the first")
        submitted(pool, done.append, "the second").result(60)
    assert done == ["the second"]


def test_what_another_thread_has_begun_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the pool that was free by then has taken it."""
    with ThreadPoolExecutor(2) as pool:
        submit = pool.submit

        def submit_and_fail(*work: Any) -> Any:
            submit(*work).result(60)
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(pool, "submit", submit_and_fail)
        assert submitted(pool, int, "7").result(60) == 7


def test_a_thread_that_could_not_be_started_is_started_with_the_next_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beat = threading.Event()

    class Extended(Leases):
        def extend(self, connection: Any, leases: Sequence[Lease]) -> list[Lease]:
            beat.set()
            return []

    heartbeat = Heartbeat(Extended("s", seconds=0.03), Connection)  # type: ignore[arg-type]
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError):
            heartbeat.hold(lease())
    heartbeat.hold(lease())
    assert beat.wait(60)
    heartbeat.stop()


def test_the_failures_of_a_child_count_until_another_takes_its_place(
    counts: WorkerCounters,
) -> None:
    counts.counts.take(3)
    counts(ThreadFailed(thread="heartbeat", first=True))
    counts(ThreadFailed(thread="heartbeat", first=False))
    assert counts.failing() == ["heartbeat"]
    counts.counts.take(3)  # it was killed
    assert counts.failing() == []
    assert counted(counts, "heartbeat") == (2, 0)


def test_what_fails_in_streams_and_relays_is_counted() -> None:
    streams, relay = StreamCounters(), RelayCounters([])
    streams(ThreadFailed(thread="streams", first=True))
    relay(RelayFailed(error="x"))
    assert counted(relay, "relay") == (1, 1)
    relay(RelayStarted())
    assert counted(relay, "relay") == (1, 0)
    read = streams.counts.read()
    assert read["beatless_thread_failures_total", ("streams",)] == [1]
