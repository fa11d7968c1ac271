"""`manage.py beatless …`: the command line, with the App of the Django project."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, handle_default_options

from beatless.cli import main

APP = "beatless.django:app"


class Command(BaseCommand):  # type: ignore[misc]  # Django has no types
    """Hands its arguments to the command line of beatless as they are."""

    help = "The command line of beatless: manage.py beatless --help"
    requires_system_checks = ()

    def run_from_argv(self, argv: list[str]) -> None:
        """`argv` is manage.py's. Exits with the status of beatless."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--settings")
        parser.add_argument("--pythonpath")
        own, arguments = parser.parse_known_args(argv[2:])
        handle_default_options(own)
        os.environ.setdefault("BEATLESS_APP", APP)
        if "dev" in arguments:
            self._start_anew(argv[0], arguments)
        main(arguments)

    def handle(self, *args: Any, **_: Any) -> None:
        """For `call_command("beatless", "runs")`. Raises SystemExit."""
        os.environ.setdefault("BEATLESS_APP", APP)
        main(list(args))

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Only for `call_command`."""
        parser.add_argument("args", nargs=argparse.REMAINDER)

    @staticmethod
    def _start_anew(script: str, arguments: list[str]) -> None:
        """Be a process in which Django is not set up yet: `dev` starts its servers before that."""
        paths = [str(Path(script).resolve().parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-m", "beatless", *arguments]
        os.execv(sys.executable, command)  # noqa: S606 - itself
