"""The waking and sleeping of a relay, for as long as its sessions live."""

import logging
import threading

from beatless.outbox.clock import monotonic, since_boot
from beatless.outbox.config import RelayConfig
from beatless.outbox.doorbell import Ring, Sessions, State
from beatless.outbox.drain import Drain
from beatless.outbox.observer import (
    RelayAsleep,
    RelayWoke,
    StalledRelayEnded,
    WakeSource,
    WatchdogRan,
)
from beatless.outbox.overdue import OVERDUE_POLL_S
from beatless.outbox.shards import Shards
from beatless.outbox.sockets import Alarm

logger = logging.getLogger(__name__)

FROZEN_AFTER_WATCHDOGS = 2
"""Watchdog intervals without a statement after which another relay counts as frozen."""

BUSY_MESSAGES = 8
"""Messages in one look that show more load than ringing is good for."""

FEW_WAKES = 3
"""Rings, one soon after another, that cost less than staying awake: a run of one step has three."""

BURST_MESSAGES = 200
"""Messages in `BURST_S` that are a burst."""

BURST_S = 1.0
"""Seconds of a burst, and after one, while the relay lingers ten times as long: another is near,
and a stall of the disk is not silence. Whenever it sleeps too early, every writer rings."""

BURST_LINGER_FACTOR = 10

LOAD_S = 2.0
"""Seconds for which a relay awaits no lock of another after so many messages in `BURST_S`, however
often it has slept between them."""

LONGEST_NAP_S = 0.001
"""Seconds between two looks that find nothing, at most; each is twice the one before."""

PAUSE_PER_MESSAGE_S, LONGEST_PAUSE_S = 0.0005, 0.005
"""Seconds that a relay waits after a look, for each message that it found, and at most."""

UNWATCHED_RECHECK_S = 0.5
"""Seconds between two looks of a relay that awaits no lock, whether each shard has a leader."""

FULL_BATCH_MESSAGES = 64
"""Messages in one look that need no company: the next look follows at once."""

DROWSY_POLL_S = 0.02
"""Seconds between two looks while a caller's open transaction keeps the relay from sleeping."""

UNLED_RECHECK_S = 0.1
"""Seconds after which a relay that knows of shards without a leader counts again.

Another relay is about to lead them and will announce it; or it is going, has released its shards,
and still counts as a member, for a backend releases its locks one by one. Then nobody announces it.
"""

PING_TIMEOUT_S = 5.0
"""Seconds in which a NOTIFY to ourselves must have come back."""

SUSPEND_S = 1.0
"""Seconds of a suspend of the machine, at least: the clock of waits stands still meanwhile."""

CLOCK_SLACK_S = 0.0005
"""Due times are the server's: look a moment after them, not a moment before."""


