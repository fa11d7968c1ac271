"""The exclusive right to execute a run, with a fencing token.

A claim draws a token; every later write of the owner names it, so a worker that was frozen past
its lease writes nothing (Kleppmann, "How to do distributed locking", 2016). A drawn token is never
seen again, not even after a failover that lost the claim it was drawn for. All clocks are the
server's.
"""

import json
import logging
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg

from beatless.orchestrator.claims import UNREAD, Ahead, Behind, Claim, of_messages, of_others
from beatless.orchestrator.inbox import Inbox
from beatless.orchestrator.lease_status import HeldLease, Kept, LeaseStatus
from beatless.orchestrator.limit import RunLimit
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.progress import GIVEN_BACK, SUSPECT, UNCOUNTED
from beatless.orchestrator.queues import PRESENCE_EXPIRES_S
from beatless.orchestrator.records import Run
from beatless.orchestrator.state import RunState
from beatless.outbox.clock import monotonic
from beatless.outbox.message import UNREADABLE, shard_of
from beatless.outbox.pending import prepare_anew
from beatless.outbox.queries import Caller, array, execute
from beatless.outbox.statements import statements

logger = logging.getLogger(__name__)

Connection = psycopg.Connection[Any]

LOCK_TIMEOUT_S = 1.0
"""Seconds that a claim or a heartbeat waits for a lock: others wait behind it meanwhile."""

NEXT_LOCK_TIMEOUT_S = 0.05
"""Seconds that a claim waits for a lock which comes with the end of another run: for a slot that
another claim has taken and not committed. Else it is left out."""

LOOKED_AT = 256
"""Waiting runs among which the further ones of a claim are: plans of others may stand before."""

MOMENT_S = 0.1
"""Seconds that a message may have been on its way to a worker, while others go on without one."""

LOOKED_BACK = 2000
"""The last events of a run, among which `held_by` looks for what a suspect has said: one that has
emitted more since is taken for one of several."""


@dataclass(slots=True, kw_only=True)
class Lease:
    """One claim of one run. `cancelled`, `signalled` and `lost` are news of the heartbeat."""

    run: Run
    token: int
    next_token: int | None = None
    """The token that replaces it: while the answer is unknown, the row may have either."""
    cancelled: bool = False
    signalled: bool = False
    """Signals of the run wait to be taken into its journal."""
    lost: bool = False
    deadline: float | None = None
    """When the run must have ended, by this process's monotonic clock."""
    waited: float | None = None
    """Seconds that the run was due before this claim; None if it was taken from another worker."""
    age: float = 0.0
    """Seconds from the run's first claim to this one."""
    uncalled: bool = False
    """Whether an attempt has begun of which a death of the process would be no crash.

    Its body was not called, as it waits for its turn, or is one of several that run.
    """
    beside: bool = False
    """Whether it is one of several that run: after a death it is a suspect."""
    alone: bool = False
    """Whether no other runs in its process while its body does, nor will: of a suspect."""
    ran_out: bool = False
    """Whether it was taken from a holder of whom nobody knows that it has died."""
    unreadable: bool = False
    """Whether the input of the run is JSON that was written with SQL, and that nobody can read."""
    begun: bool = False
    """Whether the claim has started the first step, as it does for a run that was never claimed."""
    limited_step: bool = False
    """Whether the run has the limits of a step, which is to be begun or has begun."""
    let_in: bool = False
    """Whether the run has waited for a slot: others may wait for that which its end frees."""
    following: "Lease | None" = None
    """The lease that was claimed with the end of this run."""
    next_wanted: bool = False
    """Whether the run was parked while others may wait for its worker."""
    following_token: int | None = None
    """The token of the claim that was sent with the end of this run, if one was."""
    trace_context: Mapping[str, str] | None = None
    """Of the trace that the run was started in: `traceparent`, as W3C Trace Context has it."""
    ahead: Sequence[Any] = ()
    """The first page of the journal as the claim has read it: rows of `checkpoint_page`."""
    claimed_at: float = field(default_factory=monotonic)

    @property
    def tokens(self) -> list[int]:
        """Those that the row may have while the lease is held."""
        return [self.token] if self.next_token is None else [self.token, self.next_token]

    @property
    def seconds(self) -> float:
        """Since the run's first claim."""
        return self.age + monotonic() - self.claimed_at

    @property
    def now_ms(self) -> float:
        """The time by the clock of Postgres, in milliseconds; 0 before the first claim."""
        claimed = self.run.started_at
        return 0.0 if claimed is None else (claimed.timestamp() + self.seconds) * 1000

    @property
    def late(self) -> bool:
        """Whether the run has reached its deadline."""
        return self.deadline is not None and monotonic() >= self.deadline


