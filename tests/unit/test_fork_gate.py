"""A fork while another thread connects: the child inherits no lock of libpq and OpenSSL."""

import os
import threading
from collections.abc import Iterator

import pytest

from beatless.outbox import forks


def status_of_child() -> int:
    """0 if the child can go where no other thread may fork."""
    pid = os.fork()
    if pid == 0:
        free = forks._gate.lock.acquire(timeout=60)
        os._exit(0 if free and left.is_set() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


left = threading.Event()


@pytest.fixture
def inside(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another thread is where no fork may happen, for so many seconds."""
    left.clear()
    entered, told = threading.Event(), threading.Event()

    def stay() -> None:
        with forks.without_forks():
            entered.set()
            told.wait(request.param)
            left.set()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    yield
    told.set()
    thread.join()


@pytest.mark.parametrize("inside", [0.2], indirect=True)
@pytest.mark.usefixtures("inside")
def test_a_fork_waits_until_the_other_thread_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "FORK_PATIENCE_S", 60.0)
    assert status_of_child() == 0


@pytest.mark.parametrize("inside", [30.0], indirect=True)
@pytest.mark.usefixtures("inside")
def test_a_fork_does_not_wait_for_ever_and_its_child_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forks, "FORK_PATIENCE_S", 0.05)
    assert status_of_child() == 1  # before the other thread was done, and not locked: see below
    pid = os.fork()
    if pid == 0:
        os._exit(0 if forks._gate.lock.acquire(timeout=60) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
