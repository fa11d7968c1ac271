"""Live streams of runs: the journal first, then Redis, in order and each event once.

1. subscribe, and wait for Redis to acknowledge
2. read the journal: whatever was committed before is there
3. put what arrives into order; a hole, a reconnect or a long silence reads the journal again
4. end after RunFinished, or with an error when the database has another history

A Redis message is a hint. It may be late, doubled or lost; the journal is the truth.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from typing import Any, Self, TypeVar

import redis
import sqlalchemy
from redis import asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy import exc

from beatless.errors import HistoryChanged, WaitTimeout
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.journal import PAGE_BYTES, Journal, Run
from beatless.outbox import forks
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.observer import Observer, ThreadFailed, ignore
from beatless.outbox.publishers import channel_for, run_of
from beatless.outbox.queries import Caller
from beatless.streams.observer import Backfilled, BackfillReason, StreamClosed, StreamOpened

logger = logging.getLogger("beatless.stream")

T = TypeVar("T")

AWAY = (exc.OperationalError, exc.InterfaceError, exc.InternalError, exc.TimeoutError)
"""The journal cannot be read now: Postgres is gone or full, or the pool has no connection left."""

BEYOND = 2**31
"""Above any seq."""

PAGE = 500
"""Events read from the journal at once."""

FIRST_PAGE = 64

AGAIN_S = 1.0
"""Until a task goes on in which something has gone wrong that nobody foresaw."""

SUBSCRIBE_S = 5.0
"""Seconds that a stream waits for Redis to acknowledge its subscription."""

LEAST_PATIENCE_S = 0.05
"""Seconds that even a stream whose time is over gives Redis to answer."""

GAP_PAUSE_S = 1.0
"""Seconds until the journal is read again for an event that it did not have: whoever may publish on
the channel can invent any number of them."""


class Cursor:
    """Puts backfilled and live events into order, each exactly once. Does no I/O."""

    def __init__(self, after: int) -> None:
        self.seq = after
        self._early: dict[int, EventText] = {}

    def feed(self, events: Iterable[EventText]) -> Iterator[EventText]:
        """The events that are now next in order."""
        self._early.update((event.seq, event) for event in events if event.seq > self.seq)
        while event := self._early.pop(self.seq + 1, None):
            self.seq = event.seq
            yield event

    @property
    def missing(self) -> bool:
        """True while a later event has arrived before an earlier one: read the journal again."""
        return bool(self._early)

    def forget(self) -> None:
        """Drop what is early, before the journal is read: there it is, or it was never committed.

        Kept, an event with a seq that no run reaches would have the journal read without pause.
        """
        self._early.clear()


class History:
    """Tells whether the database still has the history in which a run is followed."""

    def __init__(self, run_id: str, epoch: str | None) -> None:
        """`epoch` is that of the cursor, if it is known already."""
        self._run_id = run_id
        self._epoch = epoch
        self.sure = epoch is not None
        """Nothing has happened since the last look that another history could have come with."""

    def differs(self, epoch: str, head: int, seq: int) -> bool:
        """Whether a database of this epoch, where the run has this head, has not what was seen."""
        return self._epoch not in (None, epoch) or head < seq

    def check(self, epoch: str, head: int, seq: int) -> None:
        """Raises HistoryChanged."""
        if self.differs(epoch, head, seq):
            raise HistoryChanged(self._run_id, seq)
        self._epoch, self.sure = epoch, True


class Origin:
    """The identity of the database's history, as far as this process knows."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._epoch = ""
        self._flushed = 0
        self._look = threading.Lock()

    @property
    def name(self) -> str:
        """The epoch without its timeline, for names of channels; empty before the first look."""
        return self._epoch.rpartition("t")[0]

    def epoch(self, connection: Caller) -> str:
        """The epoch now. It is renewed here if the disk has become an older copy of itself.

        That is: a snapshot was restored while this process lived. One that was restored while none
        did is for people to tell, by `beatless migrate --restored`.
        """
        # Noted before the statement: what other threads learn meanwhile may be newer.
        before = (self._epoch, self._flushed)
        epoch, flushed = self._journal.epoch(connection)
        with self._look:
            if epoch == before[0] == self._epoch and 0 < flushed < before[1]:
                logger.warning(
                    "the database has gone back in time: its epoch is renewed",
                    extra={"action": "epoch_renewed", "epoch": epoch},
                )
                self._journal.renew(connection, epoch)
                epoch, flushed = self._journal.epoch(connection)
            if epoch == self._epoch:
                flushed = max(flushed, self._flushed)
            self._epoch, self._flushed = epoch, flushed
        return epoch

    def after_fork(self) -> None:
        self._look = threading.Lock()