class Leases:
    """The statements over leases for one schema."""

    def __init__(self, schema: str, *, seconds: float) -> None:
        self.seconds = seconds
        self.inbox = Inbox(schema)
        self.sql = statements(
            __file__,
            schema,
            lock_timeout_ms=round(LOCK_TIMEOUT_S * 1000),
            looked_at=LOOKED_AT,
            looked_back=LOOKED_BACK,
            presence_expires_s=PRESENCE_EXPIRES_S,
            run_options=OPTION_SQL["run_options"],
        )

    def claim(
        self,
        connection: Connection,
        run_id: str,
        *,
        plan: str,
        worker: str,
        first_step: str | None,
        dispatch: int,
        ahead: Ahead | None = None,
    ) -> Lease | None:
        """Take the run if it waits and is due, or if its lease has run out; else None.

        Who can write to the broker can name any plan and any dispatch: a run of another plan is not
        taken, and no number moves that of the next message by more than one.

        Also None if another transaction holds the run's row for longer than `LOCK_TIMEOUT_S`: the
        run is dispatched again. For a run that was never claimed this also commits StepStarted of
        `first_step`, if it is given: not for a plan that begins with a wait, or is a function.
        With `ahead` the first page of its journal is read too: see `Lease.ahead`.
        """
        claimed = self._claim(
            connection,
            {
                "run_id": run_id,
                "plan": plan,
                "worker": worker,
                "seconds": self.seconds,
                "shard": shard_of(run_id),
                "first": first_step,
                "dispatch": dispatch,
                "token": new_token(),
            },
            [self.sql["claim"]],
            ahead,
        )
        return claimed[0] if claimed else None

    def claim_with_others(
        self,
        connection: Connection,
        run_id: str,
        *,
        plan: str,
        worker: str,
        first_steps: Mapping[str, str],
        dispatch: int,
        places: int,
        ahead: Ahead | None = None,
    ) -> list[Lease]:
        """Claim a run, and with it up to `places` others that wait in its queue; one commit.

        The others are runs of the plans in `first_steps`, which gives the first step of each. They
        were never claimed before, and are the next in the order of the relay. They are claimed also
        if the run itself cannot be, but not beside one that was claimed before. No places cost no
        statement.
        """
        return self._claim(
            connection,
            {
                "run_id": run_id,
                "plan": plan,
                "worker": worker,
                "seconds": self.seconds,
                "shard": shard_of(run_id),
                "first": first_steps[plan],
                "dispatch": dispatch,
                "token": new_token(),
                "places": places,
                "tokens": [new_token() for _ in range(places)],
                "plans": list(first_steps),
                "firsts": list(first_steps.values()),
            },
            [self.sql["claim"], *([self.sql["claim_further"]] if places else [])],
            ahead,
        )

    def claim_together(
        self,
        connection: Connection,
        claims: Sequence[Claim],
        behind: Sequence[Behind],
        *,
        worker: str,
        first_steps: Mapping[str, str],
        ahead: Ahead | None = None,
    ) -> list[Lease]:
        """Claim several runs, whose messages have come together, in one commit; and others.

        No run is waited for. A run is missing that is to be claimed by itself, or not at all: one
        whose row another transaction holds, one that has limits, that another worker has or had,
        or that is not due. The others are as those of `claim_with_others`.
        """
        together, further = self.sql["claim_together"], self.sql["claim_further"]
        drawn = [new_token() for _ in claims]
        asked = [
            *([(together, drawn, of_messages(claims))] if claims else []),
            *(
                (further, [new_token() for _ in range(each.places)], of_others(each, first_steps))
                for each in behind
            ),
        ]
        of_all = {"worker": worker, "seconds": self.seconds}
        try:
            with connection.pipeline():  # as in `_claim`
                connection.execute(self.sql["fence"])
                claimed = [
                    connection.execute(statement, {**parameters, **of_all, "tokens": array(tokens)})
                    for statement, tokens, parameters in asked
                ]
                read = {
                    token: ahead(connection, each.run_id, token)
                    for each, token in zip(claims, drawn, strict=True)
                    if ahead is not None and each.reads_ahead
                }
        except psycopg.errors.LockNotAvailable:
            prepare_anew(connection)
            return []
        leases = [_lease(row) for rows in claimed for row in rows.fetchall()]
        if read:
            _note_read(leases, read)
        return leases

    def claim_next(
        self,
        connection: Connection,
        ended: Lease,
        *,
        worker: str,
        first_steps: Mapping[str, str | None],
        redispatch_s: float,
    ) -> Callable[[], Lease | None]:
        """Claim the run that is next in the queue of one that has ended: with limits, or without.

        In the pipeline and the transaction of that end; asks for the answer once these have ended.
        Of the plans in `first_steps`, which gives the first step of each, if it begins with one.
        None with limits, for a run that was let in, while a message has waited for `MOMENT_S` for
        a worker of that queue: what was sent just now is due again after `redispatch_s`. For others
        that of another queue of such a worker.
        """
        ended.following_token = new_token()
        connection.execute(
            self.sql["fence_behind_end"], {"milliseconds": f"{NEXT_LOCK_TIMEOUT_S * 1000:.0f}"}
        )
        claimed = connection.execute(
            self.sql["claim_next"] if ended.let_in else self.sql["claim_behind"],
            {
                "run_id": ended.run.run_id,
                "token": ended.token,
                "worker": worker,
                "seconds": self.seconds,
                "next": ended.following_token,
                "plans": list(first_steps),
                "firsts": list(first_steps.values()),
                "redispatch": redispatch_s,
                "just_sent": redispatch_s - MOMENT_S,
            },
        )
        # The commit waits for that of each other transaction that rings: it is not to fail there.
        connection.execute(self.sql["set_lock_timeout"], {"milliseconds": "0"})
        return lambda: next((_lease(row) for row in claimed.fetchall()), None)

    def find_following(self, connection: Connection, ended: Lease) -> Lease | None:
        """The lease that `claim_next` has taken with an end whose answer was lost; None if none.

        Once the end is known to be committed. Also None if its time is over: others have it then.
        """
        parameters = {"token": ended.following_token, "seconds": self.seconds}
        for row in execute(connection, self.sql["find_following"], parameters):
            lease = _lease(row)
            lease.let_in = True  # or not, and then its end asks for another in vain
            return lease
        return None

    def _claim(
        self,
        connection: Connection,
        parameters: dict[str, Any],
        claims: Sequence[str],
        ahead: Ahead | None,
    ) -> list[Lease]:
        # The fence first, the claim's snapshot after it: a `pause` that was committed before it is
        # seen, one that was not waits for us. It is one round trip all the same, and one
        # transaction: the statements of a pipeline are, on an autocommit connection.
        try:
            with connection.pipeline():
                connection.execute(self.sql["fence"])
                claimed = [connection.execute(claim, parameters) for claim in claims]
                token = parameters["token"]
                read = {token: ahead(connection, parameters["run_id"], token)} if ahead else {}
        except UNREAD:
            if ahead is None:
                raise
            prepare_anew(connection)
            return self._claim(connection, parameters, claims, None)
        except psycopg.errors.LockNotAvailable:
            prepare_anew(connection)
            logger.info(
                "run not claimed: another transaction holds its row; it is dispatched again",
                extra={"action": "claim_waited", "run_id": parameters["run_id"]},
            )
            return []
        leases = [_lease(row) for rows in claimed for row in rows.fetchall()]
        if read:
            _note_read(leases, read)
        return leases

    def take_slots_of_step(
        self, connection: Connection, lease: Lease, limits: Sequence[RunLimit]
    ) -> str | None:
        """Take the slots of a step's limits, and a token of each rate; the limit that has none.

        None also if the lease is gone, which a settlement in the same transaction finds out. With
        one that has none, the lease is to end in it: see the function of this name.
        """
        given = json.dumps([each.to_dict() for each in limits])
        parameters = {"run_id": lease.run.run_id, "token": lease.token, "limits": given}
        ((missing,),) = execute(connection, self.sql["take_slots_of_step"], parameters)
        return None if missing is None else str(missing)

    def send_free_slots_of_step(self, connection: Connection, lease: Lease) -> None:
        """`free_slots_of_step` in the caller's pipeline, for a step that ends here."""
        connection.execute(
            self.sql["free_slots_of_step"],
            {"run_id": lease.run.run_id, "token": lease.token, "ends": True},
        )

    def free_slots_of_step(self, caller: Caller, lease: Lease, *, ends: bool) -> None:
        """Give back those of a step that `ends` here, or of a run that is cancelled."""
        parameters = {"run_id": lease.run.run_id, "token": lease.token, "ends": ends}
        execute(caller, self.sql["free_slots_of_step"], parameters)

    def extend(self, connection: Connection, leases: Sequence[Lease]) -> list[Lease]:
        """Keep leases for their full time from now; those that were not kept.

        These are gone, or another transaction holds their rows at this moment: see `inspect`.
        """
        by_token = {token: lease for lease in leases for token in lease.tokens}
        kept = self.extend_tokens(
            connection, [(lease.run.run_id, token) for token, lease in by_token.items()]
        )
        for token, news in kept.items():
            by_token[token].cancelled = news.cancelled
            by_token[token].signalled = news.signalled
        return [lease for lease in leases if kept.keys().isdisjoint(lease.tokens)]

    def extend_tokens(
        self, connection: Connection, held: Sequence[tuple[str, int]]
    ) -> dict[int, Kept]:
        """The same by run id and token; the news of each that was kept."""
        with connection.pipeline(), connection.transaction():
            connection.execute(self.sql["limit_lock_wait"])
            extended = connection.execute(
                self.sql["extend"],
                {
                    "run_ids": [run_id for run_id, _ in held],
                    "tokens": [token for _, token in held],
                    "seconds": self.seconds,
                },
            )
        return {
            token: Kept(cancelled=cancelled, signalled=signalled)
            for token, cancelled, signalled in extended.fetchall()
        }

    def take_in(self, connection: Connection, lease: Lease, lock_s: float) -> None:
        """Take the signals of a run into its journal, unless its row is held for so long."""
        try:
            with self.with_lock_timeout(connection, lock_s):
                self.inbox.take_in(connection, lease.run.run_id, lease.token, seen=0)
        except psycopg.errors.LockNotAvailable:
            return  # with the next heartbeat, or the next commit of the run
        lease.signalled = False

    def end(
        self,
        connection: Connection,
        held: Sequence[tuple[str, int]],
        *,
        uncalled: Collection[int] = (),
        beside: Collection[int] = (),
    ) -> dict[int, bool]:
        """End these leases, by run id and token, whose process is known to be dead.

        Their runs are dispatched at once. The attempts under the tokens in `uncalled` do not count:
        their bodies were not called, or ran `beside` others: they are given back, unless they were,
        and nothing more is written under their tokens. For each token that still has a lease:
        whether it was ended; False if another transaction holds the row at this moment. The rest
        were gone.
        """
        rows = connection.execute(
            self.sql["end"],
            {
                "run_ids": [run_id for run_id, _ in held],
                "tokens": [token for _, token in held],
                "renewed": [new_token() for _ in held],
                "uncalled": [token in uncalled for _, token in held],
                "beside": [token in beside for _, token in held],
                "trace": GIVEN_BACK,
                "uncounted": list(UNCOUNTED),
            },
        ).fetchall()
        return {token: ended for token, ended, _ in rows}

    def held_by(self, connection: Connection, workers: Sequence[str]) -> list[HeldLease]:
        """The leases that processes of these workers hold, by what ends the names of those."""
        rows = connection.execute(
            self.sql["held_by"],
            {
                "workers": list(workers),
                "seconds": self.seconds,
                "suspect": SUSPECT,
                "given_back": GIVEN_BACK,
            },
        ).fetchall()
        return [
            HeldLease(run_id=run_id, token=token, worker=who, alone=alone, uncalled=uncalled)
            for run_id, token, who, alone, uncalled in rows
        ]

    def note_death(self, connection: Connection, worker: str) -> None:
        """Note that this process has died, and leave its leases to their time."""
        connection.execute(self.sql["note_death"], {"worker": worker})

    @contextmanager
    def with_lock_timeout(self, connection: Connection, seconds: float) -> Iterator[None]:
        """A transaction that waits so long for a lock: else psycopg.errors.LockNotAvailable."""
        with connection.transaction():
            connection.execute(
                self.sql["set_lock_timeout"], {"milliseconds": f"{seconds * 1000:.0f}"}
            )
            yield

    def renew_token(self, connection: Connection, lease: Lease) -> None:
        """Fence off our own write whose answer was lost: it has happened, or never will.

        Its backend may still wait for a lock, or for the disk. This waits for the row behind it,
        and a statement that comes later finds another token. May be repeated if its own answer is
        lost.
        """
        if lease.next_token is None:
            lease.next_token = new_token()
        rows = execute(
            connection,
            self.sql["renew"],
            {"run_id": lease.run.run_id, "tokens": lease.tokens, "next": lease.next_token},
        )
        if rows:
            lease.token, lease.next_token = lease.next_token, None

    def inspect(self, connection: Connection, lease: Lease, after: int) -> LeaseStatus:
        """Read the lease and its writes after an interrupted commit.

        Notes on the lease whether a cancel was accepted.
        """
        parameters = {"run_id": lease.run.run_id, "after": after}
        rows = execute(connection, self.sql["inspect"], parameters)
        if not rows:
            return LeaseStatus(
                held=False, committed_since=False, last_seq=0, state=RunState.CANCELLED
            )
        token, last_seq, lease.cancelled, state, written = rows[0]
        ours = token in lease.tokens
        return LeaseStatus(
            held=ours and state == RunState.RUNNING,
            committed_since=ours and written,
            last_seq=last_seq,
            state=RunState(state),
        )


