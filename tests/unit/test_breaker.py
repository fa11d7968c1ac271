"""What a relay says of a publisher that cannot be reached."""

import pytest

from beatless.outbox import breaker as breakers
from beatless.outbox.backoff import BACKOFF_CAP_S, Backoff
from beatless.outbox.breaker import CircuitBreaker
from beatless.outbox.errors import PublishFailed
from beatless.outbox.observer import ignore


def test_a_publisher_that_stays_away_has_one_traceback_and_a_reason_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    breaker = CircuitBreaker("Redis", Backoff(initial=0.1, cap=2.0), ignore)
    for _ in range(3):
        breaker.record_failure(PublishFailed("Redis", "no route to host"))
    breaker.record_success()
    breaker.record_failure(PublishFailed("Redis", "no route to host"))

    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False, True]
    for record in caplog.records:
        assert record.__dict__["reason"] == "Redis cannot be reached: no route to host"


def test_a_publisher_is_tried_every_two_seconds_however_long_it_was_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(breakers, "monotonic", lambda: now)
    breaker = CircuitBreaker("Redis", Backoff(cap=BACKOFF_CAP_S), ignore)
    tries = 0
    while now < 28:
        tries += 1
        breaker.record_failure(PublishFailed("Redis", "away"))
        assert 0 < breaker.retry_in_s <= 2.0
        now += breaker.retry_in_s
        assert breaker.allows_call
    assert tries >= 14


def test_a_door_is_tried_at_once_when_another_shows_that_its_server_may_be_back() -> None:
    breaker = CircuitBreaker("Redis", Backoff(cap=BACKOFF_CAP_S), ignore)
    for _ in range(60):
        breaker.record_failure(PublishFailed("Redis", "away"))
    assert not breaker.allows_call
    breaker.allow_now()
    assert breaker.allows_call
    assert breaker.retry_in_s == 0


def test_the_end_of_a_series_of_failures_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    breaker = CircuitBreaker("Redis", Backoff(), ignore)
    breaker.record_success()
    breaker.record_failure(PublishFailed("Redis", "away"))
    breaker.record_failure(PublishFailed("Redis", "away"))

    assert (breaker.record_success(), breaker.record_success()) == (True, False)
    assert [record.message for record in caplog.records] == [
        "publish failed, will retry",
        "publish failed, will retry",
        "publishes again",
    ]
    told = [vars(record) for record in caplog.records]
    assert [line["publisher"] for line in told] == ["Redis"] * 3
    assert told[-1]["failures"] == 2
