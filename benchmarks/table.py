"""Writes benchmarks/README.md from benchmarks/results/latest.json."""

import json
from pathlib import Path

from benchmarks.measure import RESULTS

HEAD = """# Benchmarks

`make bench` runs all, `make bench-NAME` one; `make bench-table` writes this page from
`results/latest.json`. Every figure is a ratio or a count that was measured in one run, side by side
with what it is compared to: the median of the repeats, and the smallest and largest. Services are
embedded, with fsync on; everything shares the machine's cores. What `make bench-peers` measures is
in [performance](../docs/performance.md).

| key | what | median | min | max |
|---|---|---|---|---|
"""


def main() -> None:
    rows = [
        f"| `{key}` | {found['what']} | **{found['value']:g}** {found['unit']} "
        f"| {found['min']:g} | {found['max']:g} |\n"
        for key, found in json.loads(RESULTS.read_text()).items()
        if isinstance(found, dict) and "value" in found and not key.startswith("peers.")
    ]
    (Path(__file__).parent / "README.md").write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main()
