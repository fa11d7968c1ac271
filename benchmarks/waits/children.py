"""A run that starts many children beside as many runs that are started in bulk."""

import time
from collections.abc import Iterator

from benchmarks.measure import interleaved, ratios
from benchmarks.waits.fleet import Chosen, Figure, Fleet, fleets

CHILDREN = 10_000


def measure(chosen: Chosen) -> Iterator[Figure]:
    count, resumed = chosen.of(CHILDREN), list[float]()
    with fleets() as fleet:
        fleet.start("relay"), fleet.start("worker")
        _plain_runs(fleet, count // 10)  # the first pages, and the workers' connections

        def mapped() -> float:
            rate, after = _map(fleet, count)
            resumed.append(1000 * after)
            return rate

        found = interleaved(
            {"map": mapped, "plain": lambda: _plain_runs(fleet, count)}, chosen.repeats
        )
    yield Figure(
        key="map", values=found["map"], unit="/s", what=f"children of a map of {count:,} no-ops"
    )
    yield Figure(
        key="map.ratio",
        values=ratios(found["map"], found["plain"]),
        unit="x",
        what="the same / as many plain runs that are started in bulk",
    )
    yield Figure(
        key="map.resumed",
        values=resumed,
        unit="ms",
        what="end of its last child to the first line of its next step",
    )


def _map(fleet: Fleet, count: int) -> tuple[float, float]:
    """Children per second, and seconds from the end of the last to the parent's next line."""
    began = time.time()
    run = fleet.client.start_run("fan", count)
    line = fleet.client.wait_for_run(run.run_id, timeout=600).result
    (last, ended) = fleet.db.execute(
        "SELECT extract(epoch FROM max(finished_at))::float8, count(finished_at) FROM runs"
        " WHERE parent_id = %s",
        (run.run_id,),
    ).fetchone() or (0.0, 0)
    assert ended == count
    return count / (last - began), line - last


def _plain_runs(fleet: Fleet, count: int) -> float:
    """Runs per second, from before the start of the first to the end of the last."""
    began = time.time()
    run_ids = fleet.start_runs("noop", [None] * count)
    fleet.until(lambda: not fleet.ask("SELECT count(*) FROM dispatches"), "the runs end")
    (last,) = fleet.db.execute(
        "SELECT extract(epoch FROM max(finished_at))::float8 FROM runs WHERE run_id = ANY(%s)",
        (run_ids,),
    ).fetchone() or (0.0,)
    return count / (last - began)
