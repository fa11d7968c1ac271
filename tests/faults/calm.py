"""Calm periods: nothing is broken and few call, so that whatever is late was forgotten.

1. all faults are taken back, all processes are there, and nobody calls any more: quiet
2. all that is due has ended, and the outbox is empty; in a quiet that lasts too long, something
   has been forgotten
3. calm: a few calls at once, and the next ones when all that they began has ended; a wake-up that
   is lost is made good by no other
"""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, time
from typing import LiteralString

import psycopg
import redis

from tests.faults.fleet import UNATTENDED, Fleet
from tests.faults.load import Load
from tests.faults.recorder import Recorder
from tests.faults.rounds import Rounds

QUIET_S = 30.0
"""The longest quiet until all is drained: a lost message is looked for after 2 s and, if it seems
to be there, after 8 s again; a broken transaction is made again after 1, 2, 4 and 8 s."""

BOUND_S = 3.0
"""What nothing takes in calm. Forgotten, a run or an event waits for a relay's next look: 15 s."""

FORGOTTEN_S = 12.0
"""The next round comes after this time even if nothing moves: it would wake what was forgotten."""

LAG_FACTOR = 10.0
"""The bound is longer by so many times the longest delay of a thread that only waits, and commits.
"""

TICK_S = 0.05

LOOK_S = 1.0
"""Two looks are no longer apart, or this machine stood still: such time is not counted."""

WORK = 100_000
"""Numbers to add, of a thread whose delays are measured: a millisecond or two, else they would only
show that the machine wakes quickly."""

DUE = f"""
SELECT count(*) FROM runs WHERE state = 'running'
   OR state = 'queued' AND coalesce(not_before <= clock_timestamp(), true)
      AND queue <> '{UNATTENDED}'
   OR state = 'queued' AND EXISTS (
        SELECT FROM signals JOIN dispatches d USING (run_id)
         WHERE d.run_id = runs.run_id AND d.reason = 'wait')
"""


def heal(fleet: Fleet) -> None:
    """Nothing is broken any more, whatever a fault has left when it was disturbed itself."""
    for slot in fleet.slots.values():
        with contextlib.suppress(ProcessLookupError):
            pids = [slot.pid, *slot.children] if slot.child and slot.child.alive else []
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
    for way in fleet.ways:
        way.cut_after = way.loses = None
        way.release()
        way.cut()
    with contextlib.suppress(redis.RedisError), fleet.redis(fleet.bus) as client:
        client.execute_command("ACL", "SETUSER", "default", "+publish")
    with fleet.connect_patiently() as session:
        session.execute("SET default_transaction_read_only = off")
        session.execute("ALTER SYSTEM RESET default_transaction_read_only")
        session.execute("ALTER DATABASE postgres RESET ALL")
        session.execute("SELECT pg_reload_conf()")
        session.execute("DROP TRIGGER IF EXISTS chaos_full ON run_events")


UNFINISHED = "SELECT count(*) FROM runs WHERE state IN ('queued', 'running')"


@contextmanager
def quiet(fleet: Fleet, load: Load, recorder: Recorder) -> Iterator[float | None]:
    """Nobody calls in this block, after all was healed; when all had drained, or None."""
    fleet.wait_ready()
    with load.hushed(), slowness(fleet) as longest:
        load.hears.wait(QUIET_S)
        begin = time()
        drained = None if (rows := drain(fleet, DUE, QUIET_S)) is not None else time()
        yield drained
        slack_s = LAG_FACTOR * longest[0]
        recorder.write(
            "quiet", begin=begin, end=time(), drained=drained, rows=rows, slack_s=slack_s
        )


def drain(
    fleet: Fleet,
    left: LiteralString,
    seconds: float,
    act: Callable[[psycopg.Connection], None] = lambda _: None,
) -> int | None:
    """Wait until this counts no run, and the outbox is empty; else how many rows are left in it.

    No longer than so many seconds in which nothing moves but the runs of schedules, which come for
    ever: a slow machine is waited for. Meanwhile `act` is called, again and again.
    """
    looked, left_s, rows, fewest, before = monotonic(), seconds, 0, 0, ()

    def look() -> bool:
        """Whether there is time left."""
        nonlocal looked, left_s
        left_s -= min(monotonic() - looked, LOOK_S)
        looked = monotonic()
        return left_s > 0

    while look():
        with contextlib.suppress(psycopg.Error), fleet.connect() as session:
            while look():
                now = session.execute(
                    f"SELECT ({left}), (SELECT count(*) FROM run_outbox),"
                    " (SELECT sum(last_seq) FROM runs WHERE schedule IS NULL)"
                ).fetchone() or (0, 0, 0)
                due, rows, written = now
                act(session)
                if not due and not rows:
                    return None
                if (due, written) != before or rows < fewest:
                    left_s, fewest, before = seconds, rows, (due, written)
                threading.Event().wait(0.02)
    return rows


def calm(fleet: Fleet, load: Load, recorder: Recorder, chance: random.Random, s: float) -> None:
    """Rounds of calls for so many seconds, in quiet; longer if something is late at their end."""

    def wait_until_drained() -> None:
        drain(fleet, DUE, FORGOTTEN_S)

    rounds = Rounds(load, wait_until_drained)
    begin, until = time(), monotonic() + s
    with slowness(fleet) as longest:
        while monotonic() < until:
            rounds.round(chance)
            threading.Event().wait(chance.choice([0, 0, 0.005, 0.05, 0.2]))
    recorder.write("calm", begin=begin, end=time(), bound_s=BOUND_S + LAG_FACTOR * longest[0])


@contextmanager
def slowness(fleet: Fleet) -> Iterator[list[float]]:
    """The longest delay in seconds, in this block, of a thread that waits and does a little.

    It commits, too: where the disk is slow, all wait for it.
    """
    longest, ending = [0.0], threading.Event()

    def tick() -> None:
        while not ending.is_set():
            with contextlib.suppress(psycopg.Error), fleet.connect() as session:
                begin = monotonic()
                while not ending.wait(TICK_S):
                    sum(range(WORK))
                    session.execute("UPDATE chaos_pulse SET beats = beats + 1")
                    longest[0] = max(longest[0], monotonic() - begin - TICK_S)
                    begin = monotonic()
            ending.wait(TICK_S)

    ticker = threading.Thread(target=tick, name="ticker")
    ticker.start()
    try:
        yield longest
    finally:
        ending.set()
        ticker.join()
