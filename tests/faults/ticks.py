"""Rules of the checker about schedules: each tick has one run, none early, and none is left out."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from tests.faults.history import History, Record, Violation


def each_tick_has_one_run(history: History) -> Iterator[Violation]:
    """Up to the last one that was fired, and those of a calm, also those that were missed."""
    for name, schedule in history.schedules.items():
        if schedule["state"] == "stopped":
            yield Violation("tick", "-", f"{name} is stopped: {schedule['reason']}")
        runs = runs_by_tick(history, name)
        for tick, found in runs.items():
            if len(found) > 1:
                ids = sorted(run["run_id"] for run in found)
                yield Violation("tick", ids[0], f"{name} has fired {tick:.0f} as {ids}")
        last = max([schedule["last_tick"] or 0.0, *runs])
        for calm in history.calms:
            last = max(last, min(calm["end"] - calm["bound_s"], schedule["until"]))
        tick = schedule["first"]
        while tick <= last:
            if tick not in runs:
                yield Violation("tick", "-", f"{name} has not fired {tick:.0f}")
            tick += schedule["every_s"]
        for tick in runs:
            if tick < schedule["first"] or (tick - schedule["first"]) % schedule["every_s"]:
                ids = sorted(run["run_id"] for run in runs[tick])
                yield Violation("tick", ids[0], f"{name} has no tick {tick}")


def ticks_are_fired_in_time(history: History) -> Iterator[Violation]:
    """Never before their time, by the clock of Postgres, and in a calm not long after it."""
    for name in history.schedules:
        for tick, found in runs_by_tick(history, name).items():
            for run in found:
                if run["created_at"] < tick:
                    early_s = tick - run["created_at"]
                    yield Violation("tick", run["run_id"], f"{name} was {early_s:.3f} s early")
                for calm in history.calms:
                    waited_s = run["created_at"] - tick
                    inside = calm["begin"] < tick and run["created_at"] < calm["end"]
                    if inside and waited_s > calm["bound_s"]:
                        yield Violation("tick", run["run_id"], f"{name} was {waited_s:.1f} s late")


def runs_by_tick(history: History, name: str) -> dict[float, list[Record]]:
    """The runs that a schedule has started; a retry has the tick of the run that it repeats."""
    found: dict[float, list[Record]] = defaultdict(list)
    for run in history.runs.values():
        if run.get("schedule") == name and not run["retry_of"]:
            found[run["tick"]].append(run)
    return found


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    each_tick_has_one_run,
    ticks_are_fired_in_time,
)
