"""What is asked for when several runs are claimed: those of messages, and those that come next."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from beatless.outbox.message import shard_of
from beatless.outbox.queries import array


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a message asks for: the lease of its run, as `Leases.claim` takes these."""

    run_id: str
    plan: str
    first_step: str | None
    dispatch: int
    reads_ahead: bool = False
    """The first page of its journal is read with it: see `Ahead`."""


UNREAD = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.ProgramLimitExceeded)
"""Errors of what only SQL can have written to a run: its execution meets them, not its claim."""

Ahead = Callable[[psycopg.Connection[Any], str, int], Callable[[], Sequence[Any]]]
"""Sends what is read behind the claim of a run under a token, as `ReadAhead.send`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What runs that have ended ask for: so many leases of those that come next in their queue."""

    run_id: str
    """One of those that have ended."""
    places: int


def of_messages(claims: Sequence[Claim]) -> dict[str, str | int]:
    """The parameters of the statement `claim_together`, but for those of all claims."""
    rows = [
        (each.run_id, shard_of(each.run_id), each.plan, each.first_step, each.dispatch)
        for each in claims
    ]
    names = ("run_ids", "shards", "plans", "firsts", "dispatches")
    return {
        name: array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }


def of_others(behind: Behind, first_steps: Mapping[str, str]) -> dict[str, str | int]:
    """The same of `claim_further`, of plans with these first steps."""
    return {
        "run_id": behind.run_id,
        "token": -1,  # of no lease: the run was not claimed with these
        "places": behind.places,
        "plans": array(first_steps),
        "firsts": array(first_steps.values()),
    }
