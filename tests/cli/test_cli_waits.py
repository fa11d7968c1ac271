"""The commands about runs that wait: `waits`, `signal`, `show`, `children` and `queues`."""

from typing import Any

import pytest

from beatless import Plan, RunContext, RunState, StepContext, days, plan, sleep, step, wait
from beatless.http import Client
from beatless.testing import Kit
from tests.commands import Command
from tests.serving import serving


@step
def ship(ctx: StepContext) -> None: ...


@plan("ordered")
def ordered(run: RunContext[Any]) -> Any:
    run.wait("paid", "refused", timeout=days(3))
    return run.again(None)


@step
def pack(ctx: StepContext) -> None:
    if ctx.input == "broken":
        raise ValueError("no [red] box")


parcel = Plan("parcel", [pack])


@plan("packs")
def packs(run: RunContext[Any]) -> Any:
    return len(run.map(parcel, run.input, failure="collect"))


@plan("part")
def part(run: RunContext[bool]) -> None:
    if run.input:
        run.wait("go")


@plan("parts")
def parts(run: RunContext[list[bool]]) -> None:
    run.map(part, run.input)


@plan("first_then")
def first_then(run: RunContext[Any]) -> None:
    kept = run.child(part, True)
    run.child(part, False).result()
    kept.result()


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        part,
        parts,
        first_then,
        Plan("order", [wait("paid", "refused", timeout=days(3)), wait("delivered"), ship]),
        Plan("sleeper", [sleep(days=14), ship]),
        ordered,
        parcel,
        packs,
    ]


def test_runs_that_wait_have_a_column_of_their_own(beatless: Kit, command: Command) -> None:
    beatless.start_run("order")
    beatless.start_run("sleeper")
    beatless.work_until_idle()
    beatless.start_run("order", delay=60)
    beatless.start_run("order")
    (state,) = beatless.client.queues()
    counts = (state.queued, state.delayed, state.waiting, state.active)
    assert counts == (1, 1, 2, 0)
    (told,) = command.documents("queues")
    assert (told["queued"], told["delayed"], told["waiting"], told["active"]) == counts
    titles, row = (line.split() for line in command("queues").splitlines())
    titles = [title for title in titles if title not in ("age", "after")]  # the queue has none
    assert dict(zip(titles, row, strict=False)) | {
        "queued": "1",
        "delayed": "1",
        "waiting": "2",
    } == dict(zip(titles, row, strict=False))
    with serving(beatless.app) as api, Client(api.url) as client:
        assert client.queues() == [state]


def test_show_says_what_a_run_waits_for_and_names_no_worker(
    beatless: Kit, command: Command
) -> None:
    order, sleeper = beatless.start_run("order").run_id, beatless.start_run("sleeper").run_id
    beatless.work_until_idle()
    sheet = command("show", order)
    assert "waits for           paid or refused, until 20" in sheet
    assert "\nworker" not in sheet
    assert "\nnot_before" not in sheet
    assert "waits for           a time, until 20" in command("show", sleeper)
    (told,) = command.documents("show", order)
    assert [wait["names"] for wait in told["waits"]] == [["paid", "refused"]]
    beatless.signal(order, "paid")
    beatless.work_until_idle()
    assert "waits for           delivered, without an end" in command("show", order)
    beatless.signal(order, "delivered")
    beatless.work_until_idle()
    done = command("show", order)
    assert "waits for" not in done
    assert "\nworker" in done


def test_waits_lists_those_of_one_run_or_of_all_that_wait(beatless: Kit, command: Command) -> None:
    order, sleeper = beatless.start_run("order").run_id, beatless.start_run("sleeper").run_id
    beatless.work_until_idle()
    queued = beatless.start_run("order").run_id
    assert [told["run_id"] for told in command.documents("waits")] == [sleeper, order]
    assert [told["run_id"] for told in command.documents("waits", "--limit", "1")] == [sleeper]
    assert [told["run_id"] for told in command.documents("waits", "--plan", "order")] == [order]
    assert command.documents("waits", queued) == []
    (told,) = command.documents("waits", order)
    assert (told["occurrence"], told["names"]) == ("paid", ["paid", "refused"])
    assert command("waits").splitlines()[2].split()[:5] == [order, "paid", "paid", "or", "refused,"]
    command("waits", "nobody", status=2)
    assert "nobody" in command.error
    command("waits", order, "--plan", "order", status=2)


