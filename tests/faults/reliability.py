"""Writes docs/reliability.md and docs/images/soak.svg from the stored results.

`make reliability` does it; tests/unit/test_reliability.py compares them.
"""

import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.expectations import DRILLS, EXPECTATIONS
from tests.faults.planted import caught
from tests.faults.results import CHAOS, PLANTED, ROOT, SCENARIOS, SOAK, kills_in, read
from tests.faults.soak import SERIES, Verdict, verdict

PAGE = ROOT / "docs" / "reliability.md"
PICTURE = ROOT / "docs" / "images" / "soak.svg"

PUBLISHED = {
    "postgres_restart": ("100 %", "0 %", "0 %", "exits", "0 %", "101 %", "100 %", "0 %"),
    "pg_backend_kill": ("100 %", "0 %", "100 %", "exits", "0 %", "101 %", "100 %", "0 %"),
    "pool_exhaustion": ("100 %", "87 %", "86 %", "96 %", "99 %", "100 %", "100 %", "100 %"),
    "crash_recovery": ("98 %", "103 %", "98 %", "117 %", "73 %", "121 %", "98 %", "74 %"),
    "repeated_kills": ("99 %", "112 %", "88 %", "99 %", "18 %", "109 %", "72 %", "26 %"),
}
"""Rate after each scenario as a share of the rate before, by SYSTEMS: its published sweep of
2026-05-09 (results/2026-05-09-full-sweep/phase_b_summary.md, commit 93677ca)."""

SYSTEMS = ("awa", "absurd", "oban", "pg-boss", "procrastinate", "river", "pgque", "pgmq")
HARNESS = "https://github.com/hardbyte/postgresql-job-queue-benchmarking"

HEAD = """# Reliability

<!-- Written by `make reliability` from benchmarks/results; the suite compares it. -->

What can break, what happens then, and how often that was tried. What is promised is in
[guarantees](guarantees.md); each figure here is a stored result, and each section names the command
that makes it again.
"""

NONE_YET = "\nNo result is stored yet.\n"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def links(tests: tuple[str, ...]) -> str:
    return ", ".join(f"[{Path(test).stem}](../tests/{test})" for test in tests)


def chaos(runs: list[dict[str, Any]] | None) -> str:
    """The faults, what happens by each, and how often it hit."""
    hits = Counter[str]()
    for run in runs or []:
        hits.update(run["hits"])
    text = """
## Faults

`make chaos SEED=n SECONDS=300` runs a fleet of processes (two pools of workers, relays, an API)
behind TCP proxies, under a mixed load: starts in committed and rolled-back transactions, keys,
delays, deadlines, priorities, retries, cancels, pauses, lists and functions that wait, signals
that race their time-outs, viewers over HTTP and beside it that go on where they were. Faults come
at random, by the seed. Every call, every effect of a body in a ledger outside of Postgres, every
claim (by a trigger) and every frame that a viewer saw is written down; a
[checker](../tests/faults/checker.py) that imports nothing of beatless tests I1 to I14 over that
history and over the stored data. A fault counts only if it hit something: a lease that was held, a
session in a transaction, a stream that was open. `ARGS=--store` adds a run to this page.
"""
    if runs:
        text += (
            f"\nThe last {len(runs)} runs: {sum(run['runs'] for run in runs):,} runs of the load, "
            f"{sum(run['events'] for run in runs):,} events, "
            f"{sum(run['views'] for run in runs):,} streams, {hits.total():,} faults of "
            f"{len(hits)} kinds, {kills_in(hits):,} of them kills, "
            f"**{sum(run['violations'] for run in runs)} violations**.\n\n"
            "| seed | day | seconds | runs | events | streams | faults | kinds | violations |\n"
            "|---|---|---|---|---|---|---|---|---|\n"
        )
        text += "".join(
            f"| {run['seed']} | {run['at']} | {run['seconds']:g} | {run['runs']:,} "
            f"| {run['events']:,} | {run['views']:,} | {sum(run['hits'].values()):,} "
            f"| {len(run['hits'])} | {run['violations']} |\n"
            for run in runs
        )
    else:
        text += NONE_YET
    text += "\n| fault | what happens | hit in these runs | its own tests |\n|---|---|---|---|\n"
    for name, (happens, tests) in EXPECTATIONS.items():
        text += f"| `{name}` | {happens} | {hits[name] or '-'} | {links(tests)} |\n"
    text += "\nWhat one history cannot judge has drills of its own, in `make test-long`:\n"
    text += "\n| drill | what happens | tests |\n|---|---|---|\n"
    for name, (happens, tests) in DRILLS.items():
        text += f"| {name} | {happens} | {links(tests)} |\n"
    return text


