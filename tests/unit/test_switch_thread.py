"""Many calls in one thread: each goes on by itself."""

import threading
from concurrent.futures import Future

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


def test_a_wait_that_has_ended_early_keeps_nothing_until_its_time() -> None:
    thread = SwitchThread(lambda: None)
    thread.start()
    kept: list[int] = []

    def call() -> None:
        done: Future[None] = Future()
        thread.soon(lambda: done.set_result(None))
        thread.wait_for(done, 86_400.0)
        kept.append(len(thread._pauses))

    thread.spawn(call)
    thread.stop()
    assert kept == [0]
