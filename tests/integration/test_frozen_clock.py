"""Tests that stop the clocks of their process, as with freezegun: the kit still stops waiting."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from beatless.errors import WaitTimeout
from beatless.outbox.clock import monotonic
from beatless.testing import Kit

PRODUCT = [
    path
    for folder in ("jobs", "orchestrator", "outbox")
    for path in (Path(__file__).parents[2] / folder).rglob("*.py")
]


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `freezegun.freeze_time` does: its clocks stand wherever a module holds them."""
    for name in ("monotonic", "perf_counter", "time", "time_ns", "monotonic_ns"):
        real, stood = getattr(time, name), getattr(time, name)()
        for module in list(sys.modules.values()):
            if module.__name__.startswith(("threading", "queue", "multiprocessing", "_pytest")):
                continue
            for held in [key for key, value in vars(module).items() if value is real]:
                monkeypatch.setattr(module, held, lambda stood=stood: stood)


WAITS: dict[str, Callable[[Kit, str], object]] = {
    "completion": lambda kit, run: kit.wait_for_run_completion(run, timeout=0.3),
    "event": lambda kit, run: kit.wait_for_event(run, "StepStarted", timeout=0.3),
    "flush": lambda kit, run: kit.wait_for_outbox_flush(run, timeout=0.3),
    "stream": lambda kit, run: kit.collect_stream(run, timeout=0.3),
    "the client's stream": lambda kit, run: list(kit.client.stream_run(run, timeout=0.3)),
    "the client's wait": lambda kit, run: kit.client.wait_for_run(run, timeout=0.3),
}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.usefixtures("frozen")
def test_a_wait_ends_while_the_clocks_stand(beatless: Kit, wait: str) -> None:
    run = beatless.start_run("agents.run")
    with pytest.raises((AssertionError, WaitTimeout)):
        WAITS[wait](beatless, run.run_id)


@pytest.mark.usefixtures("frozen")
def test_runs_are_executed_and_time_moves_while_the_clocks_stand(beatless: Kit) -> None:
    run = beatless.start_run("agents.run", delay=60)
    beatless.advance(61)
    beatless.work_until_idle()
    assert len(beatless.collect_stream(run.run_id)) == 13


def test_no_deadline_of_ours_is_by_a_clock_that_can_be_stopped() -> None:
    stoppable = re.compile(r"\btime\.monotonic|^from time import .*\bmonotonic", re.MULTILINE)
    code = {path: path.read_text() for path in PRODUCT if path.name != "clock.py"}
    assert [path.name for path, text in code.items() if stoppable.search(text)] == []
    assert abs(monotonic() - time.monotonic()) < 60
