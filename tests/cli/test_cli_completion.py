"""`beatless completion`: shells complete commands, options and plans."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from beatless.cli import run
from beatless.cli.environment import NO_SERVERS

Completed = Callable[..., list[str]]

ASKED = """
eval "$(beatless completion bash)"
complete -p beatless
ask() {
  COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
  _beatless_completion beatless
  echo "${COMPREPLY[@]}"
}
ask beatless que
ask beatless start two
"""
"""As bash calls the function when somebody presses tab."""


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Completed:
    """What a shell that has such completions is told for a line whose last word is incomplete."""
    for name, value in NO_SERVERS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BEATLESS_APP", "tests.plans:app")

    def complete(*words: str, shell: str = "fish") -> list[str]:
        monkeypatch.setenv("_BEATLESS_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(["beatless", *words]))
        monkeypatch.setenv("COMP_CWORD", words[-1] if shell == "fish" else str(len(words)))
        with pytest.raises(SystemExit):
            run([])
        said, error = capsys.readouterr()
        assert error == ""
        return [line.removeprefix("plain,") for line in said.strip().splitlines()]

    return complete


@pytest.mark.slow
def test_bash_completes_commands_and_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BEATLESS")]:
        monkeypatch.delenv(name)
    bin = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("BEATLESS_APP", "tests.plans:app")
    assert shutil.which("beatless") == str(bin / "beatless")
    asked = subprocess.run(
        ["bash", "--norc", "-c", ASKED], capture_output=True, text=True, check=True
    )
    assert asked.stderr == ""
    registered, commands, plans = asked.stdout.splitlines()
    assert "_beatless_completion" in registered
    assert commands == "queues"
    assert "two_steps" in plans.split()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_a_script_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert f"_BEATLESS_COMPLETE={shell}_complete" in capsys.readouterr().out


def test_a_shell_without_a_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


def test_commands_are_completed_with_their_help(completed: Completed) -> None:
    assert completed("tai") == ["tail\tThe events of all runs, as they come; Ctrl-C ends it."]
    assert completed("tai", shell="zsh")[:2] == ["plain", "tail"]
    assert completed("--vers")[0].startswith("--version\t")


def test_options_and_their_values_are_completed(completed: Completed) -> None:
    assert completed("runs", "--state", "comp") == ["completed"]
    assert {line.split("\t")[0] for line in completed("tail", "--")} >= {"--plan", "--from"}
    assert "two_steps" in completed("tail", "--plan", "two")
    assert completed("plan", "show", "two_st") == ["two_steps"]


def test_an_app_that_cannot_be_loaded_has_no_plans_and_says_nothing(
    completed: Completed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loud_and_broken.py").write_text("print('hello')\n1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert completed("--app", "loud_and_broken:app", "start", "") == []
    assert "two_steps" in completed("--app", "tests.plans:app", "start", "two")
