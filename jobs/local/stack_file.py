"""The file by which commands find the `beatless dev` of their directory."""

import contextlib
import fcntl
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from beatless.outbox.clock import monotonic

LOCK = "dev.lock"
"""Held by the stack as long as it lives; its process id is inside."""

STATE = "stack.json"
"""Its process id and its settings."""

DJANGO_SETTINGS = "DJANGO_SETTINGS_MODULE"
"""Beside those settings, if the app is that of a Django project."""

START_S = 120.0
"""How long a stack that is starting is waited for."""

LOOK_INTERVAL_S = 0.1


def settings_of_running(here: Path, say: Callable[[str], None]) -> dict[str, str]:
    """The variables of a stack that runs now on a data directory below `here`.

    One that is starting is waited for, after a word to `say`: `beatless dev &` and the next command
    are often typed at once.
    """
    deadline = monotonic() + START_S
    told = False
    while True:
        starting = _starts_in(here)
        for directory in _data_directories(here):
            if not _runs_on(directory):
                continue
            if found := _environ(directory):
                return found
            starting = True
        if not starting or monotonic() > deadline:
            return {}
        if not told:
            say("`beatless dev` is starting in this directory: waiting for it")
            told = True
        threading.Event().wait(LOOK_INTERVAL_S)  # it may end without a word


def settings_of_ready(here: Path) -> dict[str, str]:
    """The same of one that has started; nothing is waited for."""
    running = (_environ(each) for each in _data_directories(here) if _runs_on(each))
    return next((found for found in running if found), {})


def _environ(directory: Path) -> dict[str, str] | None:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return dict(json.loads((directory / STATE).read_text())["environ"])
    return None


def _data_directories(here: Path) -> list[Path]:
    others = sorted(path.parent for path in here.glob(f"*/{LOCK}"))
    return [here / ".beatless", *(other for other in others if other.name != ".beatless")]


def _runs_on(directory: Path) -> bool:
    try:
        with (directory / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # nothing has run here, or not for us
    return False


def _starts_in(here: Path) -> bool:
    """Whether a `beatless dev` of this directory still is on its way to its lock."""
    return any(
        directory == str(here) and "dev" in arguments and _holds_no_lock(pid)
        for pid, directory, arguments in _commands()
    )


def _commands() -> Iterator[tuple[int, str, list[str]]]:
    """The commands `beatless …` that run now: their process, directory and arguments."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            for place, word in enumerate(line[:4]):
                if Path(word).name == "beatless":
                    yield int(process.name), str((process / "cwd").readlink()), line[place + 1 :]


def _holds_no_lock(pid: int) -> bool:
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if descriptor.readlink().name == LOCK:
                    return False
        return True
    return False
