"""The calls of the test kit that let time pass, and fire the ticks of schedules on the way."""

from typing import Any

from beatless.app import App
from beatless.orchestrator.schedule import StoredSchedule
from beatless.orchestrator.schedules import AppliedSchedules
from beatless.testing.stored_time import check_seconds, move_into_past, next_tick_in_s
from beatless.testing.waits import WaitCalls
from beatless.transactions import transact


class TimeCalls(WaitCalls):
    """Moves the stored times of one app."""

    def __init__(self, app: App, **options: Any) -> None:
        super().__init__(app, **options)
        self._advanced_s = 0.0

    def apply_schedules(self) -> AppliedSchedules:
        """Store the schedules that the app declares, as `beatless migrate` does.

        A test whose schedules are to fire calls it; in all others none does.

        >>> beatless.apply_schedules().created
        []
        """
        return self.client.apply_schedules(self.app.schedules)

    def apply_plans(self) -> list[str]:
        """Register the plans for starts from SQL, as `beatless migrate` does.

        A test that starts runs by `SELECT beatless.start_run(…)` calls it first.

        >>> beatless.apply_plans()
        []
        """
        return self.client.apply_plans()

    @property
    def schedules(self) -> dict[str, StoredSchedule]:
        """The schedules of the test by name, as they are stored now.

        >>> from beatless import Schedule
        >>> made = beatless.client.create_schedule(Schedule("hourly", "checkout", every=3600))
        >>> beatless.advance(3600)
        >>> beatless.schedules["hourly"].last_run_id is not None
        True
        """
        return {stored.name: stored for stored in self.client.schedules(limit=1_000_000)}

    def advance(self, seconds: float, *, ticks: bool = True) -> None:
        """Let time pass without waiting: every stored time moves so far into the past.

        Leases, delays, retries, sleeps, time-outs, redispatches, retention and the ages of runs and
        tokens then are as they would be, in every process. The clocks of processes do not move, nor
        times that they count with them: the `timeout` of a step that is running, a relay's pause
        after a failure. Ticks of schedules are fired on the way, each at its time, and a run that
        one starts is due then; the names of ticks (`run.tick`) are those of the calendar. With
        `ticks=False` no relay lives meanwhile, and ticks are missed. Real time goes on between the
        calls: three times 60 seconds fire three ticks of a schedule of a minute, or four. Raises
        ValueError unless it is 0 seconds to a thousand years.

        >>> run = beatless.start_run("checkout", {"order": 1}, delay=3600)
        >>> beatless.work_until_idle()
        0
        >>> beatless.advance(3600)
        >>> beatless.work_until_idle()
        1
        """
        check_seconds(seconds)
        left = seconds
        while ticks and (wait := self._next_tick_in_s()) is not None and wait <= left:
            self._move(max(0.0, wait))
            left -= max(0.0, wait)
            with self.app.direct_connection() as connection:
                if not self.app.firing().fire(connection, None):
                    break  # a transaction of the test holds it
        self._move(left)
        self._advanced_s += seconds

    def _move(self, seconds: float) -> None:
        schema, channel = self.app.settings.schema, self.app.queries.channel
        transact(
            self.app.engine,
            lambda connection: move_into_past(connection, schema, channel, seconds),
            twice=False,
        )

    def _next_tick_in_s(self) -> float | None:
        with self.app.engine.connect() as connection:
            return next_tick_in_s(connection, self.app.settings.schema)
