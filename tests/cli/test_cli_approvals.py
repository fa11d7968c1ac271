"""The commands about approvals: `approve`, `approve-link`, `revoke-link`, and what others show."""

import pytest

from beatless import Plan, RunContext, StepContext, approve, days, plan, step
from beatless.testing import Kit
from tests.commands import Command
from tests.serving import serving

ANN = "ann@example.com"


@plan("release")
def release(run: RunContext) -> list[object]:
    found = run.approve("Release it?", timeout=days(3))
    return [found.data.approved, found.data.comment, found.by]


@step
def refund(ctx: StepContext) -> int:
    return int(ctx.results["amount"].data)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [release, Plan("amounts", [approve("How much?", form=int, name="amount"), refund])]


def waiting(beatless: Kit, name: str) -> str:
    run = beatless.start_run(name).run_id
    beatless.work_until_idle()
    return run


def test_a_verdict_is_sent_by_yes_or_no_and_another_decision_as_json(
    beatless: Kit, command: Command
) -> None:
    first, second = waiting(beatless, "release"), waiting(beatless, "amounts")
    said = command("approve", first, "Release_it", "--no", "--comment", "late", "--by", ANN)
    assert said == f"Release_it of {first} was decided by {ANN}\n"
    again = ("approve", first, "Release_it", "--no", "--comment", "late", "--by", ANN)
    assert "decided before by" in command(*again)
    exact = ("approve", first, "Release_it#1", "--no", "--comment", "late", "--by", ANN)
    assert "decided before by" in command(*exact)
    command("approve", first, "Release_it", "--yes", "--by", "bob", status=1)
    assert f"was decided by {ANN}" in command.error
    command("approve", second, "amount", "--data", '"much"', "--by", ANN, status=2)
    assert "the decision is refused" in command.error
    (told,) = command.documents("approve", second, "amount", "--data", "12", "--by", ANN)
    assert (told["occurrence"], told["by"], told["new"]) == ("amount", ANN, True)
    for options in ([], ["--yes", "--data", "1"], ["--data", "1", "--comment", "x"]):
        command("approve", second, "amount", *options, "--by", ANN, status=2)
    beatless.work_until_idle()
    assert beatless.client.get_run(first).result == [False, "late", ANN]
    assert beatless.client.get_run(second).result == 12


def test_a_link_is_printed_with_the_address_of_the_api_and_can_be_revoked(
    beatless: Kit, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = waiting(beatless, "release")
    made = ("approve-link", run, "Release_it", "--by", ANN, "--expires", "2h")
    command(*made, status=2)
    assert "--base-url" in command.error
    with serving(beatless.app) as api:
        monkeypatch.setenv("BEATLESS_API_URL", api.url)
        url = command(*made).strip()
        assert api("GET", url.removeprefix(api.url)).status == 200
        link = command.error.split()[-1]
        command("revoke-link", link)
        assert api("GET", url.removeprefix(api.url)).status == 410
    command("revoke-link", "nothing", status=2)


def test_lists_and_drawings_say_that_a_run_waits_for_a_person(
    beatless: Kit, command: Command
) -> None:
    run = waiting(beatless, "release")
    assert 'a person: "Release it?", until 20' in command("waits")
    assert 'waits for           a person: "Release it?", until 20' in command("show", run)
    assert 'waits for the approval "Release it?"' in command("explain", run)
