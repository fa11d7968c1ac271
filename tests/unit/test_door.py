"""What a relay says of a publisher that cannot be reached."""

import pytest

from beatless.outbox import relay as relays
from beatless.outbox.backoff import BACKOFF_CAP_S, Backoff
from beatless.outbox.errors import PublishFailed
from beatless.outbox.relay import Door, ignore


def test_a_door_that_stays_shut_has_one_traceback_and_a_reason_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    door = Door("Redis", Backoff(initial=0.1, cap=2.0), ignore)
    for _ in range(3):
        door.failed(PublishFailed("Redis", "no route to host"))
    door.succeeded()
    door.failed(PublishFailed("Redis", "no route to host"))

    assert [bool(record.exc_info) for record in caplog.records] == [True, False, False, True]
    for record in caplog.records:
        assert record.__dict__["reason"] == "Redis cannot be reached: no route to host"


def test_a_door_is_tried_every_two_seconds_however_long_it_was_shut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(relays, "monotonic", lambda: now)
    door = Door("Redis", Backoff(cap=BACKOFF_CAP_S), ignore)
    tries = 0
    while now < 28:
        tries += 1
        door.failed(PublishFailed("Redis", "away"))
        assert 0 < door.opens_in <= 2.0
        now += door.opens_in
        assert door.open
    assert tries >= 14


def test_a_door_is_tried_at_once_when_another_shows_that_its_server_may_be_back() -> None:
    door = Door("Redis", Backoff(cap=BACKOFF_CAP_S), ignore)
    for _ in range(60):
        door.failed(PublishFailed("Redis", "away"))
    assert not door.open
    door.try_now()
    assert door.open
    assert door.opens_in == 0
