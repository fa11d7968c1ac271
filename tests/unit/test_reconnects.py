"""How soon a worker tries its broker again, and what its end does not wait for."""

import threading
from typing import Any

import kombu
import pytest
from celery.exceptions import WorkerShutdown
from celery.worker import state as worker_state

from beatless import App, Settings
from beatless.outbox.backoff import BACKOFF_CAP_S
from beatless.worker.reconnects import CONNECTION_ERROR_HOOKS, ReconnectBackoff
from beatless.worker.shutdown import Draining


class Consumer:
    """As much of Celery's as the step touches."""

    def ensure_connected(self, connection: kombu.Connection) -> kombu.Connection:
        return connection

    def on_connection_error_after_connected(self, error: Exception) -> None:
        self.error = error

    def on_connection_error_before_connected(self, error: Exception) -> None:
        self.error = error


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


@pytest.fixture
def step(consumer: Consumer) -> Any:
    return ReconnectBackoff.of(Draining())(consumer)


def test_a_broker_that_is_away_is_tried_every_two_seconds(step: Any, consumer: Consumer) -> None:
    connection = consumer.ensure_connected(kombu.Connection("redis://127.0.0.1:1/0"))
    assert connection.ensure_connection.keywords["interval_max"] == BACKOFF_CAP_S == 2.0


def test_a_broker_that_accepts_and_refuses_is_left_alone_for_longer_and_longer(step: Any) -> None:
    refused = ConnectionError("You can't write against a read only replica.")
    delays = [step.delay(refused, 0.01) for _ in range(60)]
    assert delays[0] <= 0.1
    assert all(BACKOFF_CAP_S * 0.8 <= delay <= BACKOFF_CAP_S for delay in delays[6:])
    assert step.delay(refused, 60.0) <= 0.1  # it had worked meanwhile


def test_what_is_no_message_holds_up_nobody(step: Any) -> None:
    assert [step.delay(ValueError("no JSON"), 0.01) for _ in range(60)] == [0.0] * 60


@pytest.mark.parametrize("when", CONNECTION_ERROR_HOOKS)
def test_the_pause_ends_when_the_worker_is_told_to_stop(
    step: Any, consumer: Consumer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    refused = ConnectionError("refused")
    for _ in range(60):
        step.delay(refused, 0.0)
    monkeypatch.setattr(worker_state, "should_stop", 0)
    with pytest.raises(WorkerShutdown):
        getattr(consumer, when)(refused)
    monkeypatch.setattr(worker_state, "should_stop", None)
    step.draining.set()
    getattr(consumer, when)(refused)
    assert consumer.error is refused


def test_closed_executors_wait_for_no_grace() -> None:
    address = "127.0.0.1:1"
    app = App(
        Settings(
            database_url=f"postgresql://{address}/x",
            redis_url=f"redis://{address}/0",
            grace_seconds=3600,
        ),
        [],
    )
    app.executors.draining.prepare()
    before = set(threading.enumerate())  # those of tests before may be ending still
    app.executors._begin()
    (waiting,) = [t for t in set(threading.enumerate()) - before if t.name == "beatless-grace"]
    app.executors.draining.set()
    app.executors.close()
    waiting.join(60)
    assert not waiting.is_alive()
