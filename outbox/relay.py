"""Moves committed messages to their publishers. Knows shards and doors, nothing of runs."""

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from typing import Any

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from beatless.outbox.async_publisher import AsyncTaskPublisher, Batch
from beatless.outbox.backoff import BACKOFF_CAP_S, BACKOFF_RESET_S, Backoff
from beatless.outbox.chores import Chore, Chores
from beatless.outbox.clock import monotonic
from beatless.outbox.doorbell import Alarm, DirectConnection, Sessions, State, prepare_to_drain
from beatless.outbox.errors import (
    DirectConnectionRequired,
    PublishFailed,
    PublishRefused,
    SchemaMissing,
)
from beatless.outbox.faults import CrashPoints
from beatless.outbox.message import SHARDS, EventMessage, PickedEvents, TaskMessage, shard_of
from beatless.outbox.observer import (
    BatchFailed,
    DeadLettered,
    DeadlinesExpired,
    Drained,
    Observer,
    PublisherName,
    QueueRefused,
    RelayAsleep,
    RelayFailed,
    RelayStarted,
    RelayStopped,
    RelayWoke,
    RunSetAside,
    ShardsAssigned,
    StalledRelayEnded,
    WakeSource,
    WatchdogRan,
    ignore,
)
from beatless.outbox.publishers import EventPublisher, TaskPublisher
from beatless.outbox.queries import (
    ALL_SHARDS,
    BATCH_BYTES,
    FEWER,
    Floor,
    PickedTask,
    Queries,
    picked_tasks,
)
from beatless.outbox.sockets import readable
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

Overdue = Callable[
    [psycopg.Connection[Any], Sequence[int], datetime | None], list[tuple[str, str, str]]
]
"""Ends overdue runs of some shards, as of a time or now: of each its id, plan and queue."""

STRIKES = 5
"""Refusals of one message, while its door is open to others, after which it is parked."""

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

PROMPT = 0.05
"""Seconds that a step waits for the broker; what takes longer is taken back later."""

HOPELESS = 60.0
"""Seconds without an answer after which a batch counts as not sent. A RabbitMQ that is short of
memory holds its publishers without a word, and no timeout of theirs ends that."""

HANGING = 3
"""Batches that may hang at once. Each has a thread, and is sent when the broker lets go after all:
while so many do, no other is tried."""

PARTING = 2.0
"""Seconds that a relay which stops waits for the broker. What it does not note is sent again."""

LOCKED_LOOK = 0.25
"""Seconds between two looks at what is due while another transaction holds its row."""

NEVER_OF_A_ROW = frozenset(
    ("08", "25", "26", "28", "3D", "3F", "40", "42", "53", "55", "57", "58", "")
)
"""Classes of SQLSTATE for which no row is to blame: the connection, the transaction (a primary that
has become read-only), rights, what does not exist, resources, locks, an operator, the system."""

SET_ASIDE_S = 60.0
"""Seconds for which a run is left alone after a statement over one of its rows has failed."""

OVERDUE_LOOK_S = 1.0
"""Between two looks for overdue runs: under load, and while one is held."""

FLOOR_EVERY = 1000
"""Messages between two attempts to raise the scan floor."""


class Door:
    """One publisher and its back-off: the other door stays open while this one is shut."""

    def __init__(self, name: PublisherName, backoff: Backoff, observer: Observer) -> None:
        self.name = name
        self.failures = 0
        self._backoff = backoff
        self._observer = observer
        self._retry_at = 0.0

    @property
    def open(self) -> bool:
        return monotonic() >= self._retry_at

    @property
    def opens_in(self) -> float:
        """Seconds until the next try."""
        return max(0.0, self._retry_at - monotonic())

    def try_now(self) -> None:
        """Something else has shown that its server may be back."""
        self._retry_at = 0.0

    def succeeded(self) -> bool:
        """Note a success; True if it ended a series of failures."""
        recovered, self.failures, self._retry_at = self.failures > 0, 0, 0.0
        return recovered

    def failed(self, error: Exception) -> None:
        self.failures += 1
        delay = self._backoff.delay(self.failures)
        self._retry_at = monotonic() + delay
        self._observer(BatchFailed(publisher=self.name, failures=self.failures))
        logger.warning(
            "publish failed, will retry",
            extra={
                "action": "publish_failed",
                "door": self.name,
                "retry_in": delay,
                "reason": str(error),
            },
            # The same once more every two seconds would bury whatever else is in the log.
            exc_info=error if self.failures == 1 else None,
        )


