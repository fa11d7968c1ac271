"""Plants known bugs in copies of the tree, and lets the general load find them.

`python -m tests.faults.planted [--only NAME,…] [--missing] [--few N] [--seconds S] [--seeds N]`:
runs of `make chaos`, unmodified, that end at the first violation. A bug is caught if two of three
fresh seeds find it: it gets seeds until two have found it, or two have not, or as many as are asked
for. What was found is stored for docs/reliability.md. Exit status 1 if a bug was not caught.
`--missing` takes bugs that no stored runs have caught. `--few` takes some that have been, others
each day, with new seeds until one has found it, and stores nothing.
`tests/unit/test_planted.py` tests that each fits the tree.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.faults.bugs import BUGS, Bug
from tests.faults.results import PLANTED, ROOT, read, write

SEEDS, ENOUGH = 3, 2
"""A bug is caught if it is found with two of three seeds."""

MOST_SEEDS = 12
"""So many has a bug of `--few` at most: a slow machine does less in a run."""

Trial = dict[str, Any]
"""One run: its `seed`, the `seconds` until the bug was found or null, the `rules` that found it,
and the `first` violation."""


def plant(bug: Bug, tree: Path) -> None:
    """Raises ValueError if the tree is another one by now."""
    for edit in bug.edits:
        path = tree / edit.file
        text = path.read_text()
        if text.count(edit.text) != 1:
            raise ValueError(f"{edit.file} has this {text.count(edit.text)} times: {edit.text}")
        path.write_text(text.replace(edit.text, edit.instead))


def copy_of_the_tree(target: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, target, symlinks=True, ignore=left_out)


def trial(bug: Bug, seed: int, seconds: float) -> Trial:
    """One run of the load on a copy of the tree that has the bug."""
    with tempfile.TemporaryDirectory(prefix="planted-") as directory:
        tree = Path(directory) / "tree"
        copy_of_the_tree(tree)
        plant(bug, tree)
        run = subprocess.run(
            [
                *(sys.executable, "-m", "tests.faults", "--keep", f"{directory}/kept"),
                *("--seed", str(seed), "--seconds", str(seconds), "--stop-early"),
            ],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])},
            capture_output=True,
            text=True,
            check=False,
        )
    if "violations" not in run.stdout:
        raise RuntimeError(f"the load did not end: {run.stdout[-500:]} {run.stderr[-1500:]}")
    rules = re.findall(r"^  (\w+): \d+$", run.stdout, re.MULTILINE)
    first = re.search(rf"^  ((?:{'|'.join(rules)}) \S+: .*)$", run.stdout, re.MULTILINE)
    took = re.search(r"^  found after (\d+) s$", run.stdout, re.MULTILINE)
    found_s = int(took[1]) if took else seconds if rules else None
    says = first[1][:200] if first else None
    return {"seed": seed, "seconds": found_s, "rules": rules, "first": says}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.planted", description=__doc__)
    parser.add_argument("--only", help="these bugs, comma separated", default="")
    parser.add_argument("--missing", action="store_true", help="those that were not caught yet")
    parser.add_argument("--few", type=int, help="so many bugs, others each day")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, help="all of them, also when the verdict is known")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or list(BUGS)
    if unknown := set(names) - BUGS.keys():
        parser.error(f"no bug {sorted(unknown)}: choose from {', '.join(BUGS)}")
    if given.missing:
        known = read(PLANTED) or {}
        names = [name for name in names if not caught(known.get(name, {}).get("trials", []))]
    if given.few is not None:
        names = some_of(names, given.few, day=datetime.now(UTC).date().toordinal())
    missed = 0
    for name in names:
        trials: list[Trial] = []
        try:
            while not decided(trials, given.seeds, few=bool(given.few)):
                seed = random.SystemRandom().randrange(10**6)
                trials.append(trial(BUGS[name], seed, given.seconds))
        except RuntimeError as error:  # a mistake of the load: the other bugs have their turn
            print(f"{name}: {error}", flush=True)
            missed += 1
            continue
        if given.few is None:
            store(name, trials)
        good = bool(found(trials)) if given.few else caught(trials)
        missed += not good
        print(f"{name}: {'; '.join(map(told, trials))}", flush=True)
    print(f"planted: {len(names)} bugs, {len(names) - missed} caught")
    return 1 if missed else 0


def found(trials: list[Trial]) -> list[Trial]:
    """Those that have found the bug."""
    return [trial for trial in trials if trial["rules"]]


def caught(trials: list[Trial]) -> bool:
    return len(found(trials)) >= ENOUGH


def decided(trials: list[Trial], seeds: int | None, *, few: bool) -> bool:
    """Whether there are as many as were asked for, or no other can change the verdict."""
    if seeds is not None:
        return len(trials) >= seeds
    good = len(found(trials))
    if few:
        return good > 0 or len(trials) >= MOST_SEEDS
    return good >= ENOUGH or len(trials) - good > SEEDS - ENOUGH


def some_of(names: list[str], few: int, *, day: int) -> list[str]:
    """Some of those that stored runs have caught: others the next day, and all in turn."""
    known = read(PLANTED) or {}
    sure = [name for name in names if name in known and caught(known[name]["trials"])] or names
    return [sure[(day * few + number) % len(sure)] for number in range(min(few, len(sure)))]


def told(trial: Trial) -> str:
    if not trial["rules"]:
        return f"seed {trial['seed']}: nothing"
    return f"seed {trial['seed']}: {trial['first']} after {trial['seconds']:g} s"


def store(name: str, trials: list[Trial]) -> None:
    """Put the newest runs of this bug in the place of those before, and leave out unknown bugs."""
    known = read(PLANTED) or {}
    known[name] = {"at": datetime.now(UTC).date().isoformat(), "trials": trials}
    write(PLANTED, {bug: known[bug] for bug in BUGS if bug in known})


if __name__ == "__main__":
    sys.exit(main())