class SessionLoop:
    """One connection lifetime of a relay, from its sessions' start to their end."""

    def __init__(
        self, config: RelayConfig, sessions: Sessions, *, alarm: Alarm, stopping: threading.Event
    ) -> None:
        """`alarm` interrupts a wait: rung after `stopping` was set, or when a batch has an end."""
        self.drain = Drain(sessions.work, config, on_result=alarm.ring)
        self.shards = Shards(sessions, config.observer)
        self.sessions = sessions
        self._config = config
        self._alarm = alarm
        self._stopping = stopping
        self._observer = config.observer
        self._next_due: float | None = None
        self._watchdog_at = monotonic() + config.watchdog
        self._suspended_s = since_boot() - monotonic()
        self._last_wake = 0.0
        self._wakes = 0
        """How many have followed one another within `linger`."""
        self._burst_at = -BURST_S
        self._counted, self._counted_since = 0, -BURST_S
        """Messages since then."""
        self._loaded_until = 0.0
        self._drowsy_moved = 0
        self._unwatched = False
        """No lock of another relay is awaited, under load: it looks at `_recheck_at`."""
        self._recheck_at = 0.0

    def run(self) -> None:
        """Drain and sleep until the relay stops. Raises when a session is lost."""
        self.sessions.announce()
        self.rebalance()
        while not self._stopping.is_set():
            if self.sessions.members_changed:
                self.rebalance()
            match self.sessions.state:
                case State.AWAKE:
                    self._stay_awake()
                case State.DROWSY:
                    self._fall_asleep()
                case State.ASLEEP:
                    self._sleep()
        self.drain.finish(self.shards.owned)

    def close(self) -> None:
        """Finish the drain's messages in flight."""
        self.drain.close()

    def rebalance(self) -> None:
        """Wake up, and lead another share of the shards."""
        if self.sessions.state is not State.AWAKE:
            self.sessions.rouse()
        self.shards.rebalance()
        self._unwatched = False
        if not self.shards.complete:
            self._watchdog_at = min(self._watchdog_at, monotonic() + UNLED_RECHECK_S)
        self.drain.events.floor.reset()
        self._note_origin()

    def _note_origin(self) -> None:
        if self.shards.origin:
            self.drain.events.origin = self.shards.origin

    def _wait(self, seconds: float) -> None:
        self.sessions.wait(seconds, self._alarm)
        # A ring's reason was set before it: it is checked after this.
        self._alarm.quiet()

    def _stay_awake(self) -> None:
        began = quiet_since = monotonic()
        total, nap = 0, self._config.nap
        while monotonic() - quiet_since < self._linger():
            # One step at least: who sends news of members without end must not keep us from it.
            if moved := self.drain.step(self.shards.owned):
                quiet_since, total = monotonic(), total + moved
                self._count(moved)
                if total > BURST_MESSAGES:
                    self._burst_at = quiet_since
                if quiet_since - began > BURST_S:
                    began, total = quiet_since, 0
                nap = self._config.nap
                self._gather(moved)
            else:
                self._wait(nap)
                nap = min(2 * nap, max(self._config.nap, LONGEST_NAP_S))
            if monotonic() - self.drain.overdue.looked_at > OVERDUE_POLL_S:
                self.drain.overdue.end(self.shards.owned)
            self._look_at_schedules()
            self._look_at_neighbours()
            self._run_watchdog()
            if self._stopping.is_set() or self.sessions.members_changed:
                return
        self._drowsy_moved = 0
        self.sessions.doze(self.shards.owned)

    def _look_at_schedules(self) -> None:
        schedules = self.drain.schedules
        if self.sessions.schedules_changed or self._was_suspended():
            # Before the look: a change that comes behind it is heard of as well.
            self.sessions.schedules_changed = False
            schedules.expect_change()
        if schedules.due:
            schedules.look(self.shards.owned)

    def _gather(self, moved: int) -> None:
        """Wait for the messages of the next moment, the longer the more there are.

        A look costs as much for one message as for ten (ADR 0060). What comes alone is followed by
        the next look at once, and a batch that is large enough too.
        """
        if 1 < moved < FULL_BATCH_MESSAGES:
            self._alarm.quiet()  # of the batch that was just collected
            self._wait(min(moved * PAUSE_PER_MESSAGE_S, LONGEST_PAUSE_S))

    def _count(self, moved: int) -> None:
        """Have nothing wait for a lock if there is much: what dies would stay before each scan.

        See ADR 0086.
        """
        now = monotonic()
        if now - self._counted_since > BURST_S:
            self._counted, self._counted_since = 0, now
        self._counted += moved
        if self._counted > BURST_MESSAGES:
            self._loaded_until = now + LOAD_S
            for companion in self._config.companions:
                companion.note_load()
            self._unwatched |= self.sessions.unwatch()

    def _look_at_neighbours(self) -> None:
        """Look for shards without a leader now and then, until the load is over."""
        if self._unwatched and monotonic() >= self._loaded_until:
            self._unwatched = False
            self.shards.watch_next()
        elif self._unwatched and monotonic() >= self._recheck_at:
            self._find_unled()

    def _find_unled(self) -> None:
        """Look for shards without a leader, and tell the other relays: it may be for them."""
        self._recheck_at = monotonic() + UNWATCHED_RECHECK_S
        if not self.shards.all_led():
            self.sessions.members_changed = True
            self.sessions.announce()

    def _linger(self) -> float:
        """Seconds for which to stay awake after the last message."""
        recent = monotonic() - self._burst_at < BURST_S
        return self._config.linger * (BURST_LINGER_FACTOR if recent else 1)

    def _fall_asleep(self) -> None:
        # Forget the ring before looking: one that comes while we look must wake us again.
        self.sessions.rung = Ring.NOTHING
        if self._is_busy(self._drain_all()):
            self.sessions.rouse()
        elif self.sessions.granted():
            if self._is_busy(self._drain_all()):
                self.sessions.rouse()
                return
            self._observer(RelayAsleep(shards=self.shards.owned))
        elif not self.sessions.rung:
            # The locks are asked for one after another: behind a shard whose lock a caller's open
            # transaction holds, the writers of the others are still silent. So look now and then.
            self._wait(min(self._patience(), DROWSY_POLL_S))
            self._look_at_neighbours()
            self._run_watchdog()

    def _is_busy(self, moved: int) -> bool:
        """Whether too much came since we began to fall asleep: meanwhile every writer rings."""
        self._count(moved)
        self._drowsy_moved += moved
        return self._drowsy_moved > BUSY_MESSAGES

    def _sleep(self) -> None:
        if not self.sessions.rung and not self.drain.tasks.has_result:
            self._wait(self._patience())
        if self._stopping.is_set() or self.sessions.members_changed:
            return
        rung, self.sessions.rung = self.sessions.rung, Ring.NOTHING
        due = self._next_due is not None and monotonic() >= self._next_due
        if self._was_suspended():
            self.drain.overdue.next_at, due = 0.0, True
            self.drain.schedules.expect_change()
        if rung or due or self.drain.tasks.has_result:
            woke, before = monotonic(), self._last_wake
            self._last_wake = woke
            self._wakes = self._wakes + 1 if woke - before < self._config.linger else 1
            alone = not due and not self.drain.tasks.has_result and not self.drain.tasks_left
            moved = self._answer(rung) if rung and alone else self._drain_all()
            source: WakeSource = "notify" if rung else "timer" if due else "broker"
            self._count(moved)
            self._observer(RelayWoke(source=source))
            # As Linux' NAPI: interrupts while idle, none under load.
            if moved > BUSY_MESSAGES or (moved and self._wakes > FEW_WAKES):
                self.sessions.rouse()
        self._look_at_neighbours()
        self._run_watchdog()

    def _answer(self, ring: Ring) -> int:
        """Publish what a ring told of. Asleep: whatever is committed from now on rings, too.

        So one look is enough that has found all. A step or a trace has moved no dispatch: neither
        these nor their due times are looked at then. A claim makes room in a window, which matters
        only while dispatches are left. The step that it has begun may end soon: one look for both.
        """
        if ring is Ring.CLAIM:
            self._alarm.quiet()  # of the batch that was just collected
            self._wait(self._config.linger)
            # Forgotten before the look: what rings while it looks is to be answered, too.
            ring, self.sessions.rung = ring.beside(self.sessions.rung), Ring.NOTHING
        shards, look_ahead = self.shards.owned, ring is not Ring.EVENTS
        moved = self.drain.step(shards, only_events=ring is not Ring.ALL)
        if moved > BUSY_MESSAGES:
            return moved
        if not self.drain.complete:
            return moved + self._drain_all()
        if self.sessions.rung and ring is not Ring.ALL:
            # The look that follows deletes what this one has published.
            self.sessions.rung = ring.beside(self.sessions.rung)
            return moved
        if not self.drain.conclude(shards, look_ahead=look_ahead):
            return moved + self._drain_all()
        if look_ahead:
            self._note_next_step()
        return moved

    def _drain_all(self) -> int:
        """Publish waiting messages, and note when to look again; both only until it is too much.

        Under load there is always more: going on would leave all writers ringing meanwhile.
        """
        shards = self.shards.owned
        if monotonic() >= self.drain.overdue.next_at:
            self.drain.overdue.end(shards)
        if self.drain.schedules.due:
            self.drain.schedules.fire()
        total = 0
        while total <= BUSY_MESSAGES:
            moved = self.drain.step(shards, look_ahead=True)
            total += moved
            if not moved and not self.drain.crowded and not self.drain.tasks.marks_due:
                self._note_next_step()
                break
        return total

    def _was_suspended(self) -> bool:
        """Whether the machine was, since the last look: what was to come later may be due."""
        before, self._suspended_s = self._suspended_s, since_boot() - monotonic()
        return self._suspended_s - before > SUSPEND_S

    def _note_next_step(self) -> None:
        wait = self.drain.next_step_in()
        self._next_due = None if wait is None else monotonic() + wait

    def _patience(self) -> float:
        """Seconds until this relay has something to do without a ring."""
        until = self._watchdog_at
        if self._next_due is not None:
            until = min(until, self._next_due)
        if self._unwatched:
            until = min(until, self._recheck_at, self._loaded_until)
        return max(0.0, until - monotonic()) + CLOCK_SLACK_S

    def _run_watchdog(self) -> None:
        """Send the only periodic statements of an idle relay, once in each watchdog interval.

        They prove that a NOTIFY still arrives, show the other relays that this one is not frozen,
        end those that are, find shards without a leader, and let VACUUM go on.
        """
        if monotonic() < self._watchdog_at:
            return
        if self.sessions.state is State.ASLEEP:
            self.sessions.prove_listening(PING_TIMEOUT_S)
        for pid in self.sessions.end_silent(self._config.watchdog * FROZEN_AFTER_WATCHDOGS):
            logger.warning(
                "a relay was killed, is frozen or is cut off: its sessions, which have sent no "
                "statement for too long, were ended, and its shards are free",
                extra={"action": "relay_silenced", "pid": pid},
            )
            self._observer(StalledRelayEnded(pid=pid))
            self.sessions.members_changed = True
        self._find_unled()  # the relay that should have noticed may not have
        self._note_origin()
        self.sessions.renew_watch()
        self.sessions.show_failing(self._config.failing())
        self._observer(WatchdogRan())
        self._watchdog_at = monotonic() + self._config.watchdog
