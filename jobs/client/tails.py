"""Calls that follow all runs of a namespace as one stream."""

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from beatless.client.base import BaseClient
from beatless.client.requests import check_texts, checked_tags, seconds
from beatless.errors import BadRequest, HistoryChanged
from beatless.orchestrator.events import EventType
from beatless.streams.tailed import Choice, TailedEvent

if TYPE_CHECKING:
    from beatless.streams.tail import TailedText

EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)


class TailCalls(BaseClient):
    """Following all runs of the namespace at once."""

    def tail(
        self,
        *,
        plan: str | Sequence[str] | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        event: str | Sequence[str] | None = None,
        since: datetime | None = None,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> Generator[TailedEvent]:
        """The events of all runs of the namespace as one stream, as they are published.

        Of runs of one of these plans, of this queue, with all of these tags; of these types. It
        begins when it is called, or with the events `since` a time, and ends after `timeout`
        seconds, without it never: close it, or break out of the loop. Each event comes once, those
        of a run in their order; runs are in the order of arrival. It goes on through the loss of
        Redis (then slower) and of Postgres. When the database was restored or failed over, events
        may be gone that were given, and others may never come: it raises HistoryChanged; or it
        calls `on_reset`, and goes on with the present.

        Raises BadRequest, and Unreachable if Postgres is away when it is called.

        >>> tail = client.tail(tags={"shop": "eu"}, event=["RunStarted", "RunFinished"], timeout=60)
        >>> run = client.start_run("checkout", {"order": 1}, tags={"shop": "eu"})
        >>> executed = beatless.work_until_idle()
        >>> for told in tail:
        ...     print(told.plan, told.event.type)
        ...     if told.event.final:
        ...         break
        checkout RunStarted
        checkout RunFinished
        """
        choice = choice_of(
            self._namespace, plan=plan, queue=queue, tags=tags, event=event, since=since
        )
        timeout = seconds("timeout", timeout)
        self.epoch()  # raises if Postgres is away
        batches = self._streams.tail(choice, since=since, timeout=timeout).follow(raising(on_reset))
        # Begun here, and not with the first event: what is started from here on is not missed.
        first = next(batches, [])

        def events() -> Generator[TailedEvent]:
            with closing(batches):
                yield from map(_told, first)
                for batch in batches:
                    yield from map(_told, batch)

        return events()

    def atail(
        self,
        *,
        plan: str | Sequence[str] | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        event: str | Sequence[str] | None = None,
        since: datetime | None = None,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncGenerator[TailedEvent]:
        """`tail` for asyncio. It begins when its first event is awaited.

        >>> import asyncio
        >>> run = client.start_run("checkout", {"order": 1}, tags={"shop": "us"})
        >>> executed = beatless.work_until_idle()
        >>> async def told():
        ...     tail = client.atail(tags={"shop": "us"}, since=run.created_at, timeout=60)
        ...     async for each in tail:
        ...         if each.event.final:
        ...             return each.event.data["outcome"]
        >>> asyncio.run(told())
        'completed'
        """
        choice = choice_of(
            self._namespace, plan=plan, queue=queue, tags=tags, event=event, since=since
        )
        timeout = seconds("timeout", timeout)

        async def events() -> AsyncGenerator[TailedEvent]:
            await self._streams.in_thread(self.epoch)
            tail = self._streams.tail(choice, since=since, timeout=timeout)
            async with aclosing(tail.afollow(raising(on_reset))) as batches:
                async for batch in batches:
                    for each in batch:
                        yield _told(each)

        return events()


def choice_of(
    namespace: str,
    *,
    plan: str | Sequence[str] | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    event: str | Sequence[str] | None,
    since: datetime | None,
) -> Choice:
    """What is chosen by the arguments of `tail`. Raises BadRequest."""
    plans = [plan] if isinstance(plan, str) else [*(plan or [])]
    events = [event] if isinstance(event, str) else [*(event or [])]
    check_texts(queue=queue)
    for each in plans:
        check_texts(plan=each)
    known = [each.value for each in EventType]
    if unknown := [each for each in events if each not in known]:
        raise BadRequest("event", f"is {unknown[0]!r:.100}; choose {', '.join(known)}")
    if since is not None and (since.tzinfo is None or since < EARLIEST):
        raise BadRequest("since", f"is {since}: give a time after 1970 with its time zone")
    return Choice(
        namespace=namespace,
        plans=plans,
        queue=queue,
        tags=dict(checked_tags(tags) or {}),
        events=events,
    )


def raising(on_reset: Callable[[], None] | None) -> Callable[[], None]:
    """What is called when the database has another history: without `on_reset` it raises."""

    def raise_it() -> None:
        raise HistoryChanged(None, 0)

    return on_reset or raise_it


def _told(found: "TailedText") -> TailedEvent:
    return TailedEvent(plan=found.plan, event=found.event)