def new_token() -> int:
    """A fencing token: a number that was never drawn before."""
    return secrets.randbits(63)


def _note_read(leases: Sequence[Lease], read: Mapping[int, Callable[[], Sequence[Any]]]) -> None:
    """Note with these leases what was read of them, by token."""
    for lease in leases:
        rows = read[lease.token]() if lease.token in read else ()
        if rows and rows[-1][1] is not None:  # it has a run under this lease
            lease.ahead, lease.run = rows, replace(lease.run, last_seq=rows[-1][1])


def _lease(claimed: Sequence[Any]) -> Lease:
    """Of a row of a claim."""
    *row, ran_out, token, left, waited, age, trace_context, limited_step, let_in, begun, _ = claimed
    run = Run.from_row(row)
    return Lease(
        run=run,
        token=token,
        cancelled=run.cancel_requested_at is not None,
        deadline=None if left is None else monotonic() + left,
        waited=waited,
        age=age,
        trace_context=_carrier(trace_context),
        ran_out=ran_out,
        unreadable=run.input == UNREADABLE,
        begun=begun,
        limited_step=limited_step,
        let_in=let_in,
    )


def _carrier(stored: Any) -> Mapping[str, str] | None:
    """The headers that a row carries, unless it holds anything else: the run is worth more."""
    headers = isinstance(stored, dict) and all(isinstance(value, str) for value in stored.values())
    return stored if headers else None
