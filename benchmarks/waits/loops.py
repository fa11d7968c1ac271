"""Functions that go round two thousand times: what a late turn costs beside an early one."""

import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

from benchmarks.measure import ratios
from benchmarks.waits.fleet import Chosen, Figure, Fleet, fleets
from benchmarks.waits.plans import TURNS_OF_A_GENERATION

TURNS = 2000

WINDOW = 20
"""Turns of which the median counts: around the 10th, and up to the last."""


def measure(chosen: Chosen) -> Iterator[Figure]:
    # At least two generations, and two windows.
    turns = max(2, chosen.of(TURNS) // TURNS_OF_A_GENERATION) * TURNS_OF_A_GENERATION
    with fleets() as fleet:
        fleet.start("relay"), fleet.start("worker")
        _loop(fleet, turns // 10)
        plain = [_loop(fleet, turns) for _ in range(chosen.repeats)]
        waits = [_signalled_loop(fleet, turns) for _ in range(chosen.repeats)]
    early = [1000 * statistics.median(each[:WINDOW]) for each in plain]
    late = [1000 * statistics.median(each[-WINDOW:]) for each in plain]
    yield Figure(key="loop", values=early, unit="ms", what="the 10th turn of a loop, a step each")
    yield Figure(
        key="loop.ratio",
        values=ratios(late, early),
        unit="x",
        what=f"turn {turns:,} / the 10th, in one claim",
    )
    last = TURNS_OF_A_GENERATION
    first_ones = [1000 * statistics.median(each[:last]) for each in waits]
    last_ones = [1000 * statistics.median(each[-last:]) for each in waits]
    yield Figure(
        key="loop.waits",
        values=first_ones,
        unit="ms",
        what=f"signal to first line, turns 1 to {last} of a loop that waits in each turn",
    )
    yield Figure(
        key="loop.waits.ratio",
        values=ratios(last_ones, first_ones),
        unit="x",
        what=f"the last {last} of {turns:,} turns / the first, with run.again every {last}",
    )
    yield Figure(
        key="loop.waits.replay",
        values=[_within_a_generation(each) for each in waits],
        unit="x",
        what="the last ten turns of a generation / its first ten",
    )


def _loop(fleet: Fleet, turns: int) -> list[float]:
    """Seconds of each turn but the first."""
    (run_id,) = fleet.start_runs("loop", [turns])
    fleet.await_ends([run_id])
    rows = fleet.db.execute(
        "SELECT (data ->> 'result')::float8 FROM run_events"
        " WHERE run_id = %s AND type = 'StepFinished' ORDER BY seq",
        (run_id,),
    ).fetchall()
    assert len(rows) == turns
    return [after - before for (before,), (after,) in pairwise(rows)]


def _signalled_loop(fleet: Fleet, turns: int) -> list[float]:
    """Seconds from each signal to the first line of the step that follows it."""
    run = fleet.client.start_run("signalled_loop", {"turn": 0, "turns": turns})
    found = []
    for event in fleet.client.stream_run(run.run_id):
        if event.type == "WaitStarted":
            fleet.client.signal_run(run.run_id, "go", time.time())
        elif event.type == "StepFinished":
            found.append(event.data["result"])
    assert len(found) == turns
    return found


def _within_a_generation(turns: Sequence[float]) -> float:
    whole = TURNS_OF_A_GENERATION
    generations = [turns[first : first + whole] for first in range(0, len(turns), whole)]
    early = [seconds for each in generations for seconds in each[:10]]
    late = [seconds for each in generations for seconds in each[-10:]]
    return statistics.median(late) / statistics.median(early)
