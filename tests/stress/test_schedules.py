"""A schedule fires each second, while its relays are killed and frozen."""

import os
import random
import signal
import threading
from datetime import UTC, datetime, timedelta

import pytest

from beatless import Schedule
from beatless.local.child import Child
from beatless.testing import Kit

SECONDS = 60
FAULT_EVERY_S = 5.0
LATE_S = 3.0
"""Of 99 ticks in 100: less than a relay stays frozen; on a quiet machine a tenth of a second."""


@pytest.mark.long
def test_each_second_has_one_run_while_relays_are_killed_and_frozen(beatless: Kit) -> None:
    relays = [beatless.relay_process("tests.plans:app") for _ in range(3)]
    made = beatless.client.create_schedule(
        Schedule("second", "two_steps", every=1, catch_up="all", queue="nobody")
    )
    rng, pause = random.Random(21), threading.Event()
    first = made.next_tick
    assert first is not None
    frozen: list[Child] = []
    while (datetime.now(UTC) - first).total_seconds() < SECONDS:
        pause.wait(FAULT_EVERY_S)
        for relay in frozen:
            os.kill(relay.pid, signal.SIGCONT)
        frozen.clear()
        victim = rng.choice(relays)
        if rng.random() < 0.5:
            os.kill(victim.pid, signal.SIGSTOP)
            frozen.append(victim)
        else:
            victim.kill()
            relays[relays.index(victim)] = beatless.relay_process("tests.plans:app")
    for relay in frozen:
        os.kill(relay.pid, signal.SIGCONT)
    beatless.client.pause_schedule("second")

    runs = sorted(
        (run for run in beatless.client.list_runs(queue="nobody", limit=1000)),
        key=lambda run: run.tick,
    )
    assert [run.tick for run in runs] == [
        first + timedelta(seconds=number) for number in range(len(runs))
    ]
    assert len(runs) >= SECONDS
    lateness = sorted((run.created_at - run.tick).total_seconds() for run in runs)
    assert lateness[0] >= 0
    assert lateness[len(lateness) * 99 // 100] < LATE_S, lateness
