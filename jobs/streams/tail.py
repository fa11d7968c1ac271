"""The events of many runs as one stream: those of a namespace, as they are published.

1. subscribe to the channels of all runs, and wait for Redis to acknowledge
2. look a run up when its first message arrives: whether it is chosen, and from which event on
3. put its events into order; a hole is read from the journal
4. after an outage of Redis, read what was missed: of the known runs, and of those that have started
   or ended meanwhile

Each event is given once, and those of a run in their order; runs are in the order of arrival. While
nobody tails, it costs nothing. A run that is silent since before the tail, and moved during an
outage only, is found with its next event, and the ones before it are not left out.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import sqlalchemy

from beatless.namespaces import namespace_of
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.journal import Journal
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.message import run_of
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements
from beatless.streams.cursor import Cursor
from beatless.streams.history import Origin
from beatless.streams.messages import parse
from beatless.streams.pager import Pager
from beatless.streams.subscription import Subscription
from beatless.streams.waiting import GAP_PAUSE_S, POSTGRES_AWAY

logger = logging.getLogger("beatless.stream")

KNOWN_RUNS = 100_000
"""Chosen runs of which a tail knows the last event that it gave, and as many others."""

PAGE_RUNS = 1000
"""Runs that one statement lists or looks up."""

LATE_S = 60.0
"""Seconds by which a start or an end may be committed, or published, after its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The runs of a tail: all of a namespace, or those with this plan, queue and tags."""

    namespace: str
    plans: Sequence[str] = ()
    """One of these; without any, every plan."""
    queue: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """All of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailedEvent:
    """An event, and the plan of its run."""

    plan: str
    event: Event


class _Tailed:
    """A chosen run, and how far its events were given."""

    __slots__ = ("cursor", "ended", "moved_ms", "plan", "sought", "sought_at")

    def __init__(self, plan: str, after: int) -> None:
        self.plan = plan
        self.cursor = Cursor(after)
        self.ended = False
        self.moved_ms = 0
        """The time of the last event that was given."""
        self.sought = -1
        """The seq after which a hole was looked for, and when."""
        self.sought_at = 0.0

    def feed(self, events: Iterable[EventText]) -> list[TailedEvent]:
        """The events that are now next in order."""
        found = []
        for text in self.cursor.feed(events):
            event = text.event()
            self.ended = self.ended or event.final
            self.moved_ms = event.ts
            found.append(TailedEvent(plan=self.plan, event=event))
        return found


