"""The client for asyncio."""

import asyncio
import itertools
import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx2

from beatless.client.streams import check_cursor
from beatless.errors import BadSetting
from beatless.http import (
    approval_calls,
    calls,
    group_calls,
    limit_calls,
    schedule_calls,
    tail_calls,
    wire,
)
from beatless.http.calls import named_as
from beatless.http.follower import (
    FRAME_LIMIT,
    RETRY,
    STALL_S,
    Follower,
    Interrupted,
    Tailer,
    TimeIsUp,
    Viewer,
)
from beatless.http.tls import trusted
from beatless.http.wire import Exchange
from beatless.orchestrator.events import Event
from beatless.orchestrator.records import Run
from beatless.outbox import forks
from beatless.outbox.backoff import Backoff
from beatless.streams.tailed import TailedEvent

P = ParamSpec("P")
T = TypeVar("T")


def in_loop(
    exchange: Callable[P, Exchange[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    """The method of an AsyncClient that performs an exchange of the table."""

    async def method(self: "AsyncClient", /, *arguments: P.args, **options: P.kwargs) -> T:
        return await self._perform(exchange(*arguments, **options))

    return named_as(exchange, method)


class AsyncClient:
    """`beatless.http.Client` for asyncio: the same calls as coroutines, and `astream_run`.

    >>> import asyncio
    >>> async def main():
    ...     async with AsyncClient(url, token=None) as client:
    ...         run = await client.start_run("checkout", {"order": 1})
    ...         return (await client.get_run(run.run_id)).state.value
    >>> asyncio.run(main())
    'queued'
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        stall: float = STALL_S,
        backoff: Backoff = RETRY,
    ) -> None:
        """`timeout` is for calls, in seconds; `stall` is how long a stream may bring no byte."""
        self._url, self._token, self._timeout = url, token, timeout
        self._stall = stall
        self._backoff = backoff
        self._http = self._new_http()
        forks.watch(self)

    def _new_http(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            base_url=self._url,
            headers=wire.authorization(self._token),
            timeout=self._timeout,
            limits=wire.LIMITS,
            verify=trusted(),
        )

    def after_fork(self) -> None:
        self._http = self._new_http()

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of `BEATLESS_API_URL` with the token in `BEATLESS_TOKEN`. Raises BadSetting."""
        url = os.environ.get("BEATLESS_API_URL")
        if not url:
            raise BadSetting("BEATLESS_API_URL", "is not set", "https://beatless.example")
        return cls(url, token=os.environ.get("BEATLESS_TOKEN"), **options)

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    start_run = in_loop(calls.start_run)
    get_run = in_loop(calls.get_run)
    list_runs = in_loop(calls.list_runs)
    events = in_loop(calls.events)
    stream_token = in_loop(calls.stream_token)
    cancel_run = in_loop(calls.cancel_run)
    signal_run = in_loop(calls.signal_run)
    waits = in_loop(calls.waits)
    approve_run = in_loop(approval_calls.approve_run)
    approval_link = in_loop(approval_calls.approval_link)
    revoke_approval_link = in_loop(approval_calls.revoke_approval_link)
    children = in_loop(calls.children)
    retry_run = in_loop(calls.retry_run)
    remove_run = in_loop(calls.remove_run)
    clean = in_loop(calls.clean)
    count_finished = in_loop(calls.count_finished)
    failed_runs = in_loop(calls.failed_runs)
    retry_failed = in_loop(calls.retry_failed)
    dead_letters = in_loop(calls.dead_letters)
    dead_letter = in_loop(calls.dead_letter)
    requeue_dead_letter = in_loop(calls.requeue_dead_letter)
    requeue_dead_letters = in_loop(calls.requeue_dead_letters)
    discard_dead_letter = in_loop(calls.discard_dead_letter)
    queues = in_loop(calls.queues)
    pause_queue = in_loop(calls.pause_queue)
    groups = in_loop(group_calls.groups)
    set_group_weight = in_loop(group_calls.set_group_weight)
    set_age_after = in_loop(group_calls.set_age_after)
    limits = in_loop(limit_calls.limits)
    set_limit = in_loop(limit_calls.set_limit)
    release_limit = in_loop(limit_calls.release_limit)
    resume_queue = in_loop(calls.resume_queue)
    drain_queue = in_loop(calls.drain_queue)
    obliterate_queue = in_loop(calls.obliterate_queue)
    create_schedule = in_loop(schedule_calls.create_schedule)
    update_schedule = in_loop(schedule_calls.update_schedule)
    delete_schedule = in_loop(schedule_calls.delete_schedule)
    schedules = in_loop(schedule_calls.schedules)
    schedule = in_loop(schedule_calls.schedule)
    pause_schedule = in_loop(schedule_calls.pause_schedule)
    resume_schedule = in_loop(schedule_calls.resume_schedule)
    run_schedule_now = in_loop(schedule_calls.run_schedule_now)
    backfill_schedule = in_loop(schedule_calls.backfill_schedule)
    cancel_backfill = in_loop(schedule_calls.cancel_backfill)

    async def wait_for_run(self, run_id: str, timeout: float | None = None) -> Run:
        """Wait for the end of a run and return it. Raises RunNotFound and WaitTimeout."""
        run = await self.get_run(run_id)
        # The end counts, in whichever history it comes.
        async for event in self.astream_run(
            run_id, run.last_seq, timeout=timeout, on_reset=lambda: None
        ):
            if event.final:
                break
        return await self.get_run(run_id)

    async def astream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncIterator[Event]:
        """`Client.stream_run` for asyncio."""
        run = await self.get_run(run_id)
        check_cursor(run, from_seq)
        follower = Follower(
            run.run_id, from_seq, timeout=timeout, on_reset=on_reset, backoff=self._backoff
        )
        async with aclosing(self._follow(follower)) as events:
            async for event in events:
                yield event

    async def _follow(self, viewer: Viewer[T]) -> AsyncGenerator[T]:
        while True:
            request = self._http.build_request(
                "GET",
                viewer.path,
                params=viewer.query,
                headers=viewer.headers,
                timeout=httpx2.Timeout(self._timeout, read=viewer.patience(self._stall)),
            )
            try:
                response = await self._http.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        await response.aread()
                    if not viewer.accept(response):
                        return
                    frames = aiter(httpx2.EventSource(response, FRAME_LIMIT))
                    while (frame := await within(viewer, anext(frames, None))) is not None:
                        event = viewer.feed(frame)
                        if event is not None:
                            yield event
                            if viewer.ended:
                                return
                finally:
                    await response.aclose()
                delay = viewer.closed()
            except (httpx2.TransportError, Interrupted) as error:
                delay = viewer.failed(error)
            await asyncio.sleep(delay)

    async def atail(
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
        """`Client.tail` for asyncio. It begins when its first event is awaited."""
        query = tail_calls.query_of(plan=plan, queue=queue, tags=tags, event=event, since=since)
        tailer = Tailer(query, timeout=timeout, on_reset=on_reset, backoff=self._backoff)
        await self._perform(tail_calls.reach())
        with suppress(TimeIsUp):
            async with aclosing(self._follow(tailer)) as events:
                async for event_of_run in events:
                    yield event_of_run

    async def _perform(self, exchange: Exchange[T]) -> T:
        """The result of an exchange of requests."""
        try:
            call = next(exchange)
            while True:
                call = exchange.send(await self._send(call))
        except StopIteration as end:
            result: T = end.value
            return result

    async def _send(self, call: wire.Call[Any]) -> Any:
        arguments = wire.arguments_of(call)
        for tried in itertools.count(1):
            try:
                response = await self._http.request(call.method, call.path, **arguments)
            except httpx2.TransportError as error:
                delay = wire.pause_after(call, tried, error, self._backoff)
                if delay is None:
                    raise wire.unreachable(self._http.base_url, error) from error
            else:
                delay = wire.pause_after(call, tried, response, self._backoff)
                if delay is None:
                    return wire.result_of(call, response)
            await asyncio.sleep(delay)
        raise AssertionError("unreachable")


async def within(viewer: Viewer[Any], frame: Awaitable[T]) -> T:
    """The next frame. Raises the viewer's `too_late` when its time is up."""
    if viewer.deadline is None:
        return await frame
    try:
        # Not wait_for: before Python 3.12 it swallows a cancellation that comes with the frame.
        async with asyncio.timeout(viewer.left()):
            return await frame
    except TimeoutError as error:
        raise viewer.too_late() from error
