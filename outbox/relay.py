"""Moves committed messages to their publishers. Knows shards and publishers, nothing of runs."""

import logging
import os
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any

import psycopg

from beatless.outbox.backoff import BACKOFF_RESET_S
from beatless.outbox.chores import Chores
from beatless.outbox.clock import monotonic
from beatless.outbox.config import RelayConfig
from beatless.outbox.doorbell import Sessions
from beatless.outbox.drain import Drain
from beatless.outbox.errors import DirectConnectionRequired, SchemaMissing
from beatless.outbox.observer import RelayFailed, RelayStarted, RelayStopped
from beatless.outbox.queries import ALL_SHARDS
from beatless.outbox.session_loop import SessionLoop
from beatless.outbox.sessions import prepare_to_drain
from beatless.outbox.sockets import Alarm, readable
from beatless.outbox.threads import LastingThread

logger = logging.getLogger(__name__)

PREPARED_AT_ONCE = 0
"""The `prepare_threshold` of a session that is proven to be the relay's own.

Behind a pooler a first statement that is prepared would fail by its name, and prove nothing."""


class Relay:
    """Moves committed messages to their publishers, on any number of machines at once.

    1. lead a share of the shards, by session locks
    2. drain until nothing is left
    3. fall asleep by the doorbell protocol, until a commit rings or a dispatch is due
    4. on any error: close everything, back off, start over with a drain
    """

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._alarm = Alarm()
        self._stopping = threading.Event()
        self._thread: LastingThread | None = None
        self._chores = Chores(
            config.chores,
            queries=config.queries,
            connect=config.connect,
            observer=config.observer,
            after=config.chores_after,
        )
        self._once_lock = threading.Lock()
        self._once: tuple[psycopg.Connection[Any], Drain] | None = None
        self._pid = os.getpid()

    def start(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Run in a thread of this process. `on_error` hears of every failure it recovers from.

        Raises RuntimeError when it was started before, or made before a fork.
        """
        self._refuse_in_child()
        if self._thread is not None:
            raise RuntimeError("this relay was started before: make a new one")
        self._thread = LastingThread(
            "relay", lambda _: self.run(on_error), observer=self._config.observer
        )
        self._thread.start()

    def run(self, on_error: Callable[[Exception], None] | None = None) -> None:
        """Work until `stop()`. Raises SchemaMissing or DirectConnectionRequired at the start.

        Raises RuntimeError when the relay was made before a fork.
        """
        self._refuse_in_child()
        observer = self._config.observer
        failures, proven, began = 0, False, monotonic()
        while not self._stopping.is_set():
            try:
                began = monotonic()
                with Sessions(
                    self._config.queries, self._config.connect, self._pass_on
                ) as sessions:
                    sessions.prove_listening()
                    sessions.work.prepare_threshold = PREPARED_AT_ONCE
                    proven = True
                    self._chores.start()
                    for companion in self._config.companions:
                        companion.start()
                    observer(RelayStarted())
                    loop = SessionLoop(
                        self._config, sessions, alarm=self._alarm, stopping=self._stopping
                    )
                    try:
                        loop.run()
                    finally:
                        loop.close()
            except Exception as error:
                # Any error: a relay that ends would leave its shards without a leader.
                if not proven and isinstance(error, (DirectConnectionRequired, SchemaMissing)):
                    raise
                failures = 1 if monotonic() - began > BACKOFF_RESET_S else failures + 1
                delay = self._config.backoff.delay(failures)
                logger.warning(
                    "relay lost its sessions, will reconnect",
                    extra={"action": "relay_restart", "retry_in": delay, "reason": str(error)},
                )
                observer(RelayFailed(error=str(error)))
                if on_error is not None:
                    on_error(error)
                self._rest(delay)
        self._stop_others()
        observer(RelayStopped())

    def drain_once(self, run_id: str | None = None, now: datetime | None = None) -> int:
        """Publish everything that is due, of one run or of all, and return how many messages.

        Needs no running relay and ignores leadership: a double publication is harmless. `now` is
        the time by which a dispatch must be due (default: the server's clock). Raises RuntimeError
        when the relay was made before a fork.
        """
        self._refuse_in_child()
        with self._once_lock:
            if self._once is None:
                connection = self._config.connect()
                try:
                    prepare_to_drain(connection)
                except BaseException:
                    connection.close()
                    raise
                connection.prepare_threshold = PREPARED_AT_ONCE
                drain = Drain(connection, self._config, on_result=self._alarm.ring)
                self._once = (connection, drain)
            drain = self._once[1]
            total = 0
            try:
                drain.overdue.end(ALL_SHARDS, now)
                while run_id is None and drain.schedules.fire(now):
                    pass
                while (
                    (moved := drain.step(ALL_SHARDS, run_id=run_id, now=now))
                    or drain.tasks.await_result()
                    or drain.crowded
                ):
                    total += moved
                drain.finish(ALL_SHARDS, now)
            except BaseException:
                self._forget_once()
                raise
            return total

    def ask_to_stop(self) -> None:
        """Let `run` return after its current step. Safe in a signal handler."""
        self._stopping.set()
        self._alarm.ring()

    def stop(self) -> None:
        """Finish the current step, release the shards and return. May be called more than once.

        In a process that was forked since the relay was made, it does nothing.
        """
        if self._pid != os.getpid():
            return
        self.ask_to_stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.end()
        self._stop_others()
        with self._once_lock:
            self._forget_once()
        self._alarm.close()

    def _pass_on(self, message: str) -> None:
        for companion in self._config.companions:
            companion.heard(message)

    def _stop_others(self) -> None:
        self._chores.stop()
        for companion in self._config.companions:
            companion.stop()

    def _refuse_in_child(self) -> None:
        """Its sessions, its publishers' connections and its threads are the parent's."""
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this relay was made in process {self._pid} before it forked: make another in "
                "this process, with app.relay()"
            )

    def _forget_once(self) -> None:
        if self._once is not None:
            connection, drain = self._once
            self._once = None
            drain.close()
            connection.close()

    def _rest(self, seconds: float) -> None:
        """Wait until then, or until the relay is asked to stop; nothing else ends it."""
        until = monotonic() + seconds
        while (left := until - monotonic()) > 0:
            # A stop is set before its ring; a publisher rings for news of its own.
            self._alarm.quiet()
            if self._stopping.is_set():
                return
            readable([self._alarm], left)
