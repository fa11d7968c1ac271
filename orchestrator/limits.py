"""Limits as they stand: their slots, the runs that wait, and what a person has set."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from beatless.orchestrator.limit import rate_of, starts_of
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements

AWAITED_REST_S, IDLE_REST_S = 10.0, 60.0
"""Seconds between two looks: while runs wait for limits, and while none does."""

SWEEP = 1000
"""Buckets that one statement forgets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """One key of a limit.

    >>> app.client.set_limit("stripe", 5)
    >>> [(each.key, each.at_once, each.waiting) for each in app.client.limits()]
    [(None, 5, 0)]
    """

    name: str
    key: str | None
    """None if the limit is set, and no run uses it or waits for it."""
    at_once: int | None
    """How many runs may have a lease at once; None of a rate."""
    rate: str | None
    """How many may begin in a time, as "100/min"."""
    is_set: bool
    """Whether a person has set it; else it is the plan's."""
    running: int
    """Slots in use, also those that runs keep while they wait."""
    waiting: int
    """Runs that wait for a slot."""
    oldest: datetime | None
    """When the one that waits the longest was started."""
    hold: str | None = None
    """"run" if runs keep their slots until they have ended."""


class LimitStatements:
    """The statements over limits of one schema."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, sweep=SWEEP)

    def list(self, connection: Caller, *, prefix: str, limit: int) -> list[LimitState]:
        """Those that are in use, waited for or set, of the namespace with this prefix of ids."""
        rows = execute(connection, self._sql["list"], {"prefix": prefix, "limit": limit})
        return [
            LimitState(
                name=name,
                key=key,
                at_once=at_once,
                rate=None if starts is None else rate_of(starts, period_s),
                is_set=is_set,
                running=running,
                waiting=waiting,
                oldest=oldest,
                hold=hold,
            )
            for name, key, at_once, starts, period_s, is_set, running, waiting, oldest, hold in rows
        ]

    def set(self, connection: Caller, name: str, *, at_once: int | None, rate: str | None) -> None:
        """Let so many runs run at once, or begin; `name` with the prefix of its namespace."""
        if at_once is not None:
            execute(connection, self._sql["set"], {"name": name, "at_once": at_once})
        if rate is not None:
            starts, period_s = starts_of(rate)
            values = {"name": name, "starts": starts, "period_s": period_s}
            execute(connection, self._sql["set_rate"], values)
        execute(connection, self._sql["note"], {"name": name})

    def kinds(self, connection: Caller, name: str) -> frozenset[bool]:
        """Whether it is a rate for the runs that have it now: both while plans of it differ."""
        rows = execute(connection, self._sql["kinds"], {"name": name})
        return frozenset(is_rate for (is_rate,) in rows)

    def forget(self, connection: Caller, name: str) -> bool:
        """Let each plan say it again; False if nothing was set."""
        ((forgotten,),) = execute(connection, self._sql["forget"], {"name": name})
        execute(connection, self._sql["note"], {"name": name})
        return bool(forgotten)


class LooksAtLimits:
    """A chore: has relays look at limits that runs wait for though slots are free.

    That is so when a run was let in and is not claimed, as its queue is paused, or has no worker.
    """

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, sweep=SWEEP)

    def step(self, connection: psycopg.Connection[Any]) -> float:
        """Note them, and forget buckets; seconds until the next look is worth while."""
        execute(connection, self._sql["forget_full"], {})
        ((awaited, _),) = execute(connection, self._sql["note_free"], {})
        return AWAITED_REST_S if awaited else IDLE_REST_S
