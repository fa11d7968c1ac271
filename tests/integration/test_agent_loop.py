"""The example of an agent that explores an app: killed at random, it ends as if it had not been."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from beatless import Plan
from beatless.cli.environment import load
from beatless.testing import Kit

POINTS = ("step.before", "step.effect_done", "step.committed")
SEED = 5


@pytest.fixture
def beatless_plans(monkeypatch: pytest.MonkeyPatch) -> Sequence[Plan]:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-in-tests/")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://not-used-in-tests/")
    return list(load("examples.agent_loop:app", "app").plans.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("turns", "kills"), [(200, 5), pytest.param(200, 20, marks=pytest.mark.long)]
)
def test_a_walk_that_is_killed_ends_with_the_result_of_one_that_is_not(
    beatless: Kit, tmp_path: Path, turns: int, kills: int
) -> None:
    calm = beatless.start_run("agent_loop", {"device": str(tmp_path / "calm"), "turns": turns})
    beatless.work_until_idle()
    expected = beatless.client.get_run(calm.run_id).result
    began = Counter(e.step for e in beatless.client.events(calm.run_id) if e.type == "StepFinished")
    assert expected["turns"] == turns
    # It is a walk through the whole plan.
    assert {name.partition("#")[0] for name in began} == {
        step.name for step in beatless.app.plans["agent_loop"].steps
    }

    chosen = random.Random(SEED)
    run = beatless.start_run("agent_loop", {"device": str(tmp_path / "killed"), "turns": turns})
    for _ in range(kills):
        with beatless.crash(at=chosen.choice(POINTS), nth=chosen.randint(1, 2 * turns // kills)):
            beatless.work_until_idle()
        beatless.advance(60)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == expected
    assert beatless.client.get_run(run.run_id).attempt == kills + 1
    finished = Counter(
        e.step for e in beatless.client.events(run.run_id) if e.type == "StepFinished"
    )
    assert finished == began
    beatless.verify()
