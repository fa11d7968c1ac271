"""The live half of asynchronous streams: one Redis connection for all streams of an event loop."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Self

from redis import asyncio as aioredis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff

from beatless.orchestrator.events import EventText
from beatless.outbox.backoff import Backoff
from beatless.outbox.message import run_of
from beatless.outbox.observer import Observer, ThreadFailed, ignore
from beatless.outbox.threads import RESTART_S
from beatless.streams.cancellation import kept_cancellation
from beatless.streams.history import NO_HEAD, History
from beatless.streams.messages import parse, why_without_redis
from beatless.streams.observer import BackfillReason
from beatless.transactions import first_line

logger = logging.getLogger("beatless.stream")


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
        """Of the present connection."""
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
                asyncio.create_task(self._restarting("streams", self._read)),
                asyncio.create_task(self._restarting("heads", self._check_heads)),
                asyncio.create_task(self._restarting("ping", self._check_redis)),
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
        reader's read, and events published meanwhile are missed without a trace.
        """
        connection = self._pubsub.connection if self._pubsub is not None else None
        if connection is None or not connection.is_connected:
            return  # the reader subscribes to everything when it has a connection again
        try:
            with kept_cancellation():
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

    async def _restarting(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Work until it returns, restarted after any error: the streams of the loop wait for it."""
        first = True
        while True:
            try:
                return await work()
            except Exception:
                logger.exception(
                    "a task of the streams failed, it is restarted",
                    extra={"action": "task_failed", "which": name, "retry_in": RESTART_S},
                )
                self._observer(ThreadFailed(thread="streams", first=first))
                first = False
            await asyncio.sleep(RESTART_S)

    async def _check_heads(self) -> None:
        while self._mailboxes:
            live = self._pubsub is not None
            await asyncio.sleep(self._head_check if live else self._without_redis)
            asked = {next(iter(boxes)).run_id for boxes in self._mailboxes.values()}
            # Events passed on during the query may be newer than its answer.
            seen = [(box, box.seq) for boxes in self._mailboxes.values() for box in boxes]
            try:
                epoch, heads = await asyncio.to_thread(self._heads, list(asked))
            except Exception as error:
                # Any error: without this check a stream whose last message was lost hangs.
                logger.warning(
                    "heads of the watched runs cannot be read, will retry",
                    extra={"action": "head_check_failed", "reason": first_line(error)},
                )
                continue
            for mailbox, seq in seen:
                # Without a head the run was removed: the reader finds out by looking.
                head = heads.get(mailbox.run_id, NO_HEAD)
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
                # Not by closing the connection: unsent bytes would keep it open.
                self._limit.reschedule(asyncio.get_running_loop().time())
                continue
            self._heard = False
            await self._command("PING")

    async def _read(self) -> None:
        backoff, failures = Backoff(initial=0.1, cap=2.0), 0
        while self._mailboxes:
            with kept_cancellation():
                failures = await self._read_connection(failures)
            if failures:
                await asyncio.sleep(backoff.delay(failures))

    async def _read_connection(self, failures: int) -> int:
        """How many connections have failed one after the other: so many before this one."""
        pubsub: Any = None
        async with contextlib.AsyncExitStack() as opened:
            try:
                client = self._client()
                opened.push_async_callback(client.aclose)
                client.connection_pool.connection_kwargs["retry"] = AsyncRetry(NoBackoff(), 0)
                pubsub = client.pubsub()
                opened.push_async_callback(pubsub.aclose)
                async with asyncio.timeout(self.patience) as limit:
                    asked: set[str] = set()
                    # Others may come while we wait for the connection: they count on us.
                    while late := self._mailboxes.keys() - asked:
                        with kept_cancellation():
                            await pubsub.subscribe(*late)
                        asked |= late
                    limit.reschedule(None)
                    self._pubsub, self._limit, self._heard = pubsub, limit, True
                    while self._mailboxes:
                        if not pubsub.connection.is_connected:
                            # By `_command`; redis-py would connect anew in silence.
                            raise ConnectionResetError("it was closed while it was written to")
                        message = await pubsub.get_message(timeout=None)
                        if message is not None:
                            failures, self._heard = 0, True
                            self._deliver(message)
            except Exception as error:
                # Any error: the streams of this loop wait for this task, each for ever.
                failures += 1
                logger.warning(
                    "%s, streams read the journal",
                    why_without_redis(error),
                    extra={
                        "action": "stream_without_redis",
                        "reason": str(error) or f"no answer in {self.patience:g} s",
                    },
                )
            finally:
                if self._pubsub in (None, pubsub):  # not that of a reader which came after us
                    self._pubsub = None
                    self._acknowledged.clear()
                    for boxes in self._mailboxes.values():
                        for mailbox in boxes:
                            mailbox.connected(live=False)
        return failures

    def _deliver(self, message: dict[str, Any]) -> None:
        if message["type"] == "pong":
            return
        channel = message["channel"].decode()
        if message["type"] == "subscribe":
            boxes = self._mailboxes.get(channel)
            if boxes is None:
                return  # its viewers left meanwhile, and UNSUBSCRIBE follows
            self._acknowledged.add(channel)
            for mailbox in boxes:
                mailbox.connected(live=True)
        elif message["type"] == "message":
            size = len(message["data"])
            # Messages without a mailbox are not parsed.
            events = parse(message["data"], run_of(channel)) if size <= Mailbox.MAX_BYTES else []
            offered = events if _go_on(events) else None
            # A copy: a viewer that is gone may leave meanwhile.
            for mailbox in list(self._mailboxes.get(channel, ())):
                mailbox.put(events, size, offered)


def _go_on(events: Sequence[EventText]) -> bool:
    """Whether events follow one another, and others will follow them."""
    return bool(events) and all(
        event.seq == events[0].seq + place and not event.final for place, event in enumerate(events)
    )


class Mailbox:
    """The live events of one stream. Bounded: a slow reader reads the journal instead."""

    MAX_BYTES = 512 * 1024
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
        self.accept: Callable[[Sequence[EventText]], bool] | None = None
        """Passes events on at once, in the reader's place, if they are the next ones of its stream
        and it can. Called only while the reader waits in `next` for nothing else."""
        self._waits = False
        self._news = asyncio.Event()
        self._state_known = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the stream was asked to end."""
        return self._over.is_set()

    def end(self) -> None:
        self._over.set()
        self.missed("end")

    async def rest(self, seconds: float) -> None:
        """Wait for so many seconds, or until the stream is asked to end."""
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

    def put(
        self, events: Sequence[EventText], size: int, offered: Sequence[EventText] | None
    ) -> None:
        """A message of so many bytes. One that does not fit is read from the journal instead.

        `offered` are its events if they may be passed on without waking the reader.
        """
        if (
            offered is not None
            and self.accept is not None
            and self._waits
            and not self._news.is_set()
            and self.accept(offered)
        ):
            self.seq = offered[-1].seq
            return
        self._size += size
        if self._size > self.MAX_BYTES:
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
            self._waits = True
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait()
            except TimeoutError:
                return []
            finally:
                self._waits = False
        if self._missed:
            return None
        arrived, self._waiting, self._size = self._waiting, [], 0
        return arrived
