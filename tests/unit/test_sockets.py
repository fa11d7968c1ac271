"""Waiting for sockets: beyond 1,024 descriptors, and with a time that is over."""

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from beatless.outbox.sockets import Alarm, readable


def test_a_socket_above_descriptor_1024_is_waited_for() -> None:
    with ExitStack() as files:
        while files.enter_context(Path(os.devnull).open("rb")).fileno() < 1100:
            pass
        alarm = Alarm()
        files.callback(alarm.close)
        assert alarm.fileno() > 1024
        assert readable([alarm], 0) == []
        alarm.ring()
        assert readable([alarm], 60) == [alarm]


@pytest.mark.parametrize("seconds", [-1.0, float("-inf"), 0.0])
def test_a_time_that_is_over_is_no_time(seconds: float) -> None:
    alarm = Alarm()
    assert readable([alarm], seconds) == []
    alarm.ring()
    assert readable([alarm], seconds) == [alarm]
    assert readable([alarm], float("inf")) == [alarm]
    alarm.close()
