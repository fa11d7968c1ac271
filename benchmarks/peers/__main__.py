"""Measures beatless beside other systems: `python -m benchmarks.peers`, 20 minutes.

Each repeat measures every peer once at each workload, in an order shuffled anew, so that a slow
minute of the machine is nobody's. `--quick` takes three minutes and stores nothing.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from time import monotonic

from beatless.errors import JobsError
from benchmarks.peers import report
from benchmarks.peers.catalogue import BY_NAME, WORKLOADS, Peer
from benchmarks.peers.environments import CannotInstall
from benchmarks.peers.results import METRICS, Values, store, table
from benchmarks.peers.testbed import Testbed, TrialFailed
from benchmarks.peers.workloads import WORKLOADS as MEASURE

REPEATS = 5
QUICK_SIZE = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a peer could not be measured, 0 if all were."""
    chosen = _parse(arguments)
    began, failures = monotonic(), list[str]()
    peers = _installed([BY_NAME[name] for name in chosen.only], failures)
    size, repeats = (QUICK_SIZE, 1) if chosen.quick else (1.0, chosen.repeats)
    found: Values = {}
    with Testbed.open() as bed:
        described = bed.described()
        print(described)
        for repeat in range(repeats):
            for workload in chosen.workload:
                able = [peer for peer in peers if workload in peer.workloads]
                for peer in random.sample(able, len(able)):
                    where = f"{monotonic() - began:5.0f} s  {repeat + 1}/{repeats} {workload:8}"
                    print(f"{where} {peer.name:17}", end="", flush=True)
                    try:
                        with bed.trial(peer, workload) as trial:
                            values = MEASURE[workload](trial, size)
                    except TrialFailed as error:
                        print(f" failed: {error}", flush=True)
                        failures.append(f"{peer.name}, {workload}: {error}")
                        continue
                    for metric, value in values.items():
                        found.setdefault(metric, {}).setdefault(peer.name, []).append(
                            (repeat, value)
                        )
                    shown = [METRICS[name].show(values[name]) for name in values if name in METRICS]
                    print(f" {', '.join(shown)}", flush=True)
    print("\n" + table(found))
    for failure in failures:
        print(f"left out: {failure}")
    if not chosen.quick:
        store(found, described)
        report.main()
        print("stored in benchmarks/results/latest.json; docs/performance.md and README.md show it")
    return 1 if failures else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-peers ARGS=…", description=__doc__)
    names = ",".join(BY_NAME)
    parser.add_argument("--only", metavar="PEERS", default=names, help=f"default: {names}")
    parser.add_argument("--workload", metavar="WORKLOADS", default=",".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"default: {REPEATS}")
    parser.add_argument("--quick", action="store_true", help="small, once; stores nothing")
    chosen = parser.parse_args(arguments)
    for option, known in (("only", tuple(BY_NAME)), ("workload", WORKLOADS)):
        given = getattr(chosen, option).split(",")
        if wrong := [name for name in given if name not in known]:
            parser.error(f"--{option}: there is no {wrong[0]!r}; choose of {', '.join(known)}")
        setattr(chosen, option, [name for name in known if name in given])
    if chosen.repeats < 1:
        parser.error("--repeats: 1 or more")
    return chosen


def _installed(peers: Sequence[Peer], failures: list[str]) -> list[Peer]:
    """Those that have an environment on this machine, made now if need be."""
    able = []
    for peer in peers:
        print(f"environment of {peer.name} …", end="", flush=True)
        try:
            peer.command()
        except CannotInstall as error:
            print(f" cannot be installed: {error}")
            failures.append(f"{peer.name} cannot be installed: {error}")
        else:
            print(" ready")
            able.append(peer)
    return able


if __name__ == "__main__":
    try:
        sys.exit(main())
    except JobsError as error:
        sys.exit(f"error: {error}")
