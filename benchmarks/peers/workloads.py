"""The four workloads, each of one peer on a fresh database: measured values by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from threading import Event

from benchmarks.peers.testbed import Reading, Trial, TrialFailed

PACED, PACED_WARMUP = 120, 10
"""Jobs of `latency`, one each 50 ± 20 ms, and so many before those that count."""

LIVE, LIVE_WARMUP = 150, 25
"""Events of `live`, one each 20 ms, and so many before those that count."""

SETTLED_AFTER_S, IDLE_S = 1.0, 3.0
SINGLE_SHARE = 4
"""Of the jobs of a backlog, one in so many is started by a call of its own."""

SERVED = ("work", "relay", "postgres", "valkey")
"""The groups of processes whose processor time is a system's cost; who starts is none."""
VIEWED = (*SERVED, "follow")

Found = dict[str, float]


def runs(trial: Trial, size: float) -> Found:
    """A backlog of runs of five steps that do nothing, executed to its end."""
    peer = trial.peer
    count = max(20, round(peer.sizes["runs"] * size))
    trial.produce("run", "bulk" if peer.bulk else "single", count)
    before = trial.commits()
    if peer.events:
        trial.start("follow", "follow")
        trial.await_ready()
    trial.start_workers()
    marks = count if peer.follows_runs else count * peer.marks
    begin, end, _ = trial.await_marks(*_window(marks), marks)
    events = _checked(trial, count) if peer.events else {}
    per_s = rate(trial.records(), marks)
    trial.end()
    per_run = marks / count
    return {
        "runs": per_s / per_run,
        **_cost("runs", begin, end, per_run),
        **events,
        "runs_commits": (trial.commits() - before) / count,
    }


def jobs(trial: Trial, size: float) -> Found:
    """Jobs of one step that does nothing: their starts, and the execution of the backlog."""
    peer = trial.peer
    count = max(80, round(peer.sizes["jobs"] * size))
    single = count // SINGLE_SHARE if peer.bulk else count
    found = {"jobs_start": single / trial.produce("job", "single", single)["seconds"]}
    if many := count - single:
        found["jobs_bulk"] = many / trial.produce("job", "bulk", many)["seconds"]
    before = trial.commits()
    trial.start_workers()
    begin, end, _ = trial.await_marks(*_window(count), count)
    per_s = rate(trial.records(), count)
    trial.end()
    commits = (trial.commits() - before) / count
    return found | {"jobs": per_s, **_cost("jobs", begin, end), "jobs_commits": commits}


def latency(trial: Trial, size: float) -> Found:
    """Jobs started one by one on a system that has nothing else to do; before, nothing at all."""
    count = PACED_WARMUP + max(20, round(PACED * size))
    trial.start_workers()
    trial.await_ready(trial.peer.workers)
    waiting = Event()
    waiting.wait(SETTLED_AFTER_S)
    calm, commits = trial.read(), trial.commits()
    waiting.wait(IDLE_S * max(0.5, size))
    later = trial.read()
    seconds = later.at - calm.at
    idle = {
        "latency_idle": 100 * sum(_by_group(calm, later, SERVED).values()) / seconds,
        "latency_idle_commits": (trial.commits() - commits) / seconds,
    }
    trial.start("produce", "produce", "job", "paced", str(count))
    begin, end = trial.await_marks(PACED_WARMUP, count)
    return idle | {
        **_times("latency", trial.records()[PACED_WARMUP:]),
        **_processor_ms("latency", begin, end, SERVED),
    }


def live(trial: Trial, size: float) -> Found:
    """Events that one running job tells one by one, to one viewer."""
    count = LIVE_WARMUP + max(30, round(LIVE * size))
    trial.start_workers()
    trial.await_ready(trial.peer.workers)
    trial.start("follow", "follow")
    trial.await_ready()
    trial.start("produce", "produce", "live", "single", str(count))
    begin, end = trial.await_marks(LIVE_WARMUP, count)
    return {
        **_times("live", trial.records()[LIVE_WARMUP:]),
        **_processor_ms("live", begin, end, VIEWED),
    }


WORKLOADS: Mapping[str, Callable[[Trial, float], Found]] = {
    "runs": runs,
    "jobs": jobs,
    "latency": latency,
    "live": live,
}


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _checked(trial: Trial, count: int) -> Found:
    """The events of a run, after a viewer has got all of them. Raises TrialFailed.

    There are more than the plan says where a run was handed back and has begun a step once more.
    """
    seen = trial.report()["seen"]
    trial.run("check")
    found = trial.report()
    if not count * trial.peer.events <= found["stored"] <= seen or found["waiting"]:
        raise TrialFailed(f"a viewer of {count} runs saw {seen:g} events, {found}")
    return {"runs_events": found["stored"] / count}


def _window(marks: int) -> tuple[int, int]:
    """Between a tenth and nine tenths: processes have started, and none has run out of work."""
    return max(1, marks // 10), marks * 9 // 10


def rate(records: Sequence[tuple[float, float]], marks: int) -> float:
    """Marks in a second, within the window."""
    begin, end = _window(marks)
    return (end - begin) / (records[end - 1][1] - records[begin - 1][1])


def _by_group(begin: Reading, end: Reading, groups: Sequence[str]) -> Found:
    return {
        group: end.processor_s[group] - begin.processor_s[group]
        for group in groups
        if group in end.processor_s
    }


def _processor_ms(
    workload: str, begin: Reading, end: Reading, groups: Sequence[str], marks: float = 1
) -> Found:
    """Milliseconds of processor time of what has so many marks, all together and by group."""
    done = (end.marks - begin.marks) / marks
    spent = _by_group(begin, end, groups)
    return {
        f"{workload}_cpu": 1000 * sum(spent.values()) / done,
        **{f"{workload}_cpu_{group}": 1000 * value / done for group, value in spent.items()},
    }


def _cost(workload: str, begin: Reading, end: Reading, marks: float = 1) -> Found:
    """Processor time and WAL of what has so many marks, and the cores that others have used."""
    done = (end.marks - begin.marks) / marks
    return {
        **_processor_ms(workload, begin, end, SERVED, marks),
        f"{workload}_wal": (end.wal_bytes - begin.wal_bytes) / done,
        f"{workload}_foreign": (end.foreign_s - begin.foreign_s) / (end.at - begin.at),
    }


def _times(workload: str, records: Sequence[tuple[float, float]]) -> Found:
    """Milliseconds from the begin to the mark, p50 and p95."""
    taken = [1000 * (seen - began) for began, seen in records]
    return {workload: percentile(taken, 50), f"{workload}_p95": percentile(taken, 95)}
