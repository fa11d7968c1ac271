"""The example of an agent whose tokens are streamed, and who asks a person."""

from collections.abc import Sequence

import pytest

from beatless import Plan
from beatless.cli.environment import load
from beatless.testing import Kit


@pytest.fixture
def beatless_plans(monkeypatch: pytest.MonkeyPatch) -> Sequence[Plan]:
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "postgresql://not-used-in-tests/")
    monkeypatch.setenv("BEATLESS_REDIS_URL", "redis://not-used-in-tests/")
    return list(load("examples.streaming_agent:app", "app").plans.values())


def shown(beatless: Kit, run_id: str, step: str) -> str:
    """The text that a viewer has before it, as the docs say."""
    text = ""
    for event in beatless.client.events(run_id):
        if event.type == "StepOutput" and event.step == step:
            text = ("" if event.data["first"] == 0 else text) + "".join(event.data["pieces"])
    return text


def test_the_second_proposal_is_paid_after_a_kill_and_a_refusal(beatless: Kit) -> None:
    run = beatless.start_run("refunds", {"order": 7})
    with beatless.crash(at="step.effect_done"):
        beatless.work_until_idle()
    beatless.advance(beatless.app.settings.lease_seconds)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).state == "waiting"
    first = "The parcel came 7 days late. I propose to pay 5 euros back. "
    assert shown(beatless, run.run_id, "propose") == first

    beatless.approve(run.run_id, "payment", {"approved": False})
    beatless.work_until_idle()
    beatless.approve(run.run_id, "payment", by="ann")
    beatless.work_until_idle()

    second = "The parcel came 8 days late. I propose to pay 10 euros back. "
    assert shown(beatless, run.run_id, "propose#2") == second
    assert beatless.client.get_run(run.run_id).result == {
        "paid": second.strip(),
        "by": "ann",
        "key": f"{run.run_id}:pay",
    }
    beatless.verify()


def test_nothing_is_paid_when_nobody_decides(beatless: Kit) -> None:
    run = beatless.start_run("refunds", {"order": 7})
    beatless.work_until_idle()
    beatless.advance(8 * 86400)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == {"paid": None, "reason": "nobody decided"}
