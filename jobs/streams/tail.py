"""The events of many runs as one stream: those of a namespace, as they are published.

1. subscribe to the channels of all runs, and wait for Redis to acknowledge
2. look a run up when its first message arrives: whether it is chosen, and from which event on
3. put its events into order; a hole is read from the journal
4. after an outage of Redis, and of what is past when it begins, read what was missed: of the known
   runs, of those that have started or ended meanwhile, and of the unfinished ones that have moved

Each event is given once, and those of a run in their order; runs are in the order of arrival. While
nobody tails, it costs nothing. A tail does no I/O with Redis itself: it asks its driver, of which
there is one for threads and one for asyncio.
"""

import asyncio
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, TypeAlias

import sqlalchemy

from beatless.cursors import TailPlace
from beatless.namespaces import namespace_of
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.journal import Journal
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.message import SHARDS, run_of
from beatless.outbox.observer import Observer
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements
from beatless.streams.async_subscription import AsyncSubscription
from beatless.streams.cursor import Cursor
from beatless.streams.history import Origin
from beatless.streams.messages import parse
from beatless.streams.observer import StreamClosed, StreamOpened
from beatless.streams.pager import Pager
from beatless.streams.subscription import Subscription
from beatless.streams.tailed import Choice
from beatless.streams.waiting import GAP_PAUSE_S, POSTGRES_AWAY
from beatless.transactions import first_line

logger = logging.getLogger("beatless.stream")

KNOWN_RUNS = 100_000
"""Chosen runs of which a tail knows the last event that it gave, and as many others."""

PAGE_RUNS = 1000
"""Runs that one statement lists or looks up."""

ANSWER_S = 5.0
"""Seconds within which Redis gives a sign of life, if it is there."""

LATE_S = 60.0
"""Seconds by which a start or an end may be committed, or published, after its time."""

LAG_S = 30.0
"""Seconds by which the relays may be late before the journal is read as if Redis were away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailedText:
    """An event as text and as an object, and the plan of its run."""

    plan: str
    text: EventText
    event: Event


@dataclass(frozen=True, slots=True)
class Subscribe:
    """Be subscribed to the channels of all runs. The answer: whether Redis has acknowledged it."""


@dataclass(frozen=True, slots=True)
class Receive:
    """The messages that come within so many seconds. The answer is None if one may be lost."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Probe:
    """`Receive` after a question that Redis answers. The answer is None without a message."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Rest:
    """Let so many seconds pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Reset:
    """The database has another history: events that were given may be gone, others may never come.

    The tail begins anew with the present.
    """


Batch: TypeAlias = list[TailedText]
Steps: TypeAlias = Generator[Batch | Subscribe | Receive | Probe | Rest | Reset, Any, None]
"""What a tail asks of its driver, and the batches that it gives."""
Answer: TypeAlias = bool | list[tuple[str, bytes]] | None
NO_ANSWER: Answer = None


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

    def feed(self, events: Iterable[EventText]) -> Batch:
        """The events that are now next in order."""
        found = []
        for text in self.cursor.feed(events):
            event = text.event()
            self.ended = self.ended or event.final
            self.moved_ms = event.ts
            found.append(TailedText(plan=self.plan, text=text, event=event))
        return found


