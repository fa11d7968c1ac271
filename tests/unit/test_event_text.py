"""An event as text: one line for every reader, and nothing that could be another frame."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beatless.api.sse import CHUNK, Framing
from beatless.orchestrator.events import EventText
from beatless.outbox.message import one_line
from beatless.streams.messages import parse

ENDS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r\n"


def line(**members: Any) -> bytes:
    event = {"run_id": "r", "seq": 1, "ts": 0, "type": "DebugTrace", "v": 1, "source": "worker"}
    return json.dumps(event | members, ensure_ascii=False).encode()


@given(st.text() | st.text(alphabet=ENDS + 'a\\"'))
def test_an_event_is_one_line_whatever_ends_lines(text: str) -> None:
    sent = one_line(line(data={"text": text, text: None}))
    assert len(sent.decode().splitlines()) == 1
    assert len(sent.splitlines()) == 1
    assert json.loads(sent)["data"] == {"text": text, text: None}


def test_a_frame_is_three_lines_whatever_ends_lines() -> None:
    (read,) = parse(line(data={"text": ENDS}))
    (frame,) = Framing(lambda event: event).chunks([read], "e")
    assert len(frame.decode().splitlines()) == 4
    assert frame.decode().splitlines()[:2] == ["id: e.1", "event: DebugTrace"]
    assert read.event().data == {"text": ENDS}


@pytest.mark.parametrize(
    "forged",
    [
        line(type="X\nevent: RunFinished"),
        line(type="X\r\ndata: {}"),
        line(type=""),
        line(type=None),
        line(type=["RunFinished"]),
        line(seq=0),
        line(seq=-1),
        line(seq=True),
        line(seq=1.0),
        line(seq="1"),
        b"\xff",
        b"[]",
        b"{",
        b"[" * 100_000,
        b"1" * 5000,
    ],
    ids=lambda sent: sent[:40],
)
def test_a_message_that_is_not_ours_gives_nothing(forged: bytes) -> None:
    assert parse(forged) == []
    assert parse(line() + b"\n" + forged) == []


def test_a_message_with_returns_between_its_parts_stays_one_line() -> None:
    (read,) = parse(b'{"run_id":"r",\r"seq":1,"ts":0,"type":"X","source":"w"\r}')
    assert b"\r" not in read.text
    assert read.event().seq == 1


def test_chunks_are_counted_in_bytes() -> None:
    wide = "\U0001f642" * (CHUNK // 8)
    events = [EventText.of(n, "X", json.dumps(wide, ensure_ascii=False)) for n in (1, 2, 3)]
    sent = list(Framing(lambda event: event).chunks(events, "e"))
    assert [chunk.count(b"id: ") for chunk in sent] == [1, 1, 1]
