"""One pass of a relay over the due messages. Knows no session state: its caller decides when."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.async_publisher import Batch
from beatless.outbox.breaker import CircuitBreaker
from beatless.outbox.config import RelayConfig
from beatless.outbox.due_schedules import DueSchedules
from beatless.outbox.event_lane import EventLane
from beatless.outbox.message import PickedEvents
from beatless.outbox.observer import Drained
from beatless.outbox.overdue import OverdueRuns
from beatless.outbox.pending import prepare_anew
from beatless.outbox.quarantine import Quarantine, is_row_fault
from beatless.outbox.queries import int_array
from beatless.outbox.task_lane import TaskLane

LOCKED_ROW_POLL_S = 0.25
"""Seconds between two picks of due rows that another transaction holds."""


class Drain:
    """Publishes due messages, one batch per step, and forgets a batch in the step after it.

    1. one round trip: delete the rows that the last step published, select the next
    2. send the tasks on their way, publish the events
    3. remember both as published; nothing is deleted that a publisher has not accepted

    The round trip is one transaction. If a row makes it fail, each row is tried alone: the run of
    the one that fails is set aside, and the others go on. With nothing to delete, the tasks are
    sent on their way before the events are selected.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        config: RelayConfig,
        *,
        on_result: Callable[[], None],
    ) -> None:
        """`on_result` is called in another thread when a batch of tasks has found its end."""
        self._connection = connection
        self._queries = config.queries
        self._faults = config.faults
        self._observer = config.observer
        self._quarantine = Quarantine(config.observer)
        redis = CircuitBreaker("Redis", config.backoff, config.observer)
        broker = CircuitBreaker("broker", config.backoff, config.observer)
        self._breakers = (redis, broker)
        self._before_step = [(each, each.allows_call, each.failures) for each in self._breakers]
        self.crowded = False
        """Some rows took the places of others in the last step: take another one."""
        self.complete = False
        """Whatever the last step could pick, it has published, and handed over to the broker."""
        self._tasks_left = False
        self.next_due_s: float | None = None
        """Seconds from the last step to the next due time or deadline of a run, or the next tick of
        a schedule, if it looked ahead; None: there is none."""
        self.overdue = OverdueRuns(connection, config.overdue, config.observer)
        self.schedules = DueSchedules(
            connection, config.fire, config.queries.next_tick_sql, config.observer
        )
        self.events = EventLane(
            connection,
            config.queries,
            config.events,
            breaker=redis,
            quarantine=self._quarantine,
            on_recovery=broker.allow_now,
            observer=config.observer,
        )
        self.tasks = TaskLane(
            connection,
            config.queries,
            config.tasks,
            breaker=broker,
            quarantine=self._quarantine,
            redispatch=config.redispatch,
            wake=config.wake,
            on_result=on_result,
            on_recovery=redis.allow_now,
            observer=config.observer,
        )

    def step(
        self,
        shards: Sequence[int],
        *,
        run_id: str | None = None,
        now: datetime | None = None,
        look_ahead: bool = False,
        only_events: bool = False,
    ) -> int:
        """Publish one batch; the number of messages (outbox rows and dispatches) that left.

        `look_ahead` reads `next_due_s` as well. With `only_events` no dispatch is looked for.
        """
        events, tasks = self.events, self.tasks
        self.complete = False
        self._before_step = [(each, each.allows_call, each.failures) for each in self._breakers]
        sent = list(tasks.collect(shards, now))
        tasks.abandon_stalled()
        self._quarantine.release_due()
        rows: psycopg.Cursor[Any] | None
        batch, deleted, ahead = Batch(messages=()), None, None
        apart = self._is_all_forgotten and not look_ahead
        try:
            if apart:
                # Two statements cost no more than a pipeline of two, and the tasks are on their way
                # while Postgres makes the events.
                tasks.note_forgotten(())
                if not only_events:
                    dispatches = tasks.pick(shards, run_id, now)
                    batch = self._hand_over(dispatches, None, (), shards, run_id, now)
                rows = events.pick(shards, run_id)
            else:
                with self._connection.pipeline():
                    deleted = events.forget()
                    marked = tasks.forget(now)
                    still_held = tasks.find_held(now)
                    # After the marks, without which what was sent is due. Before the pick: a row
                    # that becomes due in between is in one of the two.
                    ahead = self._look_ahead(shards) if look_ahead else None
                    rows = events.pick(shards, run_id)
                    dispatches = None if only_events else tasks.pick(shards, run_id, now)
        except psycopg.Error as error:
            self._isolate(error, shards, run_id, now)
            return len(sent)
        self.next_due_s = self._earliest(ahead, shards)
        events.note_forgotten(deleted)
        if not apart:
            tasks.note_forgotten(marked)
        picked = events.fetch(rows, run_id)
        if not apart:
            batch = self._hand_over(dispatches, still_held, picked, shards, run_id, now)
        elif picked and not batch.messages:
            self._faults.reach("relay.after_claim")
        published = events.publish(picked)
        if batch:
            sent += tasks.collect_soon(shards, now)
        self.crowded = tasks.crowded
        if published or sent:
            self._faults.reach("relay.after_publish")
            self._observer(
                Drained(events=published, tasks=len(sent), rows=events.published, messages=sent)
            )
        if run_id is None and rows is not None and not self._quarantine.run_ids:
            complete = events.note_pass(picked)
            self.complete = complete and not (tasks.crowded or tasks.full or tasks.rows_held)
        return published + len(sent)

    def _hand_over(
        self,
        dispatches: psycopg.Cursor[Any] | None,
        still_held: psycopg.Cursor[Any] | None,
        picked: Sequence[PickedEvents],
        shards: Sequence[int],
        run_id: str | None,
        now: datetime | None,
    ) -> Batch:
        """Let the dispatches of a pick be published; those of them that are.

        If it has only woken runs, these are picked at once: nothing else has to go before them.
        """
        batch = self.tasks.fetch(dispatches, still_held, shards, now)
        if self.tasks.has_woken and not batch:
            woken = self.tasks.pick(shards, run_id, now)
            if woken is not None:
                batch = self.tasks.fetch(woken, None, shards, now)
        if picked or batch.messages:
            self._faults.reach("relay.after_claim")
        self.tasks.publish(batch)
        return batch

    def conclude(self, shards: Sequence[int], *, look_ahead: bool) -> bool:
        """Delete and mark what the last step has published; False if another step is needed.

        It was `complete`, and its caller is woken by whatever is committed since. `look_ahead`
        reads `next_due_s` as well.
        """
        alone = not look_ahead and self.tasks.is_all_forgotten
        try:
            with nullcontext() if alone else self._connection.pipeline():
                deleted = self.events.forget()
                marked = self.tasks.forget(None)
                ahead = self._look_ahead(shards) if look_ahead else None
        except psycopg.Error as error:
            self._isolate(error, (), None, None)
            return False
        if look_ahead:
            self.next_due_s = self._earliest(ahead, shards)
        self.events.note_forgotten(deleted)
        self.tasks.note_forgotten(marked, picked_behind=False)
        return self.tasks.all_marked and not self.events.rows_held and not self._tasks_left

    @property
    def _is_all_forgotten(self) -> bool:
        """Whether the next step has nothing to delete or to mark, and nothing is held."""
        return self.events.is_all_forgotten and self.tasks.is_all_forgotten

    @property
    def tasks_left(self) -> bool:
        """Whether there are dispatches that the last look ahead has found due, or that are held."""
        return self._tasks_left or self.tasks.rows_held or self.tasks.marks_due

    def finish(self, shards: Sequence[int], now: datetime | None = None) -> None:
        """Delete the rows that the last step published, without selecting more."""
        self.tasks.flush(shards, now)
        try:
            deleted = self.events.forget()
            marked = self.tasks.forget(now)
        except psycopg.Error as error:
            self._isolate(error, (), None, now)
            return
        self.events.note_forgotten(deleted)
        self.tasks.note_forgotten(marked)

    def close(self) -> None:
        """End the thread that hands tasks over."""
        self.tasks.close()

    def _look_ahead(self, shards: Sequence[int]) -> psycopg.Cursor[Any]:
        return self._connection.execute(self._queries.next_due_sql, {"shards": int_array(shards)})

    def _earliest(self, ahead: psycopg.Cursor[Any] | None, shards: Sequence[int]) -> float | None:
        row = ahead.fetchone() if ahead else None
        if row is None:
            return None
        due_s, deadline_s, tick_s, self._tasks_left = row
        waits = (
            due_s,
            self.overdue.schedule(deadline_s),
            self.schedules.plan_next(tick_s, shards),
        )
        return min((wait for wait in waits if wait is not None), default=None)

    def next_step_in(self) -> float | None:
        """Seconds from the last step, which looked ahead, until another has something to do.

        Without a NOTIFY; None: for ever.
        """
        waits = [self.next_due_s, self.retry_in_s, self.tasks.timeout_in_s]
        if self.events.rows_held or self.tasks.rows_held:
            waits.append(LOCKED_ROW_POLL_S)  # its holder may roll back, which sends no NOTIFY
        if self.tasks.marks_due:
            waits.append(0.0)
        return min((max(0.0, wait) for wait in waits if wait is not None), default=None)

    @property
    def retry_in_s(self) -> float | None:
        """Seconds until a publisher, or a run, is tried again that the last step left out, or None.

        0 if it may be since: rows that the step did not pick have no due time here.
        """
        waits = [
            breaker.retry_in_s
            for breaker, allowed_call, failures in self._before_step
            if not allowed_call or not breaker.allows_call or breaker.failures != failures
        ]
        return min(waits + self._quarantine.retry_in_s, default=None)

    def _isolate(
        self,
        error: psycopg.Error,
        shards: Sequence[int],
        run_id: str | None,
        now: datetime | None,
    ) -> None:
        """Find the rows for whose sake a step failed and set their runs aside; all others go on.

        Raises the error if no row is to blame for it.
        """
        if self._connection.closed or not is_row_fault(error):
            raise error
        prepare_anew(self._connection)
        additions = self._quarantine.additions
        self.events.forget_each()
        self.tasks.forget_each(now)
        dead = self.events.dead_letter_unreadable(shards, run_id)
        if self._quarantine.additions == additions and not dead:
            raise error
        self.crowded = True
