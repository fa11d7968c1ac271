"""`beatless limits`, and what `explain` says of a run that waits for one."""

import pytest

from beatless import Limit, Plan, RunState, StepContext, step
from beatless.testing import Kit
from tests.commands import Command


@step
def charge(ctx: StepContext) -> None: ...


@pytest.fixture
def beatless_plans() -> list[Plan]:
    limit = Limit("stripe", key=lambda order: order["account"], at_once=1)
    return [Plan("charge", [charge], limits=[limit])]


def test_limits_are_listed_set_and_released(beatless: Kit, command: Command) -> None:
    runs = [beatless.start_run("charge", {"account": "acct_7"}).run_id for _ in range(3)]

    [document] = command.documents("limits", "ls")
    assert (document["name"], document["key"]) == ("stripe", "acct_7")
    assert (document["at_once"], document["is_set"], document["waiting"]) == (1, False, 2)
    assert "acct_7" in command("limits")

    command("limits", "set", "stripe", "--at-once", "2")
    assert "lets 2 run at once" in command.error
    beatless.drain_outbox_once()
    [document] = command.documents("limits", "ls")
    assert (document["at_once"], document["is_set"], document["waiting"]) == (2, True, 1)

    command("limits", "release", "stripe")
    assert "is that of its plans" in command.error
    command("limits", "release", "stripe")
    assert "was not set, and is that of its plans" in command.error
    beatless.work_until_idle()
    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}
    assert command.documents("limits") == []


def test_a_bad_number_is_refused(command: Command) -> None:
    command("limits", "set", "stripe", "--at-once", "0", status=2)
    assert "at_once is 0; give a number of runs, 1 to 10,000" in command.error
    command("limits", "set", "stripe", "--rate", "5/min", status=2)
    assert "Give at_once, as in `beatless limits set stripe --at-once 5`" in command.error
    command("limits", "set", "a b", "--at-once", "1", status=2)
    assert "name is 'a b', which does not match" in command.error


def test_explain_names_the_limit_that_a_run_waits_for_and_who_has_its_slots(
    beatless: Kit, command: Command
) -> None:
    first, second = (beatless.start_run("charge", {"account": "a"}).run_id for _ in range(2))
    with beatless.crash("step.effect_done"):
        beatless.work_until_idle()

    shown = " ".join(command("explain", second).split())

    assert f"waits for the limit stripe (key a): 1 of 1 in use by {first}" in shown
    assert "looked at when there is room" in shown


def test_a_limit_that_nothing_has_is_set_by_force_only(beatless: Kit, command: Command) -> None:
    command("limits", "set", "strpe", "--at-once", "2", status=2)
    told = " ".join(command.error.split())
    assert "name is 'strpe', a limit that no plan of this app has" in told
    assert "known are stripe. For plans to come give force, as in `beatless limits set" in told
    assert beatless.client.limits() == []

    command("limits", "set", "strpe", "--at-once", "2", "--force")
    command("limits", "set", "strpe", "--at-once", "3")
    assert [(each.name, each.at_once) for each in beatless.client.limits()] == [("strpe", 3)]


def test_a_name_that_nothing_has_is_not_released(beatless: Kit, command: Command) -> None:
    command("limits", "release", "strpe", status=2)
    told = " ".join(command.error.split())
    assert "name is 'strpe', a limit that no plan of this app has, and that is not set in" in told
    assert "namespace default; known are stripe" in told

    beatless.client.set_limit("strpe", 2, force=True)
    command("limits", "release", "strpe")
    assert "limit strpe is that of its plans" in command.error


def test_who_sees_no_limit_is_told_which_there_are(
    beatless: Kit, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("limits")
    told = " ".join(command.error.split())
    assert "no limit of namespace default is in use, waited for or set" in told
    assert "plans of this app have stripe: each is listed while runs use it" in told

    monkeypatch.setattr(beatless.app, "plans", {})
    command("limits")
    assert 'limits=[Limit("stripe", at_once=3)])' in " ".join(command.error.split())


def test_limits_are_those_of_a_namespace(beatless: Kit, command: Command) -> None:
    acme = beatless.app.client_for("acme")
    acme.start_run("charge", {"account": "acct_7"})
    acme.start_run("charge", {"account": "acct_7"})
    assert "acct_7" not in command("limits")
    assert "the limits of namespace default; there are runs in others, as --namespace acme" in (
        " ".join(command.error.split())
    )
    assert "acct_7" in command("limits", "--namespace", "acme")
    assert command.error == ""

    command("limits", "set", "stripe", "--at-once", "2", "--namespace", "acme")
    told = " ".join(command.error.split())
    assert told == (
        "in namespace acme limit stripe lets 2 run at once; "
        "`beatless limits release stripe --namespace acme` ends that"
    )
    assert [(state.at_once, state.is_set) for state in acme.limits()] == [(2, True)]
    assert beatless.client.limits() == []
    command("limits", "release", "stripe")
    assert "in namespace default limit stripe was not set" in command.error
    command("limits", "release", "stripe", "--namespace", "acme")
    assert [state.is_set for state in acme.limits()] == [False]
