"""A TCP proxy that a test makes misbehave: it cuts connections, holds them, or has no server."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self

from tests.proxy import end


class Proxy:
    """Passes bytes to `upstream`, a port of 127.0.0.1, which may change while it runs."""

    def __init__(
        self, upstream: int, *, cut: Callable[[int], int | None] = lambda _number: None
    ) -> None:
        """`cut` takes the number of a connection, from 1, and gives the count of bytes from the
        server after which it is reset; None for never, 0 to hold it without an answer.
        """
        self.upstream = upstream
        self.accepted = 0
        self.cuts = 0
        self.news = threading.Condition()
        self._cut = cut
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=4096))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on `accepted` and `cuts` holds."""
        with self.news:
            assert self.news.wait_for(condition, timeout=60)

    def turn_to(self, upstream: int) -> int:
        """Pass new connections to another server; how many there were before."""
        self.upstream = upstream
        return self.accepted

    def wait_for_more(self, accepted: int) -> None:
        """Wait until there were more connections than this."""
        self.wait_for(lambda: self.accepted > accepted)

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(60)

    async def _close(self) -> None:
        self._server.close()
        await end(self._writers)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # No coroutine: one that is cancelled before its first step closes nothing.
        self._writers.add(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self.news:
            self.accepted += 1
            number = self.accepted
            self.news.notify_all()
        limit = self._cut(number)
        try:
            if limit == 0:
                await reader.read()
            else:
                await self._pass(reader, writer, limit)
        except OSError:
            reset(writer)
        finally:
            writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None
    ) -> None:
        above, up = await asyncio.open_connection("127.0.0.1", self.upstream)
        self._writers.add(up)
        sending = asyncio.create_task(pump(reader, up))
        left = limit
        try:
            while data := await above.read(65536 if left is None else left):
                writer.write(data)
                await writer.drain()
                if left is not None:
                    left -= len(data)
                    if left == 0:
                        with self.news:
                            self.cuts += 1
                            self.news.notify_all()
                        return
        finally:
            sending.cancel()
            up.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    writer.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """End the connection with RST and not with FIN."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
