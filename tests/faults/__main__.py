"""`python -m tests.faults --seed N --seconds S`: the general load under random faults, checked.

Ends with one line; exit status 1 if anything was violated. Then the history is kept, and beside it
the least part of it in which the first violation is.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, time

from tests.faults.calm import UNFINISHED, calm, drain, heal, quiet
from tests.faults.checker import Violation, check
from tests.faults.faults import FAULTS, inject, lane_of
from tests.faults.fleet import GRACE_S, Fleet
from tests.faults.guests import ABSENT
from tests.faults.history import Record
from tests.faults.load import Load
from tests.faults.recorder import Recorder
from tests.faults.results import add_chaos, kills_in
from tests.faults.shrink import shrunk

HEALED_S = 120.0
"""All runs have ended, and the outbox is empty, this long after the last fault."""

STORM_S = (5.0, 10.0)
"""Between two calm periods."""

CALM_S = 7.0

LASTING = ("messages_to_viewers_lost",)
"""Faults that last until all is healed: they come first in each storm."""


ANOTHER_HISTORY = "another_history_declared"


class Lane:
    """Faults one after the other, each kind as often as the others."""

    def __init__(
        self, recorder: Recorder, fleet: Fleet, chance: random.Random, kinds: list[str]
    ) -> None:
        self._recorder = recorder
        self._fleet = fleet
        self._chance = chance
        self._kinds = kinds
        self._bag: list[str] = []

    def inject(self, until: float) -> list[tuple[str, bool]]:
        """Faults until then, and whether each has hit; first those that last for as long."""
        found, first = [], [kind for kind in self._kinds if kind in LASTING]
        while self._kinds and monotonic() < until:
            if not self._bag:
                self._bag = self._chance.sample(self._kinds, len(self._kinds))
            name, begin = (first or self._bag).pop(), time()
            found.append((name, inject(name, self._fleet, self._chance)))
            self._recorder.write("fault", name=name, begin=begin, end=time())
            threading.Event().wait(self._chance.expovariate(1 / 0.3))
        return found


class Chaos:
    """One run of the load under faults, with calm periods."""

    def __init__(self, fleet: Fleet, recorder: Recorder, seed: int, kinds: Sequence[str]) -> None:
        self.hits, self.misses = Counter[str](), Counter[str]()
        self.load = Load(fleet, recorder, seed)
        self._fleet = fleet
        self._recorder = recorder
        self._chance = random.Random(f"{seed}/faults")
        self._processes, self._servers, self._brief = (
            Lane(recorder, fleet, random.Random(f"{seed}/{lane}"), names)
            for lane in ("processes", "servers", "brief")
            for names in [[kind for kind in kinds if lane_of(kind) == lane]]
        )
        self._kills = Lane(
            recorder,
            fleet,
            random.Random(f"{seed}/kills"),
            [kind for kind in kinds if kind == "child_killed"],
        )
        self._kinds = kinds
        self._ends = self._stops = 0

    def run(self, seconds: float, *, stop_early: bool) -> float | None:
        """Until the time is over, or a calm period has shown a violation: after so many seconds."""
        began = monotonic()
        while (left := seconds - (monotonic() - began)) > 0:
            self._storm(min(left, self._chance.uniform(*STORM_S)))
            self._heal()
            if stop_early and self._violated():
                return monotonic() - began
            with quiet(self._fleet, self.load, self._recorder) as drained:
                if drained is not None:
                    calm(self._fleet, self.load, self._recorder, self._chance, CALM_S)
            if stop_early and self._violated():
                return monotonic() - began
        return None

    def end(self) -> None:
        """Nobody calls any more, all is healed and ends, and what is stored is written down."""
        self._heal()
        self._fleet.wait_ready()
        release = self.load.senders.release
        self.load.stop(lambda: drain(self._fleet, UNFINISHED, HEALED_S, release))
        self._note_ends()
        with self._fleet.connect_patiently() as session:
            self._recorder.write_stored(session, self._fleet.ledger)

    def _storm(self, seconds: float) -> None:
        """Faults for so long, of all lanes at once; in every other storm children die all the time.

        They are the cheapest to kill: their parent forks the next.
        """
        until = monotonic() + seconds
        lanes = [self._processes, self._brief]
        if self._chance.random() < 0.5:
            lanes.append(self._kills)
        with ThreadPoolExecutor(len(lanes)) as beside:
            others = [beside.submit(each.inject, until) for each in lanes]
            # In this thread: a server ends with the thread that has started it.
            found = self._servers.inject(until)
        for name, hit in [*found, *(each for done in others for each in done.result())]:
            (self.hits if hit else self.misses)[name] += 1
        if sys.stderr.isatty():
            print(f"\r{self.hits.total():4} faults ", end="", file=sys.stderr)

    def _heal(self) -> None:
        """Take all faults back: what was held is cut, which is one more.

        Often after a restore has been declared, which all viewers learn of when they come again.
        """
        if ANOTHER_HISTORY in self._kinds and self._chance.random() < 0.5:
            begin = time()
            hit = inject(ANOTHER_HISTORY, self._fleet, self._chance)
            (self.hits if hit else self.misses)[ANOTHER_HISTORY] += 1
            self._recorder.write("fault", name=ANOTHER_HISTORY, begin=begin, end=time())
        begin = time()
        heal(self._fleet)
        self._recorder.write("fault", name="all connections cut", begin=begin, end=time())

    def _note_ends(self) -> None:
        """Processes that have ended since the last time; a crash point hits by that.

        And those that were asked to stop.
        """
        stops, self._stops = self._fleet.stops[self._stops :], len(self._fleet.stops)
        for pids, at in stops:
            self._recorder.write("stop", pids=pids, at=at, grace_s=GRACE_S)
        ends, self._ends = self._fleet.ends[self._ends :], len(self._fleet.ends)
        for name, at in ends:
            self._recorder.write("fault", name=name, begin=at, end=at)
            if name in FAULTS:
                self.hits[name] += 1
                self.misses[name] -= 1

    def _violated(self) -> bool:
        with self.load.hushed():
            self._note_ends()
            with self._fleet.connect_patiently() as session:
                part = self._recorder.part(session, self._fleet.ledger)
        return bool(check(part))


def told(violations: list[Violation]) -> None:
    for invariant, count in sorted(Counter(v.invariant for v in violations).items()):
        print(f"  {invariant}: {count}")
    for violation in violations[:20]:
        print(f"  {violation}")


def keep(directory: Path, kept: Path, records: list[Record], violations: list[Violation]) -> None:
    """The history, the logs, and the least history of the first violation."""
    shutil.copytree(directory, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data"))
    print(f"  history and logs: {kept}")
    if violations:
        least = shrunk(records, violations[0])
        lines = [json.dumps(record) + "\n" for record in least]
        (kept / "shrunk.jsonl").write_text("".join(lines))
        print(f"  {len(least)} of {len(records)} records are enough: {kept}/shrunk.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", help="these faults, comma separated", default="")
    parser.add_argument("--keep", type=Path, help="where the history of a violation is kept")
    parser.add_argument(
        "--stop-early", action="store_true", help="check after each calm, stop at a violation"
    )
    parser.add_argument("--store", action="store_true", help="add the counts to chaos.json")
    given = parser.parse_args()
    kinds = [name for name in given.only.split(",") if name] or list(FAULTS)
    if unknown := set(kinds) - FAULTS.keys():
        parser.error(f"no fault {sorted(unknown)}: choose from {', '.join(FAULTS)}")
    print(f"chaos: seed {given.seed}, {given.seconds:g} s, {len(kinds)} kinds of faults")
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    directory.chmod(0o755)
    recorder = Recorder(directory / "history.jsonl")
    with Fleet(directory) as fleet:
        fleet.wait_ready()
        chaos = Chaos(fleet, recorder, given.seed, kinds)
        chaos.load.begin()
        try:
            found_s = chaos.run(given.seconds, stop_early=given.stop_early)
            if found_s is None:
                chaos.end()
                records = recorder.records()
            else:
                print(f"  found after {found_s:.0f} s")
                with chaos.load.hushed(), fleet.connect_patiently() as session:
                    records = recorder.part(session, fleet.ledger)
        finally:
            chaos.load.leave()
    violations = check(records)
    for name, count in sorted(chaos.hits.items()):
        missed = chaos.misses[name]
        print(f"  {name} x {count}" + (f" ({missed} missed)" if missed > 0 else ""))
    for name, needed in ABSENT.items():
        print(f"  {name}: not here, it needs {needed}")
    for name in sorted(chaos.misses.keys() - chaos.hits.keys()):
        print(f"  {name}: never hit ({chaos.misses[name]} missed)")
    told(violations)
    for failure in chaos.load.failed:
        print(f"  the load itself failed: {failure}")
    if violations or chaos.load.failed:
        kept = given.keep or Path(tempfile.gettempdir()) / f"chaos-{given.seed}"
        keep(directory, kept, records, violations)
    shutil.rmtree(directory, ignore_errors=True)
    counts = Counter(record["kind"] for record in records)
    if given.store:
        add_chaos(
            seed=given.seed,
            seconds=given.seconds,
            hits=chaos.hits,
            counts=counts,
            broken=len(violations),
        )
    print(
        f"chaos: seed {given.seed}, runs {counts['run']}, events {counts['event']}, "
        f"faults {chaos.hits.total()}, kills {kills_in(chaos.hits)}, "
        f"kinds {len(chaos.hits)}, views {chaos.load.viewed}, "
        f"calms {counts['calm']}, violations {len(violations)}"
    )
    return 1 if violations or chaos.load.failed else 0


if __name__ == "__main__":
    sys.exit(main())
