"""A stopping worker: what bounds its end."""

import threading

import pytest
from celery import signals

from beatless import Settings
from beatless.orchestrator.board import Board, Noted
from beatless.worker import shutdown
from beatless.worker.shutdown import Draining, GracefulShutdown

HELD = Noted(pid=7, beat=0.0, run_id="r", tokens=[1])


class Worker:
    """Stands for Celery's, of which the step needs no member."""


class Stopping:
    """A worker that was asked to stop, and the thread that bounds its end."""

    def __init__(self, grace_seconds: float) -> None:
        self.board = Board()
        settings = Settings(
            database_url="postgresql://nowhere.invalid/",
            redis_url="redis://nowhere.invalid/",
            grace_seconds=grace_seconds,
        )
        self.worker = Worker()
        kind = GracefulShutdown.of(Draining(), self.board, settings)
        self.step = kind(self.worker)
        self.step.start(self.worker)
        self.hung: list[bool] = []
        self._thread = threading.Thread(target=lambda: self.hung.append(self.step.hangs()))

    def begin(self) -> None:
        self._thread.start()

    def decides(self, within: float) -> bool:
        self._thread.join(within)
        return not self._thread.is_alive()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutdown, "HANGING_BROKER_S", 0.1)
    monkeypatch.setattr(shutdown, "HANGING_STEP_S", 0.1)
    monkeypatch.setattr(shutdown, "LEASES_CHECK_INTERVAL_S", 0.01)


def test_a_worker_that_holds_no_lease_does_not_wait_for_a_broker_that_hangs() -> None:
    stopping = Stopping(grace_seconds=3000)
    stopping.board.write(5, HELD)
    stopping.begin()
    assert not stopping.decides(within=0.3)
    stopping.board.clear(5)
    assert stopping.decides(within=60)
    assert stopping.hung == [True]


def test_once_the_consumer_has_stopped_only_the_grace_bounds_the_rest() -> None:
    stopping = Stopping(grace_seconds=3000)
    stopping.step.stop(stopping.worker)
    stopping.begin()
    assert not stopping.decides(within=0.3)
    signals.worker_shutdown.send(sender=stopping.worker)
    assert stopping.decides(within=60)
    assert stopping.hung == [False]


def test_after_the_grace_a_step_that_hangs_holds_nothing_up() -> None:
    stopping = Stopping(grace_seconds=0.1)
    stopping.board.write(5, HELD)
    stopping.begin()
    assert stopping.decides(within=60)
    assert stopping.hung == [True]
