"""Moves committed messages to their publishers. Knows shards and publishers, nothing of runs."""

import logging
import math
import os
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.backoff import BACKOFF_RESET_S
from beatless.outbox.chores import Chores
from beatless.outbox.clock import monotonic
from beatless.outbox.config import RelayConfig
from beatless.outbox.doorbell import Alarm, Sessions, State, prepare_to_drain
from beatless.outbox.drain import Drain
from beatless.outbox.errors import DirectConnectionRequired, SchemaMissing
from beatless.outbox.message import SHARDS
from beatless.outbox.observer import (
    RelayAsleep,
    RelayFailed,
    RelayStarted,
    RelayStopped,
    RelayWoke,
    ShardsAssigned,
    StalledRelayEnded,
    WakeSource,
    WatchdogRan,
)
from beatless.outbox.overdue import OVERDUE_POLL_S
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.sockets import readable
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

SILENT = 2
"""Watchdog intervals without a statement after which a relay counts as frozen."""

BUSY = 8
"""Messages in one look that show more load than ringing is good for."""

BURST = 200
"""Messages in a second that are a burst."""

AFTER_BURST = 1.0
"""Seconds of a burst, and after one, while the relay lingers ten times as long: another is near,
and a stall of the disk is not silence. Whenever it sleeps too early, every writer rings."""

DROWSY_LOOK = 0.02
"""Seconds between two looks while a caller's open transaction keeps the relay from sleeping."""


class Relay:
    """Moves committed messages to their publishers, on any number of machines at once.

    1. lead a share of the shards, by session locks
    2. drain until nothing is left
    3. fall asleep by the doorbell protocol, until a commit rings or a dispatch is due
    4. on any error: close everything, back off, start over with a drain
    """

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self.alarm = Alarm()
        self.stopping = threading.Event()
        self._thread: LastingThread | None = None
        self._chores = Chores(
            config.chores,
            queries=config.queries,
            connect=config.connect,
            observer=config.observer,
            after=config.chores_after,
        )
        self._once_lock = threading.Lock()
        self._once: tuple[psycopg.Connection[Any], Drain] | None = None
        self._pid = os.getpid()

    def start(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Run in a thread of this process. `on_error` hears of every failure it recovers from.

        Raises RuntimeError when it was started before, or made before a fork.
        """
        self._refuse_in_child()
        if self._thread is not None:
            raise RuntimeError("this relay was started before: make a new one")
        self._thread = LastingThread(
            "relay", lambda _: self.run(on_error), observer=self.config.observer
        )
        self._thread.start()

    def run(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Work until `stop()`. Raises SchemaMissing or DirectConnectionRequired at the start.

        Raises RuntimeError when the relay was made before a fork.
        """
        self._refuse_in_child()
        observer = self.config.observer
        failures, proven, began = 0, False, monotonic()
        while not self.stopping.is_set():
            try:
                began = monotonic()
                with Sessions(self.config.queries, self.config.connect) as sessions:
                    sessions.prove_listening()
                    proven = True
                    self._chores.start()
                    observer(RelayStarted())
                    shift = Shift(self, sessions)
                    try:
                        shift.work()
                    finally:
                        shift.close()
            except Exception as error:
                # Whatever it is: a relay that ends would leave its shards to nobody.
                if not proven and isinstance(error, (DirectConnectionRequired, SchemaMissing)):
                    raise
                failures = 1 if monotonic() - began > BACKOFF_RESET_S else failures + 1
                delay = self.config.backoff.delay(failures)
                logger.warning(
                    "relay lost its sessions, will reconnect",
                    extra={"action": "relay_restart", "retry_in": delay, "reason": str(error)},
                )
                observer(RelayFailed(error=str(error)))
                if on_error is not None:
                    on_error(error)
                self._rest(delay)
        self._chores.stop()
        observer(RelayStopped())

    def drain_once(self, run_id: str | None = None, now: datetime | None = None) -> int:
        """Publish everything that is due, of one run or of all, and return how many messages.

        Needs no running relay and ignores leadership: a double publication is harmless. `now` is
        the time by which a dispatch must be due (default: the server's clock). Raises RuntimeError
        when the relay was made before a fork.
        """
        self._refuse_in_child()
        with self._once_lock:
            if self._once is None:
                connection = self.config.connect()
                prepare_to_drain(connection)
                drain = Drain(connection, self.config, on_result=self.alarm.ring)
                self._once = (connection, drain)
            drain = self._once[1]
            total = 0
            try:
                drain.overdue.end(ALL_SHARDS, now)
                while (
                    (moved := drain.step(ALL_SHARDS, run_id=run_id, now=now))
                    or drain.tasks.await_result()
                    or drain.crowded
                ):
                    total += moved
                drain.finish(ALL_SHARDS, now)
            except BaseException:
                self._forget_once()
                raise
            return total

    def ask_to_stop(self) -> None:
        """Let `run` return after its current step. Safe in a signal handler."""
        self.stopping.set()
        self.alarm.ring()

    def stop(self) -> None:
        """Finish the current step, release the shards and return. May be called more than once.

        In a process that was forked since the relay was made, it does nothing.
        """
        if self._pid != os.getpid():
            return
        self.ask_to_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.end()
        self._chores.stop()
        with self._once_lock:
            self._forget_once()
        self.alarm.close()

    def _refuse_in_child(self) -> None:
        """Its sessions, its publishers' connections and its threads are the parent's."""
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this relay was made in process {self._pid} before it forked: make another in "
                "this process, with app.relay()"
            )

    def _forget_once(self) -> None:
        if self._once is not None:
            connection, drain = self._once
            self._once = None
            drain.close()
            connection.close()

    def _rest(self, seconds: float) -> None:
        """Wait until then, or until the relay is asked to stop; nothing else ends it."""
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            # Whoever stops us says so before they ring; a publisher rings for news of its own.
            self.alarm.quiet()
            if self.stopping.is_set():
                return
            readable([self.alarm], left)


