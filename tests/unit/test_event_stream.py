"""What a server takes at once is handed to it at once; what it does not take keeps its order."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest

from beatless.api import sse
from beatless.api.sse import EventStream, Framing
from beatless.api.stream_limits import StreamLimits
from beatless.auth import EVERYTHING
from beatless.orchestrator.events import EventText
from beatless.streams.cursor import Cursor
from beatless.streams.history import History
from beatless.streams.hub import Hub, Mailbox


class OpenStreams:
    """Of a server without tokens: nothing ends a stream."""

    def watching(self, _grant: Any, _end: Any) -> "OpenStreams":
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Server:
    """A server that takes what it is sent while it is open, and waits as long as it is not."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.gone = False
        self.sent: list[bytes] = []
        self.asked: dict[bytes, asyncio.Event] = defaultdict(asyncio.Event)

    async def send(self, message: Any) -> None:
        body = message.get("body", b"head")
        self.asked[body].set()
        if self.gone:
            raise OSError("connection lost")
        if not self.open.is_set():
            await self.open.wait()
        self.sent.append(body)

    async def receive(self) -> Any:
        await asyncio.Event().wait()


class Stream:
    """One response in the middle of its chunks."""

    def __init__(self) -> None:
        self.server = Server()
        self.more: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.response = EventStream(
            OpenStreams(),  # type: ignore[arg-type]
            StreamLimits().reserve(EVERYTHING),
        )
        self.response.chunks = self._chunks()
        self._waits = asyncio.Event()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            self._waits.set()
            chunk = await self.more.get()
            self._waits.clear()
            if chunk is None:
                return
            yield chunk

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(
            self.response({"type": "http"}, self.server.receive, self.server.send)
        )
        await self._waits.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.more.put_nowait(None)
        await self.task


async def within(seconds: float, *awaited: Any) -> None:
    async with asyncio.timeout(seconds):
        await asyncio.gather(*awaited)


def test_a_chunk_that_the_server_takes_is_sent_when_the_call_returns() -> None:
    async def main() -> None:
        async with Stream() as stream:
            for number in range(3):
                assert stream.response.offer(b"%d" % number)
                assert stream.server.sent == [b"head", b"0", b"1", b"2"][: number + 2]
        assert stream.server.sent == [b"head", b"0", b"1", b"2", b""]
        assert not stream.response.offer(b"late")

    asyncio.run(main())


def test_a_server_that_waits_gets_what_was_offered_before_what_comes_after() -> None:
    async def main() -> None:
        async with Stream() as stream:
            stream.server.open.clear()
            assert stream.response.offer(b"first")
            assert not stream.response.offer(b"second")  # so it comes by the queue
            stream.more.put_nowait(b"second")
            stream.more.put_nowait(b"third")
            assert stream.server.sent == [b"head"]
            stream.server.open.set()
        assert stream.server.sent == [b"head", b"first", b"second", b"third", b""]

    asyncio.run(main())


def test_after_a_wait_chunks_are_taken_at_once_again() -> None:
    async def main() -> None:
        async with Stream() as stream:
            stream.server.open.clear()
            assert stream.response.offer(b"first")
            stream.server.open.set()
            stream.more.put_nowait(b"second")
            await within(60, stream.server.asked[b"second"].wait())
            assert stream.response.offer(b"third")
            assert stream.server.sent[-1] == b"third"

    asyncio.run(main())


def test_a_viewer_that_does_not_read_what_was_offered_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sse, "SEND_TIMEOUT_S", 0.01)
    caplog.set_level("INFO")

    async def main() -> None:
        stream = await Stream().__aenter__()
        stream.server.open.clear()
        assert stream.response.offer(b"first")
        await within(60, stream.server.asked[b""].wait())
        stream.server.open.set()
        await within(60, stream.task)
        assert stream.server.sent == [b"head", b""]

    asyncio.run(main())
    assert [record.action for record in caplog.records] == ["dropped"]


def test_a_viewer_that_goes_while_it_is_offered_something_ends_its_stream_alone() -> None:
    async def main() -> None:
        stream = await Stream().__aenter__()

        stream.server.gone = True
        assert not stream.response.offer(b"first")
        with pytest.raises(OSError, match="connection lost"):
            await within(60, stream.task)

    asyncio.run(main())


EVENTS = [EventText(seq, "DebugTrace", b'{"seq":%d}' % seq) for seq in range(1, 8)]


def test_the_frames_of_one_message_are_made_once_for_each_epoch() -> None:
    made = []

    def shown(event: EventText) -> EventText:
        made.append(event.seq)
        return event

    framing, message = Framing(shown), EVENTS[:2]
    first = framing.whole(message, "e")
    assert framing.whole(message, "e") is first
    assert made == [1, 2]
    assert framing.whole(message, "f") == first.replace(b"id: e.", b"id: f.")
    assert framing.whole(EVENTS[2:3], "f") == b"".join(framing.chunks(EVENTS[2:3], "f"))


def test_a_cursor_offers_what_is_next_and_nothing_else() -> None:
    taken: list[int] = []

    def accept(events: Any) -> bool:
        taken.extend(event.seq for event in events)
        return True

    cursor = Cursor(2)
    assert not cursor.offer(accept, EVENTS[1:3])  # it has seen one of them
    assert not cursor.offer(accept, EVENTS[3:4])  # one is missing before it
    assert not cursor.offer(lambda _: False, EVENTS[2:3])
    assert cursor.offer(accept, EVENTS[2:4])
    assert (cursor.seq, taken) == (4, [3, 4])
    assert list(cursor.feed(EVENTS[5:6])) == []
    assert not cursor.offer(accept, EVENTS[4:5])  # the journal is to be read first


def test_a_mailbox_passes_on_only_while_its_reader_waits() -> None:
    async def main() -> None:
        hub = Hub(lambda: None, heads=lambda _: ("", {}), head_check=1, without_redis=1, patience=1)
        mailbox = Mailbox(hub, "r", "c", 0, History("r", "e"))
        passed: list[EventText] = []
        mailbox.accept = lambda events: passed.extend(events) is None
        mailbox.put(EVENTS[:1], 1, EVENTS[:1])
        assert await mailbox.next(60) == EVENTS[:1]
        reading = asyncio.create_task(mailbox.next(60))
        begun = asyncio.Event()
        asyncio.get_running_loop().call_soon(begun.set)  # after the task's first step
        await begun.wait()
        mailbox.put(EVENTS[1:2], 1, EVENTS[1:2])
        assert (passed, mailbox.seq) == (EVENTS[1:2], 2)
        mailbox.put(EVENTS[2:3], 1, None)  # not to be passed on: the last one of a run
        mailbox.put(EVENTS[3:4], 1, EVENTS[3:4])  # nor what comes before the reader has that
        assert await reading == EVENTS[2:4]
        assert passed == EVENTS[1:2]

    asyncio.run(main())
