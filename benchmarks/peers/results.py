"""The measured values of peers: stored beside those of other benchmarks, and shown as a table.

Keys are `peers.<metric>.<peer>`. `ratio` is our value divided by the peer's, repeat by repeat: it
holds on another day and another machine, where absolute values do not.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from benchmarks.measure import RESULTS, record
from benchmarks.peers.catalogue import BY_NAME, OURS, PEERS

Values = dict[str, dict[str, list[tuple[int, float]]]]
"""By metric and peer: the number of the repeat, and the value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    unit: str
    what: str
    digits: int = 0

    def show(self, value: float) -> str:
        return f"{value:,.{self.digits}f} {self.unit}"


METRICS = {
    "runs": Metric(unit="/s", what="runs of 5 steps, durable, executed from a backlog"),
    "runs_cpu": Metric(unit="ms", what="processor time of such a run, all processes", digits=2),
    "runs_commits": Metric(unit="commits", what="transactions of such a run", digits=1),
    "runs_wal": Metric(unit="bytes", what="WAL of such a run"),
    "runs_events": Metric(unit="events", what="events of such a run", digits=2),
    "jobs": Metric(unit="/s", what="jobs of one step executed from a backlog"),
    "jobs_cpu": Metric(unit="ms", what="processor time of such a job, all processes", digits=2),
    "jobs_commits": Metric(unit="commits", what="transactions of such a job", digits=2),
    "jobs_wal": Metric(unit="bytes", what="WAL of such a job"),
    "jobs_start": Metric(unit="/s", what="jobs started by one process, one by one"),
    "jobs_bulk": Metric(unit="/s", what="jobs started by one process, many at once"),
    "latency": Metric(unit="ms", what="start of a job to the first line of it, p50", digits=2),
    "latency_p95": Metric(unit="ms", what="the same, p95", digits=2),
    "latency_cpu": Metric(
        unit="ms", what="processor time of a job at 20/s, but its start", digits=1
    ),
    "latency_idle": Metric(unit="%", what="of one core while nothing is to do", digits=2),
    "latency_idle_commits": Metric(unit="/s", what="transactions while nothing is to do", digits=1),
    "live": Metric(unit="ms", what="an event told in a job to its viewer, p50", digits=2),
    "live_p95": Metric(unit="ms", what="the same, p95", digits=2),
    "live_cpu": Metric(unit="ms", what="processor time of such an event, all processes", digits=2),
}
"""What is stored of each peer. The parts of processor time are stored with the whole."""

FOREIGN = "foreign"
"""Cores that other processes of the machine used meanwhile, a value of the whole measurement."""


def store(found: Values, bed: str) -> None:
    """Replace the stored values of what was measured now, on this testbed; the others stay."""
    day = datetime.now(UTC).date().isoformat()
    for metric, by_peer in found.items():
        if metric not in METRICS:
            continue
        for peer, values in by_peer.items():
            facts: dict[str, Any] = {"day": day}
            if parts := _parts(found, metric, peer):
                facts["parts"] = parts
            if peer != OURS and (ratio := _ratio(by_peer, peer)):
                facts["ratio"] = ratio
            record(
                f"peers.{metric}.{peer}",
                [value for _, value in values],
                unit=METRICS[metric].unit,
                what=f"{BY_NAME[peer].title}: {METRICS[metric].what}",
                facts=facts,
            )
    foreign = [
        value
        for metric, by_peer in found.items()
        if metric.endswith(f"_{FOREIGN}")
        for values in by_peer.values()
        for _, value in values
    ]
    if foreign:
        what = "cores that other processes of the machine used meanwhile"
        facts = {"day": day, "testbed": bed}
        record(f"peers.{FOREIGN}", foreign, unit="cores", what=what, facts=facts)


def stored() -> dict[str, dict[str, Any]]:
    """The stored values of peers by key, without the leading `peers.`."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {
        key.removeprefix("peers."): value
        for key, value in known.items()
        if key.startswith("peers.")
    }


def table(found: Values) -> str:
    """The medians for a terminal: a line for each metric, a column for each peer."""
    peers = [peer.name for peer in PEERS if any(peer.name in each for each in found.values())]
    rows = [["", *peers]]
    for name, metric in METRICS.items():
        if by_peer := found.get(name):
            cells = [
                f"{_median(by_peer[peer]):,.{metric.digits}f}" if peer in by_peer else "-"
                for peer in peers
            ]
            rows.append([f"{name} {metric.unit}", *cells])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(lines) + "\n"


def _parts(found: Values, metric: str, peer: str) -> dict[str, float]:
    """The median of each group's share of a metric: `runs_cpu_postgres` is a part of `runs_cpu`."""
    return {
        name.removeprefix(f"{metric}_"): round(_median(by_peer[peer]), 4)
        for name, by_peer in found.items()
        if name.startswith(f"{metric}_") and name not in METRICS and peer in by_peer
        if not name.endswith(FOREIGN)
    }


def _ratio(by_peer: Mapping[str, Sequence[tuple[int, float]]], peer: str) -> dict[str, float]:
    """Ours divided by the peer's, of the repeats that have both."""
    ours, theirs = dict(by_peer.get(OURS, ())), dict(by_peer[peer])
    ratios = [ours[repeat] / theirs[repeat] for repeat in ours.keys() & theirs if theirs[repeat]]
    if not ratios:
        return {}
    return {
        "value": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def _median(values: Sequence[tuple[int, float]]) -> float:
    return statistics.median(value for _, value in values)
