"""Many calls in one thread: each goes on by itself."""

import threading

from beatless.orchestrator.switch_thread import SwitchThread
from beatless.outbox.observer import Signal


def test_a_call_that_fails_stops_no_other() -> None:
    signals: list[Signal] = []
    thread = SwitchThread(lambda: None, observer=signals.append)
    thread.start()
    called = threading.Event()
    thread.spawn([].pop)
    thread.spawn(called.set)

    assert called.wait(60)
    thread.stop()
    assert (signals, thread.calls) == ([], 0)
