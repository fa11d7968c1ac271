"""The clock of every deadline: it goes on when a test stops the clocks of its process.

freezegun replaces `time.monotonic` wherever a module holds it, and a wait by it would last
for ever. It leaves this one alone.
"""

import time
from time import CLOCK_MONOTONIC, clock_gettime

BOOT_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", CLOCK_MONOTONIC)


def monotonic() -> float:
    """Seconds since some time in the past; comparable with `time.monotonic` of this machine."""
    return clock_gettime(CLOCK_MONOTONIC)


def since_boot() -> float:
    """The same with the time in which the machine was suspended, where the system counts it."""
    return clock_gettime(BOOT_CLOCK)
