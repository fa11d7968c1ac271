"""Records of what a process of a peer has done, for the process that measures.

Runs in the peer's own environment: needs nothing but Python. A record is two doubles of
CLOCK_MONOTONIC, when it began and when it was seen, in an append-only file for each process.
"""

import json
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

DATABASE_URL = os.environ.get("PEER_DATABASE_URL", "")
REDIS_URL = os.environ.get("PEER_REDIS_URL", "")
FOLDER = Path(os.environ.get("PEER_TALLY", "."))

now = time.monotonic

_files: dict[int, int] = {}
"""The open file of this process: after a fork it is another."""


def mark(began: float = 0.0) -> None:
    """Record that something which began then has been seen now."""
    seen, pid = now(), os.getpid()
    if pid not in _files:
        _files[pid] = os.open(FOLDER / f"t.{pid}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(_files[pid], struct.pack("<dd", began, seen))


def ready() -> None:
    """Tell that this process takes work, or listens."""
    (FOLDER / f"ready.{os.getpid()}").touch()


def report(**facts: float) -> None:
    """Hand in the facts of this process, when it ends."""
    (FOLDER / "report").write_text(json.dumps(facts))


def pauses(count: int) -> Iterator[float]:
    """So many pauses of 50 ± 20 ms, the same each time: no poll of a peer stays in step with it.

    Each is what is left until the next is due.
    """
    chance, due = random.Random(7), now()
    for _ in range(count):
        due += 0.05 + chance.uniform(-0.02, 0.02)
        yield max(0.0, due - now())


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)
