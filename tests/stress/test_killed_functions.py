"""Workers and relays of runs that branch, have children or are undone, killed at each boundary.

Each process is told the point at which it ends itself with SIGKILL. One that does not come to its
point goes on: nothing here needs two things to happen at once.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from beatless import Plan, RunState
from beatless.local.child import Child
from beatless.testing import Kit
from tests.killed_plans import ALL, CHILDREN, INPUTS, RESULTS, UNDONE
from tests.valkeys import until

APP = "tests.killed_plans:app"
PATIENCE_S = 1200.0
ASYNC = ["--pool", "async"]
THREADS = ["--", "--pool", "threads"]

RELAYS = ["relay.after_claim@2:kill", "relay.after_publish@2:kill", "relay.after_claim@9:kill", ""]

WORKERS: dict[str, tuple[int, list[str]]] = {
    # so many of the first die for certain, whatever the machine does; the points
    "maps": (
        3,
        [
            *("children.before", "children.started", "claim.committed@40", "wait.committed"),
            *("step.before@50", "step.effect_done@60", "step.committed@70", "task.before_ack@80"),
        ],
    ),
    "nests": (
        4,
        [
            *("children.before", "children.started", "children.started@2", "claim.committed@5"),
            *("wait.before@2", "wait.committed@2", "step.committed@9", "wait.signalled"),
        ],
    ),
    "races": (
        3,
        [
            *("claim.committed", "children.before@2", "children.started@2", "wait.before"),
            *("wait.committed", "step.committed", "wait.signalled"),
        ],
    ),
    "gathers": (
        4,
        [
            *("claim.committed", "beside.before", "beside.committed", "step.effect_done@3"),
            *("beside.committed@4", "step.before@2", "step.committed"),
        ],
    ),
    "waits": (
        3,
        [
            *("claim.committed", "beside.committed", "step.before", "wait.before"),
            *("wait.committed", "wait.signalled", "beside.committed@2", "step.committed"),
        ],
    ),
    "late_thread": (0, ["claim.committed", "step.before@2", "beside.committed@2"]),
    "late_task": (0, ["claim.committed", "step.before@2", "beside.committed@2"]),
    # up to the first undo, then in and behind each
    "undone_branches": (
        3,
        [
            *("beside.committed@2", "step.before@6", "step.effect_done", "step.committed"),
            *("step.before", "step.effect_done@2", "step.committed@2"),
        ],
    ),
    "undone_calls": (
        6,
        [
            *("step.before@6", "step.effect_done", "step.committed"),
            *("step.before", "step.effect_done@2", "step.committed"),
        ],
    ),
}


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return ALL


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    return {"lease_seconds": 20, "redispatch_seconds": 1}


class Fleet:
    """A relay and a worker at a time; whichever has died is replaced by one with the next point."""

    def __init__(self, kit: Kit, arguments: list[str], points: list[str]) -> None:
        self._kit = kit
        self._arguments = arguments
        self._points = [*(f"{point}:kill" for point in points), ""]
        self._relays = list(RELAYS)
        self.deaths = 0
        self.relay = kit.relay_process(APP, fault=self._relays.pop(0))
        self.worker = self._begin()

    def _begin(self) -> Child:
        fault = self._points.pop(0)
        return self._kit.worker_process(APP, concurrency=8, arguments=self._arguments, fault=fault)

    def replace_dead(self) -> None:
        if not self.relay.alive:
            self.relay = self._kit.relay_process(APP, fault=self._relays.pop(0))
        if not self.worker.alive:
            self.deaths += 1
            self.worker = self._begin()


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "pool"),
    [
        *((name, ASYNC) for name in WORKERS if name != "late_thread"),
        *((name, THREADS) for name in ("late_thread", "gathers", "undone_branches")),
    ],
)
def test_a_run_whose_workers_and_relays_are_killed_ends_right(
    beatless: Kit, tmp_path: Path, name: str, pool: list[str]
) -> None:
    certain, points = WORKERS[name]
    ledger = tmp_path / "ledger"
    given = INPUTS.get(name, {}) | {"ledger": str(ledger)}
    fleet = Fleet(beatless, pool, [] if "hangs" in given else points)
    run = beatless.start_run(name, given)
    if "hangs" in given:  # its first attempt is ended by force, and then its process
        beatless.wait_for_event(run.run_id, "StepFailed", timeout=PATIENCE_S)
        fleet.worker.kill()
        fleet = Fleet(beatless, pool, points)

    signals = ["go"] if name == "waits" else []

    def has_ended() -> bool:
        fleet.replace_dead()
        if signals and any(wait.names == signals for wait in beatless.waits(run.run_id)):
            beatless.signal(run.run_id, signals.pop(), 7)
        return beatless.client.get_run(run.run_id).state.final

    until(has_ended, PATIENCE_S)
    assert fleet.deaths >= certain
    check_outcome(beatless, run.run_id, name)
    check_children(beatless, run.run_id, name)
    check_bodies(beatless, ledger)
    beatless.verify()


def check_outcome(kit: Kit, run_id: str, name: str) -> None:
    """The result of a run that nobody kills, or all that was begun is undone in order."""
    ended, events = kit.client.get_run(run_id), kit.client.events(run_id)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    if name in RESULTS:
        assert (ended.state, ended.result) == (RunState.COMPLETED, RESULTS[name]), ended.error
        return
    assert ended.error is not None
    assert (ended.state, ended.error["type"]) == (RunState.FAILED, "Fatal")
    assert "undo" not in ended.error
    starts = [event for event in events if event.type == "StepStarted"]
    begun = dict.fromkeys(e.step for e in starts if "undo" in (e.data or {}))
    assert sorted(map(str, begun)) == sorted(UNDONE[name])
    ends = [str(event.step) for event in events if event.type == "StepFinished"]
    undone = [end.partition("#undo:")[2] for end in ends if "#undo:" in end]
    assert undone == [*reversed(begun)]


def check_children(kit: Kit, run_id: str, name: str) -> None:
    """Each was started once, in the order of the inputs."""
    children = kit.children(run_id)
    if name == "races":
        assert [child.plan for child in children] == ["never", "parcel", "never"]
        assert [child.state.value for child in children] == ["cancelled", "completed", "cancelled"]
    if name == "maps":
        assert [child.input["number"] for child in children] == [*range(1, CHILDREN + 1)]
    if name == "nests":
        below = [kit.children(child.run_id) for child in children]
        assert [run.input["number"] for runs in below for run in runs] == [*range(1, 61)]


def check_bodies(kit: Kit, ledger: Path) -> None:
    """No body was called after the commit of its result."""
    called: dict[str, dict[str, int]] = defaultdict(dict)
    for line in ledger.read_text().splitlines():
        run_id, step, attempt = json.loads(line)
        called[run_id][step] = max(attempt, called[run_id].get(step, 0))
    for run_id, attempts in called.items():
        finished = set()
        for event in kit.client.events(run_id):
            assert event.type != "StepStarted" or event.step not in finished
            if event.type == "StepFinished":
                finished.add(event.step)
                assert attempts[str(event.step)] <= event.attempt
