"""The thread that keeps leases: what it does is tested on Postgres, here is what it does not."""

import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease, Leases


def lease() -> Lease:
    return Lease(run=None, token=1)  # type: ignore[arg-type]  # never looked at


class Connection:
    closed = False

    def close(self) -> None:
        self.closed = True


def test_runs_that_end_soon_cost_no_beat():
    connected = threading.Event()

    def connect() -> Any:
        connected.set()
        raise psycopg.OperationalError("no beat is due")

    heartbeat = Heartbeat(Leases("s", seconds=3600), connect)
    for _ in range(10):
        held = lease()
        heartbeat.hold(held)
        assert not connected.wait(0.01)
        heartbeat.release(held)
    heartbeat.stop()
    assert not connected.is_set()


def test_a_heartbeat_that_never_held_anything_can_be_stopped():
    Heartbeat(Leases("s", seconds=1), lambda: None).stop()


def test_it_rests_between_leases_and_wakes_for_the_next():
    beats: list[float] = []
    beat = threading.Event()

    class Extended(Leases):
        def extend(self, connection: Any, leases: Sequence[Lease]) -> list[Lease]:
            beats.append(1)
            beat.set()
            return []

    heartbeat = Heartbeat(Extended("s", seconds=0.03), Connection)  # type: ignore[arg-type]
    for _ in range(3):
        beat.clear()
        held = lease()
        heartbeat.hold(held)
        assert beat.wait(60)
        heartbeat.release(held)
    heartbeat.stop()


def test_it_beats_at_once_after_a_suspend_of_the_machine(monkeypatch: pytest.MonkeyPatch):
    """The clock of waits stood still meanwhile, the leases of the server did not."""
    boot = [0.0]
    monkeypatch.setattr("beatless.orchestrator.heartbeat.since_boot", lambda: boot[0])
    monkeypatch.setattr("beatless.orchestrator.heartbeat.SUSPEND_CHECK_INTERVAL_S", 0.01)
    beat = threading.Event()

    class Extended(Leases):
        def extend(self, connection: Any, leases: Sequence[Lease]) -> list[Lease]:
            beat.set()
            return []

    heartbeat = Heartbeat(Extended("s", seconds=3600), Connection)  # type: ignore[arg-type]
    heartbeat.hold(lease())
    assert not beat.wait(0.1)
    boot[0] = 3600.0
    assert beat.wait(60)
    heartbeat.stop()


@pytest.mark.parametrize(
    "error",
    [psycopg.OperationalError("the server closed the connection"), ValueError("'paused'")],
    ids=["of Postgres", "any other"],
)
def test_after_a_failure_it_goes_on_and_does_not_wait_for_its_next_turn(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr("beatless.orchestrator.heartbeat.RETRY_INTERVAL_S", 0.01)
    kept = threading.Event()

    class FailsOnce(Leases):
        def extend(self, connection: Any, leases: Sequence[Lease]) -> list[Lease]:
            if self.seconds < 1:
                self.seconds = 3600  # from now on its next turn comes after twenty minutes
                raise error
            kept.set()
            return []

    heartbeat = Heartbeat(FailsOnce("s", seconds=0.03), Connection)  # type: ignore[arg-type]
    heartbeat.hold(lease())
    assert kept.wait(60)
    heartbeat.stop()
