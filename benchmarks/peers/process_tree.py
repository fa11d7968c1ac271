"""Trees of processes: their start, the processor time that they have used, and their end."""

import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from beatless.local.processes import die_with_parent

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def start(command: Sequence[str], environ: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process that ends with this one, its output in the log."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environ),
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
        )


def kill(roots: Iterable[subprocess.Popen[bytes]]) -> None:
    """SIGKILL to each process and all that descend from it."""
    roots = list(roots)
    for pid in trees(root.pid for root in roots):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for root in roots:
        root.wait()


def trees(roots: Iterable[int]) -> list[int]:
    """The roots and all that descend from them, whatever session they lead."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        if (fields := _fields(int(entry.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(roots)
    for pid in found:
        found += children.get(pid, [])
    return found


def processor_s(root: int) -> float:
    """Processor time of a process and its descendants, with those that have ended."""
    return sum(_own_s(pid) + _ended_s(pid) for pid in trees([root]))


def machine_s() -> float:
    """Processor time of everything on this machine since its start."""
    ticks = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle, waiting_for_disk = ticks[3:5]
    return (sum(ticks) - idle - waiting_for_disk) / TICKS_PER_S


def _own_s(pid: int) -> float:
    """Of all its threads, to the nanosecond: the clock of clock_getcpuclockid(3)."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _ended_s(pid: int) -> float:
    """Of its children that have ended and were waited for, to the tick."""
    fields = _fields(pid)
    return 0.0 if fields is None else (int(fields[13]) + int(fields[14])) / TICKS_PER_S


def _fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on; None if the process is gone."""
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
