"""Writes docs/performance.md, its picture and the table of README.md from the stored results.

`make performance` does it; tests/unit/test_performance_page.py compares them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.catalogue import OURS, PEERS, Peer
from benchmarks.peers.results import FOREIGN, METRICS, stored

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "performance.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- peers: made by benchmarks/peers/report.py -->", "<!-- peers: end -->"

Results = Mapping[str, Mapping[str, Any]]

HEAD = """# Performance

<!-- Written by `make performance` from benchmarks/results; the suite compares it. -->

beatless beside seven other systems, each measured on the same servers in the same minutes.
`make bench-peers` repeats it on your machine: it makes an environment for each peer under
`~/.cache/beatless` from pinned hashes ([locks](../benchmarks/peers/locks)), about 20 minutes for
five repeats. `make bench-peers ARGS="--only pgqueuer,beatless --workload runs --repeats 3"`
measures a part, `ARGS=--quick` everything once and small in three minutes, without storing it.
What the journal, the relay and the streams could reach at best, and what waiting runs cost, is in
[benchmarks](../benchmarks/README.md), what breaks under faults in [reliability](reliability.md).
"""

IN_SHORT = """\
Beside other systems, on the same servers in the same minutes; what each does less or more, and
how it is measured, is in [performance](docs/performance.md). `make bench-peers` repeats it on your
machine."""

NONE_YET = "\nNo result is stored yet: run `make bench-peers`.\n"

HOW = """
## How it is measured

* **One after the other, again and again.** Each repeat measures every peer once at each workload,
  in an order shuffled anew. "Ours" is our value divided by the peer's, repeat by repeat: the
  median, and in brackets the least and the largest. On another machine absolute values are others;
  ratios hold better, and differences below 15 % are noise.
* **Servers.** PostgreSQL with its defaults (fsync and synchronous_commit on) and Valkey that
  appends to a file flushed each second, as a broker needs it; a fresh database, an empty Valkey and
  a checkpoint before each trial. They share the machine's cores with everything else: who uses
  little processor time is fast here. On a disk that takes a millisecond to flush, commits matter
  more.
* **Rate.** The slope between a tenth and nine tenths of what ends, so that starts and the last
  stragglers do not count. A peer's run ends with the body of its last step; ours, and that of the
  outbox beside BullMQ, when its last event has been published, ours also at a viewer. A repeat
  in which that viewer misses one of our events fails.
* **Processor time** is that of workers, relays and servers in the same window, from the clocks of
  their processes and of all that descend from them; who starts, and the viewer of `runs`, count as
  clients, the viewer of `live` is a part of the way.
* **Commits** are transactions of the database as Postgres counts them, from before the workers
  start to their end; **WAL** is what was inserted in the window.
* **Start to first line** is from before the call that starts a job to the first line of its body,
  one clock for all processes, jobs 50 ± 20 ms apart on a system that has nothing else to do.
* A peer without a counterpart is left out of a table: only Celery, DBOS and BullMQ show what a job
  tells while it is executed.
