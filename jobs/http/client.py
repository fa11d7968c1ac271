"""The client for threads."""

import itertools
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from typing import Any, Self, TypeVar

import httpx2

from beatless.client.streams import check_cursor
from beatless.errors import BadSetting
from beatless.http import wire
from beatless.http.aio import AsyncClient
from beatless.http.follower import FRAME_LIMIT, RETRY, STALL, Follower, Interrupted
from beatless.orchestrator.events import Event
from beatless.orchestrator.journal import Run
from beatless.orchestrator.queues import QueueState
from beatless.outbox import forks
from beatless.outbox.backoff import Backoff
from beatless.outbox.letters import DeadLetter

T = TypeVar("T")


class Client:
    """Starts, reads and follows runs over HTTP, as the client of an app does. Threads may share it.

    Calls are tried five times before they raise Unreachable. AccessDenied says that the token is
    not good, or not for this.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        stall: float = STALL,
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
        )

    def after_fork(self) -> None:
        self._http = self._new_http()
        self._pid = os.getpid()
        self._closed = threading.Event()

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client of `BEATLESS_API_URL` with the token in `BEATLESS_TOKEN`. Raises BadSetting."""
        url = os.environ.get("BEATLESS_API_URL")
        if not url:
            raise BadSetting("BEATLESS_API_URL", "is not set", "https://beatless.example")
        return cls(url, token=os.environ.get("BEATLESS_TOKEN"), **options)

    def close(self) -> None:
        """Close its connections. Who waits between two tries, in another thread, tries no more."""
        self._closed.set()
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_run(
        self,
        plan: str,
        input: Any = None,
        *,
        run_id: str | None = None,
        key: str | None = None,
        queue: str | None = None,
        delay: float | timedelta | None = None,
        not_before: datetime | None = None,
        deadline: float | timedelta | None = None,
        priority: int = 0,
        tags: Mapping[str, str] | None = None,
        traceparent: str | None = None,
    ) -> Run:
        """Store a run. Raises UnknownPlan, BadRequest, BadPayload, RunConflict."""
        return self._send(
            wire.start_run(
                plan,
                input,
                run_id=run_id,
                key=key,
                queue=queue,
                delay=delay,
                not_before=not_before,
                deadline=deadline,
                priority=priority,
                tags=tags,
                traceparent=traceparent,
            )
        )

    def get_run(self, run_id: str) -> Run:
        """The run as it is stored now. Raises RunNotFound."""
        return self._send(wire.get_run(run_id))

    def list_runs(
        self,
        *,
        state: str | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        retried: bool | None = None,
        step: str | None = None,
        before: Run | tuple[datetime, str] | None = None,
        limit: int = 50,
    ) -> list[Run]:
        """Runs, newest first. `before` is the last run of the page before, or its time and id.

        `retried` keeps those that somebody has retried, or those that nobody has; `step` those that
        have not ended and are in this step, or go on with it.
        """
        found: list[Run] = []
        while len(found) < limit:
            wanted = min(limit - len(found), wire.PAGE)
            page, more = self._send(
                wire.list_runs(
                    state=state,
                    plan=plan,
                    queue=queue,
                    tags=tags,
                    retried=retried,
                    step=step,
                    before=before,
                    limit=wanted,
                )
            )
            found += page
            if not more:
                break
            before = page[-1]
        return found

    def events(self, run_id: str, from_seq: int = 0, limit: int | None = None) -> list[Event]:
        """The stored events after `from_seq`. Raises RunNotFound and EventsPruned."""
        found: list[Event] = []
        while limit is None or len(found) < limit:
            wanted = wire.PAGE if limit is None else min(limit - len(found), wire.PAGE)
            after = from_seq + len(found)
            page, last_seq = self._send(wire.events(run_id, after, wanted))
            found += page
            if not page or page[-1].seq >= last_seq:
                break
        return found

    def stream_token(self, run_id: str) -> str:
        """A token that may follow this run for some minutes, for `EventSource`'s URL.

        Raises RunNotFound.
        """
        return self._send(wire.stream_token(run_id))

    def wait_for_run(self, run_id: str, timeout: float | None = None) -> Run:
        """Wait for the end of a run and return it. Raises RunNotFound and WaitTimeout."""
        run = self.get_run(run_id)
        # The end counts, in whichever history it comes.
        for event in self.stream_run(run_id, run.last_seq, timeout=timeout, on_reset=lambda: None):
            if event.final:
                break
        return self.get_run(run_id)

    def cancel_run(self, run_id: str, *, reason: str | None = None) -> Run:
        """Ask a run to stop, durably; one that has ended stays as it is. Raises RunNotFound."""
        return self._send(wire.cancel_run(run_id, reason)) or self.get_run(run_id)

    def retry_run(self, run_id: str, from_step: str | None = None) -> Run:
        """Start a new run that goes on where an ended one has failed; the new run.

        Not tried again when its answer is lost: there could be two. Raises RunNotFound,
        UnknownPlan and CannotRetry.
        """
        return self._send(wire.retry_run(run_id, from_step))

    def remove_run(self, run_id: str) -> None:
        """Take a run away with all of its events. Raises RunNotFound, RunIsActive."""
        self._send(wire.remove_run(run_id))

    def clean(self, state: str, older_than: float | timedelta, limit: int = 1000) -> int:
        """Take away up to `limit` runs that ended in this state so long ago; how many."""
        return self._send(wire.clean(state, older_than, limit))

    def count_finished(self, state: str, older_than: float | timedelta) -> tuple[int, int]:
        """(runs, events) that `clean` would take away without a limit."""
        return self._send(wire.count_finished(state, older_than))

    def failed_runs(
        self,
        *,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        error: str | None = None,
        within: float | timedelta | None = None,
        limit: int = 100,
    ) -> list[Run]:
        """The runs that were given up on: failed, and retried by nobody. Oldest end first.

        `error` is looked for in "type: message" of the error, `within` keeps those
        that failed so many seconds ago or less. `remove_run` discards one.
        """
        found: list[Run] = []
        cursor = None
        while len(found) < limit:
            page, cursor = self._send(
                wire.failed_runs(
                    plan=plan,
                    queue=queue,
                    tags=tags,
                    error=error,
                    within=within,
                    limit=limit - len(found),
                    cursor=cursor,
                )
            )
            found += page
            if cursor is None:
                break
        return found

    def retry_failed(
        self,
        *,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        error: str | None = None,
        within: float | timedelta | None = None,
        limit: int = 100,
    ) -> tuple[list[Run], list[Exception]]:
        """`retry_run` for all of `failed_runs`: the new runs, and why others cannot be retried.

        Not tried again when its answer is lost: it can be called again, and then tells of those
        only that were left. Two calls at once retry each run once.
        """
        started: list[Run] = []
        refused: list[Exception] = []
        cursor = None
        while (left := limit - len(started) - len(refused)) > 0:
            page, reasons, cursor = self._send(
                wire.retry_failed(
                    plan=plan,
                    queue=queue,
                    tags=tags,
                    error=error,
                    within=within,
                    limit=left,
                    cursor=cursor,
                )
            )
            started += page
            refused += reasons
            if cursor is None:
                break
        return started, refused

    def dead_letters(self, limit: int = 100, after: int = 0) -> list[DeadLetter]:
        """Event messages that could not be published, oldest first, with an id above `after`."""
        found: list[DeadLetter] = []
        while len(found) < limit:
            page, more = self._send(wire.dead_letters(limit - len(found), after))
            found += page
            if not more:
                break
            after = page[-1].id
        return found

    def dead_letter(self, letter_id: int) -> DeadLetter:
        """One of `dead_letters`. Raises BadRequest if there is no such letter."""
        return self._send(wire.dead_letter(letter_id))

    def requeue_dead_letter(self, letter_id: int) -> None:
        """Publish the message again. Raises BadRequest if there is no such letter."""
        self._send(wire.requeue_dead_letter(letter_id))

    def requeue_dead_letters(self, *, reason: str = "", limit: int = 1000) -> int:
        """Publish many messages again, oldest first; how many they were.

        Those that have `reason` in their reason, whatever its case.
        """
        return self._send(wire.requeue_dead_letters(reason=reason, limit=limit))

    def discard_dead_letter(self, letter_id: int) -> None:
        """Forget the message; its events stay in the journal. Raises BadRequest."""
        self._send(wire.discard_dead_letter(letter_id))

    def queues(self) -> list[QueueState]:
        """Every queue that has runs or is paused, with its counts."""
        return self._send(wire.queues())

    def pause_queue(self, queue: str) -> None:
        """After this returned no run of the queue starts anywhere; those that run go on."""
        self._send(wire.pause_queue(queue))

    def resume_queue(self, queue: str) -> None:
        """Let the queue's runs start again."""
        self._send(wire.resume_queue(queue))

    def drain_queue(self, queue: str) -> int:
        """Take away the runs that wait, leave those that run; how many were taken away."""
        return self._send(wire.drain_queue(queue))

    def obliterate_queue(self, queue: str, *, force: bool = False) -> int:
        """Take away the queue with all of its runs; how many. Raises QueueBusy without `force`."""
        return self._send(wire.obliterate_queue(queue, force=force))

    def stream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> Iterator[Event]:
        """Every event after `from_seq`, in order and once, as it is committed, to RunFinished.

        Goes on from the last event whatever happens to the connection or the server. Raises
        RunNotFound, BadRequest for a `from_seq` beyond the head, EventsPruned, AccessDenied, and
        WaitTimeout if no RunFinished came within `timeout` seconds. When the database was restored
        or failed over it raises HistoryChanged; or it calls `on_reset`, which must forget the
        events, and gives all of them from the first.
        """
        run = self.get_run(run_id)
        check_cursor(run, from_seq)
        follower = Follower(
            run.run_id, from_seq, timeout=timeout, on_reset=on_reset, backoff=self._backoff
        )
        return self._follow(follower)

    def _follow(self, follower: Follower) -> Iterator[Event]:
        while True:
            pid = self._pid
            request = self._http.build_request(
                "GET",
                wire.stream_path(follower.run_id),
                headers=follower.headers,
                timeout=httpx2.Timeout(self._timeout, read=follower.patience(self._stall)),
            )
            try:
                response = self._http.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        response.read()
                    if not follower.accept(response):
                        return
                    with cut_after(response, follower.left()):
                        for frame in httpx2.EventSource(response, FRAME_LIMIT):
                            event = follower.feed(frame)
                            if event is not None:
                                yield event
                                if event.final:
                                    return
                                if pid != self._pid:
                                    raise Interrupted("its connection is another process's")
                finally:
                    if pid == self._pid:
                        response.close()
                delay = follower.closed()
            except (httpx2.TransportError, Interrupted) as error:
                delay = follower.failed(error)
            self._closed.wait(delay)

    def astream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncIterator[Event]:
        """`stream_run` for asyncio. Who follows many runs in one loop takes an AsyncClient."""

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

    def _send(self, call: wire.Call[T]) -> T:
        for tried in itertools.count(1):
            try:
                response = self._http.request(
                    call.method, call.path, json=call.body, params=call.query, headers=call.headers
                )
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
