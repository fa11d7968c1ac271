"""Real processes of a test: each is `beatless` with the settings of the test's app."""

import os
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from beatless.app import App
from beatless.local.child import Child, Launch, spawn
from beatless.outbox.clock import monotonic
from beatless.testing.broker_guard import Guard

FENCED = (
    "import sys, beatless.cli.environment\n"
    "with beatless.cli.environment.importing():\n"
    "    import beatless.testing.broker_guard\n"
    "with beatless.testing.broker_guard.fenced(sys.argv.pop(1)):\n"
    "    beatless.cli.main()"
)
"""A process of a test: `beatless`, which publishes on the test's own broker and on no other."""

STOP_S = 10.0
"""Seconds that a process has to end in order; a worker has none."""

MAX_LINE_CHARS = 300
"""Characters of a log's last line that are shown."""


class Processes:
    """The processes of one test."""

    def __init__(
        self, app: App, *, directory: Path, guard: Guard | None, launch: Launch = spawn
    ) -> None:
        """`directory` is where they write their logs; `guard` fences them in."""
        self._app = app
        self._directory = directory
        self._guard = guard
        self._launch = launch
        self._children: list[Child] = []

    def start(self, app: str, arguments: list[str], settings: dict[str, Any]) -> Child:
        """A process of `module:attribute`, ready. Settings are those of the test, and these."""
        given = {f"BEATLESS_{name.upper()}": str(value) for name, value in settings.items()}
        # It finds the modules that the test finds: `pythonpath` of pytest is on no path but this.
        given |= {"BEATLESS_APP": app, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        name = f"{arguments[0]}-{len(self._children) + 1}"
        fenced: dict[str, Any] = {}
        if self._guard is not None:
            spec = self._guard.spec(self._directory / f"{name}.refused")
            fenced["command"] = (sys.executable, "-P", "-c", FENCED, spec)
        child = Child(
            name,
            arguments,
            environ=os.environ | self._app.settings.to_env() | given,
            log=self._directory / f"{name}.log",
            launch=self._launch,
            **fenced,
        )
        self._children.append(child)
        child.start()
        child.wait_ready()
        return child

    def described(self) -> list[str]:
        """A line for each, with the last one of its log."""
        found = []
        for child in self._children:
            with suppress(OSError):
                lines = child.log.read_text(errors="replace").strip().splitlines() or [""]
                state = "alive" if child.alive else "ended"
                found.append(f"{child.name} ({state}): {lines[-1][:MAX_LINE_CHARS]}")
        return found

    def end(self) -> None:
        """End all of them, even if one fails.

        The orderly end of a worker takes Celery two seconds, and nothing is lost without it.
        """
        now = monotonic()
        workers = [child for child in self._children if child.name.startswith("worker")]
        with ExitStack() as last:
            for child in self._children:
                last.callback(child.reap, now if child in workers else now + STOP_S)
            for child in self._children:
                if child not in workers:
                    last.callback(child.terminate)
