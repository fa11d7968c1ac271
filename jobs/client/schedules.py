"""Calls over schedules: each starts a run at every tick of a cron expression or an interval."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from beatless.client.base import BaseClient
from beatless.client.pages import SchedulePage, schedule_page_of
from beatless.client.requests import RunRequest, check_texts
from beatless.errors import BadRequest, UnknownPlan
from beatless.namespaces import id_prefix, stored_id
from beatless.orchestrator.limit import RunLimit
from beatless.orchestrator.plan import on_cancel_steps
from beatless.orchestrator.records import NewRun, Run, new_run_id
from beatless.orchestrator.schedule import Backfill, Schedule, StoredSchedule
from beatless.orchestrator.schedules import AppliedSchedules, NewSchedule, check_understood
from beatless.orchestrator.state import RunState
from beatless.orchestrator.ticks import tick_key
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller, execute_lazily
from beatless.outbox.times import problem_with_moment

MOST_BACKFILLED = 10_000
"""Runs that one call starts for ticks of the past."""

PAGE = 500
"""Runs that one statement of a backfill starts."""

BACKFILL_TAG = "backfill"
"""The tag of runs that a backfill has started: all of one are found, and cancelled, by it."""


class ScheduleCalls(BaseClient):
    """The schedules of a namespace."""

    def create_schedule(
        self, schedule: Schedule, *, connection: Caller | None = None
    ) -> StoredSchedule:
        """Store a schedule at run time, for example one for each customer.

        It fires from the next tick on, if and when the transaction commits; `connection` is as for
        `start_run`. Raises UnknownPlan, BadRequest, BadPayload, and ScheduleConflict if the name
        is used.

        >>> from beatless import Schedule
        >>> hourly = Schedule("sync-ada", "checkout", cron="0 * * * *", input={"order": 1})
        >>> client.create_schedule(hourly).state.value
        'active'
        """
        new = self._checked_schedule(schedule, declared=False)

        def store(caller: Caller) -> StoredSchedule:
            self._queue_limit.check(caller, self._namespace, {new.run.queue})
            return self._schedules.create(caller, new)

        return self._in_transaction(connection, store)

    async def acreate_schedule(
        self, schedule: Schedule, *, connection: AsyncCaller | None = None
    ) -> StoredSchedule:
        """`create_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.create_schedule(schedule, connection=given)
        )

    def update_schedule(
        self, schedule: Schedule, *, connection: Caller | None = None
    ) -> StoredSchedule:
        """Store another definition under the name of a schedule that was made at run time.

        With another `cron`, `every`, `tz` or `jitter` it fires from the next tick on that these
        give. One that does not fire stays so: resume it. Raises ScheduleNotFound, UnknownPlan,
        BadRequest, BadPayload, and ScheduleConflict for one that an app declares.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-bob", "checkout", cron="0 * * * *"))
        >>> client.update_schedule(Schedule("sync-bob", "checkout", every=60)).every
        60
        """
        new = self._checked_schedule(schedule, declared=False)

        def store(caller: Caller) -> StoredSchedule:
            self._queue_limit.check(caller, self._namespace, {new.run.queue})
            return self._schedules.update(caller, new)

        return self._in_transaction(connection, store)

    async def aupdate_schedule(
        self, schedule: Schedule, *, connection: AsyncCaller | None = None
    ) -> StoredSchedule:
        """`update_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.update_schedule(schedule, connection=given)
        )

    def delete_schedule(self, name: str, *, connection: Caller | None = None) -> None:
        """Take a schedule away; its runs stay.

        Raises ScheduleNotFound, and ScheduleConflict for one that an app declares.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-cleo", "checkout", cron="0 * * * *"))
        >>> client.delete_schedule("sync-cleo")
        """
        check_texts(name=name)
        self._in_transaction(
            connection, lambda caller: self._schedules.delete(caller, self._namespace, name)
        )

    async def adelete_schedule(self, name: str, *, connection: AsyncCaller | None = None) -> None:
        """`delete_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.delete_schedule(name, connection=given)
        )

    def schedules(
        self, *, after: str = "", limit: int = 100, connection: Caller | None = None
    ) -> list[StoredSchedule]:
        """The schedules by name; `after` is the last name of the page before.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-dan", "checkout", cron="0 * * * *"))
        >>> [each.name for each in client.schedules() if each.name == "sync-dan"]
        ['sync-dan']
        """
        check_texts(after=after)
        return self._in_transaction(
            connection,
            lambda caller: list(
                self._schedules.page(caller, self._namespace, after=after, limit=limit)
            ),
        )

    async def aschedules(
        self, *, after: str = "", limit: int = 100, connection: AsyncCaller | None = None
    ) -> list[StoredSchedule]:
        """`schedules` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.schedules(after=after, limit=limit, connection=given)
        )

    def page_of_schedules(self, *, after: str, limit: int, max_bytes: int) -> SchedulePage:
        """`schedules` for a server: ends after so many bytes and has few in memory at once."""
        check_texts(after=after)

        def read(caller: Caller) -> SchedulePage:
            found = self._schedules.page(
                caller, self._namespace, after=after, limit=limit, read=execute_lazily
            )
            return schedule_page_of(found, limit, max_bytes)

        return self._in_transaction(None, read)

    def schedule(self, name: str, *, connection: Caller | None = None) -> StoredSchedule:
        """One schedule as it is stored now. Raises ScheduleNotFound.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-eve", "checkout", cron="0 0 1 1 *"))
        >>> client.schedule("sync-eve").next_tick.month
        1
        """
        check_texts(name=name)
        return self._in_transaction(
            connection, lambda caller: self._schedules.get(caller, self._namespace, name)
        )

    async def aschedule(
        self, name: str, *, connection: AsyncCaller | None = None
    ) -> StoredSchedule:
        """`schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(connection, lambda given: self.schedule(name, connection=given))

    def pause_schedule(self, name: str, *, connection: Caller | None = None) -> StoredSchedule:
        """Fire no tick until it is resumed; ticks of that time are passed over.

        Raises ScheduleNotFound.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-fay", "checkout", cron="0 * * * *"))
        >>> client.pause_schedule("sync-fay").state.value
        'paused'
        """
        check_texts(name=name)
        return self._in_transaction(
            connection, lambda caller: self._schedules.pause(caller, self._namespace, name)
        )

    async def apause_schedule(
        self, name: str, *, connection: AsyncCaller | None = None
    ) -> StoredSchedule:
        """`pause_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.pause_schedule(name, connection=given)
        )

    def resume_schedule(self, name: str, *, connection: Caller | None = None) -> StoredSchedule:
        """Fire from the next tick on, after a pause or after a tick that could not be written.

        Raises ScheduleNotFound, and ScheduleConflict for one that its app declares no more.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-gus", "checkout", cron="0 * * * *"))
        >>> paused = client.pause_schedule("sync-gus")
        >>> client.resume_schedule("sync-gus").state.value
        'active'
        """
        check_texts(name=name)
        return self._in_transaction(
            connection, lambda caller: self._schedules.resume(caller, self._namespace, name)
        )

    async def aresume_schedule(
        self, name: str, *, connection: AsyncCaller | None = None
    ) -> StoredSchedule:
        """`resume_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.resume_schedule(name, connection=given)
        )

    def run_schedule_now(self, name: str, *, connection: Caller | None = None) -> Run:
        """Start a run of a schedule out of turn, also of one that is paused: its `tick` is now.

        Raises ScheduleNotFound, and UnknownPlan if this app lacks the plan.

        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-hal", "checkout", cron="0 * * * *"))
        >>> client.run_schedule_now("sync-hal").schedule
        'sync-hal'
        """
        check_texts(name=name)
        run_id = stored_id(self._namespace, new_run_id())  # a lost answer is no second run

        def start(caller: Caller) -> Run:
            id, members, input, now = self._schedules.now(caller, self._namespace, name)
            key = f"schedule/{name}/now/{run_id}"
            new = self._run_of(members, input, run_id=run_id, key=key)
            new = replace(new, schedule=name, schedule_id=id, tick=now)
            return self._journal.create_runs(caller, [new])[0]

        return self._in_transaction(connection, start)

    async def arun_schedule_now(self, name: str, *, connection: AsyncCaller | None = None) -> Run:
        """`run_schedule_now` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.run_schedule_now(name, connection=given)
        )

    def backfill_schedule(
        self, name: str, start: datetime, end: datetime, *, connection: Caller | None = None
    ) -> Backfill:
        """Start a run for each tick from `start` on and before `end` that has none.

        The runs have a tag `backfill` with the `id` of the result: `cancel_backfill` takes it. They
        count for no `overlap`. All are stored, or none. Raises ScheduleNotFound, UnknownPlan, and
        BadRequest for times without a zone or in the future, and for more than 10,000 ticks, and
        ScheduleConflict for a rule or time zone that is not known here.

        >>> from datetime import UTC, datetime
        >>> from beatless import Schedule
        >>> made = client.create_schedule(Schedule("sync-ivy", "checkout", cron="0 2 * * *"))
        >>> first, last = datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 5, 4, tzinfo=UTC)
        >>> client.backfill_schedule("sync-ivy", first, last).runs
        3
        """
        check_texts(name=name)
        for member, given in (("from", start), ("to", end)):
            if problem := problem_with_moment(given):
                raise BadRequest(member, problem)
        backfill_id = new_run_id()

        def fill(caller: Caller) -> Backfill:
            stored = self._schedules.get(caller, self._namespace, name)
            check_understood(stored)
            _, members, input, now = self._schedules.now(caller, self._namespace, name)
            if end > now:
                raise BadRequest("to", f"is {end.isoformat()}, which is in the future")
            new: list[NewRun] = []
            for tick in stored.ticks.between(start.astimezone(UTC), end.astimezone(UTC)):
                if len(new) == MOST_BACKFILLED:
                    raise BadRequest(
                        "to", f"would make more than {MOST_BACKFILLED} runs: do it in parts"
                    )
                run = self._run_of(
                    members,
                    input,
                    run_id=stored_id(self._namespace, new_run_id()),
                    key=tick_key(name, tick),
                )
                tags = {**(run.tags or {}), BACKFILL_TAG: backfill_id}
                new.append(replace(run, schedule=name, tick=tick, tags=tags))
            started = 0
            for at in range(0, len(new), PAGE):
                started += self._journal.create_missing_runs(caller, new[at : at + PAGE])
            return Backfill(id=backfill_id, runs=started)

        return self._in_transaction(connection, fill)

    async def abackfill_schedule(
        self, name: str, start: datetime, end: datetime, *, connection: AsyncCaller | None = None
    ) -> Backfill:
        """`backfill_schedule` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.backfill_schedule(name, start, end, connection=given)
        )

    def cancel_backfill(
        self, backfill_id: str, *, reason: str | None = None, connection: Caller | None = None
    ) -> int:
        """Cancel the runs of a backfill that have not ended; how many.

        >>> client.cancel_backfill("0192d3a4-none-such")
        0
        """
        check_texts(backfill_id=backfill_id, reason=reason)
        undo = on_cancel_steps(self._plans.values())

        def cancel(caller: Caller) -> int:
            run_ids = [
                run.run_id
                for state in (RunState.QUEUED, RunState.WAITING, RunState.RUNNING)
                for run in self._journal.list_runs(
                    caller,
                    namespace=self._namespace,
                    state=state,
                    tags={BACKFILL_TAG: backfill_id},
                    limit=MOST_BACKFILLED,
                )
            ]
            cancelled = self._cancels.cancel(
                caller, run_ids, reason=reason, undo=undo, source="api", namespace=self._namespace
            )
            return len(cancelled)

        return self._in_transaction(connection, cancel)

    async def acancel_backfill(
        self, backfill_id: str, *, reason: str | None = None, connection: AsyncCaller | None = None
    ) -> int:
        """`cancel_backfill` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection,
            lambda given: self.cancel_backfill(backfill_id, reason=reason, connection=given),
        )

    def apply_schedules(self, schedules: Sequence[Schedule]) -> AppliedSchedules:
        """Make the stored schedules of this app those that it declares: a part of the deploy.

        Those that it declares no more are paused. Raises ScheduleConflict for a name of others,
        UnknownPlan, BadRequest and BadPayload; then none is changed.

        >>> from beatless import Schedule
        >>> client.apply_schedules([Schedule("yearly", "checkout", cron="0 0 1 1 *")]).created
        ['yearly']
        """
        new = [self._checked_schedule(schedule, declared=True) for schedule in schedules]
        return self._in_transaction(
            None,
            lambda caller: self._schedules.apply(
                caller,
                new,
                namespace=self._namespace,
                app=self._app_name,
                plans=self._plans,
                id_prefix=id_prefix,
            ),
        )

    def declared_schedules(self) -> list[StoredSchedule]:
        """The stored schedules that this app declares or has declared, and those of lost plans.

        >>> from beatless import Schedule
        >>> applied = client.apply_schedules([Schedule("weekly", "checkout", cron="0 0 * * 1")])
        >>> [each.name for each in client.declared_schedules() if each.state.value == "active"]
        ['weekly']
        """
        return self._in_transaction(
            None,
            lambda caller: self._schedules.declared(
                caller, namespace=self._namespace, app=self._app_name, plans=self._plans
            ),
        )

    def _checked_schedule(self, schedule: Schedule, *, declared: bool) -> NewSchedule:
        request = RunRequest(
            plan=schedule.plan,
            input=schedule.input,
            queue=schedule.queue,
            priority=schedule.priority,
            tags=schedule.tags,
            deadline=schedule.deadline,
            group=schedule.group,
        )
        return NewSchedule(
            schedule=schedule,
            namespace=self._namespace,
            app=self._app_name,
            declared=declared,
            run=self._checked(request),
        )

    def _run_of(self, members: Mapping[str, Any], input: str, *, run_id: str, key: str) -> NewRun:
        """A run of a schedule. Raises UnknownPlan if this app lacks its plan."""
        if members["plan"] not in self._plans:
            raise UnknownPlan(members["plan"], list(self._plans))
        return NewRun(
            run_id=run_id,
            namespace=self._namespace,
            plan=members["plan"],
            plan_version=members["plan_version"],
            queue=members["queue"],
            input=input,
            key=key,
            not_before=None,
            delay=None,
            deadline=members["deadline"],
            default_queue=members["default_queue"],
            default_input=members["default_input"],
            limits=[RunLimit(**each) for each in members.get("limits") or ()],
            priority=members["priority"],
            tags=members["tags"],
            group=members.get("group"),
        )
