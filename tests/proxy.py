"""A TCP proxy that holds connections without a word, loses an answer, and cuts anywhere.

It can be far away from its server, and lose single messages of Redis' pub/sub.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PUBLISHED = re.compile(rb"\$7\r\nmessage\r\n\$\d+\r\n([^\r]+)\r\n")
"""The begin of a message to a subscriber, with its channel, in the protocol of Redis."""


class Proxy:
    """Forwards 127.0.0.1:port to a server, in a thread of its own."""

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        """Requests reach the server so much later."""
        self._upstream = port
        self._delay_s = delay_s
        self.loses: Callable[[], bool] | None = None
        """Whether a subscriber of Redis loses its next message: it gets one of another channel."""
        self.port = 0
        self.lost = threading.Event()
        """An answer has been lost."""
        self.cut_after: Callable[[], int] | None = None
        """After how many bytes of answers each new connection is cut."""
        self._marker = b""
        self._flows: set[asyncio.Event] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._ready = threading.Event()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    def hold(self) -> None:
        """From now on the connections that exist carry nothing, in no direction; new ones do."""
        asyncio.run_coroutine_threadsafe(self._hold(), self._loop).result(60)

    async def _hold(self) -> None:
        for flow in self._flows:
            flow.clear()

    def release(self) -> None:
        """What was held flows again."""
        asyncio.run_coroutine_threadsafe(self._release(), self._loop).result(60)

    async def _release(self) -> None:
        for flow in self._flows:
            flow.set()

    def cut(self) -> int:
        """End all connections with a reset; how many."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(60)

    async def _cut(self) -> int:
        open_ = [writer for writer in self._writers if not writer.is_closing()]
        for writer in open_:
            writer.transport.abort()
        return len(open_) // 2

    def lose_answer_to(self, marker: bytes) -> None:
        """The next request with these bytes reaches the server; its answer reaches nobody."""
        self._marker = marker

    def _lose_some(self, message: re.Match[bytes]) -> bytes:
        if self.loses is None or not self.loses():
            return message[0]
        return message[0].replace(message[1], b"?" * len(message[1]))

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**20)
        )
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(end(self._writers))
        self._loop.close()

    def _accept(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        # No coroutine: one that is cancelled before its first step closes nothing.
        self._writers.add(back)
        task = self._loop.create_task(self._serve(client, back))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            server, forth = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:  # it is away: so are we
            back.transport.abort()
            return
        self._writers.add(forth)
        flow, losing = asyncio.Event(), asyncio.Event()
        flow.set()
        self._flows.add(flow)
        pumps = [
            asyncio.create_task(self._requests(client, forth, flow, losing)),
            asyncio.create_task(self._answers(server, back, flow, losing)),
        ]
        with suppress(asyncio.CancelledError):
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        self._flows.discard(flow)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for writer in (forth, back):
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def _requests(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        flow: asyncio.Event,
        losing: asyncio.Event,
    ) -> None:
        while data := await reader.read(65536):
            if self._delay_s:
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.Event().wait(), self._delay_s)
            await flow.wait()
            if self._marker and self._marker in data:
                self._marker = b""
                losing.set()
            writer.write(data)
            await writer.drain()
        await flow.wait()

    async def _answers(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        flow: asyncio.Event,
        losing: asyncio.Event,
    ) -> None:
        left = self.cut_after() if self.cut_after else None
        while data := await reader.read(65536):
            await flow.wait()
            if losing.is_set():
                self.lost.set()
                return
            if self.loses is not None:
                data = PUBLISHED.sub(self._lose_some, data)
            if left is not None and (left := left - len(data)) <= 0:
                writer.write(data[: left or None])
                await writer.drain()
                return
            writer.write(data)
            await writer.drain()


async def end(writers: set[asyncio.StreamWriter]) -> None:
    """Cancel all that runs in this loop, and close these connections until they are closed."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    for writer in writers:
        writer.transport.abort()
    await asyncio.gather(*(writer.wait_closed() for writer in writers), return_exceptions=True)


@contextmanager
def proxy(port: int, *, delay_s: float = 0.0) -> Iterator[Proxy]:
    """A running proxy to this port of 127.0.0.1."""
    found = Proxy(port, delay_s=delay_s)
    found.start()
    try:
        yield found
    finally:
        found.stop()
