"""Live streams of runs: the journal first, then Redis, in order and each event once.

1. subscribe, and wait for Redis to acknowledge
2. read the journal: all events committed before are there
3. put arriving events into order; a hole, a reconnect or a long silence reads the journal again
4. end after RunFinished, or with an error when the database has another history

A Redis message is a hint. It may be late, doubled or lost; the journal is the truth.
"""

import asyncio
import contextlib
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy

from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.records import Run
from beatless.outbox import forks
from beatless.outbox.clock import monotonic
from beatless.outbox.message import channel_for, every_channel
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.queries import Caller
from beatless.streams.cursor import Cursor
from beatless.streams.history import NO_HEAD, History, Origin, origin_of
from beatless.streams.observer import Backfilled, BackfillReason, StreamClosed, StreamOpened
from beatless.streams.pager import Pager
from beatless.streams.waiting import GAP_PAUSE_S, POSTGRES_AWAY, JournalRetry, Timeout

if TYPE_CHECKING:
    import redis
    from redis import asyncio as aioredis

    from beatless.cursors import TailPlace
    from beatless.streams.hub import Hub
    from beatless.streams.tail import Tail
    from beatless.streams.tailed import Choice

T = TypeVar("T")


class Streams:
    """Makes streams for one app."""

    def __init__(
        self,
        *,
        journal: Journal,
        engine: sqlalchemy.Engine,
        redis_client: Callable[[], "redis.Redis"],
        aredis_client: Callable[[], "aioredis.Redis"],
        prefix: str,
        head_check: float = 15.0,
        without_redis: float = 1.0,
        patience: float = 5.0,
        observer: Observer = ignore,
    ) -> None:
        """`head_check` bounds how long a lost last message goes unnoticed, in seconds.

        `without_redis` is how often the journal is read while Redis is away, and `patience` how
        long a new asynchronous stream waits for Redis before it reads the journal all the same.
        """
        self._journal = journal
        self._engine = engine
        self._origin = Origin(journal)
        self._redis_client = redis_client
        self._prefix = prefix
        self._head_check = head_check
        self._without_redis = without_redis
        self._observer = observer
        self._aredis_client = aredis_client
        self._patience = patience
        self._hubs: dict[asyncio.AbstractEventLoop, Hub] = {}
        self._choosing = threading.Lock()
        forks.watch(self)

    def after_fork(self) -> None:
        # A loop goes on in the parent, and with it the objects that its streams share.
        self._hubs = {}
        self._choosing = threading.Lock()
        self._origin.after_fork()

    def epoch(self, connection: Caller) -> str:
        """Changes when the database's history may have changed: restore, or failover."""
        return self._origin.epoch(connection)

    def _current_epoch(self) -> str:
        with self._engine.begin() as connection:
            return self.epoch(connection)

    def channel(self, run_id: str) -> str:
        """The Redis channel of the run's events. Raises the errors of Postgres, the first time."""
        if not self._origin.name:
            self._current_epoch()
        return self._known_channel(run_id)

    def _known_channel(self, run_id: str) -> str:
        """`channel` in the history of the last look; empty before the first."""
        name = self._origin.name
        return channel_for(self._prefix, name, run_id) if name else ""

    def _hub(self) -> "Hub":
        """That of the running loop: waiters of one loop cannot be woken from another."""
        from beatless.streams.hub import Hub  # imports redis, which only a stream needs

        loop = asyncio.get_running_loop()
        with self._choosing:
            if loop not in self._hubs:
                # Loops do not report that they are closed.
                self._hubs = {key: hub for key, hub in self._hubs.items() if not key.is_closed()}
                self._hubs[loop] = Hub(
                    self._aredis_client,
                    heads=self._heads,
                    head_check=self._head_check,
                    without_redis=self._without_redis,
                    patience=self._patience,
                    observer=self._observer,
                )
            return self._hubs[loop]

    def follow(self, run: Run, after: int, *, timeout: float | None = None) -> Iterator[Event]:
        """Events after a seq until RunFinished, for a thread that may block.

        `timeout` is in seconds. Raises WaitTimeout, HistoryChanged, EventsPruned.
        """
        if run.state.final and after >= run.last_seq:
            return
        from beatless.streams.subscription import SUBSCRIBE_TIMEOUT_S, Subscription

        limit = Timeout(run.run_id, timeout)
        cursor, sought = Cursor(after), -1
        reason: BackfillReason = "start"
        history = History(run.run_id, None)
        with contextlib.suppress(*POSTGRES_AWAY):  # then the first read of the journal raises it
            self.channel(run.run_id)
        subscription = Subscription(self._redis_client, self._known_channel(run.run_id))
        self._observer(StreamOpened())
        try:
            while True:
                # The journal is read after every (re)subscription: events published before it
                # are never received, and only the journal has them.
                live = subscription.ensure(limit.cap(SUBSCRIBE_TIMEOUT_S))
                history.sure = False
                yield from (events := _UntilFinal(self._backfill(cursor, history, reason, limit)))
                if events.final:
                    return
                if subscription.move(self._known_channel(run.run_id)):
                    continue  # the cached history was outdated
                reason = "head_check" if live else "without_redis"
                wait = self._head_check if live else self._without_redis
                quiet_at = monotonic() + wait
                while not cursor.missing and monotonic() < quiet_at:
                    if limit.over:
                        raise limit.error(*self._state(run.run_id))
                    arrived = subscription.next(limit.cap(max(0.0, quiet_at - monotonic())))
                    if arrived is None:
                        reason = "reconnect" if live else "without_redis"
                        break
                    yield from (events := _UntilFinal(cursor.feed(arrived)))
                    if events.final:
                        return
                    if arrived:
                        quiet_at = monotonic() + wait
                if cursor.missing:
                    cursor.forget()
                    reason = "gap"
                    if cursor.seq == sought:
                        threading.Event().wait(limit.cap(GAP_PAUSE_S))
                    sought = cursor.seq
        finally:
            self._observer(StreamClosed())
            subscription.close()

    def tail(
        self,
        choice: "Choice",
        *,
        since: datetime | None = None,
        after: "TailPlace | None" = None,
        timeout: float | None = None,
        idle: float | None = None,
    ) -> "Tail":
        """A tail of all runs that are chosen, from now or `since` on, or `after` another's place.

        It ends after `timeout` seconds; see `streams.tail`.
        """
        from beatless.streams.async_subscription import AsyncSubscription
        from beatless.streams.subscription import Subscription
        from beatless.streams.tail import Tail

        pattern = every_channel(self._prefix)
        return Tail(
            choice,
            journal=self._journal,
            engine=self._engine,
            origin=self._origin,
            subscription=lambda: Subscription(self._redis_client, pattern, of_all_runs=True),
            async_subscription=lambda: AsyncSubscription(self._aredis_client, pattern),
            own_channel=self._known_channel,
            head_check=self._head_check,
            without_redis=self._without_redis,
            observer=self._observer,
            since=since,
            after=after,
            timeout=timeout,
            idle=idle,
        )

    def _backfill(
        self, cursor: Cursor, history: History, reason: BackfillReason, limit: Timeout
    ) -> Iterator[EventText]:
        retry, pager = JournalRetry(limit), Pager()
        while True:
            try:
                page, more = self._read(limit.run_id, cursor.seq, pager, history)
            except POSTGRES_AWAY as error:
                history.sure = False
                threading.Event().wait(retry.delay(error, cursor.seq))
                continue
            retry.succeeded()
            self._observer(Backfilled(reason=reason, events=len(page)))
            yield from cursor.feed(page)
            if not more:
                return

    def _read(
        self, run_id: str, after: int, pager: Pager, history: History
    ) -> tuple[list[EventText], bool]:
        with self._engine.begin() as connection:
            if not history.sure:
                epoch, heads = self._look(connection, [run_id])
                history.check(epoch, heads.get(run_id, NO_HEAD), after)
            page, more = self._journal.read_page(connection, run_id, after=after, limit=pager.limit)
        pager.learn(page)
        return page, more

    def _heads(self, run_ids: list[str]) -> tuple[str, dict[str, int]]:
        with self._engine.begin() as connection:
            return self._look(connection, run_ids)

    def _look(
        self, connection: sqlalchemy.Connection, run_ids: list[str]
    ) -> tuple[str, dict[str, int]]:
        """(the epoch, the last seq of each run)"""
        return self.epoch(connection), self._journal.heads(connection, run_ids)

    def _state(self, run_id: str) -> tuple[str, int]:
        try:
            return "unfinished", self._heads([run_id])[1].get(run_id, 0)
        except POSTGRES_AWAY:
            return "unknown", 0

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call something that reads Postgres without blocking the loop."""
        return await asyncio.to_thread(function, *arguments)

    async def afollow(
        self, run: Run, after: int, *, timeout: float | None = None
    ) -> AsyncIterator[Event]:
        """`follow` for asyncio."""
        async with contextlib.aclosing(self.watch(run, after, timeout=timeout)) as batches:
            async for batch in batches:
                for text in batch:
                    yield text.event()

    async def watch(
        self,
        run: Run,
        after: int,
        *,
        epoch: str | None = None,
        timeout: float | None = None,
        idle: float | None = None,
        accept: Callable[[Sequence[EventText]], bool] | None = None,
    ) -> AsyncGenerator[list[EventText]]:
        """`afollow` in batches; an empty one means that nothing came for `idle` seconds, or that
        the journal cannot be read now. Ends early after `end`. `epoch` is that of `after`.

        `accept` is called with the next events while the generator waits for them: if it returns
        True they are passed on, and do not come as a batch. Of one message, all streams of a run
        are given the same object.
        """
        if run.state.final and after >= run.last_seq:
            return
        limit = Timeout(run.run_id, timeout)
        cursor, sought = Cursor(after), -1
        reason: BackfillReason = "start"
        retry, pager = JournalRetry(limit), Pager()
        while epoch is None:
            try:
                epoch = await asyncio.to_thread(self._current_epoch)
            except POSTGRES_AWAY as error:
                await asyncio.sleep(retry.delay(error, cursor.seq))
                yield []
        history = History(run.run_id, epoch)
        # Not the channel of our own last look: the epoch may be another's, and of a later history.
        channel = channel_for(self._prefix, origin_of(epoch), run.run_id)
        mailbox = self._hub().subscribe(channel, run.run_id, after, history)
        if accept is not None:
            mailbox.accept = partial(cursor.offer, accept)
        async with mailbox, self._counted():
            while not mailbox.ended:
                await mailbox.ready(limit.left)
                more = True
                while more and not mailbox.ended:
                    try:
                        page, more = await asyncio.to_thread(
                            self._read, run.run_id, cursor.seq, pager, history
                        )
                    except POSTGRES_AWAY as error:
                        history.sure = False
                        await mailbox.rest(retry.delay(error, cursor.seq))
                        yield []
                        continue
                    retry.succeeded()
                    self._observer(Backfilled(reason=reason, events=len(page)))
                    if batch := list(cursor.feed(page)):
                        mailbox.seq = cursor.seq
                        yield batch
                        if batch[-1].final:
                            return
                while not cursor.missing:
                    if limit.over:
                        raise limit.error(*await asyncio.to_thread(self._state, run.run_id))
                    arrived = await mailbox.next(limit.left if idle is None else limit.cap(idle))
                    if arrived is None:
                        reason = mailbox.reason
                        break
                    batch = list(cursor.feed(arrived))
                    if batch:
                        mailbox.seq = cursor.seq
                    if batch or not arrived:
                        yield batch
                    if batch and batch[-1].final:
                        return
                if cursor.missing:
                    cursor.forget()
                    reason = "gap"
                    if cursor.seq == sought:
                        await mailbox.rest(limit.cap(GAP_PAUSE_S))
                    sought = cursor.seq

    @contextlib.asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self._observer(StreamOpened())
        try:
            yield
        finally:
            self._observer(StreamClosed())

    @property
    def open_streams(self) -> int:
        """The number of open asynchronous streams, in all loops."""
        with self._choosing:
            return sum(hub.open_streams for hub in self._hubs.values())

    def end(self) -> None:
        """End the asynchronous streams that are open in this loop, in order."""
        self._hub().end()

    async def aclose(self) -> None:
        """Close the connection that this loop's streams share."""
        await self._hub().aclose()


class _UntilFinal:
    """Passes events on as objects and remembers whether the last one was final."""

    def __init__(self, events: Iterable[EventText]) -> None:
        self._events = events
        self.final = False

    def __iter__(self) -> Iterator[Event]:
        for event in self._events:
            self.final = event.final
            yield event.event()
            if self.final:
                return
