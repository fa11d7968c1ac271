"""Senders of signals, a part of the general load.

They send before a run waits, as soon as it waits, when its time-out comes, twice with one key, many
at once, in transactions that stay open or roll back, and to runs that have ended. A wait without
an end is ended by them, sooner or later.
"""

import heapq
import random
import threading
from collections.abc import Callable
from time import time
from typing import Any, NamedTuple

import psycopg
from sqlalchemy import Engine

from beatless import App, Event, SignalRequest
from beatless.errors import JobsError, Unreachable
from beatless.orchestrator.errors import OrchestratorError
from tests.faults.plans import UNSENT, WAITED
from tests.faults.recorder import Recorder

RACE_SPREAD_S = 0.03
"""So close to a time-out are the signals that race it."""

MOST_WAITING = 40
"""Runs that are remembered as waiting."""


class RolledBack(Exception):
    """Raised by a caller in its own transaction, which therefore leaves nothing."""


class Sent(NamedTuple):
    """A signal, which may be sent again."""

    run_id: str
    name: str
    key: str


class Senders:
    """What several threads send, and what they know of runs that wait."""

    def __init__(
        self,
        app: App,
        engine: Engine,
        recorder: Recorder,
        *,
        lost: Callable[[BaseException], bool],
        pause: Callable[[float], object],
        long_s: float,
    ) -> None:
        """`lost` knows errors of connections; `pause` waits; `long_s` is longer than a lease."""
        self._client = app.client
        self._engine = engine
        self._recorder = recorder
        self._lost = lost
        self._pause = pause
        self._long_s = long_s
        self._lock = threading.Lock()
        self._recent: list[tuple[str, str]] = []
        """Runs that will wait, with their plans."""
        self._waiting: dict[str, tuple[str, ...]] = {}
        """Runs that wait, as far as was heard, with the signals that end it."""
        self._planned: list[tuple[float, str, str]] = []
        self._sent: list[Sent] = []
        self._numbers = 0

    def started(self, run_id: str, plan: str) -> None:
        """A run was started."""
        if plan in WAITED:
            with self._lock:
                self._recent = [*self._recent[-20:], (run_id, plan)]

    def heard(self, event: Event, chance: random.Random) -> None:
        """Redis has published this: plan a signal for a run that waits now."""
        names = tuple((event.data or {}).get("names", ()))
        with self._lock:
            if event.type == "WaitStarted" and names and names != (UNSENT,):
                self._waiting.pop(event.run_id, None)
                self._waiting[event.run_id] = names
                while len(self._waiting) > MOST_WAITING:
                    self._waiting.pop(next(iter(self._waiting)))
                until = (event.data or {}).get("until")
                at = time() if chance.random() < 0.3 else None
                if until and chance.random() < 0.6:
                    at = until / 1000 + chance.gauss(0, RACE_SPREAD_S)
                if at is not None:
                    heapq.heappush(self._planned, (at, event.run_id, chance.choice(names)))
            elif event.type in ("WaitFinished", "CancelRequested", "RunFinished"):
                self._waiting.pop(event.run_id, None)
            if event.type == "RunFinished" and chance.random() < 0.9:
                self._recent = [each for each in self._recent if each[0] != event.run_id]

    def race(self, chance: random.Random) -> None:
        """Send what is planned for now, in a moment."""
        with self._lock:
            if not self._planned or self._planned[0][0] > time() + 0.2:
                return
            at, run_id, name = heapq.heappop(self._planned)
        self._pause(max(0.0, at - time()))
        self._send([self._new(run_id, name)], chance, waits=None)

    def send(self, chance: random.Random) -> None:
        """One signal, or many, to runs that wait, will wait, or have ended."""
        many = chance.choice([1, 1, 1, 1, 4])
        waiting = 0.6 if many == 1 else 1.0
        chosen = (self._chosen(chance, waiting=waiting) for _ in range(many))
        sent = [each for each in chosen if each is not None]
        if sent:
            waits = None
            if chance.random() < 0.35:
                waits = self._moment(chance.choice([0, 0.02, 0.1, 0.1, 0.5, self._long_s]))
            self._send(sent, chance, waits=waits)

    def send_late(self, chance: random.Random, waits: Callable[[], object]) -> bool:
        """To a run that waits, in a transaction that commits after this; whether there is one."""
        sent = self._chosen(chance, waiting=1.0)
        if sent is not None:
            self._send([sent], chance, waits=waits, rolls_back=0)
        return sent is not None

    def release(self, session: psycopg.Connection) -> None:
        """Send each run that waits what it waits for."""
        for run_id, names in session.execute(PARKED).fetchall():
            self._send([self._new(run_id, names[0])], random.Random(run_id), waits=None)

    def _moment(self, seconds: float) -> Callable[[], object]:
        return lambda: self._pause(seconds)

    def _chosen(self, chance: random.Random, *, waiting: float) -> Sent | None:
        with self._lock:
            if self._sent and chance.random() < 0.07 and waiting < 1:
                return chance.choice(self._sent)
            if self._waiting and chance.random() < waiting:
                run_id = chance.choice(list(self._waiting))
                names = self._waiting[run_id]
            elif self._recent and waiting < 1:
                run_id, plan = chance.choice(self._recent)
                names = (*WAITED[plan], *WAITED[plan], "other")
            else:
                return None
        return self._new(run_id, chance.choice(names))

    def _new(self, run_id: str, name: str) -> Sent:
        with self._lock:
            self._numbers += 1
            sent = Sent(run_id, name, f"{name}-{self._numbers}")
            self._sent = [*self._sent[-20:], sent]
        return sent

    def _send(
        self,
        sent: list[Sent],
        chance: random.Random,
        *,
        waits: Callable[[], object] | None,
        rolls_back: float = 0.25,
    ) -> None:
        """In one call; in the sender's own transaction if it waits."""
        requests = [SignalRequest(each.run_id, each.name, each.key, each.key) for each in sent]
        begin, outcome = time(), "unknown"
        try:
            if waits is None:
                self._client.signal_runs(requests)
            else:
                with self._engine.begin() as connection:
                    self._client.signal_runs(requests, connection=connection)
                    waits()
                    if chance.random() < rolls_back:
                        raise RolledBack
            outcome = "ok"
        except RolledBack:
            outcome = "rolled_back"
        except Unreachable:
            self._pause(0.1)
        except (JobsError, OrchestratorError):
            outcome = "failed"
            with self._lock:
                for each in sent:
                    self._waiting.pop(each.run_id, None)
        except Exception as error:
            if not self._lost(error):
                raise
        for each in sent:
            facts: dict[str, Any] = {"run_id": each.run_id, "name": each.name, "key": each.key}
            self._recorder.write(
                "call", op="signal", begin=begin, end=time(), outcome=outcome, **facts
            )


PARKED = f"""
SELECT d.run_id, e.data -> 'names' FROM dispatches d CROSS JOIN LATERAL (
  SELECT data FROM run_events e WHERE e.run_id = d.run_id AND e.type = 'WaitStarted'
   ORDER BY seq DESC LIMIT 1) e
 WHERE d.state = 'delayed' AND d.reason = 'wait' AND e.data ? 'names'
   AND NOT e.data -> 'names' ? '{UNSENT}'
   AND NOT EXISTS (SELECT FROM signals s WHERE s.run_id = d.run_id)
"""