def planted(found: dict[str, Any] | None) -> str:
    """The known bugs and what found each."""
    text = """
## Planted bugs

A load that finds nothing proves nothing unless it finds what is there. `make planted` plants
known bugs in copies of the tree, one by one, and runs the unmodified load on each until its
checker objects. A bug is caught if it is found with two of three fresh seeds.
"""
    if not found:
        return text + NONE_YET
    first = [
        trial["seconds"] for bug in found.values() for trial in bug["trials"] if trial["rules"]
    ]
    text += f"\n{sum(caught(bug['trials']) for bug in found.values())} of {len(found)} were caught"
    text += f", the median after {statistics.median(first):.0f} s.\n" if first else ".\n"
    text += "\n| bug | found in | by | after (s) | seeds |\n|---|---|---|---|---|\n"
    for name, bug in found.items():
        good = [trial for trial in bug["trials"] if trial["rules"]]
        rules = ", ".join(sorted({rule for trial in good for rule in trial["rules"]})) or "nothing"
        after = ", ".join(f"{trial['seconds']:.0f}" for trial in good) or "-"
        seeds = ", ".join(str(trial["seed"]) for trial in bug["trials"])
        text += f"| {name} | {len(good)} of {len(bug['trials'])} | {rules} | {after} | {seeds} |\n"
    return text


def scenarios(found: dict[str, Any] | None) -> str:
    """The five scenarios of the public harness beside the systems that it has published."""
    text = f"""
## Five scenarios of a public harness

[A harness of others]({HARNESS}) measures eight job systems on Postgres by five scenarios: the
rate of completed jobs after each, as a share of the rate before. `make chaos-scenarios` rebuilds
them from its description, with all settings at their defaults: ours is the rate from ten seconds
after the stress on, its systems' that of the minute after it. Their load was 200 to 600 jobs a
second on other hardware, so shares can be compared, rates cannot.
"""
    if not found:
        return text + NONE_YET
    text += f"\n| scenario | **beatless** | {' | '.join(SYSTEMS)} |\n"
    text += "|---" * (len(SYSTEMS) + 2) + "|\n"
    for name, others in PUBLISHED.items():
        ours = found.get(name)
        told = f"**{share(ours['back_share'])}**" if ours else "-"
        text += f"| {name} | {told} | {' | '.join(others)} |\n"
    text += (
        "\n| ours | what happens | runs/s before | meanwhile | 90 % back after | runs | lost |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    for name, ours in found.items():
        text += (
            f"| {name} | {ours['what']} | {ours['baseline_per_s']:g} "
            f"| {share(ours['during_share'])} | {ours['back_after_s']} s "
            f"| {ours['accepted']:,} | **{ours['lost']}** |\n"
        )
    return text


def soak(found: dict[str, Any] | None) -> str:
    """The verdict of the soak, and its picture."""
    text = """
## Soak

`make soak SECONDS=600` starts runs over HTTP at a steady rate, follows some, and removes ended
ones after seconds, so that a table stays flat only if vacuum keeps it so. A line is drawn through
the means of twelve blocks of the samples, without the first quarter; a series grows if the growth
that is left after three standard errors is more than 5 % of its mean. Exit status 1 if one does.
"""
    if not found:
        return text + NONE_YET
    text += (
        f"\n{found['seconds']:g} s, {found['runs']:,} runs, {found['followed']:,} of them followed "
        f"({found['machine']}):\n\n| | mean | growth | beyond doubt | |\n|---|---|---|---|---|\n"
    )
    for name, series in SERIES.items():
        told = verdict(found["samples"][name], series.floor)
        text += (
            f"| {series.title} | {told.mean:.1f} {series.unit} | {told.growth:+.2f} "
            f"| {told.least:+.2f} | {'**grows**' if told.grows else 'flat'} |\n"
        )
    return (
        text
        + "\n![Memory, descriptors, connections, tables and indexes over time](images/soak.svg)\n"
    )


WIDTH, HEIGHT, COLUMNS, GAP = 340, 110, 2, 20
INK, LINE, WRONG = "#57606a", "#0969da", "#cf222e"


def picture(found: dict[str, Any]) -> str:
    """One small chart for each series, from zero to its largest value."""
    rows = -(-len(SERIES) // COLUMNS)
    width, height = COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP
    size = f'width="{width}" height="{height}"'
    style = 'font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>']
    for number, (name, series) in enumerate(SERIES.items()):
        x = GAP + number % COLUMNS * (WIDTH + GAP)
        y = GAP + number // COLUMNS * (HEIGHT + GAP)
        told = verdict(found["samples"][name], series.floor)
        parts += _chart(found["samples"][name], told, f"{series.title}", series.unit, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _chart(values: list[float], told: Verdict, title: str, unit: str, x: int, y: int) -> list[str]:
    top = max(values) * 1.1 or 1.0
    base, room = y + HEIGHT, HEIGHT - 20
    step = WIDTH / max(1, len(values) - 1)
    points = " ".join(
        f"{x + n * step:.1f},{base - value / top * room:.1f}" for n, value in enumerate(values)
    )
    shown = f"{title}: {values[-1]:.4g} {unit}".rstrip()
    return [
        f'<text x="{x}" y="{y + 10}" fill="{INK}">{shown}</text>',
        f'<path d="M{x} {base}h{WIDTH}" stroke="{INK}" stroke-width="1" fill="none"/>',
        f'<polyline points="{points}" fill="none" stroke="{WRONG if told.grows else LINE}"/>',
    ]


def page() -> str:
    """docs/reliability.md."""
    return "".join(
        [
            HEAD,
            chaos(read(CHAOS)),
            planted(read(PLANTED)),
            scenarios(read(SCENARIOS)),
            soak(read(SOAK)),
        ]
    )


def main() -> int:
    PAGE.write_text(page())
    if found := read(SOAK):
        PICTURE.write_text(picture(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