class Pager:
    """The number of events to read: as many as fit into a page, judging by the last one.

    What does not fit is built by Postgres in vain.
    """

    def __init__(self) -> None:
        self.limit = FIRST_PAGE

    def learn(self, page: Sequence[EventText]) -> None:
        if page:
            size = sum(len(event.text) for event in page)
            self.limit = max(1, min(PAGE, PAGE_BYTES * len(page) // max(1, size)))


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
        # A loop goes on in the parent, and with it what its streams share.
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
        """The Redis channel of the run's events. Raises what Postgres raises, the first time."""
        if not self._origin.name:
            self._current_epoch()
        return self._known_channel(run_id)

    def _known_channel(self, run_id: str) -> str:
        """`channel` in the history of the last look; empty before the first."""
        name = self._origin.name
        return channel_for(self._prefix, name, run_id) if name else ""

    def _hub(self) -> "Hub":
        """That of the running loop: what waits in one loop cannot be woken from another."""
        loop = asyncio.get_running_loop()
        with self._choosing:
            if loop not in self._hubs:
                # Loops do not tell when they are closed.
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
        """Events after a seq until RunFinished, for a thread that may block."""
        if run.state.final and after >= run.last_seq:
            return
        deadline = None if timeout is None else monotonic() + timeout
        cursor, sought = Cursor(after), -1
        reason: BackfillReason = "start"
        history = History(run.run_id, None)
        with contextlib.suppress(*AWAY):  # then the first look into the journal tells it
            self.channel(run.run_id)
        subscription = Subscription(self._redis_client, self._known_channel(run.run_id))
        self._observer(StreamOpened())
        try:
            while True:
                # The journal is read after every (re)subscription: what was published before it
                # is never heard, and only the journal knows what that was.
                live = subscription.ensure(_left(deadline, SUBSCRIBE_S))
                history.sure = False
                backfill = self._backfill(cursor, run.run_id, history, reason, timeout, deadline)
                yield from (events := _Once(backfill))
                if events.final:
                    return
                if subscription.move(self._known_channel(run.run_id)):
                    continue  # what we knew of the history was old
                reason = "head_check" if live else "without_redis"
                wait = self._head_check if live else self._without_redis
                quiet_at = monotonic() + wait
                while not cursor.missing and monotonic() < quiet_at:
                    patience = _remaining(quiet_at, deadline, run.run_id, timeout, self._state)
                    arrived = subscription.next(patience)
                    if arrived is None:
                        reason = "reconnect" if live else "without_redis"
                        break
                    yield from (events := _Once(cursor.feed(arrived)))
                    if events.final:
                        return
                    if arrived:
                        quiet_at = monotonic() + wait
                if cursor.missing:
                    cursor.forget()
                    reason = "gap"
                    if cursor.seq == sought:
                        threading.Event().wait(_left(deadline, GAP_PAUSE_S))
                    sought = cursor.seq
        finally:
            self._observer(StreamClosed())
            subscription.close()

    def _backfill(
        self,
        cursor: Cursor,
        run_id: str,
        history: History,
        reason: BackfillReason,
        timeout: float | None,
        deadline: float | None,
    ) -> Iterator[EventText]:
        backoff, failures, pager = Backoff(initial=0.1, cap=2.0), 0, Pager()
        while True:
            try:
                page, more = self._read(run_id, cursor.seq, pager, history)
            except AWAY as error:
                history.sure = False
                failures += 1
                delay = backoff.delay(failures)
                _log_wait(run_id, error)
                if deadline is not None and monotonic() + delay >= deadline:
                    raise WaitTimeout(run_id, timeout or 0, "unknown", cursor.seq) from error
                threading.Event().wait(delay)
                continue
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
                history.check(epoch, heads.get(run_id, BEYOND), after)
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
        except AWAY:
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
    ) -> AsyncGenerator[list[EventText]]:
        """`afollow` in batches; an empty one says that nothing came for `idle` seconds, or that
        the journal cannot be read now. Ends early after `end`. `epoch` is that of `after`.
        """
        if run.state.final and after >= run.last_seq:
            return
        deadline = None if timeout is None else monotonic() + timeout
        cursor, sought = Cursor(after), -1
        reason: BackfillReason = "start"
        backoff, failures, pager = Backoff(initial=0.1, cap=2.0), 0, Pager()

        async def wait(error: Exception, rest: Callable[[float], Awaitable[None]]) -> None:
            nonlocal failures
            failures += 1
            delay = backoff.delay(failures)
            _log_wait(run.run_id, error)
            if deadline is not None and monotonic() + delay >= deadline:
                raise WaitTimeout(run.run_id, timeout or 0, "unknown", cursor.seq) from error
            await rest(delay)

        while epoch is None or not self._origin.name:
            try:
                now = await asyncio.to_thread(self._current_epoch)
                epoch = epoch or now
            except AWAY as error:
                await wait(error, asyncio.sleep)
                yield []
        history = History(run.run_id, epoch)
        channel = self._known_channel(run.run_id)
        mailbox = self._hub().subscribe(channel, run.run_id, after, history)
        async with mailbox, self._counted():
            while not mailbox.ended:
                await mailbox.ready(None if deadline is None else deadline - monotonic())
                more = True
                while more and not mailbox.ended:
                    try:
                        page, more = await asyncio.to_thread(
                            self._read, run.run_id, cursor.seq, pager, history
                        )
                    except AWAY as error:
                        history.sure = False
                        await wait(error, mailbox.rest)
                        yield []
                        continue
                    failures = 0
                    self._observer(Backfilled(reason=reason, events=len(page)))
                    if batch := list(cursor.feed(page)):
                        mailbox.seq = cursor.seq
                        yield batch
                        if batch[-1].final:
                            return
                while not cursor.missing:
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        state, head = await asyncio.to_thread(self._state, run.run_id)
                        raise WaitTimeout(run.run_id, timeout or 0, state, head)
                    patience = left if idle is None else min(idle, left or idle)
                    arrived = await mailbox.next(patience)
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
                        await mailbox.rest(_left(deadline, GAP_PAUSE_S))
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


class _Once:
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


def _log_wait(run_id: str, error: Exception) -> None:
    logger.warning(
        "journal cannot be read, stream waits",
        extra={"action": "stream_waits", "run_id": run_id, "reason": str(error)},
    )


def _remaining(
    quiet_at: float,
    deadline: float | None,
    run_id: str,
    timeout: float | None,
    state: Callable[[str], tuple[str, int]],
) -> float:
    now = monotonic()
    if deadline is not None and now >= deadline:
        raise WaitTimeout(run_id, timeout or 0, *state(run_id))
    return max(0.0, min(quiet_at, deadline or quiet_at) - now)


def _left(deadline: float | None, most: float) -> float:
    """The seconds until the deadline, of so many."""
    return most if deadline is None else max(0.0, min(most, deadline - monotonic()))


def parse(body: bytes, run_id: str | None = None) -> list[EventText]:
    """The events of one Redis message; none of one that is not ours, for it may hide nothing.

    Nor of one with events of another run than this, if it is given.
    """
    try:
        return [EventText.read(line, run_id) for line in body.split(b"\n") if line]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning(
            "a message on a run's channel is not ours",
            extra={"action": "strange_message", "reason": str(error)},
        )
        return []


class Subscription:
    """One blocking subscription to one run. Knows when it may have missed something."""

    def __init__(self, client: Callable[[], "redis.Redis"], channel: str) -> None:
        self._client = client
        self._channel = channel
        self._pubsub: Any = None
        self._redis: redis.Redis | None = None
        self._backoff = Backoff(initial=0.5, cap=2.0)
        self._failures = 0
        self._retry_at = 0.0
        self._forked = False
        forks.watch(self)

    def after_fork(self) -> None:
        # redis-py closes what nobody holds any more, and says nothing to the server in a child.
        self._pubsub = self._redis = None
        self._forked = True

    def ensure(self, patience: float = SUBSCRIBE_S) -> bool:
        """Subscribe, if we are not, and wait for the acknowledgement; False without Redis.

        Also while it is not known what to subscribe to.
        """
        if self._pubsub is not None:
            return True
        self._forked = False
        if not self._channel:
            return False
        if monotonic() < self._retry_at:
            return False
        try:
            self._redis = self._client()
            # Without retries a lost connection is an error; with them redis-py reconnects in
            # silence, and what was published meanwhile would be missed without a trace.
            options = self._redis.connection_pool.connection_kwargs
            options["retry"] = Retry(NoBackoff(), 0)
            for name in ("socket_connect_timeout", "socket_timeout"):
                if options.get(name):  # 0 would not mean soon, but without waiting at all
                    options[name] = min(options[name], max(LEAST_PATIENCE_S, patience))
            pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]  # redis-py's gap
            pubsub.subscribe(self._channel)
            while (message := pubsub.get_message(timeout=patience)) is not None:
                if message["type"] == "subscribe":
                    self._pubsub, self._failures = pubsub, 0
                    return True
        except (RedisError, OSError) as error:
            logger.warning(
                "Redis is away, stream reads the journal",
                extra={"action": "stream_without_redis", "reason": str(error)},
            )
        self.close()
        self._failures += 1
        self._retry_at = monotonic() + self._backoff.delay(self._failures)
        return False

    def move(self, channel: str) -> bool:
        """Listen there instead; False if it does already."""
        if channel == self._channel:
            return False
        self.close()
        self._channel = channel
        return True

    def next(self, timeout: float) -> list[EventText] | None:
        """The next message's events; [] after `timeout` seconds; None if one may be lost."""
        if self._pubsub is None:
            if not self._forked:
                threading.Event().wait(max(0.0, timeout))
            return None
        try:
            message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=timeout)
        except (RedisError, OSError):
            self.close()
            return None
        return parse(message["data"], run_of(self._channel)) if message else []

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()
        if self._redis is not None:
            self._redis.close()
        self._pubsub = self._redis = None


