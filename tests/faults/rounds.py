"""Rounds of calls in a calm: few calls, and all is still between them.

What a relay forgets as it goes to sleep is not made good by the next call, which comes when all has
ended. So wake-ups that are lost are late here, and only here.
"""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from time import monotonic
from typing import Any

from beatless.outbox.message import SHARDS, shard_of
from tests.faults.fleet import UNATTENDED
from tests.faults.load import SHOWN_S, Load

MANY_RUNS = 30
"""So many, started at once, keep relays awake, so that no writer rings."""

BRIEF_DEADLINE_S = 0.5


IDLE_DEADLINE_S = 30.0
"""Of runs that no worker takes, if their cancel is lost."""

PAIRS_S = 2.0

SHORTLY_S = 0.02
"""A relay that was awakened by one call sleeps again before this time is over."""

ASLEEP_S = 0.04
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
        if chance.random() < 0.4:
            until = monotonic() + PAIRS_S
            while monotonic() < until:
                self._pair(chance)
        else:
            self._calls(chance)
        self._drain()

    def _pair(self, chance: random.Random) -> None:
        """A call that wakes a relay, and another at about the time at which it goes to sleep.

        The other may have begun before, and commit when the relay sleeps. Nothing else wakes it:
        no worker takes these runs.
        """
        shard = chance.randrange(SHARDS)
        one, other = (self._idle_wish(chance, shard) for _ in range(2))
        way = chance.choice(["late", "start", "cancel"])
        self._load.start([one], chance, waits=lambda: None)
        self._pause(chance.uniform(0, SHORTLY_S))
        if way == "cancel":
            self._load.cancel(one["run_id"], 1.0, chance)
        else:
            self._load.start([other], chance, waits=self._stills if way == "late" else lambda: None)
        self._drain()
        for wish in (one, other) if way != "cancel" else ():
            self._load.cancel(wish["run_id"], 1.0, chance)

    def _stills(self) -> None:
        """Return when all is still."""
        self._drain()
        self._pause(ASLEEP_S)

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

    def _idle_wish(self, chance: random.Random, shard: int) -> dict[str, Any]:
        """A run that no worker takes, of this shard."""
        names = (f"idle-{chance.randrange(10**12)}" for _ in count())
        wish = self._load.brief(chance, UNATTENDED) | {"deadline": IDLE_DEADLINE_S}
        return wish | {"run_id": next(name for name in names if shard_of(name) == shard)}

    def _start_quick(self, chance: random.Random) -> None:
        """A run that ends soon: a calm has many rounds."""
        wish = self._load.wish(chance)
        if "key" not in wish:
            wish["input"]["seconds"] = min(0.02, wish["input"]["seconds"])
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
