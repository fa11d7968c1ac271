"""Calls that follow runs."""

from collections.abc import AsyncIterator, Callable, Iterator

from beatless.auth import Tokens
from beatless.client.base import BaseClient
from beatless.client.requests import seconds
from beatless.errors import BadRequest, HistoryChanged
from beatless.orchestrator.events import Event
from beatless.orchestrator.records import Run
from beatless.outbox.clock import monotonic
from beatless.transactions import reaching_postgres


class StreamCalls(BaseClient):
    """Following runs to their end."""

    def stream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> Iterator[Event]:
        """Every event after `from_seq`, in order and once, as it is committed, to RunFinished.

        Goes on through the loss of Redis (then slower) and of Postgres. Ends at once for a run that
        ended at or before `from_seq`. Raises RunNotFound (later too, if the run is removed),
        BadRequest for a `from_seq` beyond the head, EventsPruned for events that are not kept any
        more, WaitTimeout if no RunFinished came within `timeout` seconds. When the database was
        restored or failed over, seen events may be gone: it raises HistoryChanged; or it calls
        `on_reset`, which must forget the events, and gives all of them from the first.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> [event.type for event in client.stream_run(run.run_id, from_seq=6)]
        ['StepFinished', 'RunFinished']
        """
        timeout = seconds("timeout", timeout)
        run = self._check_stream(run_id, from_seq)
        if on_reset is None:
            return self._streams.follow(run, from_seq, timeout=timeout)
        return self._follow_anew(run, from_seq, timeout, on_reset)

    def _follow_anew(
        self, run: Run, after: int, timeout: float | None, on_reset: Callable[[], None]
    ) -> Iterator[Event]:
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                yield from self._streams.follow(run, after, timeout=left)
                return
            except HistoryChanged:
                on_reset()
                run, after = self.get_run(run.run_id), 0

    def astream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncIterator[Event]:
        """`stream_run` for asyncio. All streams of a loop share one connection to Redis.

        >>> import asyncio
        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> async def steps():
        ...     return [event.step async for event in client.astream_run(run.run_id, from_seq=6)]
        >>> asyncio.run(steps())
        ['ship', None]
        """
        timeout = seconds("timeout", timeout)

        async def events() -> AsyncIterator[Event]:
            run = await self._streams.in_thread(self._check_stream, run_id, from_seq)
            after, deadline = from_seq, None if timeout is None else monotonic() + timeout
            while True:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                try:
                    async for event in self._streams.afollow(run, after, timeout=left):
                        yield event
                    return
                except HistoryChanged:
                    if on_reset is None:
                        raise
                    on_reset()
                    run, after = await self._streams.in_thread(self.get_run, run_id), 0

        return events()

    def stream_token(self, run_id: str) -> str:
        """A token that may follow this run over HTTP for some minutes, for `EventSource`'s URL.

        Raises RunNotFound.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> url = f"/v1/runs/{run.run_id}/stream?token={client.stream_token(run.run_id)}"
        """
        run = self.get_run(run_id)
        with reaching_postgres(self._journal.schema, self._engine):
            return Tokens(self._engine, self._journal.schema).create_for_stream(
                run.run_id, namespace=self._namespace, maker=None
            )

    def _check_stream(self, run_id: str, from_seq: int) -> Run:
        run = self.get_run(run_id)
        check_cursor(run, from_seq)
        return run

    def wait_for_run(self, run_id: str, timeout: float | None = None) -> Run:
        """Wait for the end of a run and return it. Raises RunNotFound and WaitTimeout.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> client.wait_for_run(run.run_id, timeout=10).result
        {'parcel': 'p_1'}
        """
        timeout = seconds("timeout", timeout)
        left, deadline = timeout, None if timeout is None else monotonic() + timeout
        while not (run := self.get_run(run_id)).state.final:
            try:
                for _ in self._streams.follow(run, run.last_seq, timeout=left):
                    pass
            except HistoryChanged:
                # The end counts, in whichever history it comes.
                left = None if deadline is None else max(0.0, deadline - monotonic())
        return run


def check_cursor(run: Run, after: int) -> None:
    """Raises BadRequest and EventsPruned unless everything after the seq can be followed."""
    if after < 0:
        raise BadRequest("from_seq", "is negative; 0 gives everything")
    if after > run.last_seq:
        raise beyond_the_head(run, after)
    run.require_events(after)


def beyond_the_head(run: Run, after: int) -> BadRequest:
    """The error for a cursor beyond the last event."""
    return BadRequest(
        "from_seq", f"is {after}, beyond the last event {run.last_seq} of run {run.run_id}"
    )