class Hub:
    """One asynchronous Redis connection for all streams of a loop, with counted channels.

    It also asks Postgres, once for all watched runs, whether a last message was lost, and whether
    the database still has the history that was seen: every `head_check` seconds, or every
    `without_redis` while Redis is away. Every `patience` seconds it asks Redis for a sign of life,
    and leaves a connection that has given none since the last time: a Redis that is stopped, or
    gone without a word, closes nothing.
    """

    def __init__(
        self,
        client: Callable[[], "aioredis.Redis"],
        *,
        heads: Callable[[list[str]], tuple[str, dict[str, int]]],
        head_check: float,
        without_redis: float,
        patience: float,
        observer: Observer = ignore,
    ) -> None:
        self.patience = patience
        self._observer = observer
        self._client = client
        self._heads = heads
        self._head_check = head_check
        self._without_redis = without_redis
        self._mailboxes: dict[str, set[Mailbox]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._pubsub: Any = None
        self._limit = asyncio.Timeout(None)
        """Of the reader's present connection."""
        self._heard = False
        self._acknowledged: set[str] = set()

    @property
    def open_streams(self) -> int:
        """The number of open streams."""
        return sum(len(boxes) for boxes in list(self._mailboxes.values()))

    def end(self) -> None:
        """End every stream."""
        for boxes in self._mailboxes.values():
            for mailbox in boxes:
                mailbox.end()

    def subscribe(self, channel: str, run_id: str, after: int, history: History) -> "Mailbox":
        """A mailbox for the run's messages, to be used with `async with`."""
        return Mailbox(self, run_id, channel, after, history)

    async def add(self, mailbox: "Mailbox") -> None:
        self._mailboxes.setdefault(mailbox.channel, set()).add(mailbox)
        if not self._tasks or any(task.done() for task in self._tasks):
            for task in self._tasks:
                task.cancel()
            self._tasks = [
                asyncio.create_task(self._lasting("streams", self._read)),
                asyncio.create_task(self._lasting("heads", self._check_heads)),
                asyncio.create_task(self._lasting("ping", self._check_redis)),
            ]
        elif mailbox.channel in self._acknowledged:
            mailbox.connected(live=True)
        else:
            await self._command("SUBSCRIBE", mailbox.channel)

    async def remove(self, mailbox: "Mailbox") -> None:
        boxes = self._mailboxes.get(mailbox.channel, set())
        boxes.discard(mailbox)
        if boxes:
            return
        self._mailboxes.pop(mailbox.channel, None)
        self._acknowledged.discard(mailbox.channel)
        if not self._mailboxes:
            await self.aclose()
        else:
            await self._command("UNSUBSCRIBE", mailbox.channel)

    async def _command(self, *words: str) -> None:
        """Write to the connection that the reader reads.

        Not by the methods of redis-py's PubSub: on an error these connect anew in the middle of the
        reader's read, and what was published meanwhile is missed without a trace.
        """
        connection = self._pubsub.connection if self._pubsub is not None else None
        if connection is None or not connection.is_connected:
            return  # the reader subscribes to everything when it has a connection again
        try:
            async with asyncio.timeout(self.patience):
                await connection.send_command(*words)
        except Exception as error:
            logger.debug("connection lost", extra={"action": "lost", "reason": str(error)})
            # The reader sees it too, at the latest now.
            await connection.disconnect(nowait=True)

    async def aclose(self) -> None:
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _lasting(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do it until it returns, or again after anything that it raises: streams wait for it."""
        while True:
            try:
                return await work()
            except Exception:
                logger.exception(
                    "a task of the streams failed, it begins again",
                    extra={"action": "task_failed", "which": name, "retry_in": AGAIN_S},
                )
                self._observer(ThreadFailed(thread="streams", first=True))
            await asyncio.sleep(AGAIN_S)

    async def _check_heads(self) -> None:
        while self._mailboxes:
            live = self._pubsub is not None
            await asyncio.sleep(self._head_check if live else self._without_redis)
            asked = {next(iter(boxes)).run_id for boxes in self._mailboxes.values()}
            # What is passed on while we ask may be newer than the answer.
            seen = [(box, box.seq) for boxes in self._mailboxes.values() for box in boxes]
            try:
                epoch, heads = await asyncio.to_thread(self._heads, list(asked))
            except Exception as error:
                # Whatever it is: without this check a stream whose last message was lost hangs.
                logger.warning(
                    "heads of the watched runs cannot be read, will retry",
                    extra={"action": "head_check_failed", "reason": str(error)},
                )
                continue
            for mailbox, seq in seen:
                # Without a head the run was removed: the reader finds out by looking.
                head = heads.get(mailbox.run_id, BEYOND)
                if mailbox.history.differs(epoch, head, seq):
                    mailbox.history.sure = False
                elif head <= mailbox.seq:
                    continue
                mailbox.missed("head_check" if live else "without_redis")

    async def _check_redis(self) -> None:
        while self._mailboxes:
            await asyncio.sleep(self.patience)
            if self._pubsub is None:
                continue  # the reader connects, and has its own limit for that
            if not self._heard:
                # Not by closing the connection: what was not sent yet would keep it open.
                self._limit.reschedule(asyncio.get_running_loop().time())
                continue
            self._heard = False
            await self._command("PING")

    async def _read(self) -> None:
        backoff, failures = Backoff(initial=0.1, cap=2.0), 0
        while self._mailboxes:
            async with contextlib.AsyncExitStack() as opened:
                try:
                    client = self._client()
                    opened.push_async_callback(client.aclose)
                    client.connection_pool.connection_kwargs["retry"] = AsyncRetry(NoBackoff(), 0)
                    pubsub = client.pubsub()
                    opened.push_async_callback(pubsub.aclose)
                    async with asyncio.timeout(self.patience) as self._limit:
                        asked: set[str] = set()
                        # Others may come while we wait for the connection: they count on us.
                        while late := self._mailboxes.keys() - asked:
                            await pubsub.subscribe(*late)
                            asked |= late
                        self._limit.reschedule(None)
                        self._pubsub, self._heard = pubsub, True
                        while self._mailboxes:
                            message = await pubsub.get_message(timeout=None)
                            if message is not None:
                                failures, self._heard = 0, True
                                self._deliver(message)
                except Exception as error:
                    # Whatever it is: the streams of this loop wait for this task, each for ever.
                    failures += 1
                    logger.warning(
                        "Redis is away, streams read the journal",
                        extra={
                            "action": "stream_without_redis",
                            "reason": str(error) or f"no answer in {self.patience:g} s",
                        },
                    )
                finally:
                    self._pubsub = None
                    self._acknowledged.clear()
                    for boxes in self._mailboxes.values():
                        for mailbox in boxes:
                            mailbox.connected(live=False)
            if failures:
                await asyncio.sleep(backoff.delay(failures))

    def _deliver(self, message: dict[str, Any]) -> None:
        if message["type"] == "pong":
            return
        channel = message["channel"].decode()
        if message["type"] == "subscribe":
            self._acknowledged.add(channel)
            for mailbox in self._mailboxes.get(channel, ()):
                mailbox.connected(live=True)
        elif message["type"] == "message":
            size = len(message["data"])
            # What no mailbox takes is not even looked at.
            events = parse(message["data"], run_of(channel)) if size <= Mailbox.LIMIT else []
            for mailbox in self._mailboxes.get(channel, ()):
                mailbox.put(events, size)


class Mailbox:
    """The live events of one stream. Bounded: a slow reader reads the journal instead."""

    LIMIT = 512 * 1024
    """Bytes that may wait for the reader."""

    def __init__(self, hub: Hub, run_id: str, channel: str, seq: int, history: History) -> None:
        self.run_id = run_id
        self.channel = channel
        self.seq = seq
        """The last event that the reader has passed on."""
        self.history = history
        self.live = False
        self._hub = hub
        self._waiting: list[EventText] = []
        self._size = 0
        self._missed = False
        self.reason: BackfillReason = "start"
        """Why the reader shall look into the journal."""
        self._news = asyncio.Event()
        self._state_known = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the stream was told to end."""
        return self._over.is_set()

    def end(self) -> None:
        self._over.set()
        self.missed("end")

    async def rest(self, seconds: float) -> None:
        """Wait for so long, or until the stream is told to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()

    async def __aenter__(self) -> Self:
        try:
            await self._hub.add(self)
        except BaseException:
            await self._hub.remove(self)  # its viewer went while we asked Redis
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._hub.remove(self)

    def connected(self, *, live: bool) -> None:
        """The subscription begins, or is lost: either way something may have been missed."""
        self.live = live
        self._state_known.set()
        self.missed("reconnect" if live else "without_redis")

    def missed(self, reason: BackfillReason) -> None:
        """Something may have been lost: the reader shall look into the journal."""
        self._missed, self.reason = True, reason
        self._news.set()

    def put(self, events: Sequence[EventText], size: int) -> None:
        """A message of so many bytes. What does not fit is read from the journal instead."""
        self._size += size
        if self._size > self.LIMIT:
            self._waiting.clear()
            self._size = 0
            self.missed("overflow")
            return
        self._waiting += events
        self._news.set()

    async def ready(self, left: float | None) -> None:
        """Wait until the subscription is acknowledged, or known not to be possible now.

        Not for longer than the hub's patience, or `left` seconds: an acknowledgement that comes
        later has the journal read again.
        """
        if not self._state_known.is_set():
            patience = self._hub.patience
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience if left is None else min(patience, left)):
                    await self._state_known.wait()
            self._state_known.set()
        self._missed = self.ended

    async def next(self, timeout: float | None) -> list[EventText] | None:
        """The events that have come; [] after `timeout` seconds; None if some may be lost."""
        if not self._waiting and not self._missed:
            self._news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return []
        if self._missed:
            return None
        arrived, self._waiting, self._size = self._waiting, [], 0
        return arrived