class Shift:
    """One life of a relay, from its sessions' start to their end."""

    def __init__(self, relay: Relay, sessions: Sessions) -> None:
        self._relay = relay
        self._sessions = sessions
        self._drain = Drain(sessions.work, relay.config, on_result=relay.alarm.ring)
        self._shards: tuple[int, ...] = ()
        self._members: list[int] = []
        self._next_due: float | None = None
        self._watchdog_at = monotonic() + relay.config.watchdog
        self._last_wake = 0.0
        self._burst_at = -AFTER_BURST
        self._drowsy_moved = 0

    def work(self) -> None:
        """Drain and sleep until the relay stops. Raises when a session is lost."""
        self._sessions.announce()
        self._share_shards()
        while not self._relay.stopping.is_set():
            if self._sessions.members_changed:
                self._share_shards()
            match self._sessions.state:
                case State.AWAKE:
                    self._stay_awake()
                case State.DROWSY:
                    self._fall_asleep()
                case State.ASLEEP:
                    self._sleep()
        self._drain.finish(self._shards)

    def close(self) -> None:
        """End what the drain has begun."""
        self._drain.close()

    def _wait(self, seconds: float) -> None:
        self._sessions.wait(seconds, self._relay.alarm)
        # Whoever rang has said why before: it is looked at after this.
        self._relay.alarm.quiet()

    def _stay_awake(self) -> None:
        began = quiet_since = looked = monotonic()
        total = 0
        while monotonic() - quiet_since < self._linger():
            # One step at least: who sends news of members without end must not keep us from it.
            if moved := self._drain.step(self._shards):
                quiet_since, total = monotonic(), total + moved
                if total > BURST:
                    self._burst_at = quiet_since
                if quiet_since - began > AFTER_BURST:
                    began, total = quiet_since, 0
            else:
                self._wait(self._relay.config.nap)
            if monotonic() - looked > OVERDUE_POLL_S:
                looked = monotonic()
                self._drain.overdue.end(self._shards)
            self._look_after_sessions()
            if self._relay.stopping.is_set() or self._sessions.members_changed:
                return
        self._drowsy_moved = 0
        self._sessions.doze(self._shards)

    def _linger(self) -> float:
        recent = monotonic() - self._burst_at < AFTER_BURST
        return self._relay.config.linger * (10 if recent else 1)

    def _fall_asleep(self) -> None:
        # Forget the ring before looking: one that comes while we look must wake us again.
        self._sessions.rung = False
        if self._is_busy(self._drain_all()):
            self._sessions.rouse()
        elif self._sessions.granted():
            if self._is_busy(self._drain_all()):
                self._sessions.rouse()
                return
            self._relay.config.observer(RelayAsleep(shards=self._shards))
        elif not self._sessions.rung:
            # The locks are asked for one after another: behind a shard whose lock a caller's open
            # transaction holds, the writers of the others are still silent. So look now and then.
            self._wait(min(self._patience(), DROWSY_LOOK))
            self._look_after_sessions()

    def _is_busy(self, moved: int) -> bool:
        """Whether too much came since we began to fall asleep: meanwhile every writer rings."""
        self._drowsy_moved += moved
        return self._drowsy_moved > BUSY

    def _sleep(self) -> None:
        if not self._sessions.rung and not self._drain.tasks.has_result:
            self._wait(self._patience())
        if self._relay.stopping.is_set() or self._sessions.members_changed:
            return
        rung, self._sessions.rung = self._sessions.rung, False
        due = self._next_due is not None and monotonic() >= self._next_due
        if rung or due or self._drain.tasks.has_result:
            woke, before = monotonic(), self._last_wake
            self._last_wake = woke
            moved = self._drain_all()
            source: WakeSource = "notify" if rung else "timer" if due else "broker"
            self._relay.config.observer(RelayWoke(source=source))
            # As Linux' NAPI: interrupts while idle, none under load.
            if moved > BUSY or (moved and woke - before < self._relay.config.linger):
                self._sessions.rouse()
        self._look_after_sessions()

    def _drain_all(self) -> int:
        """Publish what is there, and note when to look again; both only until it is too much.

        Under load there is always more: whoever went on would leave all writers ringing meanwhile.
        """
        if monotonic() >= self._drain.overdue.next_at:
            self._drain.overdue.end(self._shards)
        total = moved = self._drain.step(self._shards)
        due = None
        while total <= BUSY:
            # Asked before the last step: what becomes due between the two is in one of them. And
            # when all that was sent is marked: until then its rows are overdue, and none is next.
            marked = not self._drain.tasks.marks_due
            due = self._drain.next_due(self._shards) if marked else None
            moved = self._drain.step(self._shards)
            total += moved
            if not moved and not self._drain.crowded and marked:
                break
        if moved:
            return total
        wait = self._drain.next_step_in(due)
        self._next_due = None if wait is None else monotonic() + wait
        return total

    def _patience(self) -> float:
        until = self._watchdog_at
        if self._next_due is not None:
            until = min(until, self._next_due)
        # Due times are the server's: look a moment after them, not a moment before.
        return max(0.0, until - monotonic()) + 0.0005

    def _look_after_sessions(self) -> None:
        """The only periodic statements of an idle relay.

        They prove that a NOTIFY still arrives, tell the other relays that this one is not frozen,
        end those that are, find shards that nobody leads, and let VACUUM go on.
        """
        if monotonic() < self._watchdog_at:
            return
        if self._sessions.state is State.ASLEEP:
            self._sessions.prove_listening(5.0)
        for pid in self._sessions.end_silent(self._relay.config.watchdog * SILENT):
            logger.warning(
                "a relay was silent for too long: its sessions were ended, its shards are free",
                extra={"action": "relay_silenced", "pid": pid},
            )
            self._relay.config.observer(StalledRelayEnded(pid=pid))
            self._sessions.members_changed = True
        if len(self._holders()[0]) < SHARDS:  # whoever should have noticed has not
            self._sessions.members_changed = True
            self._sessions.announce()
        self._sessions.renew_watch()
        self._relay.config.observer(WatchdogRan())
        self._watchdog_at = monotonic() + self._relay.config.watchdog

    def _share_shards(self) -> None:
        """Lead an equal share of the shards, and watch the next relay in the ring for its death."""
        sessions, key = self._sessions, self._relay.config.queries.leader_key
        if sessions.state is not State.AWAKE:
            sessions.rouse()
        sessions.watch_shard(None)
        changed = sessions.watch_granted  # somebody died: the others must count anew as well
        sessions.members_changed = sessions.watch_granted = False
        me = sessions.pid
        holders, members = self._holders()
        # So they must if somebody went while nobody watched, and what is free is not for us.
        changed |= not set(self._members) <= set(members)
        self._members = members
        share = math.ceil(SHARDS / max(1, len(members)))
        mine = sorted(shard for shard, pid in holders.items() if pid == me)
        for shard in mine[share:]:
            sessions.work.execute(f"SELECT pg_advisory_unlock({key}, %s)", (shard,))
            changed = True
        mine = mine[:share]
        for shard in (s for s in range(SHARDS) if s not in holders):
            if len(mine) >= share:
                break
            row = sessions.work.execute(
                f"SELECT pg_try_advisory_lock({key}, %s)", (shard,)
            ).fetchone()
            if row and row[0]:
                mine.append(shard)
                changed = True
        self._shards = tuple(sorted(mine))
        self._drain.events.floor.reset()
        if changed:
            sessions.announce()
        self._relay.config.observer(ShardsAssigned(shards=self._shards))
        ring = [pid for pid in members if pid > me] + [pid for pid in members if pid < me]
        others, still = self._holders()
        # Nobody watched who went since the count, or gave up a shard that was not free then.
        freed = len(mine) < share and len(others) < SHARDS
        if still != members or freed:
            sessions.members_changed = True
        theirs = [(ring.index(pid), shard) for shard, pid in others.items() if pid in ring]
        # Granted to the waiting session of a relay that has gone: free again in a moment, and
        # nobody else's to tell.
        strays = [(-1, shard) for shard, pid in others.items() if pid not in still]
        waited_for = min(strays + theirs, default=None)
        sessions.watch_shard(waited_for[1] if waited_for else None)

    def _holders(self) -> tuple[dict[int, int], list[int]]:
        """Which session leads which shard, and the sessions of all relays."""
        rows = self._sessions.work.execute(
            f"SELECT objid::int8, pid, {self._relay.config.queries.origin} "
            "FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            f"AND classid = ({self._relay.config.queries.leader_key})::oid AND objsubid = 2"
        ).fetchall()
        if rows:  # a renewed history is noticed by the way
            self._drain.events.origin = rows[0][2]
        holders = {shard: pid for shard, pid, _ in rows if shard < SHARDS}
        members = sorted({pid for shard, pid, _ in rows if shard >= SHARDS})
        return holders, members
