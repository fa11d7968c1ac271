"""Facts in the bytes of published events, which are not parsed."""

from collections.abc import Mapping

import pytest

from beatless.observe import published

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def start(plan: str, queue: str, run_id: str = "r-1", more: str = "") -> bytes:
    return (
        f'{{"run_id":"{run_id}","seq":1,"ts":1700000000123,"type":"RunStarted","v":1,'
        f'"source":"api","data":{{"plan": "{plan}", "queue": "{queue}"{more}}}}}'
    ).encode()


def finished(source: str, seq: int = 7) -> bytes:
    return (
        f'{{"run_id":"r-1","seq":{seq},"ts":1700000000999,"type":"RunFinished","v":1,'
        f'"source":"{source}","data":{{"plan": "two_steps", "outcome": "cancelled"}}}}'
    ).encode()


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ([], {}),
        ([start("a", "q")] * 3, {("a", "q"): 3}),
        ([start("a", "q"), start("a", "r"), finished("worker")], {("a", "q"): 1, ("a", "r"): 1}),
        ([start("naïve", "größe")], {("naïve", "größe"): 1}),
    ],
)
def test_starts_are_counted_by_plan_and_queue(
    batch: list[bytes], found: Mapping[tuple[str, str], int]
) -> None:
    assert published.starts(b"\n".join(batch)) == found


def test_data_of_users_that_looks_like_a_start_is_none() -> None:
    """As Postgres stores it: with a space after each colon, and quotes escaped."""
    forged = ', "input": {"type": "RunStarted", "v": 1, "text": "\\"type\\":\\"RunStarted\\""}'
    assert published.starts(start("a", "q", more=forged)) == {("a", "q"): 1}


def test_runs_that_no_worker_had_are_those_that_the_api_finished() -> None:
    batch = b"\n".join([finished("api"), finished("worker"), finished("api")])
    assert list(published.cancellations(batch)) == ["two_steps", "two_steps"]


def test_a_body_tells_its_times_and_its_place_in_the_run() -> None:
    body = b"\n".join([start("a", "q"), finished("worker")])
    assert published.written_at_ms(body) == 1_700_000_000_123
    assert published.last_seq(body) == 7
    assert published.begins_run(body, b"r-1")
    assert not published.begins_run(finished("worker", seq=12), b"r-1")
    assert published.ends_run(body)
    assert not published.ends_run(start("a", "q"))
    assert published.written_at_ms(b"") is published.last_seq(b"") is None


def test_a_start_carries_the_trace_it_belongs_to() -> None:
    traced = start("a", "q", more=f', "trace_context": {{"traceparent": "{TRACE}"}}')
    assert published.traceparent(traced) == TRACE
    assert published.traceparent(start("a", "q")) is None