class Tail:
    """One tail: `follow` it in a thread that may block, or `afollow` it in a loop, once."""

    def __init__(
        self,
        choice: Choice,
        *,
        journal: Journal,
        engine: sqlalchemy.Engine,
        origin: Origin,
        subscription: Callable[[], Subscription],
        async_subscription: Callable[[], AsyncSubscription],
        own_channel: Callable[[str], str],
        head_check: float,
        without_redis: float,
        observer: Observer,
        since: datetime | None = None,
        after: TailPlace | None = None,
        timeout: float | None = None,
        idle: float | None = None,
    ) -> None:
        """`since` begins it in the past, `after` where another one was; `timeout` ends it.

        `own_channel` gives the channel of a run; the subscriptions are to the channels of all. At
        the latest after `idle` seconds there is a batch, which may be empty, also while much is
        read of which nothing is chosen.
        """
        self._choice = choice
        self._journal = journal
        self._engine = engine
        self._origin = origin
        self._subscription = subscription
        self._async_subscription = async_subscription
        self._own_channel = own_channel
        self._head_check = head_check
        self._without_redis = without_redis
        self._observer = observer
        self._idle = math.inf if idle is None else idle
        self._idle_at = monotonic() + self._idle
        self.caught_up = False
        """All was given that there was when it last began to read what it had missed."""
        self._deadline = None if timeout is None else monotonic() + timeout
        self._sql = statements(__file__, journal.schema, page_runs=PAGE_RUNS, last_shard=SHARDS - 1)
        self._chosen: OrderedDict[str, _Tailed] = OrderedDict()
        self._others: OrderedDict[str, None] = OrderedDict()
        self._epoch = ""
        self._began = self._seen_all_until = since
        """No start and no end before `_seen_all_until` was missed, but for those that were late."""
        if after is not None:
            self._epoch, self._seen_all_until = after.epoch, after.seen
            self._began = max(after.began, after.seen - timedelta(seconds=LATE_S))
        self._looked_at = self._seen_all_until
        self._unheard_since = self._seen_all_until
        """Any unfinished run may have moved since then, and no message has told of it."""
        self._all_at = -math.inf
        """When all of these are looked at while Redis is away."""
        self._forgotten_ms = 0
        """The time of the last event that was given of a run that is forgotten."""

    @property
    def place(self) -> TailPlace | None:
        """Where another tail may go on: no event is left out then. None before the first batch."""
        if self._began is None or self._seen_all_until is None or not self._epoch:
            return None
        seen = min(self._seen_all_until, self._unheard_since or self._seen_all_until)
        return TailPlace(epoch=self._epoch, began=self._began, seen=seen)

    def follow(self, on_reset: Callable[[], None] = lambda: None) -> Generator[Batch]:
        """Events as they come. An empty list: `idle` seconds are over, or all is `caught_up`.

        `on_reset` is called when the database has another history: see `Reset`.
        """
        subscription, steps, answer = self._subscription(), self._steps(), NO_ANSWER
        self._observer(StreamOpened())
        try:
            while (step := _next(steps, answer)) is not None:
                answer = NO_ANSWER
                match step:
                    case Subscribe():
                        answer = subscription.ensure()
                    case Receive(seconds):
                        answer = subscription.messages(seconds)
                    case Probe(seconds):
                        answer = subscription.probe(seconds)
                    case Rest(seconds):
                        threading.Event().wait(seconds)
                    case Reset():
                        on_reset()
                    case _:
                        yield step
        finally:
            self._observer(StreamClosed())
            subscription.close()

    async def afollow(self, on_reset: Callable[[], None] = lambda: None) -> AsyncGenerator[Batch]:
        """`follow` for asyncio. Reads Postgres in threads, one statement after another."""
        subscription, steps, answer = self._async_subscription(), self._steps(), NO_ANSWER
        self._observer(StreamOpened())
        try:
            while (step := await asyncio.to_thread(_next, steps, answer)) is not None:
                answer = NO_ANSWER
                match step:
                    case Subscribe():
                        answer = await subscription.ensure()
                    case Receive(seconds):
                        answer = await subscription.messages(seconds)
                    case Probe(seconds):
                        answer = await subscription.probe(seconds)
                    case Rest(seconds):
                        await asyncio.sleep(seconds)
                    case Reset():
                        on_reset()
                    case _:
                        yield step
        finally:
            self._observer(StreamClosed())
            await subscription.aclose()

    def _steps(self) -> Steps:
        backoff, failures = Backoff(initial=0.1, cap=2.0), 0
        while not self._over:
            live = yield Subscribe()
            if not live:
                self._miss()
            try:
                yield from self._catch_up(live=live)
                failures = 0
                yield []
                yield from self._listen(live)
            except POSTGRES_AWAY as error:
                failures += 1
                logger.warning(
                    "journal cannot be read, the tail waits",
                    extra={"action": "stream_waits", "reason": first_line(error)},
                )
                yield Rest(self._at_most(backoff.delay(failures)))

    @property
    def _over(self) -> bool:
        return self._deadline is not None and monotonic() >= self._deadline

    def _at_most(self, seconds: float) -> float:
        """So many seconds, or those that are left."""
        left = seconds if self._deadline is None else self._deadline - monotonic()
        return max(0.0, min(seconds, left))

    def _listen(self, live: bool) -> Steps:
        """Pass on what arrives, until something may have been missed."""
        heard = False
        look_at = monotonic() + (self._head_check if live else self._without_redis)
        while not self._over:
            arrived = yield Receive(self._at_most(min(look_at, self._idle_at) - monotonic()))
            if arrived is None:
                self._miss()
                return
            heard = heard or bool(arrived)
            yield from self._pass_on(arrived)
            yield from self._if_idle()
            if monotonic() < look_at:
                continue
            if not heard:  # nothing happened, or the connection is dead
                arrived = yield Probe(self._at_most(ANSWER_S))
                if arrived is None:
                    self._miss()
                else:
                    yield from self._pass_on(arrived)
                return
            with self._engine.begin() as connection:
                if self._is_other_history(connection):
                    return
                # Until the last look at least, the connection was alive.
                self._seen_all_until = self._looked_at
                self._looked_at = self._time(connection)
            if self._unheard_since is not None:
                return
            yield from self._read_heads()
            heard, look_at = False, monotonic() + self._head_check

    def _if_idle(self) -> Iterator[Batch]:
        """An empty batch, if it is time for one."""
        if monotonic() >= self._idle_at:
            self._idle_at = monotonic() + self._idle
            yield []

    def _catch_up(self, *, live: bool) -> Steps:
        self.caught_up = False
        with self._engine.begin() as connection:
            epoch, now = self._origin.epoch(connection), self._time(connection)
        # Only with both: another history is to be told even if Postgres goes away in between.
        other, self._epoch = self._epoch not in ("", epoch), epoch
        if other:
            self._chosen.clear()
            self._others.clear()
            self._began = self._seen_all_until = self._unheard_since = None
            yield Reset()
        if self._began is None or self._seen_all_until is None:
            self._began = self._seen_all_until = self._looked_at = now
            self._looked_at_all(live, now)
            self.caught_up = True
            return
        self._began = min(self._began, now)
        late = timedelta(seconds=LATE_S)
        since = self._seen_all_until - late
        # Each run is in one list only: those that are forgotten meanwhile do not come again.
        listed = [
            self._listed(self._sql["started"], since),
            self._listed(self._sql["ended"], since),
        ]
        # It looks at every unfinished run: not each second while Redis is away.
        all_of_them = self._unheard_since is not None and (live or monotonic() >= self._all_at)
        if self._unheard_since is not None and all_of_them:
            listed.append(self._moved(self._unheard_since - late, since))
        for run_ids in chain.from_iterable(listed):
            yield from self._read([*self._look_up(run_ids)])
            yield from self._if_idle()
            if self._over:
                return
            self._forget(now - late)
        yield from self._read_heads()
        self._begin_behind_forgotten(now - late)
        if all_of_them:
            self._looked_at_all(live, now)
        self._seen_all_until = self._looked_at = now
        self.caught_up = True

    def _miss(self) -> None:
        """From now on messages may be lost."""
        if self._unheard_since is None:
            self._unheard_since = self._seen_all_until

    def _looked_at_all(self, live: bool, now: datetime) -> None:
        """Every unfinished run was looked at, after this time."""
        self._unheard_since = None if live else now
        self._all_at = monotonic() + self._head_check

    def _is_other_history(self, connection: Caller) -> bool:
        return self._epoch not in ("", self._origin.epoch(connection))

    def _time(self, connection: Caller) -> datetime:
        """The time of Postgres. If relays are late, messages are missing as if they were lost."""
        now: datetime
        unpublished: datetime | None
        now, unpublished = execute(connection, self._sql["clock"], {})[0]
        if unpublished is not None and unpublished < now - timedelta(seconds=LAG_S):
            self._miss()
            if self._unheard_since is not None:
                self._unheard_since = min(self._unheard_since, unpublished)
        return now

    def _listed(self, listing: str, since: datetime) -> Iterator[list[str]]:
        """The runs that this statement lists after a time, by pages."""
        at, run_id = since, ""
        while True:
            parameters = {
                "namespace": self._choice.namespace,
                "after_at": at,
                "after_id": run_id,
                "since": since,
            }
            with self._engine.begin() as connection:
                rows = execute(connection, listing, parameters)
            if rows:
                at, run_id, _ = rows[-1]
                yield [found for _, found, own in rows if own and self._may_be_chosen(found)]
            if len(rows) < PAGE_RUNS:
                return

    def _moved(self, moved: datetime, since: datetime) -> Iterator[list[str]]:
        """The unfinished runs from before `since` that have had events after a time, by pages."""
        after = ""
        while True:
            parameters = {"after_id": after, "moved": moved, "since": since}
            with self._engine.begin() as connection:
                rows = execute(connection, self._sql["moved"], parameters)
            yield [found for found, moved in rows if moved and self._may_be_chosen(found)]
            if len(rows) < PAGE_RUNS:
                return
            after = rows[-1][0]

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

    def _forget(self, until: datetime | None = None) -> None:
        """Forget the runs that are silent for the longest, but none that moved after `until`."""
        for _ in range(len(self._chosen)):
            if len(self._chosen) <= KNOWN_RUNS:
                break
            run_id, run = self._chosen.popitem(last=False)
            if until is not None and run.moved_ms >= until.timestamp() * 1000:
                self._chosen[run_id] = run
            else:
                self._forgotten_ms = max(self._forgotten_ms, run.moved_ms)

    def _begin_behind_forgotten(self, until: datetime | None = None) -> None:
        """The tail begins later from now on: what was given of forgotten runs is not given again.

        They come as new ones if they move. `until`: not later than this, for of runs that are still
        to come events may be older.
        """
        if self._began is None or not self._forgotten_ms:
            return
        last = datetime.fromtimestamp((self._forgotten_ms + 1) / 1000, UTC)
        self._began = max(self._began, last if until is None else min(last, until))
        self._forgotten_ms = 0

    def _pass_on(self, arrived: Sequence[tuple[str, bytes]]) -> Iterator[Batch]:
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
            if batch := self._wanted(run.feed(texts)):
                yield batch
            if run.cursor.missing:
                run.cursor.forget()
                if run.sought != run.cursor.seq or monotonic() - run.sought_at >= GAP_PAUSE_S:
                    run.sought, run.sought_at = run.cursor.seq, monotonic()
                    with_holes.append(run_id)
        yield from self._read(with_holes)
        self._forget()
        self._begin_behind_forgotten()

    def _wanted(self, batch: Batch) -> Batch:
        types = self._choice.events
        return [each for each in batch if each.text.type in types] if types else batch

    def _read_heads(self) -> Iterator[Batch]:
        """Read what the journal has of known runs, and the tail has not."""
        unfinished = [run_id for run_id, run in self._chosen.items() if not run.ended]
        for start in range(0, len(unfinished), PAGE_RUNS):
            some = unfinished[start : start + PAGE_RUNS]
            with self._engine.begin() as connection:
                heads = self._journal.heads(connection, some)
            yield from self._if_idle()
            for run_id in some:
                if run_id not in heads:
                    self._chosen[run_id].ended = True  # removed
            yield from self._read(
                [each for each in some if heads.get(each, 0) > self._chosen[each].cursor.seq]
            )

    def _read(self, run_ids: Sequence[str]) -> Iterator[Batch]:
        """What the journal has of these runs."""
        for run_id in run_ids:
            run, pager, more = self._chosen[run_id], Pager(), True
            while more and not self._over:
                yield from self._if_idle()
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
                if batch := self._wanted(run.feed(page)):
                    yield batch


def _next(
    steps: Steps, answer: Answer
) -> Batch | Subscribe | Receive | Probe | Rest | Reset | None:
    """The next step, after the answer to the last one; None at the end."""
    try:
        return steps.send(answer)
    except StopIteration:
        return None
