"""The command line in the process of a test."""

import json
from typing import Any

import pytest

from beatless.cli import run


class Command:
    """Runs commands with the settings of the test's own app."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.error = ""

    def __call__(self, *arguments: str, status: int = 0) -> str:
        assert run(["--app", "tests.plans:app", *arguments]) == status
        out, self.error = self._capsys.readouterr()
        return out

    def documents(self, *arguments: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self(*arguments, "--json").splitlines()]
