"""Rounds of calls in a calm: few calls, and all is still between them.

What a relay forgets as it goes to sleep is not made good by the next call, which comes when all has
ended. So wake-ups that are lost are late here, and only here.
"""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from time import monotonic
from typing import Any

import psycopg

from beatless.outbox.message import SHARDS, shard_of
from tests.faults.fleet import UNATTENDED
from tests.faults.load import SHOWN_S, Load

MANY_RUNS = 30
"""So many, started at once, keep relays awake, so that no writer rings."""

BURST_SHARE = 0.8
"""Of the rounds: what a relay forgets as it goes to sleep is seen in these alone."""

BRIEF_DEADLINE_S = 0.5

BURST_RUNS = 150
"""So many keep it awake for some time."""

AWAKE_S = 1.0
"""A relay was awake within this time after a burst, or this round will not find it so."""

AWAKE = """
SELECT NOT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted
                      AND mode = 'ExclusiveLock' AND objsubid = 2 AND objid = %(shard)s
                      AND classid = 'run_outbox'::regclass)
"""
"""While a relay is awake it holds no lock on the bell of its shards: their writers do not ring."""

ASLEEP_S = 0.1
"""A relay that has nothing to do sleeps after this time."""


class Rounds:
    """Rounds of one load, while nobody else calls."""

    def __init__(self, load: Load, drain: Callable[[], None]) -> None:
        """`drain` returns when all that is due has ended, and the outbox is empty."""
        self._load = load
        self._drain = drain
        self._pause = threading.Event().wait

    def round(self, chance: random.Random) -> None:
        """Calls of one kind; all that they began has ended then, or was forgotten."""
        (self._burst if chance.random() < BURST_SHARE else self._calls)(chance)
        self._drain()

    def _burst(self, chance: random.Random) -> None:
        """Many runs of one shard keep its relay awake; what begins then commits when it sleeps.

        No worker takes the many: when they have ended by their deadline, nothing wakes the relay.
        The others commit one by one: one that rings would make good what was lost before.
        """
        shard = chance.randrange(SHARDS)
        idle = [self._of_shard(shard, UNATTENDED, chance) for _ in range(BURST_RUNS)]
        late = [(random.Random(chance.random()), threading.Event()) for _ in range(4)]
        begin = threading.Event()

        def start_late(chance: random.Random, commits: threading.Event) -> None:
            wish = self._of_shard(shard, "default", chance)
            begin.wait(SHOWN_S)
            self._load.start([wish], chance, waits=lambda: commits.wait(SHOWN_S))

        with ThreadPoolExecutor(len(late) + 1) as callers:
            for wish in idle:
                wish["deadline"] = BRIEF_DEADLINE_S
            calls = [callers.submit(start_late, *each) for each in late]
            burst = callers.submit(self._load.start, idle, chance, waits=lambda: None)
            self._await_awake(shard)
            begin.set()
            burst.result()
            self._pause(BRIEF_DEADLINE_S)
            for done, (_, commits) in zip(calls, late, strict=True):
                self._drain()
                self._pause(ASLEEP_S)
                commits.set()
                done.result()
                self._drain()

    def _calls(self, chance: random.Random) -> None:
        """A few calls at once, or many runs in one.

        Often others come while those before are busy, and commit at once, soon, or when all is
        still again.
        """
        still, many = threading.Event(), chance.random() < 0.5
        own = [random.Random(chance.random()) for _ in range(chance.choice([1, 2, 6]))]
        acts = [chance.choice([self._start_quick, self._load.senders.send]) for _ in own]
        late = [random.Random(chance.random()) for _ in range(chance.choice([0, 1, 1, 3, 6]))]
        with ThreadPoolExecutor(len(own) + len(late)) as callers:
            if many:
                self._start_many(chance)  # relays are awake from now on
                calls = []
            else:
                calls = [callers.submit(*each) for each in zip(acts, own, strict=True)]
            for each in late:
                self._pause(chance.uniform(0, 0.3 / len(late)))
                wait_s = chance.choice([0, 0.05, 0.3, *[SHOWN_S] * 7])
                calls.append(callers.submit(self._start_late, each, still, wait_s))
            self._drain()
            # Relays are awakened by a deadline, too: it is over then.
            self._pause((BRIEF_DEADLINE_S if many else 0) + chance.choice([0.05, 0.2]))
            still.set()
            for done in calls:
                done.result()

    def _await_awake(self, shard: int) -> None:
        """Return when the relay of this shard is awake, or after a while."""
        until = monotonic() + AWAKE_S
        with suppress(psycopg.Error), self._load.fleet.connect() as session:
            while monotonic() < until:
                if session.execute(AWAKE, {"shard": shard}).fetchone() == (True,):
                    return

    def _of_shard(self, shard: int, queue: str, chance: random.Random) -> dict[str, Any]:
        """A run that ends soon."""
        names = (f"burst-{chance.randrange(10**12)}" for _ in count())
        run_id = next(name for name in names if shard_of(name) == shard)
        return self._load.brief(chance, queue) | {"run_id": run_id}

    def _start_quick(self, chance: random.Random) -> None:
        """A run that ends soon: a calm has many rounds."""
        wish = self._load.wish(chance)
        if "key" not in wish:
            quicken(wish["input"])
        self._load.start([wish], chance)

    def _start_many(self, chance: random.Random) -> None:
        """Many runs in one call, which often all are of one relay's shards: the other sleeps."""
        shards = chance.choice([range(SHARDS), range(SHARDS // 2), range(SHARDS // 2, SHARDS)])
        wishes = [self._load.brief(chance, "default") for _ in range(MANY_RUNS)]
        if chance.random() < 0.7:  # only relays have work with them
            wishes = [w | {"queue": UNATTENDED, "deadline": BRIEF_DEADLINE_S} for w in wishes]
        for number, wish in enumerate(wishes):
            names = (
                f"many-{self._load.started}-{number}-{chance.randrange(10**9)}" for _ in count()
            )
            wish["run_id"] = next(name for name in names if shard_of(name) in shards)
        self._load.start(wishes, chance, waits=lambda: None)

    def _start_late(self, chance: random.Random, still: threading.Event, wait_s: float) -> None:
        """In a transaction that commits after so many seconds, or when all is still."""
        if chance.random() < 0.4 and self._load.senders.send_late(
            chance, lambda: still.wait(wait_s)
        ):
            return
        wish = self._load.brief(chance, "default")
        self._load.start([wish], chance, waits=lambda: still.wait(wait_s))


def quicken(given: dict[str, Any]) -> None:
    """Let the run of this input, and its children, take no time and end no process."""
    if "seconds" in given:
        given["seconds"] = min(0.02, given["seconds"])
    given |= dict.fromkeys(given.keys() & {"pause", "deaths"}, 0)
    first = [given["first"]] if "first" in given else []
    for child in [*first, *given.get("families", ()), *given.get("children", ())]:
        quicken(child)
