"""How a `beatless dev` is found by the commands that are run in its directory."""

import contextlib
import fcntl
import json
from pathlib import Path

LOCK = "dev.lock"
"""Held by the stack as long as it lives; its process id is inside."""

STATE = "stack.json"
"""Its process id and its settings."""


def settings_of_running(here: Path) -> dict[str, str]:
    """The BEATLESS_* variables of a stack that runs now on a data directory below `here`."""
    others = sorted(path.parent for path in here.glob(f"*/{STATE}"))
    for directory in (here / ".beatless", *others):
        try:
            with (directory / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                return dict(json.loads((directory / STATE).read_text())["environ"])
        except OSError:
            continue  # nothing has run here
    return {}
