"""Waits of a test for processes: each has a deadline, and its error describes the run."""

from pathlib import Path

from beatless.app import App
from beatless.client.streams import check_cursor
from beatless.errors import WaitTimeout
from beatless.local.child import Launch, spawn
from beatless.orchestrator.events import Event
from beatless.orchestrator.records import Run
from beatless.outbox.clock import monotonic
from beatless.streams.streams import Streams
from beatless.streams.subscription import Subscription
from beatless.testing.base import BaseKit
from beatless.testing.broker_guard import Guard

JOURNAL_CHECK_S = 0.5
"""Without news for so long, a wait reads the journal: no relay announces anything."""


class WaitCalls(BaseKit):
    """Calls that return when processes have done something."""

    def __init__(
        self, app: App, *, directory: Path, guard: Guard | None, launch: Launch = spawn
    ) -> None:
        super().__init__(app, directory=directory, guard=guard, launch=launch)
        self._streams = Streams(
            journal=app.journal,
            engine=app.engine.execution_options(isolation_level="AUTOCOMMIT"),
            redis_client=app.redis,
            aredis_client=app.aredis,
            prefix=app.settings.prefix,
            head_check=JOURNAL_CHECK_S,
            without_redis=JOURNAL_CHECK_S,
            observer=app.metrics.streams,
        )

    def wait_for_run_completion(self, run_id: str, timeout: float = 60.0) -> Run:
        """Wait until the run has ended. Raises AssertionError with a description of the run.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_run_completion(run.run_id).result
        {'parcel': 'p_1'}
        """
        run = self._client(run_id).get_run(run_id)
        self._follow(run, run.last_seq, timeout)
        return self._client(run_id).get_run(run_id)

    def wait_for_event(
        self,
        run_id: str,
        type: str | None = None,
        *,
        step: str | None = None,
        seq: int | None = None,
        timeout: float = 60.0,
    ) -> Event:
        """Wait until the run has an event of this type, of this step, with this seq; the first one.

        Raises AssertionError if none came, as soon as the run has ended without.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_event(run.run_id, "StepFinished", step="charge").data["result"]
        {'charge': 'ch_1'}
        """
        wanted = {"type": type, "step": step, "seq": seq}
        run = self._client(run_id).get_run(run_id)
        reason = "has ended"
        try:
            for event in self._streams.follow(run, run.pruned_seq, timeout=timeout):
                facts = {"type": event.type, "step": event.step, "seq": event.seq}
                if all(value in (None, facts[name]) for name, value in wanted.items()):
                    return event
        except WaitTimeout:
            reason = f"still runs after {timeout:g} s"
        asked = " ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        raise AssertionError(
            f"run {run_id} {reason}, without an event {asked}\n{self.describe(run_id)}"
        )

    def wait_for_outbox_flush(
        self, run_id: str, seq: int | None = None, timeout: float = 60.0
    ) -> None:
        """Wait until the run's events (up to `seq`) have been published and forgotten.

        An event that is still to come is waited for. Raises RunNotFound, and AssertionError, as
        soon as the run has ended without event `seq`.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_outbox_flush(run.run_id)
        """
        deadline = monotonic() + timeout
        stored_id = self._client(run_id).get_run(run_id).run_id
        subscription = Subscription(self.app.redis, self._streams.channel(stored_id))
        try:
            subscription.ensure()
            while not self._flushed(run_id, seq):
                if monotonic() >= deadline:
                    raise AssertionError(
                        f"the outbox still has events of run {run_id} after {timeout:g} s\n"
                        f"{self.describe(run_id)}"
                    )
                # A publication is announced here; that it is forgotten, soon after, is nowhere.
                subscription.next(0.02)
        finally:
            subscription.close()

    def _flushed(self, run_id: str, seq: int | None) -> bool:
        run = self._client(run_id).get_run(run_id)
        first = min((row[0] for row in self._outbox(run.run_id)), default=None)
        if seq is None:
            return first is None
        if run.state.final and run.last_seq < seq:
            raise AssertionError(
                f"run {run_id} has ended with event {run.last_seq}: there is no event {seq}"
            )
        return run.last_seq >= seq and (first is None or first > seq)

    def collect_stream(self, run_id: str, from_seq: int = 0, timeout: float = 60.0) -> list[Event]:
        """All events of the stream from there to RunFinished.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> [event.seq for event in beatless.collect_stream(run.run_id, from_seq=6)]
        [7, 8]
        """
        run = self._client(run_id).get_run(run_id)
        check_cursor(run, from_seq)
        return self._follow(run, from_seq, timeout)

    def _follow(self, run: Run, after: int, timeout: float) -> list[Event]:
        try:
            return list(self._streams.follow(run, after, timeout=timeout))
        except WaitTimeout as error:
            raise AssertionError(f"{error}\n{self.describe(run.run_id)}") from error
