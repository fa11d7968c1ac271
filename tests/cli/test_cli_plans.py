"""The commands that draw a plan, retry a run, and explain one."""

import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest

from beatless import App
from beatless.cli import run
from beatless.testing import Kit


class Command:
    """Runs commands on the app of tests/plans.py, with the settings of the test's own."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.error = ""

    def __call__(self, *arguments: str, status: int = 0) -> str:
        assert run(["--app", "tests.plans:app", *arguments]) == status
        out, self.error = self._capsys.readouterr()
        return out


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
    assert "claimed once by" in lines[-2]
    assert "6 of 6 events are published" in lines[-1]
    assert command("explain", done.run_id, "--json").count('"kind": "attempt"') == 2
