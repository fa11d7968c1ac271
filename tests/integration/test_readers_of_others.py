"""Readers of server-sent events by others find in our streams, cut anywhere, what ours finds."""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import httpx
import httpx2
import pytest
from fastapi.testclient import TestClient
from httpx_sse import EventSource
from sseclient import SSEClient

from beatless import Plan, StepContext, step
from beatless.api import create_api
from beatless.http.follower import RETRY, Follower
from beatless.testing import Kit

TEXTS = [
    "é",
    "日本語",
    "🙂👩‍👩‍👧",
    "a\nb\r\nc\rd",
    "data: x\n\nid: 9",
    " ",
    "\u2028\u2029\x85",
    "\ufeff",
    "",
]
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8"}

Found = list[tuple[str, str, dict]]
"""The id, the type and the data of each event."""


@step
def tell(ctx: StepContext) -> list[str]:
    for text in TEXTS:
        ctx.trace(text or "empty", text=text)
    return TEXTS


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [Plan("tell", [tell])]


def by_ours(chunks: Iterable[bytes]) -> Found:
    response = httpx2.Response(
        200, headers=HEADERS, content=iter(chunks), request=httpx2.Request("GET", "http://x")
    )
    follower = Follower("r", 0, timeout=None, on_reset=None, backoff=RETRY)
    frames = list(httpx2.EventSource(response))
    found = [follower.feed(frame) for frame in frames]
    assert 2.0 <= follower.closed() <= 4.0  # the `retry` of the first frame
    return [
        (frame.id, event.type, json.loads(frame.data))
        for frame, event in zip(frames, found, strict=True)
        if event is not None
    ]


def by_httpx_sse(chunks: Iterable[bytes]) -> Found:
    response = httpx.Response(200, headers=HEADERS, content=iter(chunks))
    first, *frames = EventSource(response).iter_sse()
    assert (first.data, first.event) == ("", "message")
    assert first.retry is not None
    assert 2000 <= first.retry <= 4000
    return [(frame.id, frame.event, frame.json()) for frame in frames]


class Source:
    """What sseclient-py reads: chunks, which can be closed."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)

    def close(self) -> None: ...


def by_sseclient(chunks: Iterable[bytes]) -> Found:
    frames = SSEClient(Source(chunks)).events()
    return [(frame.id, frame.event, json.loads(frame.data)) for frame in frames]


READERS = [by_ours, by_httpx_sse, by_sseclient]


def cuts(stream: bytes) -> Iterator[Sequence[bytes]]:
    """The stream in one piece, byte by byte, and in pieces of many sizes."""
    yield [stream]
    yield [stream[at : at + 1] for at in range(len(stream))]
    for seed in range(20):
        chance = random.Random(seed)
        places = sorted(chance.sample(range(1, len(stream)), chance.randint(1, len(stream) // 4)))
        ends = zip([0, *places], [*places, len(stream)], strict=True)
        yield [stream[start:end] for start, end in ends]


def rewritten(stream: bytes) -> bytes:
    """As by a proxy: with CRLF, with comments, and with the data of an event in many lines."""
    lines = stream.replace(b'{"', b'{\ndata: "').replace(b"\nevent: ", b"\n: alive\nevent: ")
    return lines.replace(b"\n", b"\r\n")


def told(beatless: Kit) -> tuple[bytes, list[tuple[str, str, dict[str, Any]]]]:
    """The stream of a run of `tell`, and what the journal has: id, type and data of each event."""
    run_id = beatless.start_run("tell").run_id
    beatless.work_until_idle()
    events = beatless.client.events(run_id)
    with TestClient(create_api(beatless.app, is_open=True)) as api:
        stream = api.get(f"/v1/runs/{run_id}/stream").content
    epoch = stream.partition(b".")[0].removeprefix(b"id: ").decode()
    expected = [(f"{epoch}.{event.seq}", str(event.type), event.to_dict()) for event in events]
    assert [data["data"]["text"] for _, kind, data in expected if kind == "DebugTrace"] == TEXTS
    return stream, expected


def test_the_events_are_those_of_the_journal_wherever_the_stream_is_cut(beatless: Kit) -> None:
    stream, expected = told(beatless)
    for sent in (stream, rewritten(stream)):
        for chunks in cuts(sent):
            for read in READERS:
                assert read(chunks) == expected, read
