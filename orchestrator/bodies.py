"""The bodies of steps of one run that are executed at the same time, in threads or greenlets."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from typing import Protocol

from beatless.orchestrator.branch_execution import MOST_IN_FLIGHT
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.requests import BodyEnded, RunBody, Stopped
from beatless.orchestrator.watchdog import Attempt
from beatless.outbox.threads import submitted

CallBody = Callable[[RunBody], BodyEnded]
"""Calls a body; the end of its attempt. Raises LeaseLost."""


class Beside(Protocol):
    """Has bodies of one run called beside one another: of the thread that has the run."""

    def begin(self, lease: Lease, body: RunBody, call: CallBody) -> Future[BodyEnded]:
        """Have a body called soon, in a copy of the context of this thread."""

    def wait(self, ended: Future[None], timeout_s: float | None) -> None:
        """Return when the future is done, or after so many seconds."""

    def close(self) -> None:
        """No further one is begun."""


class ThreadsBeside:
    """Bodies in threads, where the thread of the run has nothing else to do."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MOST_IN_FLIGHT, thread_name_prefix="beatless-body")

    def begin(self, lease: Lease, body: RunBody, call: CallBody) -> Future[BodyEnded]:
        del lease  # no other run is in this process
        return submitted(self._threads, copy_context().run, call, body)

    def wait(self, ended: Future[None], timeout_s: float | None) -> None:
        wait([ended], timeout_s)

    def close(self) -> None:
        self._threads.shutdown(wait=False)


class Bodies:
    """The bodies of one run that were begun, and have not ended as far as its thread knows."""

    def __init__(
        self, lease: Lease, beside: Callable[[], Beside], leaving: Callable[[], bool]
    ) -> None:
        """`leaving` returns true if an exception is there to end this process."""
        self._lease = lease
        self._make_beside = beside
        self._leaving = leaving
        self._beside: Beside | None = None
        self.used = False
        """Whether one was begun."""
        self.running: dict[str, Future[BodyEnded]] = {}
        """By the occurrences of their steps."""
        self._attempts: dict[str, Attempt] = {}
        self._ended: deque[Future[BodyEnded]] = deque()
        self._bell: Future[None] | None = None
        """Done when there is one more in `_ended`, while it is waited for."""
        self._mutex = threading.Lock()

    def begin(self, body: RunBody, call: CallBody) -> None:
        """Have a body called."""
        if self._beside is None:
            self._beside, self.used = self._make_beside(), True
        future = self._beside.begin(self._lease, body, call)
        self.running[body.occurrence] = future
        future.add_done_callback(self._note)

    def note_attempt(self, occurrence: str, attempt: Attempt) -> None:
        """The body of this step is called with this attempt."""
        self._attempts[occurrence] = attempt

    def forget_attempt(self, occurrence: str) -> None:
        """It has returned: what the attempt refers to refers to this, and goes with it."""
        self._attempts.pop(occurrence, None)

    def end(self, occurrence: str) -> None:
        """Cancel the task of a body, if it is one."""
        attempt = self._attempts.get(occurrence)
        if attempt is not None and attempt.task is not None:
            attempt.task.cancel()

    def await_one(self, timeout_s: float | None) -> BodyEnded | None:
        """The next one that ends, or None after so many seconds. Raises LeaseLost."""
        try:
            self._wait(timeout_s)
        except BaseException as error:
            if isinstance(error, Exception) or not self._leaving():
                raise
            return BodyEnded(occurrence="", outcome=Stopped(error))
        if not self._ended:
            return None
        future = self._ended.popleft()
        name = next(name for name, each in self.running.items() if each is future)
        del self.running[name]
        return future.result()

    def close(self) -> None:
        """Cancel those that are tasks, and return when all have ended: the run leaves."""
        for name in list(self.running):
            self.end(name)
        while self.running:
            self._wait(None)
            while self._ended:
                future = self._ended.popleft()
                self.running = {
                    name: each for name, each in self.running.items() if each is not future
                }
        if self._beside is not None:
            self._beside.close()

    def _wait(self, timeout_s: float | None) -> None:
        with self._mutex:
            if self._ended or self._beside is None:
                return
            bell = self._bell = Future()
        self._beside.wait(bell, timeout_s)

    def _note(self, future: Future[BodyEnded]) -> None:
        """One has ended; in whichever thread."""
        with self._mutex:
            self._ended.append(future)
            if self._bell is not None and not self._bell.done():
                self._bell.set_result(None)
