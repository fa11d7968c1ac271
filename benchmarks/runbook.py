"""Writes the tables of docs/operations.md from benchmarks/results/latest.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
RESULTS = Path(__file__).parent / "results" / "latest.json"
BEGIN, END = "<!-- capacity: made by benchmarks/capacity.py -->", "<!-- capacity: end -->"


def page(text: str, results: Mapping[str, Any]) -> str:
    """The runbook with its table made from the results."""
    value = {
        key.removeprefix("capacity."): found["value"]
        for key, found in results.items()
        if key.startswith("capacity.")
    }
    rows = [
        ("a relay", f"{value['relay.connections']:.0f}", f"{value['relay.memory']:.0f} MB"),
        ("a worker's main process", "0", f"{value['worker.memory']:.0f} MB"),
        (
            "each child of it",
            f"{value['worker.connections']:.0f}",
            f"{value['child.memory']:.0f} MB, and the needs of your steps",
        ),
    ]
    lines = ["| process | connections to Postgres | memory |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "| 13 events | a run | 1,000 runs/s | a day of that |", "|---|---|---|---|"]
    for key, name in (("disk", "disk"), ("wal", "WAL"), ("redis", "to Redis")):
        each = value[key]
        lines.append(
            f"| {name} | {each / 1000:.1f} kB | {each * 1000 / 1e6:.0f} MB/s | "
            f"{each * 1000 * 86400 / 1e12:.2f} TB |"
        )
    begin, end = (text.index(mark) for mark in (BEGIN, END))
    return text[:begin] + "\n".join([BEGIN, "", *lines, "", ""]) + text[end:]


def main() -> None:
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
