"""The commands that draw a plan, retry a run, and explain one."""

import importlib
import json
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from beatless import App, Limit, Plan, RunContext, RunState, StepContext, plan, retry, step, wait
from beatless.cli import run
from beatless.cli.plans import as_text
from beatless.http import Client
from beatless.places import places
from beatless.testing import Kit
from tests.commands import Command
from tests.serving import serving


@pytest.fixture
def command(
    beatless_app: App,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Command]:
    for name, value in beatless_app.settings.to_env().items():
        monkeypatch.setenv(name, value)
    # The module makes its App from the environment, so each test imports it anew.
    monkeypatch.delitem(sys.modules, "tests.plans", raising=False)
    return Command(capsys)


def test_plan_show_draws_steps_routes_and_what_a_cancel_does(command: Command) -> None:
    assert command("plan", "show", "loop").splitlines()[1:] == [
        "",
        "  turn",
        "   │",
        "   ├─▶ turn",
        "   ▼",
        "  stop",
        "   └─■ the run completes",
    ]
    assert "when cancelled: undo  (2 attempts)" in command("plan", "show", "compensated")
    assert "hangs  (0.5 s, 2 attempts)" in command("plan", "show", "limited")


def test_plan_show_names_the_limits_of_a_plan_and_of_its_steps() -> None:
    @step(limits=[Limit("bank", at_once=3)])
    def pay(ctx: StepContext) -> None: ...

    told = as_text(Plan("shop", [pay], limits=[Limit("llm", rate="100/min")])).splitlines()
    assert told[0].endswith("queue default, limit llm: 100/min")
    assert told[2] == "  pay  (limit bank: 3 at once)"


def test_plan_show_makes_an_svg_that_is_well_formed_and_names_every_step(command: Command) -> None:
    picture = ET.fromstring(command("plan", "show", "compensated", "--svg"))
    texts = {"".join(node.itertext()).strip() for node in picture.iter() if node.tag[-4:] == "text"}
    assert {"first", "wavers", "second", "undo", "when cancelled 2 attempts"} <= texts


def test_plan_show_gives_the_graph_as_json(command: Command) -> None:
    text = command("plan", "show", "loop", "--json")
    assert '"plan": "loop"' in text
    assert '"next": ["stop", "turn"]' in text


def test_plan_show_of_an_unknown_plan_names_those_there_are(command: Command) -> None:
    command("plan", "show", "nosuch", status=2)
    assert "no plan is called 'nosuch'" in command.error
    assert "two_steps" in command.error


def test_plan_show_lists_the_steps_that_a_function_names(command: Command) -> None:
    text = command("plan", "show", "asks")
    assert text.splitlines() == [
        "asks  version v1, queue default, a function that names these steps",
        "",
        *("  a", "", "  b", "", "  hangs_for_good  (0.5 s)", "", "  c"),
    ]
    told = json.loads(command("plan", "show", "asks", "--json"))
    assert [each["name"] for each in told["steps"]] == ["a", "b", "hangs_for_good", "c"]
    ET.fromstring(command("plan", "show", "asks", "--svg"))


