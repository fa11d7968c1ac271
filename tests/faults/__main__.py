"""`python -m tests.faults --seed N --seconds S`: the general load under random faults, checked.

Ends with one line; exit status 1 if anything was violated, and the history is kept then.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from time import monotonic, time

import psycopg

from tests.faults.checker import Violation, check
from tests.faults.faults import FAULTS, inject
from tests.faults.fleet import Fleet
from tests.faults.load import Load
from tests.faults.recorder import Recorder

HEALED_S = 120.0
"""All runs have ended, and the outbox is empty, this long after the last fault."""


def heal(fleet: Fleet) -> None:
    """Nothing is broken any more, whatever a fault has left when it was disturbed itself."""
    for slot in fleet.slots.values():
        if slot.child is not None and slot.child.alive:
            for pid in (slot.pid, *slot.children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    for way in (fleet.to_postgres, fleet.to_bus, fleet.to_api):
        way.cut_after = None
        way.release()
        way.cut()
    with fleet.connect() as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute("ALTER SYSTEM RESET default_transaction_read_only")
        session.execute("ALTER DATABASE postgres RESET ALL")
        session.execute("SELECT pg_reload_conf()")
        session.execute("DROP TRIGGER IF EXISTS chaos_full ON run_events")


def wait_until_all_is_over(fleet: Fleet) -> None:
    """Every run has ended and the outbox is empty, or the time for it is over."""
    until = monotonic() + HEALED_S
    while monotonic() < until:
        with contextlib.suppress(psycopg.Error), fleet.connect() as session:
            left = session.execute(
                "SELECT (SELECT count(*) FROM runs WHERE state IN ('queued', 'running'))"
                " + (SELECT count(*) FROM run_outbox)"
            ).fetchone()
            if left == (0,):
                return
        threading.Event().wait(0.2)


def injected(
    fleet: Fleet, recorder: Recorder, seed: int, seconds: float, kinds: list[str]
) -> tuple[Counter[str], Counter[str]]:
    """Faults until the time is over, each kind as often as the others; how many hit, and missed."""
    chance = random.Random(f"{seed}/faults")
    hits, misses = Counter[str](), Counter[str]()
    bag: list[str] = []
    until = monotonic() + seconds
    while (left := until - monotonic()) > 0:
        if not bag:
            bag = chance.sample(kinds, len(kinds))
        name, begin = bag.pop(), time()
        hit = inject(name, fleet, chance)
        recorder.write("fault", name=name, begin=begin, end=time())
        (hits if hit else misses)[name] += 1
        if sys.stderr.isatty():
            print(f"\r{left:5.0f} s  {hits.total():4} faults  {name:34}", end="", file=sys.stderr)
        threading.Event().wait(chance.expovariate(1 / 0.4))
    for name, at in fleet.ends:
        recorder.write("fault", name=name, begin=at, end=at)
    crashes = [name for name, _ in fleet.ends if name in FAULTS]
    hits.update(crashes)
    misses -= Counter(crashes)
    return hits, misses


def summary(recorder: Recorder, violations: list[Violation]) -> tuple[int, int]:
    """How many runs and events there were."""
    kinds = Counter(record["kind"] for record in recorder.records())
    for invariant, count in sorted(Counter(v.invariant for v in violations).items()):
        print(f"  {invariant}: {count}")
    for violation in violations[:20]:
        print(f"  {violation}")
    return kinds["run"], kinds["event"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", help="these faults, comma separated", default="")
    parser.add_argument("--keep", type=Path, help="where the history of a violation is kept")
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
        load = Load(fleet, recorder, given.seed)
        load.start()
        hits, misses = injected(fleet, recorder, given.seed, given.seconds, kinds)
        heal(fleet)
        fleet.wait_ready()
        load.stop()
        wait_until_all_is_over(fleet)
        with fleet.connect() as session:
            recorder.write_stored(session, fleet.ledger)
    recorder.close()
    violations = check(recorder.records())
    for name, count in sorted(hits.items()):
        print(f"  {name} x {count}" + (f" ({misses[name]} missed)" if misses[name] else ""))
    for name in sorted(misses.keys() - hits.keys()):
        print(f"  {name}: never hit ({misses[name]} missed)")
    runs, events = summary(recorder, violations)
    for failure in load.failed:
        print(f"  the load itself failed: {failure}")
    if violations or load.failed:
        kept = given.keep or Path(tempfile.gettempdir()) / f"chaos-{given.seed}"
        shutil.copytree(directory, kept, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data"))
        print(f"  history and logs: {kept}")
    shutil.rmtree(directory, ignore_errors=True)
    print(
        f"chaos: seed {given.seed}, runs {runs}, events {events}, faults {hits.total()}, "
        f"kinds {len(hits)}, views {load.viewed}, violations {len(violations)}"
    )
    return 1 if violations or load.failed else 0


if __name__ == "__main__":
    sys.exit(main())
