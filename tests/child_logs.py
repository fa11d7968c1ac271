"""The logs of processes of a test.

The end of a run is known by Postgres before its worker logs it and counts it: a test that has
waited for the run waits for the line as well.
"""

import threading

from beatless.local.child import Child
from beatless.outbox.clock import monotonic


def await_line(child: Child, line: str, *, times: int = 1) -> str:
    """Wait until the log of a process contains this so often, and return all of it."""
    until = monotonic() + 60
    while (said := child.log.read_text()).count(line) < times:
        assert monotonic() < until, child.last_words()
        threading.Event().wait(0.05)
    return said
