"""What each thing that happens to a viewer over HTTP means."""

import json
from typing import Any

import httpx2
import pytest

from beatless import BadRequest, EventsPruned, RunNotFound, Unreachable, WaitTimeout
from beatless.errors import AccessDenied, HistoryChanged
from beatless.http.follower import Follower, Interrupted
from beatless.http.wire import Call, error_of, pause_after, pause_of
from beatless.outbox.backoff import Backoff

BACKOFF = Backoff(initial=1, factor=2, cap=4, jitter=0)


def follower(**options: Any) -> Follower:
    return Follower("r", 0, **{"timeout": None, "on_reset": None, "backoff": BACKOFF, **options})


def frame(seq: int, *, epoch: str = "e", event: str = "DebugTrace") -> httpx2.ServerSentEvent:
    members = {"run_id": "r", "seq": seq, "ts": 1, "type": event, "source": "worker"}
    return httpx2.ServerSentEvent(event=event, data=json.dumps(members), id=f"{epoch}.{seq}")


def priming(epoch: str = "e", seq: int = 0) -> httpx2.ServerSentEvent:
    return httpx2.ServerSentEvent(id=f"{epoch}.{seq}", retry=3000)


def answer(status: int, document: Any = None, **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.Response(status, json=document, headers=named)


def test_each_event_comes_once_and_in_order() -> None:
    one = follower()
    assert one.headers["Last-Event-ID"] == "0"
    assert one.feed(priming()) is None
    assert [one.feed(frame(seq)) is not None for seq in (1, 1, 2)] == [True, False, True]
    with pytest.raises(Interrupted, match="event 4 came after 2"):
        one.feed(frame(4))
    assert one.headers["Last-Event-ID"] == "e.2"


def test_only_an_event_starts_the_back_off_anew() -> None:
    one = follower()
    assert [one.failed(OSError()) for _ in range(4)] == [1, 2, 4, 4]
    assert one.accept(answer(200))
    one.feed(priming())
    assert one.failed(OSError()) == 4
    one.feed(frame(1))
    assert one.failed(OSError()) == 1
    assert one.closed() == 3  # the server's own wish


def test_a_server_that_is_busy_says_when_to_come() -> None:
    one = follower()
    for status in (429, 500, 502, 503, 504):
        with pytest.raises(Interrupted) as busy:
            one.accept(answer(status, Retry_After="7"))
        assert busy.value.pause == 7
    assert one.failed(busy.value) == 8


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5", 5),
        ("", 0),
        ("-3", 0),
        ("1e9", 60),
        ("nan", 0),
        ("soon", 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2215 07:28:00 GMT", 60),
    ],
)
def test_retry_after_is_read_with_care(text: str, seconds: float) -> None:
    assert pause_of(answer(503, Retry_After=text)) == seconds


def test_the_end_and_refusals() -> None:
    one = follower()
    assert one.accept(answer(204)) is False
    gone = {"error": "EventsPruned", "arguments": ["r", 0, 3], "detail": "…"}
    with pytest.raises(EventsPruned, match="events from 3 on are kept"):
        one.accept(answer(410, gone))
    with pytest.raises(RunNotFound):
        one.accept(answer(404, {"error": "RunNotFound", "arguments": ["r"]}))
    for status in (401, 403):
        with pytest.raises(AccessDenied, match=str(status)):
            one.accept(answer(status, {"detail": "no"}))


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        "x",
        {},
        {"error": "SystemExit", "arguments": []},
        {"error": ["x"]},
        {"error": "RunNotFound", "arguments": [1, 2, 3]},
        {"error": "RunNotFound"},
    ],
)
def test_documents_of_other_versions_are_understood_by_their_status(document: Any) -> None:
    assert isinstance(error_of(answer(404, document)), BadRequest)
    assert isinstance(error_of(answer(418, document)), Unreachable)
    assert isinstance(error_of(httpx2.Response(409, text="<html>")), BadRequest)


def test_another_history_is_an_error_unless_the_viewer_can_forget() -> None:
    reset = httpx2.ServerSentEvent(event="reset", data="{}", id="f.0")
    one = follower()
    for given in (priming(), frame(1)):
        one.feed(given)
    one.feed(priming("f"))
    assert one.headers["Last-Event-ID"] == "e.1"  # until it has heard what that means
    with pytest.raises(HistoryChanged, match="since event 1"):
        one.feed(reset)

    forgotten = []
    one = follower(on_reset=lambda: forgotten.append(True))
    for given in (priming(), frame(1), priming("f"), reset):
        one.feed(given)
    assert forgotten == [True]
    assert one.headers["Last-Event-ID"] == "f.0"
    assert one.feed(frame(1, epoch="f")) is not None


@pytest.mark.parametrize(
    "given",
    [
        frame(1, epoch="other"),
        httpx2.ServerSentEvent(event="DebugTrace", data="{", id="e.1"),
        httpx2.ServerSentEvent(event="DebugTrace", data="[]", id="e.1"),
        httpx2.ServerSentEvent(event="DebugTrace", data='{"seq": 1}', id="e.1"),
        httpx2.ServerSentEvent(event="DebugTrace", data="{}", id="bogus"),
    ],
)
def test_what_cannot_be_is_asked_for_again(given: httpx2.ServerSentEvent) -> None:
    one = follower()
    one.feed(priming())
    with pytest.raises(Interrupted):
        one.feed(given)
    assert one.seq == 0


def test_nobody_waits_beyond_the_deadline() -> None:
    one = follower(timeout=0.5)
    with pytest.raises(WaitTimeout):
        one.failed(OSError())
    assert one.patience(40) <= 0.5
    assert follower().patience(40) == 40


def test_which_calls_are_tried_again() -> None:
    safe = Call(method="GET", path="/", read=id)
    once = Call(method="POST", path="/", read=id, repeatable=False)
    lost, unsent = httpx2.ReadError("x"), httpx2.ConnectError("x")
    assert pause_after(safe, 1, lost, BACKOFF) == 1
    assert pause_after(once, 1, lost, BACKOFF) is None
    assert pause_after(once, 2, unsent, BACKOFF) == 2
    assert pause_after(safe, 1, answer(503, Retry_After="2"), BACKOFF) == 3
    assert pause_after(once, 1, answer(503), BACKOFF) is None
    assert pause_after(safe, 1, answer(404), BACKOFF) is None
    assert [pause_after(safe, 5, outcome, BACKOFF) for outcome in (lost, answer(503))] == [None] * 2
