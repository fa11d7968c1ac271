"""docs/performance.md and the README show the stored results; what is computed is right."""

import itertools
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from beatless.local.processes import children_of, wait_for_end
from benchmarks.peers.catalogue import BY_NAME, OURS, PEERS, WORKLOADS
from benchmarks.peers.environments import LOCKS
from benchmarks.peers.process_tree import kill, processor_s, trees
from benchmarks.peers.report import BEGIN, END, PAGE, PICTURE, README, page, picture, readme
from benchmarks.peers.results import METRICS, stored, table
from benchmarks.peers.workloads import WORKLOADS as MEASURE
from benchmarks.peers.workloads import percentile, rate


def results(**changed: float) -> dict:
    """Of each metric and peer another value."""
    numbers = itertools.count(1)
    found = {
        f"{metric}.{peer.name}": {
            "value": float(number := next(numbers)),
            "min": number - 0.5,
            "max": number + 0.5,
            "repeats": 5,
            "machine": "2 cores, Python 3.11",
            "day": "2026-01-01",
            "ratio": {"value": number / 7, "min": 0.01, "max": 99.0},
            "parts": {"work": number / 3, "postgres": number / 4},
        }
        for metric in METRICS
        for peer in PEERS
    }
    found["foreign"] = found[f"runs.{OURS}"] | {"value": 0.07, "testbed": "PostgreSQL 18"}
    for key, value in changed.items():
        found[key] = found[key] | {"value": value}
    return found


def test_the_page_is_made_of_the_stored_results() -> None:
    assert PAGE.read_text() == page(stored()), "run: make performance"


def test_the_picture_is_made_of_the_stored_results() -> None:
    assert PICTURE.read_text() == picture(stored()), "run: make performance"


def test_the_table_of_the_readme_is_made_of_the_stored_results() -> None:
    assert README.read_text() == readme(README.read_text(), stored()), "run: make performance"


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "runs_events"])
def test_another_result_is_another_page(metric: str) -> None:
    before = page(results())
    for peer in PEERS:
        assert page(results(**{f"{metric}.{peer.name}": 12345.0})) != before


@pytest.mark.parametrize("metric", ["runs", "runs_cpu", "jobs", "latency"])
def test_the_picture_and_the_readme_show_what_is_measured_of_each_peer(metric: str) -> None:
    for peer in PEERS:
        changed = results(**{f"{metric}.{peer.name}": 54321.0})
        text = f"{BEGIN}\nold\n{END}"
        assert "54,321" in picture(changed)
        assert "54,321" in readme(text, changed)
        assert "old" not in readme(text, changed)


def test_a_peer_that_was_not_measured_is_named_and_has_no_row() -> None:
    found = {key: value for key, value in results().items() if not key.endswith(".oban")}
    row = "\n| Oban (Python) |"
    tables = page(results()).count(row)
    assert tables == 6
    assert page(found).count(row) == 1, "only what it does and its settings"
    assert "Not measured here: Oban (Python)." in page(found)


def test_what_was_not_measured_has_no_table() -> None:
    found = {key: value for key, value in results().items() if key.startswith("jobs")}
    assert re.findall("\n## (.*)", page(found))[:2] == ["Jobs of one step", "Starts"]
    assert "Durable runs" not in page(found)
    assert "No result is stored yet" in page({})
    assert "|" not in readme(f"{BEGIN}\n{END}", {})


def test_the_rate_is_the_slope_between_a_tenth_and_nine_tenths() -> None:
    slow_start, steady = [0.0] * 9, [10 + n / 50 for n in range(82)]
    stragglers = [100.0 + n for n in range(9)]
    records = [(0.0, seen) for seen in (*slow_start, *steady, *stragglers)]
    assert rate(records, 100) == pytest.approx(50)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([5, 1, 3, 2, 4], 50) == 3
    assert percentile(list(range(1, 101)), 95) == 95
    assert percentile([7], 95) == 7


def test_the_table_of_the_terminal_shows_the_medians() -> None:
    text = table({"latency": {OURS: [(0, 1.0), (1, 9.0), (2, 3.0)], "oban": [(0, 2.0)]}})
    assert re.search(r"latency ms +3\.00 +2\.00", text)


def test_each_peer_has_what_its_workloads_need() -> None:
    assert MEASURE.keys() == set(WORKLOADS)
    for peer in PEERS:
        assert set(peer.workloads) <= set(WORKLOADS)
        assert {"runs", "jobs"} & set(peer.workloads) <= peer.sizes.keys()
        assert peer.version if peer.lock else peer.name.startswith(OURS)


LOCKED = sorted(LOCKS.glob("*.txt"))


@pytest.mark.parametrize("lock", LOCKED, ids=lambda lock: lock.stem)
def test_each_package_of_a_peer_is_pinned_by_its_hash_and_by_no_address(lock: Path) -> None:
    text = lock.read_text()
    pins = re.split(r"\n(?=\S)", text.strip())
    assert all(re.match(r"[\w.-]+==[\w.]+ \\\n +--hash=sha256:", pin) for pin in pins)
    assert "://" not in text


@pytest.mark.parametrize("directory", [LOCKS / "bullmq", Path(__file__).parents[1] / "readers"])
def test_the_lock_of_node_packages_has_hashes_and_no_address_of_a_registry(
    directory: Path,
) -> None:
    text = (directory / "package-lock.json").read_text()
    assert text.count('"integrity"') == text.count('"node_modules/')
    assert '"resolved"' not in text


def test_every_lock_is_a_peers_and_every_peer_has_one() -> None:
    there = {path.stem for path in LOCKED} | {"bullmq"}
    assert there == {peer.lock for peer in BY_NAME.values()} - {""}


BURNS = """
import os, sys, time
def burn(seconds):
    while time.process_time() < seconds: pass
ended = os.fork()
if not ended:
    burn(0.08); os._exit(0)
os.waitpid(ended, 0)
if not os.fork():
    burn(0.08); os.setsid(); print("burnt", flush=True); os.read(0, 1); os._exit(0)
burn(0.04); os.read(0, 1)
"""


def test_the_processor_time_of_a_tree_has_all_that_descend_and_all_that_have_ended() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BURNS], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"burnt\n"
        # The child that has ended counts in ticks of 10 ms.
        assert processor_s(process.pid) > 0.08 - 0.02 + 0.08
        assert len(trees([process.pid])) == 2
        (child,) = children_of(process.pid)
        kill([process])
    assert process.returncode == -signal.SIGKILL
    assert wait_for_end(child, timeout_s=60)
