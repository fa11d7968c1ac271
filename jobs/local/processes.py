"""Processes of this machine, as Linux shows them: their end, their children, their parent's end."""

import contextlib
import ctypes
import os
import select
import signal
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def die_with_parent(death_signal: signal.Signals, parent: int) -> None:
    """Between fork and exec: end this process when the thread of `parent` that forks it ends.

    A change of user clears this, so change the user first.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # killed before the call above: no signal will come


def wait_for_end(pid: int, *, timeout_s: float) -> bool:
    """Whether the process, which need not be our child, has ended within the timeout."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))
    finally:
        os.close(process)


def children_of(pid: int) -> list[int]:
    """Process ids of its direct children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name, in parentheses, may itself hold spaces and parentheses.
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(int(stat.parent.name))
    return found


def has_exited(pid: int) -> bool:
    """Whether a child of ours has ended; it is left to be reaped."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
