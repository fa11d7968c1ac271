"""The stored results of the load: read and written here, shown by `reliability.py`."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "results"
CHAOS = FOLDER / "chaos.json"
PLANTED = FOLDER / "planted.json"
SCENARIOS = FOLDER / "scenarios.json"
SOAK = FOLDER / "soak.json"

KILLS = ("_killed", "_dies_at_", "_crashed", "_ended", "_restarted_empty")
"""Marks in the names of faults that end a process, a server or a session at once."""

REPORTED_RUNS = 30
"""So many runs of `make chaos` are kept, the newest."""


def read(path: Path) -> Any:
    """The stored result; None if there is none yet."""
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, found: Any) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def kills_in(hits: Mapping[str, int]) -> int:
    """How many of these faults end a process at once, by SIGKILL or as a crash does."""
    return sum(count for name, count in hits.items() if any(mark in name for mark in KILLS))


def add_chaos(
    *, seed: int, seconds: float, hits: Mapping[str, int], counts: Mapping[str, int], broken: int
) -> None:
    """Add one run of `make chaos`; `counts` are its records by kind, `broken` its violations."""
    found = {
        "at": datetime.now(UTC).date().isoformat(),
        "seed": seed,
        "seconds": seconds,
        "runs": counts.get("run", 0),
        "events": counts.get("event", 0),
        "views": counts.get("view", 0),
        "violations": broken,
        "hits": dict(sorted(hits.items())),
    }
    known = [run for run in read(CHAOS) or [] if run["seed"] != seed]
    write(CHAOS, [*known, found][-REPORTED_RUNS:])