"""


def page(results: Results) -> str:
    """docs/performance.md."""
    if not results:
        return HEAD + NONE_YET + _does(results) + HOW
    return "".join(
        (
            HEAD,
            _circumstances(results),
            "\n![The medians as bars](images/performance.svg)\n",
            _table(
                results,
                "Durable runs of five steps",
                "A backlog of runs whose steps do nothing, executed to the end.",
                ("runs", "runs_cpu", "runs_commits", "runs_wal"),
                parts="runs_cpu",
            ),
            _table(
                results,
                "Jobs of one step",
                "The same with one step; before, how many of them one process can start.",
                ("jobs", "jobs_cpu", "jobs_commits", "jobs_wal"),
                parts="jobs_cpu",
            ),
            _table(
                results,
                "Starts",
                "One process that starts jobs, each by a call and a commit of its own, or in bulk.",
                ("jobs_start", "jobs_bulk"),
            ),
            _table(
                results,
                "Start → first line",
                "On a system that has nothing else to do, 20 jobs a second, and none at all.",
                (
                    "latency",
                    "latency_p95",
                    "latency_cpu",
                    "latency_idle",
                    "latency_idle_commits",
                ),
                parts="latency_cpu",
            ),
            _table(
                results,
                "Live events",
                "An event that a job tells while it is executed, until its viewer has it; "
                "ours is committed in the journal first, theirs is not, except DBOS'.",
                ("live", "live_p95", "live_cpu"),
                parts="live_cpu",
            ),
            _does(results),
            HOW,
        )
    )


def readme(text: str, results: Results) -> str:
    """README.md with its table made from the results."""
    rows = ["| | 5-step runs | processor time each | jobs of one step | start → first line |"]
    rows += ["|---|---|---|---|---|"]
    shown = ("runs", "runs_cpu", "jobs", "latency")
    for peer in PEERS:
        cells = [_value(results, metric, peer) for metric in shown]
        if set(cells) == {"-"}:
            continue
        rows.append(f"| {_name(peer)} | {' | '.join(cells)} |")
    bars = "![The medians as bars](docs/images/performance.svg)"
    made = ["", IN_SHORT, "", *rows, "", bars, ""]
    begin, end = (text.index(mark) for mark in (BEGIN, END))
    return "\n".join([text[:begin] + BEGIN, *(made if len(rows) > 2 else []), text[end:]])


COLUMN = {
    "runs": "runs/s",
    "runs_cpu": "processor time",
    "runs_commits": "commits",
    "runs_wal": "WAL",
    "jobs": "jobs/s",
    "jobs_cpu": "processor time",
    "jobs_commits": "commits",
    "jobs_wal": "WAL",
    "jobs_start": "one by one",
    "jobs_bulk": "in bulk",
    "latency": "p50",
    "latency_p95": "p95",
    "latency_cpu": "processor time at 20/s",
    "latency_idle": "idle, of a core",
    "latency_idle_commits": "idle, transactions",
    "live": "p50",
    "live_p95": "p95",
    "live_cpu": "processor time",
}


def _table(
    results: Results, title: str, text: str, metrics: Sequence[str], *, parts: str = ""
) -> str:
    """A section with a row for each peer; "ours" stands behind the first metric and `parts`."""
    first, *rest = metrics
    if not _peers(results, first):
        return ""
    compared = {first, parts} if parts else set(metrics[:2])
    heads = [head for name in metrics for head in _heads(name, name in compared)]
    lines = [f"\n## {title}\n", f"{text}\n"]
    lines += [f"| | {' | '.join(heads)}{' | of which' if parts else ''} |"]
    lines += ["|---" * (len(heads) + 1 + bool(parts)) + "|"]
    for peer in _peers(results, first):
        cells = []
        for name in (first, *rest):
            cells.append(_spread(results, name, peer))
            if name in compared:
                cells.append(_ratio(results, name, peer))
        if parts:
            cells.append(_parts(results, parts, peer))
        lines.append(f"| {_name(peer)} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _heads(metric: str, compared: bool) -> list[str]:
    return [COLUMN[metric], "ours"] if compared else [COLUMN[metric]]


def _circumstances(results: Results) -> str:
    days = sorted({each["day"] for each in results.values()})
    machines = sorted({each["machine"] for each in results.values()})
    repeats = sorted({each["repeats"] for key, each in results.items() if key != FOREIGN})
    text = (
        f"\nMeasured on {' and '.join(days)}, {' and '.join(machines)}; "
        f"{' or '.join(map(str, repeats))} repeats, medians, in brackets the least and the largest."
    )
    if FOREIGN in results:
        foreign = results[FOREIGN]
        text += (
            f" Other processes of the machine used {foreign['value']:.2f} cores meanwhile "
            f"({foreign['min']:.2f} to {foreign['max']:.2f}). {foreign['testbed']}."
        )
    return text + "\n"


def _does(results: Results) -> str:
    lines = ["\n## What each does, and with which settings\n", "| | version | a run | settings |"]
    lines += ["|---|---|---|---|"]
    lines += [
        f"| {_name(peer)} | {peer.version or 'this checkout'} | {peer.does} | {peer.settings} |"
        for peer in PEERS
    ]
    measured = {key.partition(".")[2] for key in results}
    missing = [peer.title for peer in PEERS if results and peer.name not in measured]
    text = "\n".join([*lines, ""])
    text += (
        "\nEach peer has one worker process for each core, and the settings that gave it its "
        "highest rate in a short sweep.\n"
    )
    if missing:
        text += f"Not measured here: {', '.join(missing)}.\n"
    return text


def _peers(results: Results, metric: str) -> list[Peer]:
    return [peer for peer in PEERS if f"{metric}.{peer.name}" in results]


def _name(peer: Peer) -> str:
    return f"**{peer.title}**" if peer.name.startswith(OURS) else peer.title


def _value(results: Results, metric: str, peer: Peer) -> str:
    found = results.get(f"{metric}.{peer.name}")
    return METRICS[metric].show(found["value"]).replace(" /s", "/s") if found else "-"


def _spread(results: Results, metric: str, peer: Peer) -> str:
    found = results.get(f"{metric}.{peer.name}")
    if not found:
        return "-"
    digits = METRICS[metric].digits
    least, most = (f"{found[key]:,.{digits}f}" for key in ("min", "max"))
    return f"{_value(results, metric, peer)} ({least} to {most})"


def _ratio(results: Results, metric: str, peer: Peer) -> str:
    found = results.get(f"{metric}.{peer.name}", {}).get("ratio")
    if not found:
        return "1" if peer.name == OURS else "-"
    return f"{found['value']:.2f} x ({found['min']:.2f} to {found['max']:.2f})"


def _parts(results: Results, metric: str, peer: Peer) -> str:
    parts = results.get(f"{metric}.{peer.name}", {}).get("parts", {})
    shown = [f"{PARTS[name]} {value:.2f}" for name, value in parts.items() if value >= 0.005]
    return ", ".join(shown) or "-"


PARTS = {
    "work": "workers",
    "relay": "relay",
    "postgres": "Postgres",
    "valkey": "Valkey",
    "follow": "viewer",
}

PANELS = {
    "runs": "5-step runs, /s: more is better",
    "runs_cpu": "processor time of a run, ms: less is better",
    "jobs": "jobs of one step, /s: more is better",
    "latency": "start → first line, ms: less is better",
}
COLUMNS, WIDTH, BAR, GAP, LABEL, NUMBER = 2, 400, 15, 24, 130, 56
INK, BAR_OURS, BAR_OTHERS = "#57606a", "#0969da", "#afb8c1"


def picture(results: Results) -> str:
    """One panel of bars for each of four metrics, ours in another color."""
    rows = [
        [(peer, results[f"{metric}.{peer.name}"]["value"]) for peer in _peers(results, metric)]
        for metric in PANELS
    ]
    height = max((len(bars) for bars in rows), default=0) * (BAR + 4) + 2 * GAP
    width, depth = COLUMNS * (WIDTH + GAP) + GAP, -(-len(rows) // COLUMNS) * height + GAP
    size, style = f'width="{width}" height="{depth}"', 'font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>']
    for number, (metric, bars) in enumerate(zip(PANELS, rows, strict=True)):
        x = GAP + number % COLUMNS * (WIDTH + GAP)
        y = GAP + number // COLUMNS * height
        parts.append(
            f'<text x="{x}" y="{y}" fill="{INK}" font-weight="bold">{PANELS[metric]}</text>'
        )
        top = max((value for _, value in bars), default=1.0)
        for row, (peer, value) in enumerate(bars):
            parts += _bar(peer, value / top, f"{value:,.{METRICS[metric].digits}f}", x, y, row)
    return "\n".join([*parts, "</svg>", ""])


def _bar(peer: Peer, share: float, shown: str, x: int, y: int, row: int) -> list[str]:
    top, length = y + 10 + row * (BAR + 4), share * (WIDTH - LABEL - NUMBER)
    color = BAR_OURS if peer.name.startswith(OURS) else BAR_OTHERS
    base = top + BAR - 4
    return [
        f'<text x="{x + LABEL - 6}" y="{base}" fill="{INK}" text-anchor="end">{peer.title}</text>',
        f'<rect x="{x + LABEL}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
        f'<text x="{x + LABEL + length + 5:.1f}" y="{base}" fill="{INK}">{shown}</text>',
    ]


def main() -> None:
    results = stored()
    PAGE.write_text(page(results))
    PICTURE.write_text(picture(results))
    README.write_text(readme(README.read_text(), results))


if __name__ == "__main__":
    main()