def test_an_empty_list_of_waits_names_another_namespace(beatless: Kit, command: Command) -> None:
    beatless.app.client_for("acme").start_run("order")
    command("waits")
    told = " ".join(command.error.split())
    assert "the waits of namespace default; there are runs in others, as --namespace acme" in told
    command("waits", "--namespace", "acme")
    assert command.error == ""


def test_children_are_listed_with_their_numbers_and_errors(beatless: Kit, command: Command) -> None:
    packs_id = beatless.start_run("packs", [1, "broken"]).run_id
    beatless.work_until_idle()
    first, second = (child.run_id for child in beatless.children(packs_id))
    titles, *rows = command("children", packs_id).splitlines()
    assert titles.split() == ["number", "run", "state", "plan", "age", "error"]
    assert [row.split()[:4] for row in rows] == [
        ["1", first, "completed", "parcel"],
        ["2", second, "failed", "parcel"],
    ]
    assert rows[1].endswith("  ValueError: no [red] box")
    assert command("children", packs_id, "--after", "1").splitlines()[1].split()[0] == "2"


def test_a_signal_that_nobody_waits_for_is_kept_and_the_answer_says_what_is_waited_for(
    beatless: Kit, command: Command
) -> None:
    order = beatless.start_run("order").run_id
    assert command("signal", order, "early") == f"early is sent to {order}\n"
    assert "waits for no signal now: early is kept for a later wait" in command.error
    beatless.work_until_idle()
    command("signal", order, "payed")
    assert "waits for paid or refused now: payed is kept for a later wait" in command.error
    with serving(beatless.app) as api, Client(api.url) as client:
        assert client.signal_run(order, "payed").waits_for == ["paid", "refused"]
    assert command.documents("signal", order, "payd")[0]["waits_for"] == ["paid", "refused"]
    command("signal", order, "paid")
    assert command.error == ""
    beatless.work_until_idle()
    assert beatless.client.signal_run(order, "x").waits_for == ["delivered"]


def test_a_wait_that_was_left_behind_is_not_waited_for(beatless: Kit) -> None:
    order = beatless.start_run("ordered").run_id
    for _ in range(2):
        beatless.work_until_idle()
        assert [wait.names for wait in beatless.waits(order)] == [["paid", "refused"]]
        beatless.signal(order, "paid")
    beatless.client.cancel_run(order)
    assert beatless.waits(order) == []


def test_explain_tells_the_end_of_a_wait_in_days(beatless: Kit, command: Command) -> None:
    sleeper = beatless.start_run("sleeper").run_id
    beatless.work_until_idle()
    told = command("explain", sleeper)
    assert "dispatched once, looked at in 14.0 days" in told


@pytest.mark.parametrize(
    ("started", "given", "told"),
    [
        ("parts", [True, False, False], "2 of 3 have ended"),
        ("parts", [True], "0 of 1 has ended"),
        ("first_then", None, "1 of 2 have ended"),
    ],
)
def test_a_run_that_waits_for_children_is_told_by_how_many_have_ended(
    beatless: Kit, command: Command, started: str, given: Any, told: str
) -> None:
    run_id = beatless.start_run(started, given).run_id
    beatless.work_until_idle()

    call = "part" if given else "part#2"
    assert f"its children: {told}" in command("waits", run_id)
    assert call in command("waits", run_id).split()
    (line,) = [each for each in command("show", run_id).splitlines() if "waits for" in each]
    assert line.endswith(f"its children: {call}, {told}")
    explained = command("explain", run_id)
    assert f"waits for its children: {call}, {told}; dispatched" in explained
    assert "looked at when they have ended (reason: wait)" in explained

    for child in beatless.client.children(run_id):
        if child.input:
            beatless.signal(child.run_id, "go")
    beatless.work_until_idle()
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED
    assert len(command("waits", run_id).splitlines()) == 1
