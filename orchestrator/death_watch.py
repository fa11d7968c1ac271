"""Ends the leases of processes that have died, as soon as they have: in a worker's keeper."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from beatless.orchestrator.board import Board
from beatless.orchestrator.fleet_watch import FleetWatch
from beatless.orchestrator.keeper import Keeper
from beatless.orchestrator.lease import Connection, Leases
from beatless.orchestrator.observer import DeathCause, LeasesEnded
from beatless.orchestrator.roster import Roster
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.sockets import readable

logger = logging.getLogger(__name__)

BETWEEN_TRIES = Backoff(initial=0.05, cap=2.0)
"""Seconds between tries to end leases, while Postgres is away or a row is held."""

GIVE_UP_AFTER_S = 60.0
"""Seconds after which a lease is left to its time: Postgres is away, and what is left of a worker
that was killed shall not stay for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A lease whose process has died."""

    run_id: str
    pid: int
    uncalled: bool
    beside: bool
    cause: DeathCause
    until: float
    """When to leave it to its time, by the monotonic clock."""


class DeathWatch:
    """The work of a worker's keeper process: it keeps late leases, and ends those of the dead.

    1. wait until a process has died, announces itself, or it is time to look at late leases
    2. of a dead process: read from the board which leases it held, and end them in Postgres

    Accepted as proof of death is the pidfd of the process that held the lease, and nothing else:
    a process that stands still, or that was made with the pid of another, keeps its leases.
    It outlives the worker's main process, and ends when all of the worker's processes have. Opens
    a connection when something has died, no sooner.
    """

    def __init__(
        self,
        board: Board,
        leases: Leases,
        connect: Callable[[], Connection],
        *,
        roster: Roster,
        keeper: Keeper,
        main: int,
        fleet: FleetWatch | None = None,
        observer: Observer = ignore,
    ) -> None:
        """`main` is the pidfd of the worker's main process.

        `fleet` makes this worker known to others, and watches over them.
        """
        self._board = board
        self._leases = leases
        self._connect = connect
        self._roster = roster
        self._keeper = keeper
        self._main: int | None = main
        self._fleet = fleet
        self._observer = observer
        self._lives: dict[int, int] = {}
        """The processes that live: pidfd and life."""
        self._orphans: dict[int, Orphan] = {}
        """By token."""
        self._failures = 0
        self._try_at = 0.0
        self._look_at = monotonic() + keeper.interval_s
        self._stopped = False

    def run(self) -> None:
        """Until the worker has stopped, or nothing of it is left."""
        while not self._stopped and (self._main is not None or self._lives or self._orphans):
            self.once()

    def once(self) -> None:
        """Wait for the next thing to do, and do it."""
        main = [] if self._main is None else [self._main]
        others = self._fleet.descriptors() if self._fleet is not None else []
        ready = readable([self._roster.fileno(), *main, *others, *self._lives], self._patience())
        if self._main in ready:
            self._main = None
        for announced in self._roster.announced():
            if announced is None:
                self._stopped = True
            else:
                life, descriptor = announced
                self._lives[descriptor] = life
        if self._stopped:  # the last look: some may have been killed while the worker stopped
            ready = readable(self._lives, 0)
        for descriptor in self._lives.keys() & set(ready):
            life = self._lives.pop(descriptor)
            os.close(descriptor)
            self._keeper.gone.add(life)
            self._note_orphans(life)
        if self._orphans and monotonic() >= self._try_at:
            self._try_to_end()
        if self._fleet is not None:
            self._fleet.once()
        if monotonic() >= self._look_at:
            self._keeper.look()
            self._look_at = monotonic() + self._keeper.interval_s

    def _patience(self) -> float:
        until = min(self._look_at, self._try_at) if self._orphans else self._look_at
        own = max(0.0, until - monotonic())
        return own if self._fleet is None else min(own, self._fleet.patience())

    def _note_orphans(self, life: int) -> None:
        """Now, before the process that takes the dead one's place writes in its slots."""
        cause: DeathCause = "child_died" if self._main is not None else "worker_died"
        until = monotonic() + min(self._leases.seconds, GIVE_UP_AFTER_S)
        for noted in self._board.read():
            if noted.life != life:
                continue
            for token in noted.tokens:
                self._orphans[token] = Orphan(
                    run_id=noted.run_id,
                    pid=noted.pid,
                    uncalled=noted.uncalled,
                    beside=noted.beside,
                    cause=cause,
                    until=until,
                )

    def _try_to_end(self) -> None:
        try:
            self._end()
        except Exception as error:
            logger.warning(
                "leases of dead processes could not be ended, at once",
                extra={"action": "lease_end_failed", "reason": str(error)},
                exc_info=None if isinstance(error, psycopg.Error) else error,
            )
            if not isinstance(error, psycopg.OperationalError):
                self._orphans.clear()  # no try would succeed: as if there is no such table any more
        now = monotonic()
        self._orphans = {token: each for token, each in self._orphans.items() if each.until > now}
        self._failures = self._failures + 1 if self._orphans else 0
        self._try_at = now + BETWEEN_TRIES.delay(self._failures) if self._orphans else 0.0

    def _end(self) -> None:
        with self._connect() as connection:
            found = self._leases.end(
                connection,
                [(each.run_id, token) for token, each in self._orphans.items()],
                uncalled={token for token, each in self._orphans.items() if each.uncalled},
                beside={token for token, each in self._orphans.items() if each.beside},
            )
        ended = [self._orphans[token] for token, done in found.items() if done]
        self._orphans = {
            token: each for token, each in self._orphans.items() if found.get(token) is False
        }
        for each in ended:
            self._observer(LeasesEnded(cause=each.cause, leases=1))
            logger.warning(
                "the process of a run has died: its lease is ended, the run goes on at once",
                extra={
                    "action": "lease_ended",
                    "run_id": each.run_id,
                    "pid": each.pid,
                    "cause": each.cause,
                },
            )
