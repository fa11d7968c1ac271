"""The way of events from the outbox to Redis: picked, published, and then deleted."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.types.string import ByteaBinaryLoader

from beatless.outbox.breaker import CircuitBreaker
from beatless.outbox.errors import PublishFailed, PublishRefused
from beatless.outbox.message import EventMessage, PickedEvents, shard_of
from beatless.outbox.observer import DeadLettered, Observer
from beatless.outbox.publishers import EventPublisher
from beatless.outbox.quarantine import Quarantine, is_row_fault
from beatless.outbox.queries import BATCH_BYTES, FEW_ROWS_DIVISOR, Queries, int_array
from beatless.outbox.scan_floor import ScanFloor

logger = logging.getLogger(__name__)

MAX_REJECTIONS = 5
"""Refusals of one run's events, while Redis accepts those of others, after which they are dead
letters. A connection that Redis closes over them is a refusal."""

CLOSED_REST_S = 1.0
"""Seconds for which a run is left alone after Redis has closed a connection over its events. So the
refusals that make a dead letter are seconds apart, and no restart of Redis is taken for them."""


class EventLane:
    """Outbox rows on their way: each step deletes what the last one published, and picks the next.

    `forget` and `pick` send their statement into the caller's pipeline, `note_forgotten` and
    `fetch` take its answer after it; `publish` waits for Redis. Nothing is deleted that Redis has
    not accepted.
    """

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        queries: Queries,
        publisher: EventPublisher,
        *,
        breaker: CircuitBreaker,
        quarantine: Quarantine,
        on_recovery: Callable[[], None],
        observer: Observer,
    ) -> None:
        """`on_recovery` is called when a success ends a series of failures."""
        self.origin = ""
        """Of the events, see the fragment `origin`; read when the first are published."""
        self.floor = ScanFloor(connection)
        self._connection = connection
        self._queries = queries
        self._publisher = publisher
        self._breaker = breaker
        self._quarantine = quarantine
        self._on_recovery = on_recovery
        self._observer = observer
        self._published: list[PickedEvents] = []
        self._undeleted: list[PickedEvents] = []
        self._large = False
        self._rejections: Counter[str] = Counter()

    @property
    def published(self) -> Sequence[PickedEvents]:
        """The rows that the last step published, which the next one deletes."""
        return self._published

    @property
    def is_all_forgotten(self) -> bool:
        """Whether nothing that was published is left to be deleted."""
        return not self._undeleted and not self._published

    @property
    def rows_held(self) -> bool:
        """Whether another transaction held rows that were to be deleted in the last step."""
        return bool(self._undeleted)

    def forget(self) -> psycopg.Cursor[Any] | None:
        """Delete published rows, except those that another transaction holds; None: nothing."""
        done = self._undeleted + self._published
        if not done:
            return None
        return self._connection.execute(self._queries.forget_events_sql, _ids(done))

    def note_forgotten(self, deleted: psycopg.Cursor[Any] | None) -> None:
        """Take the answer to `forget`; some rows may be there still, or deleted by another."""
        done = self._undeleted + self._published
        all_gone = deleted is None or deleted.rowcount == len(done)
        self._undeleted, self._published = [] if all_gone else done, []

    def forget_each(self) -> None:
        """`forget`, row by row: the run of a row for which it fails is set aside."""
        done = self._undeleted + self._published
        self._undeleted, self._published = [], []
        for row in done:
            with self._quarantine.isolating(row.run_id.decode()):
                self._connection.execute(self._queries.forget_events_sql, _ids([row]))

    def pick(self, shards: Sequence[int], run_id: str | None) -> psycopg.Cursor[Any] | None:
        """Select the rows to publish next, of one run or of all; None while Redis rests."""
        if not self._breaker.allows_call:
            return None
        # Binary, and text left as bytes: JSON from Postgres goes to Redis untouched.
        cursor = self._connection.cursor(binary=True)
        cursor.adapters.register_loader("text", ByteaBinaryLoader)
        aside = self._quarantine.array
        if run_id is None:
            pick = (
                self._queries.pick_few_events_sql if self._large else self._queries.pick_events_sql
            )
            return cursor.execute(
                pick, {"shards": int_array(shards), "floor": self.floor.id, "aside": aside}
            )
        return cursor.execute(
            self._queries.pick_run_sql,
            {"shard": shard_of(run_id), "run_id": run_id, "aside": aside},
        )

    def fetch(self, rows: psycopg.Cursor[Any] | None, run_id: str | None) -> list[PickedEvents]:
        """Take the answer to `pick`.

        Rows that are there again though they were published are only to be deleted.
        """
        if rows is None:
            return []
        picked = list(map(PickedEvents._make, rows.fetchall()))
        if not self._undeleted:
            return picked
        known = {row.id for row in self._undeleted}
        others = [] if run_id is None else self._undeleted
        self._undeleted = [row for row in others if row.run_id.decode() != run_id]
        self._undeleted += [row for row in picked if row.id in known]
        return [row for row in picked if row.id not in known]

    def publish(self, picked: Sequence[PickedEvents]) -> int:
        """Hand these to Redis; how many it has accepted."""
        if not picked:
            return 0
        rows: dict[bytes, list[PickedEvents]] = {}
        for row in picked:
            rows.setdefault(row.run_id, []).append(row)
        if not self.origin:
            found = self._connection.execute(self._queries.history_sql).fetchone()
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
            self._publisher.publish(messages)
        except PublishFailed as error:
            if not self._is_closed_by_message(error):
                self._note_outage(error)
                return 0
            self._published = self._publish_singly(messages, rows, None)
        except PublishRefused as error:
            self._published = self._publish_singly(messages, rows, error)
        else:
            self._published = list(picked)
            if self._rejections:
                for run in rows:
                    self._rejections.pop(run.decode(), None)
            if self._breaker.record_success():
                self._on_recovery()
        return len(self._published)

    def note_pass(self, picked: Sequence[PickedEvents]) -> bool:
        """After a look at all runs: adapt the batches to its size, and raise the floor.

        Whether all that was there was picked and published, and nothing published is left.
        """
        size, complete = sum(len(row.body) for row in picked), False
        if size < BATCH_BYTES:
            looked = self._queries.few_per_shard if self._large else self._queries.per_shard
            per_shard = Counter(row.shard for row in picked)
            complete = (
                len(self._published) == len(picked)
                and not self._undeleted
                and (not picked or max(per_shard.values()) < looked)
            )
            self.floor.advance(picked, complete=complete)
        self._large = size >= (BATCH_BYTES // FEW_ROWS_DIVISOR if self._large else BATCH_BYTES)
        return complete

    def dead_letter_unreadable(self, shards: Sequence[int], run_id: str | None) -> int:
        """Make dead letters of the next rows whose events Postgres cannot read; how many."""
        heads = self._connection.execute(
            self._queries.heads_sql,
            {
                "shards": int_array(shards),
                "floor": self.floor.id,
                "aside": self._quarantine.array,
                "run_id": run_id,
            },
        ).fetchall()
        count = 0
        for shard, row_id, head in heads:
            try:
                self._connection.execute(self._queries.pick_one_sql, {"shard": shard, "id": row_id})
            except psycopg.Error as reason:
                if not is_row_fault(reason):
                    raise
                with self._quarantine.isolating(head):
                    self._dead_letter(head, shard, [row_id], str(reason))
                    count += 1
        return count

    def _publish_singly(
        self,
        messages: Sequence[EventMessage],
        rows: dict[bytes, list[PickedEvents]],
        refusal: PublishRefused | None,
    ) -> list[PickedEvents]:
        """Publish one by one: one bad message must not hold up the rest of its batch.

        `refusal` is Redis' answer to the batch; None: it closed the connection.
        """
        accepted: list[PickedEvents] = []
        refused: list[tuple[EventMessage, PublishRefused]] = []
        for message in messages:
            try:
                if refusal is not None and len(messages) == 1:
                    raise refusal
                self._publisher.publish([message])
            except PublishRefused as error:
                refused.append((message, error))
            except PublishFailed as error:
                if not self._is_closed_by_message(error):
                    self._note_outage(error)
                    break
                accepted += self._publish_rows(message.run_id, rows[message.run_id.encode()])
            else:
                accepted += rows[message.run_id.encode()]
                self._rejections.pop(message.run_id, None)
        if refusal is not None and not accepted:
            self._breaker.record_failure(refusal)
            if not self._accepts_any():
                return []  # it refuses everything: Redis is to blame, not the message
        for message, reason in refused:
            self._count_rejection(message.run_id, rows[message.run_id.encode()], reason)
        return accepted

    def _publish_rows(self, run_id: str, rows: Sequence[PickedEvents]) -> list[PickedEvents]:
        """Publish a run's rows one by one, up to the first over which Redis closes the connection.

        Together they may be too large where each of them is not.
        """
        accepted: list[PickedEvents] = []
        for row in rows:
            try:
                self._publisher.publish(
                    [EventMessage(origin=self.origin, run_id=run_id, body=row.body)]
                )
            except PublishRefused as refusal:
                self._count_rejection(run_id, [row], refusal)
                break
            except PublishFailed as error:
                if self._is_closed_by_message(error):
                    closed = _too_large(row)
                    self._count_rejection(run_id, [row], closed)
                    if self._rejections[run_id]:
                        self._quarantine.set_aside(run_id, CLOSED_REST_S, str(closed))
                else:
                    self._note_outage(error)
                break
            accepted.append(row)
            self._rejections.pop(run_id, None)
        return accepted

    def _is_closed_by_message(self, error: PublishFailed) -> bool:
        """Whether Redis, which has closed the connection over a message, takes another at once."""
        return error.is_closed and self._accepts_any()

    def _note_outage(self, error: PublishFailed) -> None:
        """Redis is away: what it refused before may have been its own end."""
        self._rejections.clear()
        self._breaker.record_failure(error)

    def _accepts_any(self) -> bool:
        """Whether events can be published at all: an empty message without a receiver is."""
        try:
            self._publisher.publish([EventMessage(origin="", run_id="", body=b"")])
        except (PublishFailed, PublishRefused):
            return False
        return True

    def _count_rejection(
        self, run_id: str, rows: Sequence[PickedEvents], refusal: PublishRefused
    ) -> None:
        self._rejections[run_id] += 1
        if self._rejections[run_id] < MAX_REJECTIONS:
            return
        del self._rejections[run_id]
        with self._quarantine.isolating(run_id):
            self._dead_letter(run_id, rows[0].shard, [row.id for row in rows], str(refusal))

    def _dead_letter(self, run_id: str, shard: int, ids: Sequence[int], reason: str) -> None:
        self._connection.execute(
            self._queries.dead_letter_sql,
            {"shard": shard, "ids": list(ids), "run_id": run_id, "reason": reason},
        )
        self._observer(DeadLettered(run_id=run_id, reason=reason))
        logger.error(
            "message parked as a dead letter",
            extra={"action": "parked", "run_id": run_id, "reason": reason},
        )


def _too_large(row: PickedEvents) -> PublishRefused:
    return PublishRefused(
        "Redis",
        f"it closes the connection over {len(row.body):,} bytes of events and takes others; raise "
        "its proto-max-bulk-len or client-query-buffer-limit, then requeue",
    )


def _ids(rows: Sequence[PickedEvents]) -> dict[str, str]:
    return {
        "shards": int_array(row.shard for row in rows),
        "ids": int_array(row.id for row in rows),
    }
