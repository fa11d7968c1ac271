"""Plants known bugs in copies of the tree, and lets the general load find them.

`python -m tests.faults.planted [--only NAME,…] [--few N] [--seconds S] [--seeds N]`: runs of
`make chaos`, unmodified, that end at the first violation. Each bug gets fresh seeds until one has
found it, three at most, or exactly as many as are asked for. What was found is stored for
docs/reliability.md. Exit status 1 if a bug was found by none. `--few` takes some bugs that have
always been found, others each day, and stores nothing. `tests/unit/test_planted.py` tests
that each fits the tree.
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

MOST_SEEDS = 3

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
    parser.add_argument("--few", type=int, help="so many bugs, others each day")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, help="all of them, also after one has found the bug")
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or list(BUGS)
    if unknown := set(names) - BUGS.keys():
        parser.error(f"no bug {sorted(unknown)}: choose from {', '.join(BUGS)}")
    if given.few is not None:
        names = some_of(names, given.few, day=datetime.now(UTC).date().toordinal())
    missed = 0
    for name in names:
        trials: list[Trial] = []
        while len(trials) < (given.seeds or MOST_SEEDS):
            trials.append(trial(BUGS[name], random.SystemRandom().randrange(10**6), given.seconds))
            if given.seeds is None and trials[-1]["rules"]:
                break
        if given.few is None:
            store(name, trials)
        missed += not any(trial["rules"] for trial in trials)
        print(f"{name}: {'; '.join(map(told, trials))}", flush=True)
    print(f"planted: {len(names)} bugs, {len(names) - missed} found")
    return 1 if missed else 0


def some_of(names: list[str], few: int, *, day: int) -> list[str]:
    """Some of those that each stored run has found: others the next day, and all in turn."""
    known = read(PLANTED) or {}
    sure = [n for n in names if n in known and all(t["rules"] for t in known[n]["trials"])] or names
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
