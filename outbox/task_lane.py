"""The way of task messages to the broker: picked, handed over, and marked once they arrived."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

import psycopg

from beatless.outbox.async_publisher import AsyncTaskPublisher, Batch
from beatless.outbox.breaker import CircuitBreaker
from beatless.outbox.clock import monotonic
from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import SHARDS, TaskMessage
from beatless.outbox.observer import Observer, QueueRefused
from beatless.outbox.publishers import TaskPublisher
from beatless.outbox.quarantine import Quarantine, is_row_fault
from beatless.outbox.queries import PickedTask, Queries, Turn, array, int_array, picked_tasks
from beatless.outbox.waking import Wake

logger = logging.getLogger(__name__)

INLINE_WAIT_S = 0.05
"""Seconds that a step waits for the broker; slower batches are collected in a later one."""

PUBLISH_TIMEOUT_S = 60.0
"""Seconds without an answer after which a batch counts as not sent. A RabbitMQ that is short of
memory holds its publishers without a word, and no timeout of theirs ends that."""

MAX_STALLED_BATCHES = 3
"""Batches that may hang at once. Each has a thread, and is sent when the broker lets go after all:
while so many do, no other is tried."""

SHUTDOWN_FLUSH_S = 2.0
"""Seconds that a stopping relay waits for the broker. Unmarked messages are sent again."""


class TaskLane:
    """Dispatches on their way: one batch is in flight at most, and its end is noted when it comes.

    `collect` takes the result of the batch in flight. `forget`, `find_held` and `pick` send their
    statement into the caller's pipeline, `note_forgotten` and `fetch` take the answers after it;
    `publish` hands a batch over and waits for nothing. Nothing is marked that the broker has not
    accepted.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        queries: Queries,
        publisher: TaskPublisher,
        *,
        breaker: CircuitBreaker,
        quarantine: Quarantine,
        redispatch: float,
        wake: Wake | None,
        on_result: Callable[[], None],
        on_recovery: Callable[[], None],
        observer: Observer,
    ) -> None:
        """`on_result` is called in another thread when a batch has found its end.

        `on_recovery` is called when a success ends a series of failures. `redispatch` is how many
        seconds a message that was sent may stay unclaimed. `wake` makes runs due that wait.
        """
        self.crowded = False
        """Rows that another transaction holds, or that are to wait, took the places of others in
        the last pick: pick once more."""
        self.has_woken = False
        """Runs that waited are due by the last pick: they are in the next one."""
        self.full = False
        """The last pick has as many rows as it may have: there may be others."""
        self.all_marked = True
        """Every message whose fate is known has been marked in the last step."""
        self._connection = connection
        self._queries = queries
        self._breaker = breaker
        self._quarantine = quarantine
        self._redispatch = redispatch
        self._wake = wake
        self._wakes_left = False
        """Whether another transaction held a run that was to be woken in the last pick."""
        self._on_recovery = on_recovery
        self._observer = observer
        self._new_publisher = partial(AsyncTaskPublisher, publisher, on_result, observer=observer)
        self._publisher = self._new_publisher()
        self._stalled: list[AsyncTaskPublisher] = []
        self._marks: list[tuple[str, Sequence[TaskMessage]]] = []
        """Marks for the messages whose fate is known, by statement."""
        self._marked: set[tuple[str, str]] = set()
        """Id and act of the messages that the last step marked."""
        self._turns: dict[str, Turn] = {}
        """The turns of the messages in flight, by id: those of queues with groups."""
        self._had: list[Turn] = []
        """Turns that groups have had, and that are not written yet."""
        self._lead = 0
        """The first of the shards of the last pick, under which turns are written."""
        self._held: dict[str, TaskMessage] = {}
        """Messages that were not marked because another transaction holds their rows, by id."""
        self._quiet_until: dict[str, float] = {}
        """The times until which each of these refused queues is not logged again."""

    @property
    def marks_due(self) -> bool:
        """Whether the next step writes the fate of messages, and so their due times."""
        return bool(self._marks)

    @property
    def is_all_forgotten(self) -> bool:
        """Whether no fate of a message and no turn is left to be written, and no row is held."""
        return not (self._marks or self._had or self._held)

    @property
    def rows_held(self) -> bool:
        """Whether another transaction held rows that were to be marked, or woken, before."""
        return bool(self._held) or self._wakes_left

    @property
    def in_flight(self) -> bool:
        """Whether a batch was handed over whose result was not collected."""
        return self._publisher.in_flight

    @property
    def has_result(self) -> bool:
        """Whether the broker has answered, after a step that did not wait for it."""
        return self._publisher.has_result

    @property
    def timeout_in_s(self) -> float | None:
        """Seconds until the batch in flight counts as not sent; None if none will."""
        self._stalled = [publisher for publisher in self._stalled if publisher.alive]
        if not self._publisher.in_flight or len(self._stalled) >= MAX_STALLED_BATCHES:
            return None
        return max(0.0, PUBLISH_TIMEOUT_S - self._publisher.in_flight_s)

    def await_result(self) -> bool:
        """Wait for the batch in flight; False if there is none, or `PUBLISH_TIMEOUT_S` are over."""
        return self._publisher.in_flight and self._publisher.wait(PUBLISH_TIMEOUT_S)

    def close(self) -> None:
        """End the thread that publishes."""
        self._publisher.close()

    def collect(self, shards: Sequence[int], now: datetime | None) -> Sequence[TaskMessage]:
        """Note the fate of the batch in flight; its messages that have arrived."""
        result = self._publisher.collect_result()
        if result is None:
            return ()
        if isinstance(result.error, PublishFailed):
            self._breaker.record_failure(result.error)
        elif result.error is not None:
            raise result.error
        queries = self._queries
        turns, self._turns = self._turns, {}
        self._had += [
            turns[message.task_id] for message in result.accepted if message.task_id in turns
        ]
        self._marks += [
            (statement, messages)
            for statement, messages in (
                (queries.mark_sent_sql, result.accepted),
                (queries.mark_kept_sql, result.kept),
                (queries.mark_lost_sql, result.lost),
            )
            if messages
        ]
        if result.error is not None:
            return result.accepted  # refusals meanwhile may be the broker's fault as well
        for messages, refusal in result.refused:
            self._postpone(messages, refusal, now)
        if (result.accepted or result.kept) and self._breaker.record_success():
            self._on_recovery()
            # The broker may have come back empty: its unclaimed messages are checked.
            self._connection.execute(queries.resend_unclaimed_sql, {"shards": int_array(shards)})
        return result.accepted

    def collect_soon(self, shards: Sequence[int], now: datetime | None) -> Sequence[TaskMessage]:
        """`collect`, after a wait of `INLINE_WAIT_S` at most."""
        if not self._publisher.wait(INLINE_WAIT_S):
            return ()
        accepted = self.collect(shards, now)
        self.crowded |= any(mark == self._queries.mark_lost_sql for mark, _ in self._marks)
        return accepted

    def flush(self, shards: Sequence[int], now: datetime | None) -> None:
        """`collect`, after a wait of `SHUTDOWN_FLUSH_S` at most."""
        self._publisher.wait(SHUTDOWN_FLUSH_S)
        self.collect(shards, now)

    def abandon_stalled(self) -> None:
        """Count the batch in flight as not sent if the broker has left it without an answer."""
        if self.timeout_in_s == 0:
            self._stalled.append(self._publisher)
            self._publisher.close()
            self._publisher = self._new_publisher()
            reason = f"no answer in {PUBLISH_TIMEOUT_S:g} s"
            self._breaker.record_failure(PublishFailed("the broker", reason))

    def forget(self, now: datetime | None) -> Sequence[psycopg.Cursor[Any]]:
        """Mark the messages whose fate is known, without rows that another transaction holds."""
        self._count_turns()
        return [self._send_mark(statement, messages, now) for statement, messages in self._marks]

    def note_forgotten(
        self, marked: Sequence[psycopg.Cursor[Any]], *, picked_behind: bool = True
    ) -> None:
        """Take the answers to `forget`: the marks are written.

        If no pick came behind them, all are due once more unless all were written: only a pick
        behind its own marks knows a run that another transaction holds from one to be sent.
        """
        self._had = []
        self.all_marked = sum(len(messages) for _, messages in self._marks) == sum(
            cursor.rowcount for cursor in marked
        )
        self._marked = {
            (message.task_id, act)
            for statement, messages in self._marks
            for message in messages
            for act in ("look", "send")
            if act == "look" or statement != self._queries.mark_lost_sql
        }
        if picked_behind or self.all_marked:
            self._marks = []

    def forget_each(self, now: datetime | None) -> None:
        """`forget`, row by row where it fails: the run of a row for which it does is set aside."""
        marks, self._marks = self._marks, []
        self._had = []  # one turn more for these groups
        for statement, messages in marks:
            self._mark_each(statement, messages, now)

    def find_held(self, now: datetime | None) -> psycopg.Cursor[Any] | None:
        """Ask which of the rows that were held are held still; None if none was."""
        if not self._held:
            return None
        return self._connection.execute(
            self._queries.still_held_sql, _attempts(self._held.values()) | {"now": now}
        )

    def pick(
        self, shards: Sequence[int], run_id: str | None, now: datetime | None
    ) -> psycopg.Cursor[Any] | None:
        """Select the dispatches that are due; None while the broker rests or has a batch."""
        if not self._breaker.allows_call or self._publisher.in_flight:
            return None
        return self._connection.execute(
            self._queries.pick_free_tasks_sql if self._held else self._queries.pick_tasks_sql,
            {
                "shards": int_array(shards),
                "run_id": run_id,
                "now": now,
                "aside": self._quarantine.array,
                "held": array(message.run_id for message in self._held.values()),
                # All relays together have no more places than one alone.
                "places": math.ceil(self._queries.window * len(shards) / SHARDS),
            },
        )

    def fetch(
        self,
        rows: psycopg.Cursor[Any] | None,
        still_held: psycopg.Cursor[Any] | None,
        shards: Sequence[int],
        now: datetime | None,
    ) -> Batch:
        """Take the answers to `pick` and `find_held`: the batch to publish next."""
        found = picked_tasks(rows.fetchall()) if rows else []
        self.has_woken = False
        self.full = len(found) >= self._queries.window
        picked = [each for each in found if each.act != "wake"]
        if still_held:
            held = {task_id for (task_id,) in still_held.fetchall()}
            held.difference_update(due.message.task_id for due in picked)
            self._held = {task_id: self._held[task_id] for task_id in held}
        due = self._without_held(picked)
        self._defer([each.message for each in due if each.act == "defer"], now)
        if rows is not None:
            self._wakes_left = len(found) > len(picked) and self._wake_noted(shards)
        unclaimed = [each for each in due if each.act == "look"]
        sent = [each for each in due if each.act == "send"]
        if rows is not None:  # else a batch is in flight, with its turns
            self._lead = min(shards, default=0)
            self._turns = {each.message.task_id: each.turn for each in sent if each.turn}
            self._had += [each.turn for each in picked if each.act == "pass" and each.turn]
        self.crowded |= any(each.turn.is_short for each in sent if each.turn)
        return Batch(
            messages=[each.message for each in sent],
            unclaimed=[each.message for each in unclaimed],
            out={each.message.queue: each.sent for each in unclaimed},
        )

    def publish(self, batch: Batch) -> None:
        """Hand a batch over, unless it is empty."""
        if batch:
            self._publisher.send(batch)

    def _count_turns(self) -> None:
        """Write the turns that groups have had: nothing in queues without groups."""
        if not self._had:
            return
        queues, groups, starts, finishes, cursors, _ = zip(*self._had, strict=True)
        self._connection.execute(
            self._queries.count_turns_sql,
            {
                "lead": self._lead,
                "queues": array(queues),
                "groups": array(groups),
                "turns": array(starts),
                "finishes": array(finishes),
                "cursors": array(cursors),
            },
        )

    def _without_held(self, picked: list[PickedTask]) -> list[PickedTask]:
        """Leave out rows that are due again right after they were marked: another holds them.

        A claim, or a transaction that lasts. They are sent again once unlocked: the worker that
        took the message has given up by then.
        """
        again = {
            due.message.task_id: due.message
            for due in picked
            if (due.message.task_id, due.act) in self._marked
        }
        self.crowded = bool(again)
        if not again:
            return picked
        self._held |= again
        return [due for due in picked if due.message.task_id not in again]

    def _send_mark(
        self, statement: str, messages: Sequence[TaskMessage], now: datetime | None
    ) -> psycopg.Cursor[Any]:
        return self._connection.execute(
            statement, _attempts(messages) | {"redispatch": self._redispatch, "now": now}
        )

    def _mark(self, statement: str, messages: Sequence[TaskMessage], now: datetime | None) -> int:
        """Mark messages at once; the number of rows written."""
        return self._send_mark(statement, messages, now).rowcount

    def _mark_each(
        self, statement: str, messages: Sequence[TaskMessage], now: datetime | None
    ) -> int:
        """`_mark`, and a row for which it fails does not hold up the others."""
        try:
            return self._mark(statement, messages, now)
        except psycopg.Error as error:
            if not is_row_fault(error):
                raise
            marked = 0
            for message in messages:
                with self._quarantine.isolating(message.run_id):
                    marked += self._mark(statement, [message], now)
            return marked

    def _defer(self, messages: Sequence[TaskMessage], now: datetime | None) -> None:
        """Defer dispatches that find no place in their queue: they make room in the next pick."""
        if messages:
            self.crowded |= self._mark_each(self._queries.defer_sql, messages, now) > 0

    def _wake_noted(self, shards: Sequence[int]) -> bool:
        """Make runs due that wait: they are in the next pick. Whether some of them were held."""
        if self._wake is None:
            return False
        woken = self._wake(self._connection, shards)
        self.has_woken = woken.done > 0
        self.crowded |= self.has_woken
        return woken.left > 0

    def _postpone(
        self, messages: Sequence[TaskMessage], refusal: PublishRefused, now: datetime | None
    ) -> None:
        """Leave a queue that the broker refuses alone for a while: the others flow."""
        self._mark_each(self._queries.postpone_sql, messages, now)
        queue = messages[0].queue
        self._observer(QueueRefused(queue=queue, messages=len(messages)))
        if monotonic() < self._quiet_until.get(queue, 0.0):
            return  # a backlog comes in many batches
        self._quiet_until[queue] = monotonic() + self._redispatch
        logger.error(
            "the broker refuses a queue: its runs wait, others continue",
            extra={
                "action": "refused",
                "queue": queue,
                "runs": len(messages),
                "retry_in": self._redispatch,
                "reason": str(refusal),
            },
        )


def _attempts(messages: Iterable[TaskMessage]) -> dict[str, Any]:
    found = list(messages)
    return {
        "run_ids": [message.run_id for message in found],
        "attempts": int_array(message.attempt for message in found),
    }