class Tail:
    """One tail, for a thread that may block. Ends when its iterator is closed."""

    def __init__(
        self,
        choice: Choice,
        *,
        journal: Journal,
        engine: sqlalchemy.Engine,
        origin: Origin,
        subscription: Subscription,
        own_channel: Callable[[str], str],
        head_check: float,
        without_redis: float,
        since: datetime | None = None,
        on_reset: Callable[[], None] = lambda: None,
    ) -> None:
        """`since` begins it in the past, and `on_reset` is called when the database has another
        history: events that were given may be gone, and it begins anew with the present.

        `own_channel` gives the channel of a run; `subscription` is to the channels of all.
        """
        self._choice = choice
        self._journal = journal
        self._engine = engine
        self._origin = origin
        self._subscription = subscription
        self._own_channel = own_channel
        self._head_check = head_check
        self._without_redis = without_redis
        self._began = since
        self._on_reset = on_reset
        self._sql = statements(__file__, journal.schema, page_runs=PAGE_RUNS)
        self._chosen: OrderedDict[str, _Tailed] = OrderedDict()
        self._others: OrderedDict[str, None] = OrderedDict()
        self._epoch = ""
        self._seen_all_until = since
        """No start and no end before was missed, but for those that were late."""
        self._looked_at = since

    def follow(self) -> Iterator[list[TailedEvent]]:
        """Events as they come. An empty list: all is given that there was until now."""
        backoff, failures = Backoff(initial=0.1, cap=2.0), 0
        try:
            while True:
                live = self._subscription.ensure()
                try:
                    yield from self._catch_up()
                    failures = 0
                    yield []
                    yield from self._listen(live)
                except POSTGRES_AWAY as error:
                    failures += 1
                    logger.warning(
                        "journal cannot be read, the tail waits",
                        extra={"action": "stream_waits", "reason": str(error)},
                    )
                    threading.Event().wait(backoff.delay(failures))
        finally:
            self._subscription.close()

    def _listen(self, live: bool) -> Iterator[list[TailedEvent]]:
        """Pass on what arrives, until something may have been missed."""
        heard = False
        look_at = monotonic() + (self._head_check if live else self._without_redis)
        while True:
            arrived = self._subscription.messages(max(0.0, look_at - monotonic()))
            if arrived is None:
                return
            heard = heard or bool(arrived)
            yield from self._pass_on(arrived)
            if monotonic() < look_at:
                continue
            if not heard:
                return  # nothing happened, or the connection is dead
            with self._engine.begin() as connection:
                if self._is_other_history(connection):
                    return
                # Until the last look at least, the connection was alive.
                self._seen_all_until = self._looked_at
                self._looked_at = self._time(connection)
            yield from self._read_heads()
            heard, look_at = False, monotonic() + self._head_check

    def _catch_up(self) -> Iterator[list[TailedEvent]]:
        with self._engine.begin() as connection:
            if self._is_other_history(connection):
                self._chosen.clear()
                self._others.clear()
                self._began = self._seen_all_until = None
                self._on_reset()
            self._epoch = self._origin.epoch(connection)
            now = self._time(connection)
        if self._began is None or self._seen_all_until is None:
            self._began = self._seen_all_until = self._looked_at = now
            return
        since = self._seen_all_until - timedelta(seconds=LATE_S)
        for listing in (self._sql["started"], self._sql["ended"]):
            for run_ids in self._listed(listing, since):
                yield from self._read([*self._look_up(run_ids)])
                self._forget()
        yield from self._read_heads()
        self._seen_all_until = self._looked_at = now

    def _is_other_history(self, connection: Caller) -> bool:
        return self._epoch not in ("", self._origin.epoch(connection))

    def _time(self, connection: Caller) -> datetime:
        found: datetime = execute(connection, self._sql["clock"], {})[0][0]
        return found

    def _listed(self, listing: str, since: datetime) -> Iterator[list[str]]:
        """The runs that this statement lists after a time, by pages."""
        at, run_id = since, ""
        while True:
            parameters = {"namespace": self._choice.namespace, "after_at": at, "after_id": run_id}
            with self._engine.begin() as connection:
                rows = execute(connection, listing, parameters)
            if rows:
                at, run_id = rows[-1]
                yield [found for _, found in rows if self._may_be_chosen(found)]
            if len(rows) < PAGE_RUNS:
                return

    def _may_be_chosen(self, run_id: str) -> bool:
        return run_id not in self._others and namespace_of(run_id) == self._choice.namespace

    def _look_up(self, run_ids: Sequence[str]) -> Iterator[str]:
        """Learn of runs that are not known; of these, those that have events to read."""
        unknown = [run_id for run_id in run_ids if run_id not in self._chosen]
        tags = dict(self._choice.tags)
        for start in range(0, len(unknown), PAGE_RUNS):
            parameters = {
                "run_ids": unknown[start : start + PAGE_RUNS],
                "namespace": self._choice.namespace,
                "plans": list(self._choice.plans) or None,
                "queue": self._choice.queue,
                "tags": json.dumps(tags) if tags else None,
                "began": self._began,
            }
            with self._engine.begin() as connection:
                rows = execute(connection, self._sql["look_up"], parameters)
            for run_id, plan, last_seq, chosen, after in rows:
                if not chosen:
                    self._others[run_id] = None
                    if len(self._others) > KNOWN_RUNS:
                        self._others.popitem(last=False)
                    continue
                self._chosen[run_id] = _Tailed(plan, after)
                if last_seq > after:
                    yield run_id

    def _forget(self) -> None:
        """Forget the runs that are silent for the longest.

        The tail begins later from then on: they come as new ones if they move, and what was given
        is not given again.
        """
        while len(self._chosen) > KNOWN_RUNS:
            _, run = self._chosen.popitem(last=False)
            last = datetime.fromtimestamp((run.moved_ms + 1) / 1000, UTC)
            if self._began is not None and run.moved_ms:
                self._began = max(self._began, last)

    def _pass_on(self, arrived: Sequence[tuple[str, bytes]]) -> Iterator[list[TailedEvent]]:
        events: dict[str, list[EventText]] = {}
        for channel, body in arrived:
            run_id = run_of(channel)
            if channel == self._own_channel(run_id) and self._may_be_chosen(run_id):
                events.setdefault(run_id, []).extend(parse(body, run_id))
        for _ in self._look_up(list(events)):
            pass  # its events are here; a hole before them is read below
        with_holes = []
        for run_id, texts in events.items():
            run = self._chosen.get(run_id)
            if run is None:
                continue
            self._chosen.move_to_end(run_id)
            if batch := run.feed(texts):
                yield batch
            if run.cursor.missing:
                run.cursor.forget()
                if run.sought != run.cursor.seq or monotonic() - run.sought_at >= GAP_PAUSE_S:
                    run.sought, run.sought_at = run.cursor.seq, monotonic()
                    with_holes.append(run_id)
        yield from self._read(with_holes)
        self._forget()

    def _read_heads(self) -> Iterator[list[TailedEvent]]:
        """Read what the journal has of known runs, and the tail has not."""
        unfinished = [run_id for run_id, run in self._chosen.items() if not run.ended]
        for start in range(0, len(unfinished), PAGE_RUNS):
            some = unfinished[start : start + PAGE_RUNS]
            with self._engine.begin() as connection:
                heads = self._journal.heads(connection, some)
            for run_id in some:
                if run_id not in heads:
                    self._chosen[run_id].ended = True  # removed
            yield from self._read(
                [each for each in some if heads.get(each, 0) > self._chosen[each].cursor.seq]
            )

    def _read(self, run_ids: Sequence[str]) -> Iterator[list[TailedEvent]]:
        """What the journal has of these runs."""
        for run_id in run_ids:
            run, pager, more = self._chosen[run_id], Pager(), True
            while more:
                try:
                    with self._engine.begin() as connection:
                        page, more = self._journal.read_page(
                            connection, run_id, after=run.cursor.seq, limit=pager.limit
                        )
                except RunNotFound:
                    run.ended = True
                    break
                except EventsPruned as error:
                    if error.oldest is None:
                        run.ended = True
                        break
                    run.cursor = Cursor(error.oldest - 1)
                    continue
                pager.learn(page)
                if batch := run.feed(page):
                    yield batch
