"""Many viewers at once, over HTTP, in a thread of their own."""

import asyncio
import threading
from collections.abc import Callable, Sequence

from beatless import Event
from beatless.http import AsyncClient
from beatless.outbox.backoff import Backoff

AT_ONCE = Backoff(initial=0.001, cap=0.05)


class Viewers:
    """Follows each of the runs at one URL; `end` gives what each viewer saw."""

    def __init__(self, url: str, run_ids: Sequence[str]) -> None:
        self.seen = 0
        self.finished = 0
        self._news = threading.Condition()
        self._url = url
        self._run_ids = run_ids
        self._results: list[list[Event]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()

    async def _main(self) -> None:
        async with AsyncClient(self._url, backoff=AT_ONCE, timeout=60) as client:
            following = [self._follow(client, run_id) for run_id in self._run_ids]
            self._results = await asyncio.gather(*following)

    async def _follow(self, client: AsyncClient, run_id: str) -> list[Event]:
        events = []
        async for event in client.astream_run(run_id, timeout=300):
            events.append(event)
            with self._news:
                self.seen += 1
                self.finished += event.final
                self._news.notify_all()
        return events

    def wait_for(self, condition: Callable[["Viewers"], bool]) -> None:
        """Wait for a condition on `seen` and `finished`."""
        with self._news:
            assert self._news.wait_for(lambda: condition(self), timeout=300)

    def end(self) -> list[list[Event]]:
        self._thread.join(330)
        assert not self._thread.is_alive()
        return self._results
