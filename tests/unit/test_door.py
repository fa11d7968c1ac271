"""What a relay says of a publisher that cannot be reached."""

import pytest

from beatless.outbox.backoff import Backoff
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