def test_plan_check_calls_functions_on_stored_results_and_no_step(
    command: Command, beatless: Kit, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger"
    run = beatless.start_run("asks", {"ledger": str(ledger)}, run_id="begun")
    beatless.step(run.run_id)
    changed = beatless.start_run("asks", {"ledger": str(ledger)}, run_id="changed")

    @plan("asks")
    def before(run: RunContext) -> None:
        for name in ("gone", "away"):
            run.step(step(name=name)(lambda ctx: None))

    beatless.executor().execute(before, changed.run_id, 0, max_steps=1)
    before_check = ledger.read_text()
    shown = command("plan", "check", status=1).splitlines()
    assert shown == [
        "asks  1 run in away: would wait, plan asks asks for a where gone is stored: changed",
        "asks  1 run in b: can go on",
    ]
    advice = command.error.replace("\n", " ")
    assert 'renamed={"gone": "a"}' in advice
    assert 'removed=["gone"] in @plan(…)' in advice
    assert "Plan(…" not in advice
    assert ledger.read_text() == before_check


def raises(run: RunContext) -> None:
    raise AttributeError("a text of its own")


def test_plan_check_and_explain_tell_by_what_a_function_differs_and_what_helps(
    command: Command, beatless: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run_id in ("one", "two"):
        given = {"ledger": str(tmp_path / run_id), "how": "never called"}
        beatless.start_run("asks", given, run_id=run_id)
        beatless.step(run_id)
    beatless.executor().execute(plan("asks")(lambda run: None), "one", 0)
    newer = plan("asks", version=7)(beatless.app.plans["asks"].function)

    def told(function: Plan) -> tuple[str, str]:
        module = importlib.import_module("tests.plans")
        monkeypatch.setitem(module.app.plans, "asks", function)
        (line,) = command("plan", "check", status=1).splitlines()
        advice = command.error.replace("\n", " ")
        (place,) = json.loads(command("--json", "plan", "check", status=1))["places"]
        assert place["difference"] in line
        assert place["advice"] in advice
        explained = command("explain", "one").splitlines()[-1]
        assert f"with the code of this app: {place['difference']}; {place['advice']}" in explained
        return line, advice

    line, advice = told(plan("asks")(raises))
    raised_at = f"test_cli_plans.py:{raises.__code__.co_firstlineno + 1}"
    assert line == (
        f"asks  2 runs in b: would wait, the function of plan asks raised AttributeError "
        f"({raised_at}) before the stored a: a text of its own: one, two"
    )
    assert advice == "2 runs would wait: mend the function "
    line, advice = told(plan("asks")(lambda run: None))
    assert "would wait, plan asks ends before the stored a: one, two" in line
    assert 'removed=["a"] in @plan(…)' in advice

    beatless.advance(60)
    beatless.executor().execute(newer, "one", 0, max_steps=1)
    beatless.executor().execute(newer, "two", 0, max_steps=1)
    beatless.executor().execute(beatless.app.plans["asks"], "one", 0)
    line, advice = told(plan("asks", version=6)(newer.function))
    assert "the run was executed by version 7 of plan asks, and this is version 6" in line
    assert "deploy version 7 of plan asks, or a higher one" in advice


def test_retry_prints_the_id_of_the_new_run(command: Command, beatless: Kit) -> None:
    failed = beatless.start_run("half")
    beatless.work_until_idle()

    new = command("retry", failed.run_id).strip()

    assert beatless.client.get_run(new).retry_of == failed.run_id
    beatless.work_until_idle()
    assert "with one" in command("show", new)
    again = command("retry", new, "--from-step", "half_second").strip()
    assert beatless.client.get_run(again).retry_of == new


def test_retry_of_a_run_that_has_not_ended_fails_with_the_reason(
    command: Command, beatless: Kit
) -> None:
    waiting = beatless.start_run("half")
    command("retry", waiting.run_id, status=1)
    assert "it is queued; wait for its end or cancel it" in command.error
    command("retry", "nobody", status=2)


def test_explain_is_a_timeline_and_json_lines(command: Command, beatless: Kit) -> None:
    done = beatless.start_run("two_steps")
    beatless.work_until_idle()

    lines = command("explain", done.run_id).splitlines()
    assert [line.split()[-1] for line in lines if " attempt " in line] == ["finished"] * 2
    worker = beatless.client.get_run(done.run_id).worker
    assert worker is not None
    host, pid, _ = worker.rsplit(":", 2)
    assert f"claimed once by {worker}, which is process {pid} on {host}" in lines[-2]
    assert int(pid) == os.getpid()
    assert "6 of 6 events are published" in lines[-1]
    assert command("explain", done.run_id, "--json").count('"kind": "attempt"') == 2


def standing_in_charge(kit: Kit, runs: int = 1) -> list[str]:
    """Runs whose attempt of a step `charge` has failed and waits, of a version that has it."""

    @step(name="charge", retry=retry(max_attempts=2, initial=10))
    def charge(ctx: StepContext) -> None:
        raise ValueError("away")

    known = Plan("two_steps", [*kit.app.plans["two_steps"].steps[:1], charge])
    started = [kit.start_run("two_steps").run_id for _ in range(runs)]
    for run_id in started:
        kit.executor().execute(known, run_id, 0)
    return started


def test_plan_check_tells_who_would_wait_for_a_step_that_this_code_does_not_have(
    command: Command, beatless: Kit
) -> None:
    assert command("plan", "check") == "no run is unfinished\n"
    fresh = beatless.start_run("two_steps").run_id
    half = beatless.start_run("two_steps", run_id="half").run_id
    beatless.step(half)
    assert command("plan", "check") == (
        "two_steps  1 run not begun: can go on\ntwo_steps  1 run in second: can go on\n"
    )
    stuck = standing_in_charge(beatless, runs=12)
    shown = command("plan", "check", status=1).splitlines()
    assert shown[0].startswith(
        "two_steps  12 runs in charge: would wait, the plan has no such step: " + min(stuck)
    )
    assert shown[0].endswith(" and 2 more")
    assert "12 runs would wait" in command.error.replace("\n", " ")
    told = json.loads(command("--json", "plan", "check", status=1))
    assert (told["unfinished"], told["waiting"]) == (14, 12)
    assert told["places"] == [
        {
            "plan": "two_steps",
            "step": "charge",
            "runs": 12,
            "waits": "unknown_step",
            "run_ids": sorted(stuck),
        },
        {"plan": "two_steps", "step": None, "runs": 1, "waits": None, "run_ids": [fresh]},
        {"plan": "two_steps", "step": "second", "runs": 1, "waits": None, "run_ids": [half]},
    ]


def test_plan_check_tells_who_goes_on_without_a_step_that_was_removed(
    command: Command, beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = beatless_app.plans["two_steps"].steps
    kept = Plan(
        "two_steps",
        [first, *(step(name=name)(lambda ctx: None) for name in ("pay", "mail")), second],
    )
    monkeypatch.setitem(beatless_app.plans, "two_steps", kept)
    beatless.apply_plans()
    for run_id in ("behind", "before", "unbegun"):
        beatless.start_run("two_steps", run_id=run_id)
    beatless.executor().execute(kept, "behind", 0, max_steps=3)
    undone = step(name="first", retry=retry(max_attempts=2, initial=10))(lambda ctx: ctx.input["x"])
    beatless.executor().execute(Plan("two_steps", [undone, *kept.steps[1:]]), "before", 0)

    assert command("plan", "check").splitlines() == [
        "two_steps  1 run not begun: can go on, without pay and mail",
        "two_steps  1 run in first: can go on, without pay and mail",
        "two_steps  1 run in second: can go on",
    ]
    told = command.error.replace("\n", " ")
    assert "2 runs (two_steps not begun, two_steps in first) will end without pay and mail" in told
    found = json.loads(command("--json", "plan", "check"))["places"]
    assert [place.get("leaves_out") for place in found] == [["pay", "mail"], ["pay", "mail"], None]


def test_plan_check_tells_which_signals_runs_wait_for_still(
    command: Command, beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/plans.md has it: the wait has another name, and its signal too."""
    first, last = beatless_app.plans["two_steps"].steps
    before = Plan("two_steps", [first, wait("picked"), last])
    both = wait("picked", "fetched", name="fetched")
    now = Plan("two_steps", [first, wait("fetched"), last], renamed={"picked": "fetched"})
    either = Plan("two_steps", [first, both, last], renamed={"picked": "fetched"})
    for run_id, version in (("old", before), ("new", either)):
        beatless.start_run("two_steps", run_id=run_id)
        beatless.executor().execute(version, run_id, 0)

    of_the_command = importlib.import_module("tests.plans").app
    monkeypatch.setitem(of_the_command.plans, "two_steps", now)
    assert command("plan", "check").splitlines() == [
        "two_steps  1 run in fetched: can go on",
        "two_steps  1 run in picked: can go on",
    ]
    told = " ".join(command.error.split())
    assert told == (
        "1 run (two_steps in picked) waits for picked, as when the wait began, which no fetched "
        "ends: send picked while `beatless waits --plan two_steps` lists such a wait"
    )
    found = json.loads(command("--json", "plan", "check"))["places"]
    assert [(place.get("waits_for"), place.get("ignores")) for place in found] == [
        (None, None),
        (["picked"], ["fetched"]),
    ]

    assert list(beatless.client.signal_run("old", "fetched").waits_for) == ["picked"]
    beatless.client.signal_run("old", "picked")
    beatless.client.signal_run("new", "fetched")
    beatless.drain_outbox_once()
    for run_id in ("old", "new"):
        beatless.executor().execute(either, run_id, 1)
        assert beatless.client.get_run(run_id).state is RunState.COMPLETED


def test_plan_check_advises_for_each_difference_what_helps_there(
    command: Command, beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = beatless.app.plans["half"]
    beatless.start_run("half", run_id="lost")
    beatless.step("lost")
    module = importlib.import_module("tests.plans")
    monkeypatch.delitem(module.app.plans, "half")
    assert kept.name not in module.app.plans

    def advice() -> str:
        return command.error.replace("\n", " ")

    assert "is not in this app: lost" in command("plan", "check", status=1)
    deploy = "the app of this command lacks the plan: deploy code that has it, or cancel its runs"
    assert f"1 run would wait: {deploy}" in advice()
    assert "keep the step" not in advice()
    standing_in_charge(beatless, runs=2)
    command("plan", "check", status=1)
    assert f"1 run (half in half_second) would wait: {deploy}" in advice()
    assert "2 runs (two_steps in charge) would wait: keep the step" in advice()


def test_plan_check_knows_renames_cancels_other_plans_and_the_step_that_undoes(
    command: Command, beatless: Kit, beatless_app: App
) -> None:
    (stuck,) = standing_in_charge(beatless)
    first, second = beatless_app.plans["two_steps"].steps
    undo = step(name="undo", retry=retry(max_attempts=2, initial=10))(lambda ctx: ctx.input["gone"])
    undone = Plan("compensated", [first], on_cancel=undo)
    run_id = beatless.start_run("compensated").run_id
    beatless.step(run_id)
    beatless.client.cancel_run(run_id)
    cancelled = places(beatless_app.engine, beatless_app.journal, beatless_app.plans)
    assert [(place.step, place.waits) for place in cancelled] == [
        ("charge", "unknown_step"),
        ("undo", None),
    ]
    beatless.executor().execute(undone, run_id, 0)

    def waiting(*plans: Plan) -> list[tuple[str, str | None, str | None]]:
        found = places(
            beatless_app.engine, beatless_app.journal, {plan.name: plan for plan in plans}
        )
        return [(place.plan, place.step, place.waits) for place in found]

    renamed = Plan("two_steps", [first, second], renamed={"charge": "second"})
    assert waiting(renamed, undone) == [
        ("compensated", "undo", None),
        ("two_steps", "charge", None),
    ]
    assert waiting(renamed, Plan("compensated", [undo])) == [
        ("compensated", "undo", "unknown_step"),  # the same name, and not the same role
        ("two_steps", "charge", None),
    ]
    assert waiting(renamed, Plan("compensated", [first])) == [
        ("compensated", "undo", "unknown_step"),
        ("two_steps", "charge", None),
    ]
    assert waiting() == [
        ("compensated", "undo", "unknown_plan"),
        ("two_steps", "charge", "unknown_plan"),
    ]
    assert stuck


def test_runs_are_found_by_the_step_that_they_are_in(
    command: Command, beatless: Kit, beatless_app: App
) -> None:
    (stuck,) = standing_in_charge(beatless)
    half = beatless.start_run("two_steps", run_id="half").run_id
    beatless.step(half)
    ended = beatless.start_run("two_steps").run_id
    beatless.executor().execute(beatless_app.plans["two_steps"], ended, 0)
    again = beatless.start_run("loop", {"turns": 9}).run_id
    for _ in range(3):
        beatless.step(again)
    found = {"charge": [stuck], "second": [half], "turn": [again], "turn#4": [], "first": []}
    with serving(beatless_app) as api, Client(f"http://127.0.0.1:{api.port}") as client:
        for name, run_ids in found.items():
            ways = [
                [run["run_id"] for run in documents(command("--json", "runs", "--step", name))],
                [run.run_id for run in beatless.client.list_runs(step=name)],
                [run.run_id for run in client.list_runs(step=name)],
            ]
            assert ways == [run_ids] * 3
    assert beatless.client.list_runs(step="charge", state="running") == []
    assert beatless.client.list_runs(step="charge", plan="loop") == []


def documents(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_plan_is_drawn_without_servers_and_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("BEATLESS_DATABASE_URL", "BEATLESS_REDIS_URL"):
        monkeypatch.setenv(name, "")
    assert run(["plan", "show", "agents.run"]) == 0
    assert capsys.readouterr().out.startswith("agents.run  version")
    assert os.environ["BEATLESS_DATABASE_URL"].endswith("no-server-is-needed.invalid/")
    monkeypatch.setenv("BEATLESS_DATABASE_URL", "")
    assert run(["runs"]) == 2
    assert "BEATLESS_DATABASE_URL is not set" in capsys.readouterr().err