class Drain:
    """Publishes what is due, one batch per step, and forgets a batch in the step after it.

    1. one round trip: delete what the last step published, select what comes next
    2. send the tasks on their way, publish the events
    3. remember both as published; nothing is deleted that a door has not accepted

    The round trip is one transaction. If a row makes it fail, each row is tried alone: the run of
    the one that fails is set aside, and the others go on.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        queries: Queries,
        events: EventPublisher,
        tasks: TaskPublisher,
        *,
        event_door: Door,
        task_door: Door,
        redispatch: float,
        faults: CrashPoints,
        observer: Observer,
        on_return: Callable[[], None],
        overdue: Overdue | None = None,
    ) -> None:
        self._connection = connection
        self._overdue = overdue
        self.deadline_at = 0.0
        """When a run may be overdue, by the monotonic clock; infinity if none has a deadline."""
        self._queries = queries
        self._events = events
        self._new_courier = partial(AsyncTaskPublisher, tasks, on_return, observer=observer)
        self._courier = self._new_courier()
        self._hanging: list[AsyncTaskPublisher] = []
        self._event_door = event_door
        self._task_door = task_door
        self._doors = (event_door, task_door)
        self._before_step = [(door, door.open, door.failures) for door in self._doors]
        self._redispatch = redispatch
        self._faults = faults
        self._observer = observer
        self.origin = ""
        """Of the events; read when the first are published."""
        self._published: list[PickedEvents] = []
        self._undeleted: list[PickedEvents] = []
        self._large = False
        self._marks: list[tuple[str, Sequence[TaskMessage]]] = []
        """What to note of the tasks that have come back, by statement."""
        self._unmarked: dict[str, TaskMessage] = {}
        self._isolations = 0
        self._aside: dict[str, float] = {}
        """Until when each of these runs is left alone."""
        self._told_until: dict[str, float] = {}
        self.crowded = False
        """What another transaction holds took the places of others: look once more."""
        self._strikes: Counter[str] = Counter()
        self._floor = 0
        self._candidate: Floor | None = None
        self._highest = 0
        self._decided = False
        self._since_floor = 0

    def step(
        self, shards: Sequence[int], *, run_id: str | None = None, now: datetime | None = None
    ) -> int:
        """Publish one batch; the number of messages (outbox rows and dispatches) that left."""
        self._before_step = [(door, door.open, door.failures) for door in self._doors]
        sent = list(self._take_back(shards, now))
        if self.hopeless_in == 0:
            self._hanging.append(self._courier)
            self._courier.close()
            self._courier = self._new_courier()
            self._task_door.failed(PublishFailed("the broker", f"no answer in {HOPELESS:g} s"))
        self._aside = {run: until for run, until in self._aside.items() if monotonic() < until}
        marked = {
            (message.task_id, act)
            for statement, messages in self._marks
            for message in messages
            for act in ("look", "send")
            if act == "look" or statement != self._queries.mark_lost_sql
        }
        unforgotten = (self._undeleted + self._published, self._marks)
        try:
            with self._connection.pipeline():
                forget = self._forget(now)
                still_held = self._ask_for_unmarked(now)
                events = self._pick_events(shards, run_id)
                tasks = self._pick_tasks(shards, run_id, now)
        except psycopg.Error as error:
            self._isolate(error, *unforgotten, shards, run_id, now)
            return len(sent)
        picked = list(map(PickedEvents._make, events.fetchall())) if events else []
        tasks_due = picked_tasks(tasks.fetchall()) if tasks else []
        if forget and self._note_undeleted(*forget):
            picked = self._without_undeleted(picked, run_id, looked=events is not None)
        if still_held:
            held = {task_id for (task_id,) in still_held.fetchall()}
            held.difference_update(due.message.task_id for due in tasks_due)
            self._unmarked = {task_id: self._unmarked[task_id] for task_id in held}
        tasks_due = self._without_unmarked(tasks_due, marked)
        self._defer([due.message for due in tasks_due if due.act == "defer"], now)
        messages = [due.message for due in tasks_due if due.act == "send"]
        unclaimed = [due for due in tasks_due if due.act == "look"]
        if picked or messages:
            self._faults.reach("relay.after_claim")
        if messages or unclaimed:
            self._courier.send(
                Batch(
                    messages=messages,
                    unclaimed=[due.message for due in unclaimed],
                    out={due.message.queue: due.sent for due in unclaimed},
                )
            )
        published = self._publish_events(picked)
        if (messages or unclaimed) and self._courier.wait(PROMPT):
            sent += self._take_back(shards, now)
            self.crowded |= any(mark == self._queries.mark_lost_sql for mark, _ in self._marks)
        if published or sent:
            self._faults.reach("relay.after_publish")
            self._observer(
                Drained(events=published, tasks=len(sent), rows=self._published, messages=sent)
            )
        if run_id is None and events is not None and not self._aside:
            size = sum(len(row.body) for row in picked)
            if size < BATCH_BYTES:
                self._raise_floor(picked)
            self._large = size >= (BATCH_BYTES // FEWER if self._large else BATCH_BYTES)
        return published + len(sent)

    def finish(self, shards: Sequence[int], now: datetime | None = None) -> None:
        """Delete what the last step published, without selecting more."""
        self._courier.wait(PARTING)
        self._take_back(shards, now)
        unforgotten = (self._undeleted + self._published, self._marks)
        try:
            if forget := self._forget(now):
                self._note_undeleted(*forget)
        except psycopg.Error as error:
            self._isolate(error, *unforgotten, (), None, now)

    @property
    def marks_due(self) -> bool:
        """Whether the next step writes what has become of messages, and so when they are due."""
        return bool(self._marks)

    @property
    def returned(self) -> bool:
        """Whether the broker has answered, after a step that did not wait for it."""
        return self._courier.has_result

    @property
    def unlocked_in(self) -> float | None:
        """Seconds until a look at what another transaction held in the last step, or None.

        It may roll back, which rings nobody.
        """
        return LOCKED_LOOK if self._undeleted or self._unmarked else None

    @property
    def opens_in(self) -> float | None:
        """Seconds until a door, or a run, is tried again that the last step left out, or None.

        0 if it has opened since: what that step did not ask for is told by no due time.
        """
        waits = [
            door.opens_in
            for door, was_open, failures in self._before_step
            if not was_open or not door.open or door.failures != failures
        ]
        waits += [max(0.0, until - monotonic()) for until in self._aside.values()]
        return min(waits, default=None)

    @property
    def hopeless_in(self) -> float | None:
        """Seconds until the batch that is away counts as not sent; None if none will."""
        self._hanging = [courier for courier in self._hanging if courier.alive]
        if not self._courier.in_flight or len(self._hanging) >= HANGING:
            return None
        return max(0.0, HOPELESS - self._courier.in_flight_s)

    def await_broker(self) -> bool:
        """Wait for the tasks that are on their way; False if there are none."""
        return self._courier.in_flight and self._courier.wait(HOPELESS)

    def close(self) -> None:
        """End the thread that hands tasks over."""
        self._courier.close()

    def next_due(self, shards: Sequence[int]) -> float | None:
        """Seconds until the next dispatch of these shards is due, or None."""
        row = self._connection.execute(
            self._queries.next_due_sql, {"shards": list(shards)}
        ).fetchone()
        found: tuple[float | None, float | None] = (row[0], row[1]) if row else (None, None)
        due, deadline = found
        if self._overdue is None or deadline is None:
            self.deadline_at = math.inf
            return due
        # What is overdue still is held, or its worker is ending it.
        deadline = max(deadline, OVERDUE_LOOK_S)
        self.deadline_at = monotonic() + deadline
        return deadline if due is None else min(due, deadline)

    def end_overdue(self, shards: Sequence[int], now: datetime | None = None) -> None:
        """End the runs that have reached their deadline and that no worker has."""
        if self._overdue is None:
            return
        try:
            ended = self._overdue(self._connection, shards, now)
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # What is to be published must not wait for it.
            logger.warning(
                "overdue runs were not ended, will retry",
                extra={"action": "overdue_failed", "reason": str(error)},
            )
            return
        if ended:
            self._observer(DeadlinesExpired(runs=ended))
            logger.info(
                "runs ended at their deadline, which no worker had",
                extra={"action": "overdue", "runs": len(ended)},
            )

    def _forget(
        self, now: datetime | None
    ) -> tuple[list[PickedEvents], psycopg.Cursor[tuple[Any, ...]]] | None:
        """Delete and mark what was published, without what another transaction holds."""
        done, deleted = self._undeleted + self._published, None
        self._undeleted, self._published = [], []
        if done:
            deleted = self._connection.execute(self._queries.forget_events_sql, _ids(done))
        for statement, messages in self._marks:
            self._mark(statement, messages, now)
        self._marks = []
        return (done, deleted) if deleted else None

    def _mark(self, statement: str, messages: Sequence[TaskMessage], now: datetime | None) -> int:
        """How many rows were free to be written, if it is not sent in a pipeline."""
        return self._connection.execute(
            statement, _attempts(messages) | {"redispatch": self._redispatch, "now": now}
        ).rowcount

    def _mark_each(
        self, statement: str, messages: Sequence[TaskMessage], now: datetime | None
    ) -> int:
        """`_mark`, and a row for which it fails does not hold up the others."""
        try:
            return self._mark(statement, messages, now)
        except psycopg.Error as error:
            if not is_of_a_row(error):
                raise
            marked = 0
            for message in messages:
                with self._blaming(message.run_id):
                    marked += self._mark(statement, [message], now)
            return marked

    def _defer(self, messages: Sequence[TaskMessage], now: datetime | None) -> None:
        """Let what finds no place in its queue make room in the look for what comes next."""
        if messages:
            self.crowded |= self._mark_each(self._queries.defer_sql, messages, now) > 0

    def _note_undeleted(
        self, done: list[PickedEvents], deleted: psycopg.Cursor[tuple[Any, ...]]
    ) -> bool:
        """Whether some of it may be there still: held, or deleted by somebody else."""
        if deleted.rowcount != len(done):
            self._undeleted = done
        return bool(self._undeleted)

    def _without_undeleted(
        self, picked: list[PickedEvents], run_id: str | None, *, looked: bool
    ) -> list[PickedEvents]:
        """What is there again though it was published is only to be deleted."""
        known = {row.id for row in self._undeleted}
        if looked:
            others = [] if run_id is None else self._undeleted
            self._undeleted = [row for row in others if row.run_id.decode() != run_id]
            self._undeleted += [row for row in picked if row.id in known]
        return [row for row in picked if row.id not in known]

    def _without_unmarked(
        self, picked: list[PickedTask], marked: set[tuple[str, str]]
    ) -> list[PickedTask]:
        """What is due again as if it had not been sent is held: by a claim, or for long.

        It is sent again when it is free: whoever took the message has given up by then.
        """
        again = {
            due.message.task_id: due.message
            for due in picked
            if (due.message.task_id, due.act) in marked
        }
        self.crowded = bool(again)
        if not again:
            return picked
        self._unmarked |= again
        return [due for due in picked if due.message.task_id not in again]

    def _ask_for_unmarked(self, now: datetime | None) -> psycopg.Cursor[tuple[Any, ...]] | None:
        if not self._unmarked:
            return None
        return self._connection.execute(
            self._queries.still_held_sql, _attempts(self._unmarked.values()) | {"now": now}
        )

    def _pick_events(
        self, shards: Sequence[int], run_id: str | None
    ) -> psycopg.Cursor[tuple[Any, ...]] | None:
        if not self._event_door.open:
            return None
        # Binary, and text left as bytes: what Postgres built goes to Redis untouched.
        cursor = self._connection.cursor(binary=True)
        cursor.adapters.register_loader("text", ByteaBinaryLoader)
        if run_id is None:
            pick = (
                self._queries.pick_few_events_sql if self._large else self._queries.pick_events_sql
            )
            return cursor.execute(
                pick,
                {"shards": list(shards), "floor": self._floor, "aside": list(self._aside)},
            )
        return cursor.execute(
            self._queries.pick_run_sql,
            {"shard": shard_of(run_id), "run_id": run_id, "aside": list(self._aside)},
        )

    def _pick_tasks(
        self, shards: Sequence[int], run_id: str | None, now: datetime | None
    ) -> psycopg.Cursor[tuple[Any, ...]] | None:
        if not self._task_door.open or self._courier.in_flight:
            return None
        return self._connection.execute(
            self._queries.pick_free_tasks_sql if self._unmarked else self._queries.pick_tasks_sql,
            {
                "shards": list(shards),
                "run_id": run_id,
                "now": now,
                "aside": list(self._aside),
                # All relays together have no more places than one alone.
                "places": math.ceil(self._queries.window * len(shards) / SHARDS),
            },
        )

    def _isolate(
        self,
        error: psycopg.Error,
        published: Sequence[PickedEvents],
        marks: Sequence[tuple[str, Sequence[TaskMessage]]],
        shards: Sequence[int],
        run_id: str | None,
        now: datetime | None,
    ) -> None:
        """Find the rows for whose sake a step failed and set their runs aside; all others go on.

        Raises the error if no row is to blame for it.
        """
        if self._connection.closed or not is_of_a_row(error):
            raise error
        # psycopg believes that what stood behind the failure in the pipeline was prepared, and does
        # not look at what a statement has done that it has seen before.
        self._isolations += 1
        self._connection.execute(f"DEALLOCATE ALL -- {self._isolations}", prepare=False)
        before = dict(self._aside)
        parked = 0
        self._undeleted, self._published, self._marks = [], [], []
        for row in published:
            with self._blaming(row.run_id.decode()):
                self._connection.execute(self._queries.forget_events_sql, _ids([row]))
        for statement, messages in marks:
            self._mark_each(statement, messages, now)
        heads = self._connection.execute(
            self._queries.heads_sql,
            {
                "shards": list(shards),
                "floor": self._floor,
                "aside": list(self._aside),
                "run_id": run_id,
            },
        ).fetchall()
        for shard, row_id, head in heads:
            try:
                self._connection.execute(self._queries.pick_one_sql, {"shard": shard, "id": row_id})
            except psycopg.Error as reason:
                if not is_of_a_row(reason):
                    raise
                with self._blaming(head):
                    self._park(head, shard, [row_id], str(reason))
                    parked += 1
        if self._aside == before and not parked:
            raise error
        self.crowded = True

    @contextmanager
    def _blaming(self, run_id: str) -> Iterator[None]:
        """Set this run aside if Postgres refuses a statement over nothing but its rows."""
        try:
            yield
        except psycopg.Error as error:
            if not is_of_a_row(error):
                raise
            self._aside[run_id] = monotonic() + SET_ASIDE_S
            self._observer(RunSetAside(run_id=run_id))
            logger.error(
                "a run is set aside: Postgres refuses a statement over its rows",
                extra={
                    "action": "set_aside",
                    "run_id": run_id,
                    "retry_in": SET_ASIDE_S,
                    "reason": str(error),
                },
            )

    def _publish_events(self, picked: list[PickedEvents]) -> int:
        if not picked:
            return 0
        rows: dict[bytes, list[PickedEvents]] = {}
        for row in picked:
            rows.setdefault(row.run_id, []).append(row)
        if not self.origin:
            found = self._connection.execute(f"SELECT {self._queries.origin}").fetchone()
            self.origin = found[0] if found else ""
        messages = [
            EventMessage(
                origin=self.origin,
                run_id=run.decode(),
                body=b"\n".join(row.body for row in group),
            )
            for run, group in rows.items()
        ]
        try:
            self._events.publish(messages)
        except PublishFailed as error:
            self._event_door.failed(error)
            return 0
        except PublishRefused as error:
            accepted = self._publish_singly(messages, rows, error)
        else:
            accepted = picked
            if self._event_door.succeeded():
                self._task_door.try_now()
        self._published = list(accepted)
        return len(accepted)

    def _publish_singly(
        self,
        messages: Sequence[EventMessage],
        rows: dict[bytes, list[PickedEvents]],
        refusal: PublishRefused,
    ) -> list[PickedEvents]:
        """One bad message must not hold up the rest of its batch."""
        accepted: list[PickedEvents] = []
        refused: list[tuple[EventMessage, PublishRefused]] = []
        for message in messages:
            try:
                if len(messages) == 1:
                    raise refusal
                self._events.publish([message])
            except PublishRefused as error:
                refused.append((message, error))
            except PublishFailed as error:
                self._event_door.failed(error)
                break
            else:
                accepted += rows[message.run_id.encode()]
        if not accepted:
            self._event_door.failed(refusal)
            if not self._door_is_open():
                return []  # it refuses everything: the door, not the message
        for message, reason in refused:
            self._strike(message.run_id, rows[message.run_id.encode()], reason)
        return accepted

    def _door_is_open(self) -> bool:
        """Whether events can be published at all: an empty message, to nobody, is accepted."""
        try:
            self._events.publish([EventMessage(origin="", run_id="", body=b"")])
        except (PublishFailed, PublishRefused):
            return False
        return True

    def _strike(self, run_id: str, rows: Sequence[PickedEvents], refusal: PublishRefused) -> None:
        self._strikes[run_id] += 1
        if self._strikes[run_id] < STRIKES:
            return
        del self._strikes[run_id]
        with self._blaming(run_id):
            self._park(run_id, rows[0].shard, [row.id for row in rows], str(refusal))

    def _park(self, run_id: str, shard: int, ids: Sequence[int], reason: str) -> None:
        self._connection.execute(
            self._queries.park_sql,
            {"shard": shard, "ids": list(ids), "run_id": run_id, "reason": reason},
        )
        self._observer(DeadLettered(run_id=run_id, reason=reason))
        logger.error(
            "message parked as a dead letter",
            extra={"action": "parked", "run_id": run_id, "reason": reason},
        )

    def _take_back(self, shards: Sequence[int], now: datetime | None) -> Sequence[TaskMessage]:
        """Note what has become of the tasks that are on their way; those that have arrived."""
        delivery = self._courier.collect_result()
        if delivery is None:
            return ()
        if isinstance(delivery.error, PublishFailed):
            self._task_door.failed(delivery.error)
        elif delivery.error is not None:
            raise delivery.error
        queries = self._queries
        self._marks += [
            (statement, messages)
            for statement, messages in (
                (queries.mark_sent_sql, delivery.accepted),
                (queries.mark_kept_sql, delivery.kept),
                (queries.mark_lost_sql, delivery.lost),
            )
            if messages
        ]
        if delivery.error is not None:
            return delivery.accepted  # what was refused meanwhile may be the door's fault as well
        for messages, refusal in delivery.refused:
            self._postpone(messages, refusal, now)
        if (delivery.accepted or delivery.kept) and self._task_door.succeeded():
            self._event_door.try_now()
            # The broker may have come back empty: what it held and nobody claimed is looked at.
            self._connection.execute(queries.resend_unclaimed_sql, {"shards": list(shards)})
        return delivery.accepted

    def _postpone(
        self, messages: Sequence[TaskMessage], refusal: PublishRefused, now: datetime | None
    ) -> None:
        """Leave a queue that the broker refuses alone for a while: the others flow."""
        self._mark_each(self._queries.postpone_sql, messages, now)
        queue = messages[0].queue
        self._observer(QueueRefused(queue=queue, messages=len(messages)))
        if monotonic() < self._told_until.get(queue, 0.0):
            return  # a backlog comes in many batches
        self._told_until[queue] = monotonic() + self._redispatch
        logger.error(
            "the broker refuses a queue: its runs wait, the others go on",
            extra={
                "action": "refused",
                "queue": queue,
                "runs": len(messages),
                "retry_in": self._redispatch,
                "reason": str(refusal),
            },
        )

    def _raise_floor(self, picked: Sequence[PickedEvents]) -> None:
        """Skip the dead rows that an old snapshot keeps VACUUM from removing.

        1. remember the highest id m that was picked and the next transaction id x
        2. once no transaction below x runs, every id up to m is visible or will never be
        3. after one complete look since then, everything up to m has been published
        Ids commit out of order, so m alone, without the wait for x, would lose rows. It is not
        read from the sequence, which a role that may write rows need not be allowed to see.
        """
        self._highest = max(self._highest, *(row.id for row in picked), 0)
        per_shard = Counter(row.shard for row in picked)
        looked = self._queries.few_per_shard if self._large else self._queries.per_shard
        complete = (
            len(self._published) == len(picked)
            and not self._undeleted
            and (not picked or max(per_shard.values()) < looked)
        )
        if complete and self._decided and self._candidate:
            self._floor = self._candidate.id
            self._candidate, self._decided = None, False
        self._since_floor += len(picked)
        if self._since_floor < FLOOR_EVERY:
            return
        self._since_floor = 0
        if self._candidate is None:
            # Whoever drew an id up to the highest one already has its transaction id. One of our
            # own, not the snapshot's xmax: that leaves out who began and runs still.
            xid = self._connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
            if xid and self._highest > self._floor:
                self._candidate = Floor(self._highest, xid[0])
        elif not self._decided:
            xmin = self._connection.execute(
                "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
            ).fetchone()
            self._decided = xmin is not None and xmin[0] >= self._candidate.xmax

    def reset_floor(self) -> None:
        """Look at everything again, because the set of shards has changed."""
        self._floor, self._highest, self._candidate, self._decided = 0, 0, None, False


def is_of_a_row(error: psycopg.Error) -> bool:
    """Whether Postgres may refuse a statement for the sake of one row, and not of all others."""
    return (error.sqlstate or "")[:2] not in NEVER_OF_A_ROW


def _ids(rows: Sequence[PickedEvents]) -> dict[str, str]:
    """Arrays as text: psycopg takes half as long to write one as to write the list."""
    return {
        "shards": f"{{{','.join(str(row.shard) for row in rows)}}}",
        "ids": f"{{{','.join(str(row.id) for row in rows)}}}",
    }


def _attempts(messages: Iterable[TaskMessage]) -> dict[str, Any]:
    found = list(messages)
    return {
        "run_ids": [message.run_id for message in found],
        "attempts": [message.attempt for message in found],
    }


class Relay:
    """Moves committed messages to their publishers, on any number of machines at once.

    1. lead a share of the shards, by session locks
    2. drain until nothing is left
    3. fall asleep by the doorbell protocol, until a commit rings or a dispatch is due
    4. on any error: close everything, back off, start over with a drain
    """

    def __init__(
        self,
        *,
        connect: Callable[[], DirectConnection],
        queries: Queries,
        events: EventPublisher,
        tasks: TaskPublisher,
        redispatch: float = 15.0,
        linger: float = 0.01,
        nap: float = 0.0003,
        watchdog: float = 15.0,
        overdue: Overdue | None = None,
        chores: Sequence[Chore] = (),
        chores_after: float = 60.0,
        backoff: Backoff | None = None,
        faults: CrashPoints | None = None,
        observer: Observer = ignore,
    ) -> None:
        """All times are seconds. `redispatch` is how long a sent message may stay unclaimed.

        `overdue` ends runs that have reached their deadline and that no worker has.
        `chores` are done beside the drains, from `chores_after` on, by one relay at a time.
        """
        self._connect = connect
        self.queries = queries
        self._events = events
        self._tasks = tasks
        self._redispatch = redispatch
        self._linger = linger
        self._nap = nap
        self._watchdog = watchdog
        self._backoff = backoff or Backoff(cap=BACKOFF_CAP_S)
        self._faults = faults or CrashPoints()
        self._observer = observer
        self._overdue = overdue
        self._alarm = Alarm()
        self._stopping = threading.Event()
        self._thread: LastingThread | None = None
        self._chores = Chores(
            chores, queries=queries, connect=connect, observer=observer, after=chores_after
        )
        self._once_lock = threading.Lock()
        self._pid = os.getpid()
        self._once: tuple[psycopg.Connection[Any], Drain] | None = None

    def start(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Run in a thread of this process. `on_error` hears of every failure it recovers from.

        Raises RuntimeError when it was started before, or made before a fork.
        """
        self._refuse_in_child()
        if self._thread is not None:
            raise RuntimeError("this relay was started before: make a new one")
        self._thread = LastingThread("relay", lambda _: self.run(on_error), observer=self._observer)
        self._thread.start()

    def _refuse_in_child(self) -> None:
        """Its sessions, its publishers' connections and its threads are the parent's."""
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this relay was made in process {self._pid} before it forked: make another in "
                "this process, with app.relay()"
            )

    def ask_to_stop(self) -> None:
        """Let `run` return after its current step. Safe in a signal handler."""
        self._stopping.set()
        self._alarm.ring()

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
        self._alarm.close()

    def drain_once(self, run_id: str | None = None, now: datetime | None = None) -> int:
        """Publish everything that is due, of one run or of all, and return how many messages.

        Needs no running relay and ignores leadership: a double publication is harmless. `now` is
        the time by which a dispatch must be due (default: the server's clock). Raises RuntimeError
        when the relay was made before a fork.
        """
        self._refuse_in_child()
        with self._once_lock:
            if self._once is None:
                connection = self._connect()
                prepare_to_drain(connection)
                self._once = (connection, self._drain(connection))
            drain = self._once[1]
            total = 0
            try:
                drain.end_overdue(ALL_SHARDS, now)
                while (
                    (moved := drain.step(ALL_SHARDS, run_id=run_id, now=now))
                    or drain.await_broker()
                    or drain.crowded
                ):
                    total += moved
                drain.finish(ALL_SHARDS, now)
            except BaseException:
                self._forget_once()
                raise
            return total

    def _forget_once(self) -> None:
        if self._once is not None:
            connection, drain = self._once
            self._once = None
            drain.close()
            connection.close()

    def run(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Work until `stop()`. Raises SchemaMissing or DirectConnectionRequired at the start.

        Raises RuntimeError when the relay was made before a fork.
        """
        self._refuse_in_child()
        failures, proven, began = 0, False, monotonic()
        while not self._stopping.is_set():
            try:
                began = monotonic()
                with Sessions(self.queries, self._connect) as sessions:
                    sessions.prove_listening()
                    proven = True
                    self._chores.start()
                    self._observer(RelayStarted())
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
                delay = self._backoff.delay(failures)
                logger.warning(
                    "relay lost its sessions, will start over",
                    extra={"action": "relay_restart", "retry_in": delay, "reason": str(error)},
                )
                self._observer(RelayFailed(error=str(error)))
                if on_error is not None:
                    on_error(error)
                self._rest(delay)
        self._chores.stop()
        self._observer(RelayStopped())

    def _rest(self, seconds: float) -> None:
        """Wait until then, or until the relay is asked to stop; nothing else ends it."""
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            # Whoever stops us says so before they ring; the courier rings for news of its own.
            self._alarm.quiet()
            if self._stopping.is_set():
                return
            readable([self._alarm], left)

    def _drain(self, connection: psycopg.Connection[Any]) -> Drain:
        return Drain(
            connection,
            self.queries,
            self._events,
            self._tasks,
            event_door=Door("Redis", self._backoff, self._observer),
            task_door=Door("broker", self._backoff, self._observer),
            redispatch=self._redispatch,
            faults=self._faults,
            observer=self._observer,
            on_return=self._alarm.ring,
            overdue=self._overdue,
        )


class Shift:
    """One life of a relay, from its sessions' start to their end."""

    def __init__(self, relay: Relay, sessions: Sessions) -> None:
        self._relay = relay
        self._sessions = sessions
        self._drain = relay._drain(sessions.work)
        self._shards: tuple[int, ...] = ()
        self._members: list[int] = []
        self._next_due: float | None = None
        self._watchdog_at = monotonic() + relay._watchdog
        self._last_wake = 0.0
        self._burst_at = -AFTER_BURST
        self._drowsy_moved = 0

    def work(self) -> None:
        """Drain and sleep until the relay stops. Raises when a session is lost."""
        self._sessions.announce()
        self._share_shards()
        while not self._relay._stopping.is_set():
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
        self._sessions.wait(seconds, self._relay._alarm)
        # Whoever rang has said why before: it is looked at after this.
        self._relay._alarm.quiet()

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
                self._wait(self._relay._nap)
            if monotonic() - looked > OVERDUE_LOOK_S:
                looked = monotonic()
                self._drain.end_overdue(self._shards)
            self._look_after_sessions()
            if self._relay._stopping.is_set() or self._sessions.members_changed:
                return
        self._drowsy_moved = 0
        self._sessions.doze(self._shards)

    def _linger(self) -> float:
        recent = monotonic() - self._burst_at < AFTER_BURST
        return self._relay._linger * (10 if recent else 1)

    def _fall_asleep(self) -> None:
        # Forget the ring before looking: one that comes while we look must wake us again.
        self._sessions.rung = False
        if self._is_busy(self._drain_all()):
            self._sessions.rouse()
        elif self._sessions.granted():
            if self._is_busy(self._drain_all()):
                self._sessions.rouse()
                return
            self._relay._observer(RelayAsleep(shards=self._shards))
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
        if not self._sessions.rung and not self._drain.returned:
            self._wait(self._patience())
        if self._relay._stopping.is_set() or self._sessions.members_changed:
            return
        rung, self._sessions.rung = self._sessions.rung, False
        due = self._next_due is not None and monotonic() >= self._next_due
        if rung or due or self._drain.returned:
            woke, before = monotonic(), self._last_wake
            self._last_wake = woke
            moved = self._drain_all()
            source: WakeSource = "notify" if rung else "timer" if due else "broker"
            self._relay._observer(RelayWoke(source=source))
            # As Linux' NAPI: interrupts while idle, none under load.
            if moved > BUSY or (moved and woke - before < self._relay._linger):
                self._sessions.rouse()
        self._look_after_sessions()

    def _drain_all(self) -> int:
        """Publish what is there, and note when to look again; both only until it is too much.

        Under load there is always more: whoever went on would leave all writers ringing meanwhile.
        """
        if monotonic() >= self._drain.deadline_at:
            self._drain.end_overdue(self._shards)
        total = moved = self._drain.step(self._shards)
        due = None
        while total <= BUSY:
            # Asked before the last step: what becomes due between the two is in one of them. And
            # when all that was sent is marked: until then its rows are overdue, and none is next.
            marked = not self._drain.marks_due
            due = self._drain.next_due(self._shards) if marked else None
            moved = self._drain.step(self._shards)
            total += moved
            if not moved and not self._drain.crowded and marked:
                break
        if moved:
            return total
        drain = self._drain
        waits = [due, drain.opens_in, drain.hopeless_in, drain.unlocked_in]
        waits += [0.0] if drain.marks_due else []
        known = [wait for wait in waits if wait is not None]
        self._next_due = monotonic() + max(0.0, min(known)) if known else None
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
        for pid in self._sessions.end_silent(self._relay._watchdog * SILENT):
            logger.warning(
                "a relay was silent for too long: its sessions were ended, its shards are free",
                extra={"action": "relay_silenced", "pid": pid},
            )
            self._relay._observer(StalledRelayEnded(pid=pid))
            self._sessions.members_changed = True
        if len(self._holders()[0]) < SHARDS:  # whoever should have noticed has not
            self._sessions.members_changed = True
            self._sessions.announce()
        self._sessions.renew_watch()
        self._relay._observer(WatchdogRan())
        self._watchdog_at = monotonic() + self._relay._watchdog

    def _share_shards(self) -> None:
        """Lead an equal share of the shards, and watch the next relay in the ring for its death."""
        sessions, key = self._sessions, self._relay.queries.leader_key
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
        self._drain.reset_floor()
        if changed:
            sessions.announce()
        self._relay._observer(ShardsAssigned(shards=self._shards))
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
            f"SELECT objid::int8, pid, {self._relay.queries.origin} "
            "FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
            f"AND classid = ({self._relay.queries.leader_key})::oid AND objsubid = 2"
        ).fetchall()
        if rows:  # a renewed history is noticed by the way
            self._drain.origin = rows[0][2]
        holders = {shard: pid for shard, pid, _ in rows if shard < SHARDS}
        members = sorted({pid for shard, pid, _ in rows if shard >= SHARDS})
        return holders, members
