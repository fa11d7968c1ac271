"""`beatless tail`: the events of all runs, in one stream."""

import json
import os
import signal
import subprocess
import sys

import pytest

from beatless import App
from beatless.testing import Kit
from tests.commands import Command


def test_a_tail_shows_the_events_of_the_chosen_runs(beatless: Kit, command: Command) -> None:
    first = beatless.start_run("two_steps", tags={"shop": "a"})
    other = beatless.start_run("agents.run")
    beatless.work_until_idle()
    chosen = ("--from", first.run_id, "--plan", "two_steps", "--tag", "shop=a", "--limit", "6")

    lines = command("tail", *chosen).splitlines()
    documents = command.documents("tail", *chosen)
    (end,) = command.documents("tail", *chosen[:-1], "1", "--event", "RunFinished")

    assert [first.run_id in line and "two_steps" in line for line in lines] == [True] * 6
    assert "RunStarted" in lines[0]
    assert "completed" in lines[-1]
    assert other.run_id not in "".join(lines)
    events = [event.to_dict() for event in beatless.client.events(first.run_id)]
    assert documents == [{"plan": "two_steps", **event} for event in events]
    assert end == documents[-1]


def test_a_whole_id_names_the_namespace_of_a_tail(beatless: Kit, command: Command) -> None:
    run = beatless.app.client_for("acme").start_run("two_steps")
    (told,) = command.documents("tail", "--from", run.run_id, "--limit", "1")
    assert told["run_id"] == run.run_id


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--from", "nobody"], "nobody"),
        (["--tag", "shop"], "write it like customer=42"),
        (["--event", "RunEnded"], "RunFinished"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_bad_options_of_a_tail_are_refused(command: Command, words: list[str], advice: str) -> None:
    assert command("tail", *words, status=2) == ""
    assert advice in command.error


def test_a_tail_notes_a_plan_that_is_not_there(beatless: Kit, command: Command) -> None:
    run = beatless.start_run("two_steps")
    command(
        "tail", "--from", run.run_id, "--plan", "two_step", "--plan", "two_steps", "--limit", "1"
    )
    assert "no plan of this app is called two_step\n" in command.error


@pytest.mark.slow
@pytest.mark.usefixtures("heeded")
def test_a_tail_follows_what_comes_until_ctrl_c(beatless: Kit, beatless_app: App) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "beatless", "tail", "--json"],
        env=os.environ | beatless_app.settings.to_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tailing:
        assert tailing.stdout is not None
        assert tailing.stderr is not None
        try:
            assert any("following the runs of namespace" in line for line in tailing.stderr)
            run = beatless.start_run("two_steps")
            beatless.work_until_idle()
            told = [json.loads(tailing.stdout.readline()) for _ in range(6)]
        finally:
            tailing.send_signal(signal.SIGINT)
        tailing.wait(60)
        assert (tailing.returncode, tailing.stdout.read()) == (0, "")
    assert [(each["run_id"], each["seq"]) for each in told] == [
        (run.run_id, seq) for seq in range(1, 7)
    ]
