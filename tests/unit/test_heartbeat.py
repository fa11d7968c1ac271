"""The thread that keeps leases: what it does is tested on Postgres, here is what it does not."""

import threading
from typing import Any

import psycopg

from orchestrator.lease import Heartbeat, Lease, Leases


def lease() -> Lease:
    return Lease(run=None, token=1)  # type: ignore[arg-type]  # never looked at


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


def test_a_heartbeat_that_never_held_anything_can_be_stopped():
    Heartbeat(Leases("s", seconds=1), lambda: None).stop()


def test_it_rests_between_leases_and_wakes_for_the_next():
    beats: list[float] = []
    beat = threading.Event()

    class Extended(Leases):
        def extend(self, connection: Any, lease: Lease) -> bool:
            beats.append(1)
            beat.set()
            return True

    class Connection:
        closed = False

        def close(self) -> None:
            self.closed = True

    heartbeat = Heartbeat(Extended("s", seconds=0.03), Connection)  # type: ignore[arg-type]
    for _ in range(3):
        beat.clear()
        held = lease()
        heartbeat.hold(held)
        assert beat.wait(10)
        heartbeat.release(held)
    heartbeat.stop()
