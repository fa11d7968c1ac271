"""Runs that wait, measured: `python -m benchmarks.waits [part …]`, 15 minutes.

With the processes that people run: `beatless relay`, `worker` and `serve`. Another size than all of
it is shown and not stored. Keys are `waits.<name>`.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.measure import record
from benchmarks.waits import children, loops, many_steps, tokens, waiting
from benchmarks.waits.fleet import Chosen, Figure

REPEATS = 5

PARTS: Mapping[str, Callable[[Chosen], Iterator[Figure]]] = {
    "waiting": waiting.measure,
    "map": children.measure,
    "async": many_steps.measure,
    "loop": loops.measure,
    "tokens": tokens.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench-waits ARGS=…", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--size", type=float, default=1.0, help="a share of it, as 0.05")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"default: {REPEATS}")
    chosen = parser.parse_args(arguments)
    if wrong := [name for name in chosen.parts if name not in PARTS]:
        parser.error(f"there is no part {wrong[0]!r}; choose of {', '.join(PARTS)}")
    if not 0 < chosen.size <= 1:
        parser.error("--size: above 0, and 1 at most")
    if chosen.repeats < 1:
        parser.error("--repeats: 1 or more")
    wanted = Chosen(size=chosen.size, repeats=chosen.repeats)
    for name in chosen.parts or PARTS:
        for figure in PARTS[name](wanted):
            record(
                f"waits.{figure.key}",
                figure.values,
                unit=figure.unit,
                what=figure.what,
                facts=figure.facts,
                store=wanted.size == 1,
            )


if __name__ == "__main__":
    main()
