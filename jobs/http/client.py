"""The client for threads."""

import itertools
import os
import socket
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, closing, contextmanager, suppress
from datetime import datetime
from itertools import chain
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
from beatless.http.aio import AsyncClient
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


def in_thread(exchange: Callable[P, Exchange[T]]) -> Callable[Concatenate["Client", P], T]:
    """The method of a Client that performs an exchange of the table."""

    def method(self: "Client", /, *arguments: P.args, **options: P.kwargs) -> T:
        return self._perform(exchange(*arguments, **options))

    return named_as(exchange, method)


class Client:
    """Starts, reads and follows runs over HTTP, as the client of an app does. Threads may share it.

    Calls are tried five times before they raise Unreachable. AccessDenied means that the token is
    not good, or not for this.

    >>> with Client(url, token=None) as client:
    ...     run = client.start_run("checkout", {"order": 1})
    >>> run.state.value
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
        self._pid = os.getpid()
        self._closed = threading.Event()
        forks.watch(self)

    def _new_http(self) -> httpx2.Client:
        return httpx2.Client(
            base_url=self._url,
            headers=wire.authorization(self._token),
            timeout=self._timeout,
            limits=wire.LIMITS,
            verify=trusted(),
        )

    def after_fork(self) -> None:
        self._http = self._new_http()
        self._pid = os.getpid()
        self._closed = threading.Event()

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of `BEATLESS_API_URL` with the token in `BEATLESS_TOKEN`. Raises BadSetting.

        >>> with Client.from_env(timeout=5.0) as client:
        ...     client.dead_letters()
        []
        """
        url = os.environ.get("BEATLESS_API_URL")
        if not url:
            raise BadSetting("BEATLESS_API_URL", "is not set", "https://beatless.example")
        return cls(url, token=os.environ.get("BEATLESS_TOKEN"), **options)

    def close(self) -> None:
        """Close its connections. Who waits between two tries, in another thread, tries no more.

        >>> client = Client(url)
        >>> client.close()
        """
        self._closed.set()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    start_run = in_thread(calls.start_run)
    get_run = in_thread(calls.get_run)
    list_runs = in_thread(calls.list_runs)
    events = in_thread(calls.events)
    stream_token = in_thread(calls.stream_token)
    cancel_run = in_thread(calls.cancel_run)
    signal_run = in_thread(calls.signal_run)
    waits = in_thread(calls.waits)
    approve_run = in_thread(approval_calls.approve_run)
    approval_link = in_thread(approval_calls.approval_link)
    revoke_approval_link = in_thread(approval_calls.revoke_approval_link)
    children = in_thread(calls.children)
    retry_run = in_thread(calls.retry_run)
    remove_run = in_thread(calls.remove_run)
    clean = in_thread(calls.clean)
    count_finished = in_thread(calls.count_finished)
    failed_runs = in_thread(calls.failed_runs)
    retry_failed = in_thread(calls.retry_failed)
    dead_letters = in_thread(calls.dead_letters)
    dead_letter = in_thread(calls.dead_letter)
    requeue_dead_letter = in_thread(calls.requeue_dead_letter)
    requeue_dead_letters = in_thread(calls.requeue_dead_letters)
    discard_dead_letter = in_thread(calls.discard_dead_letter)
    queues = in_thread(calls.queues)
    pause_queue = in_thread(calls.pause_queue)
    groups = in_thread(group_calls.groups)
    set_group_weight = in_thread(group_calls.set_group_weight)
    set_age_after = in_thread(group_calls.set_age_after)
    limits = in_thread(limit_calls.limits)
    set_limit = in_thread(limit_calls.set_limit)
    release_limit = in_thread(limit_calls.release_limit)
    resume_queue = in_thread(calls.resume_queue)
    drain_queue = in_thread(calls.drain_queue)
    obliterate_queue = in_thread(calls.obliterate_queue)
    create_schedule = in_thread(schedule_calls.create_schedule)
    update_schedule = in_thread(schedule_calls.update_schedule)
    delete_schedule = in_thread(schedule_calls.delete_schedule)
    schedules = in_thread(schedule_calls.schedules)
    schedule = in_thread(schedule_calls.schedule)
    pause_schedule = in_thread(schedule_calls.pause_schedule)
    resume_schedule = in_thread(schedule_calls.resume_schedule)
    run_schedule_now = in_thread(schedule_calls.run_schedule_now)
    backfill_schedule = in_thread(schedule_calls.backfill_schedule)
    cancel_backfill = in_thread(schedule_calls.cancel_backfill)

    def wait_for_run(self, run_id: str, timeout: float | None = None) -> Run:
        """Wait for the end of a run and return it. Raises RunNotFound and WaitTimeout.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> client.wait_for_run(run.run_id, timeout=10).result
        {'parcel': 'p_1'}
        """
        run = self.get_run(run_id)
        # The end counts, in whichever history it comes.
        for event in self.stream_run(run_id, run.last_seq, timeout=timeout, on_reset=lambda: None):
            if event.final:
                break
        return self.get_run(run_id)

    def stream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> Iterator[Event]:
        """Every event after `from_seq`, in order and once, as it is committed, to RunFinished.

        Continues from the last event after any loss of the connection or the server. Raises
        RunNotFound, BadRequest for a `from_seq` beyond the head, EventsPruned, AccessDenied, and
        WaitTimeout if no RunFinished came within `timeout` seconds. When the database was restored
        or failed over it raises HistoryChanged; or it calls `on_reset`, which must forget the
        events, and gives all of them from the first.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> [event.type for event in client.stream_run(run.run_id, from_seq=6)]
        ['StepFinished', 'RunFinished']
        """
        run = self.get_run(run_id)
        check_cursor(run, from_seq)
        follower = Follower(
            run.run_id, from_seq, timeout=timeout, on_reset=on_reset, backoff=self._backoff
        )
        return (event for event in self._follow(follower) if event is not None)

    def _follow(self, viewer: Viewer[T]) -> Generator[T | None]:
        """What each frame brings, which may be nothing."""
        while True:
            pid = self._pid
            request = self._http.build_request(
                "GET",
                viewer.path,
                params=viewer.query,
                headers=viewer.headers,
                timeout=httpx2.Timeout(self._timeout, read=viewer.patience(self._stall)),
            )
            try:
                response = self._http.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        response.read()
                    if not viewer.accept(response):
                        return
                    with cut_after(response, viewer.left()):
                        for frame in httpx2.EventSource(response, FRAME_LIMIT):
                            yield viewer.feed(frame)
                            if viewer.ended:
                                return
                            if pid != self._pid:
                                raise Interrupted("its connection is another process's")
                finally:
                    if pid == self._pid:
                        response.close()
                delay = viewer.closed()
            except (httpx2.TransportError, Interrupted) as error:
                delay = viewer.failed(error)
            self._closed.wait(delay)

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
        """The events of all runs of the token's namespace as one stream, as they are published.

        Of runs of one of these plans, of this queue, with all of these tags; of these types. It
        begins when it is called, or with the events `since` a time, and ends after `timeout`
        seconds, without it never: close it, or break out of the loop. Each event comes once, those
        of a run in their order; runs are in the order of arrival. It continues after any loss of
        the connection or the server. When the database was restored or failed over, events may be
        gone that were given, and others may never come: it raises HistoryChanged; or it calls
        `on_reset`, and goes on with the present. Raises BadRequest and AccessDenied.

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
        query = tail_calls.query_of(plan=plan, queue=queue, tags=tags, event=event, since=since)
        tailer = Tailer(query, timeout=timeout, on_reset=on_reset, backoff=self._backoff)
        self._perform(tail_calls.reach())
        frames = self._follow(tailer)
        # Begun here, and not with the first event: what is started from here on is not missed.
        first: list[TailedEvent | None] = []
        with suppress(TimeIsUp):
            while not tailer.begun:
                first.append(next(frames))

        def events() -> Generator[TailedEvent]:
            with closing(frames), suppress(TimeIsUp):
                yield from (each for each in chain(first, frames) if each is not None)

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

        async def events() -> AsyncGenerator[TailedEvent]:
            async with AsyncClient(
                self._url,
                token=self._token,
                timeout=self._timeout,
                stall=self._stall,
                backoff=self._backoff,
            ) as client:
                tail = client.atail(
                    plan=plan,
                    queue=queue,
                    tags=tags,
                    event=event,
                    since=since,
                    timeout=timeout,
                    on_reset=on_reset,
                )
                async with aclosing(tail):
                    async for each in tail:
                        yield each

        return events()

    def astream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncIterator[Event]:
        """`stream_run` for asyncio. Who follows many runs in one loop takes an AsyncClient.

        >>> import asyncio
        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> async def steps():
        ...     return [event.step async for event in client.astream_run(run.run_id, from_seq=6)]
        >>> asyncio.run(steps())
        ['ship', None]
        """

        async def events() -> AsyncIterator[Event]:
            async with AsyncClient(
                self._url,
                token=self._token,
                timeout=self._timeout,
                stall=self._stall,
                backoff=self._backoff,
            ) as client:
                async for event in client.astream_run(
                    run_id, from_seq, timeout=timeout, on_reset=on_reset
                ):
                    yield event

        return events()

    def _perform(self, exchange: Exchange[T]) -> T:
        """The result of an exchange of requests."""
        try:
            call = next(exchange)
            while True:
                call = exchange.send(self._send(call))
        except StopIteration as end:
            result: T = end.value
            return result

    def _send(self, call: wire.Call[Any]) -> Any:
        arguments = wire.arguments_of(call)
        for tried in itertools.count(1):
            try:
                response = self._http.request(call.method, call.path, **arguments)
            except httpx2.TransportError as error:
                delay = wire.pause_after(call, tried, error, self._backoff)
                if delay is None:
                    raise wire.unreachable(self._http.base_url, error) from error
            else:
                delay = wire.pause_after(call, tried, response, self._backoff)
                if delay is None:
                    return wire.result_of(call, response)
            self._closed.wait(delay)
        raise AssertionError("unreachable")


@contextmanager
def cut_after(response: httpx2.Response, seconds: float | None) -> Iterator[None]:
    """In this block the connection ends after so many seconds, as if the server had died.

    A blocking read knows no deadline that a heartbeat would not move.
    """
    if seconds is None:
        yield
        return

    def cut() -> None:
        stream = response.extensions["network_stream"]
        # The socket below TLS: that one may be shut while another thread reads.
        with (
            suppress(OSError),
            socket.socket(fileno=os.dup(stream.get_extra_info("socket").fileno())) as twin,
        ):
            twin.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
