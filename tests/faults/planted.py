"""Plants known bugs in copies of the tree, and lets the general load find them.

`python -m tests.faults.planted [--only NAME,…] [--seconds S] [--seeds N]`: what was found in which
run. Exit status 1 if a bug was found in none. `tests/unit/test_planted.py` tests that each of them
still fits the tree.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Bug(NamedTuple):
    """One edit: the text stands exactly once in the file."""

    file: str
    text: str
    instead: str


BUGS = {
    "a boundary is written without the lease": Bug(
        "orchestrator/journal.sql",
        "WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running'\n"
        "     AND last_seq >= %(after)s\n"
        "  RETURNING run_id, last_seq, state,",
        "WHERE run_id = %(run_id)s AND %(token)s <> 0 AND state = 'running'\n"
        "     AND last_seq >= %(after)s\n"
        "  RETURNING run_id, last_seq, state,",
    ),
    "a trace is written without the lease": Bug(
        "orchestrator/journal.sql",
        "WHERE run_id = %(run_id)s AND lease_token = %(token)s AND state = 'running'\n"
        "     AND last_seq >= %(after)s\n"
        "  RETURNING run_id, last_seq, cancel",
        "WHERE run_id = %(run_id)s AND %(token)s <> 0 AND state = 'running'\n"
        "     AND last_seq >= %(after)s\n"
        "  RETURNING run_id, last_seq, cancel",
    ),
    "a claim keeps the token": Bug(
        "orchestrator/lease.sql",
        "attempt = attempt + 1, lease_token = %(token)s,",
        "attempt = attempt + 1, lease_token = greatest(lease_token, least(%(token)s, 7)),",
    ),
    "a lease is taken from a worker that lives": Bug(
        "orchestrator/lease.sql",
        "state = 'running' AND lease_expires_at < clock_timestamp()",
        "state = 'running' AND lease_expires_at IS NOT NULL",
    ),
    "a heartbeat keeps no lease": Bug(
        "orchestrator/lease.sql",
        "SET lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)\n"
        "    FROM held",
        "SET lease_expires_at = clock_timestamp() + make_interval(secs => %(seconds)s / 50)\n"
        "    FROM held",
    ),
    "a cancel of a run that runs is not stored": Bug(
        "orchestrator/journal.sql",
        "WHERE run_id = %(run_id)s AND namespace = %(namespace)s AND state IN ('queued', 'running')"
        "\n     AND cancel_requested_at IS NULL",
        "WHERE run_id = %(run_id)s AND namespace = %(namespace)s AND state IN ('queued')"
        "\n     AND cancel_requested_at IS NULL",
    ),
    "a cancel is stored after the end": Bug(
        "orchestrator/journal.sql",
        "AND namespace = %(namespace)s AND state IN ('queued', 'running')\n"
        "     AND cancel_requested_at IS NULL",
        "AND namespace = %(namespace)s\n     AND cancel_requested_at IS NULL",
    ),
    "a claim does not look whether its queue is paused": Bug(
        "orchestrator/lease.sql",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                              WHERE q.name = r.queue AND q.paused_at IS NOT NULL))",
        "AND NOT EXISTS (SELECT FROM {schema}.queues q\n"
        "                              WHERE q.name = '' AND q.paused_at IS NOT NULL))",
    ),
    "a run that waits for a retry is forgotten": Bug(
        "orchestrator/journal.sql",
        "WHERE d.run_id = u.run_id AND u.state NOT IN ('queued', 'running')",
        "WHERE d.run_id = u.run_id AND u.state <> 'running'",
    ),
    "a delay is shorter than asked for": Bug(
        "orchestrator/journal.sql",
        "coalesce(not_before, clock_timestamp() + make_interval(secs => delay))",
        "coalesce(not_before, clock_timestamp() + make_interval(secs => delay / 10))",
    ),
    "a start commits by itself": Bug(
        "jobs/client/base.py",
        "            return act(given)\n",
        "            given = None\n",
    ),
    "a run that was taken over begins anew": Bug(
        "orchestrator/execution.py",
        "        if self._lease.begun:\n",
        "        if self._lease.begun or self._lease.run.attempt > 1:\n",
    ),
    "a commit whose answer was lost is made again": Bug(
        "orchestrator/leased_writer.py",
        "            if tried:\n",
        "            if tried and self._run_id == '':\n",
    ),
    "a stream does not look for gaps": Bug(
        "jobs/streams/cursor.py",
        "self._early.pop(self.seq + 1, None)",
        "self._early.pop(min(self._early, default=0), None)",
    ),
    "a stream believes events of other runs": Bug(
        "jobs/streams/messages.py",
        "EventText.read(line, run_id)",
        "EventText.read(line)",
    ),
}
"""By what they do wrong."""


def plant(bug: Bug, tree: Path) -> None:
    """Raises ValueError if the tree is another one by now."""
    path = tree / bug.file
    text = path.read_text()
    if text.count(bug.text) != 1:
        raise ValueError(f"{bug.file} has this {text.count(bug.text)} times: {bug.text}")
    path.write_text(text.replace(bug.text, bug.instead))


def copy_of_the_tree(target: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, target, symlinks=True, ignore=left_out)


def found(tree: Path, seed: int, seconds: float, kept: Path) -> str:
    """The invariants that a run of the load on the tree saw violated; empty if none."""
    path = os.pathsep.join([str(tree / "src"), str(tree)])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "tests.faults", "--keep", str(kept)),
            *("--seed", str(seed), "--seconds", str(seconds)),
        ],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if "violations" not in run.stdout:
        raise RuntimeError(f"the load did not end: {run.stdout[-500:]} {run.stderr[-1500:]}")
    counts = re.findall(r"^  (\w+): (\d+)$", run.stdout, re.MULTILINE)
    return ", ".join(f"{invariant} {count}" for invariant, count in counts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.planted", description=__doc__)
    parser.add_argument("--only", help="these bugs, comma separated", default="")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    names = [name for name in given.only.split(",") if name] or list(BUGS)
    if unknown := set(names) - BUGS.keys():
        parser.error(f"no bug {sorted(unknown)}: choose from {', '.join(BUGS)}")
    missed = 0
    for name in names:
        seeds = [random.SystemRandom().randrange(10**6) for _ in range(given.seeds)]
        results = []
        for seed in seeds:
            with tempfile.TemporaryDirectory(prefix="planted-") as directory:
                tree = Path(directory) / "tree"
                copy_of_the_tree(tree)
                plant(BUGS[name], tree)
                results.append(found(tree, seed, given.seconds, Path(directory) / "kept"))
        missed += not any(results)
        told = "; ".join(f"seed {s}: {r or 'nothing'}" for s, r in zip(seeds, results, strict=True))
        print(f"{name}: {told}", flush=True)
    print(f"planted: {len(names)} bugs, {len(names) - missed} found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
