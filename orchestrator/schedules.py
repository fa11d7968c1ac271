"""Stores, changes and lists schedules. Each function takes a connection and never commits."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from beatless.orchestrator.errors import BadPayload, ScheduleConflict, ScheduleNotFound
from beatless.orchestrator.limit import limits_of
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun
from beatless.orchestrator.schedule import Schedule, ScheduleState, StoredSchedule
from beatless.orchestrator.ticks import Ticks, jitter_s
from beatless.outbox.queries import Caller, Read, array, execute, int_array
from beatless.outbox.statements import statements

logger = logging.getLogger("beatless.schedules")

PAGE = 100
"""Schedules whose limits are computed at once: each has an input."""

PAUSED_BEFORE = "a person had paused it"
"""The reason of one that is declared no more: declared again, it is paused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSchedule:
    """A checked schedule, and a run as it will start them."""

    schedule: Schedule
    namespace: str
    app: str
    declared: bool
    run: NewRun

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the statements that store it."""
        schedule = self.schedule
        return {
            "namespace": self.namespace,
            "name": schedule.name,
            "app": self.app,
            "declared": self.declared,
            "run": self.run.to_json(),
            "cron": schedule.cron,
            "every": schedule.every,
            "tz": schedule.tz,
            "catch_up": schedule.catch_up.value,
            "overlap": schedule.overlap.value,
            "jitter": schedule.jitter,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedSchedules:
    """The names of the schedules that a deploy has changed."""

    created: Sequence[str]
    changed: Sequence[str]
    undeclared: Sequence[str]
    """Paused: the app declares them no more."""
    stopped: Sequence[str]
    """Of plans that the app has no more, or with a limit that has no key for their input."""


def check_understood(stored: StoredSchedule) -> None:
    """Raises ScheduleConflict if its ticks cannot be computed here."""
    if not stored.understood:
        raise ScheduleConflict(
            stored.name,
            "has ticks that this version or machine cannot compute: take the version that stored "
            f"it, or a machine with its time zone {stored.tz}",
        )


class Schedules:
    """The statements of one schema over schedules."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema, page=PAGE)

    def create(self, connection: Caller, new: NewSchedule) -> StoredSchedule:
        """Store a schedule; its first tick is the next one. Raises ScheduleConflict."""
        first = self._next(connection, new.schedule.name, new.schedule.ticks, new.schedule.jitter)
        rows = execute(connection, self._sql["create"], new.parameters | first)
        if not rows:
            raise ScheduleConflict(new.schedule.name, "is used: update or delete that schedule")
        return StoredSchedule.from_row(rows[0][:-1])

    def update(self, connection: Caller, new: NewSchedule) -> StoredSchedule:
        """Store another definition. Raises ScheduleNotFound and ScheduleConflict."""
        stored, _ = self._lock(connection, new)
        if stored.declared and stored.state is not ScheduleState.UNDECLARED:
            raise ScheduleConflict(
                stored.name, f"is declared by the app {stored.app}: change it there, and migrate"
            )
        return self._change(connection, stored, new)

    def delete(self, connection: Caller, namespace: str, name: str) -> None:
        """Take a schedule away; its runs stay. Raises ScheduleNotFound and ScheduleConflict."""
        stored = self.get(connection, namespace, name)
        if stored.declared and stored.state is not ScheduleState.UNDECLARED:
            raise ScheduleConflict(
                name, f"is declared by the app {stored.app}: remove it there, and migrate"
            )
        execute(connection, self._sql["delete"], {"namespace": namespace, "name": name})

    def get(self, connection: Caller, namespace: str, name: str) -> StoredSchedule:
        """Raises ScheduleNotFound."""
        rows = execute(connection, self._sql["get"], {"namespace": namespace, "name": name})
        if not rows:
            raise ScheduleNotFound(name)
        return StoredSchedule.from_row(rows[0])

    def page(
        self,
        connection: Caller,
        namespace: str,
        *,
        after: str,
        limit: int,
        read: Read = execute,
    ) -> Iterator[StoredSchedule]:
        """By name, from the one after. With `execute_lazily` few are in memory at once."""
        parameters = {"namespace": namespace, "after": after, "limit": limit}
        rows = read(connection, self._sql["page"], parameters)
        return (StoredSchedule.from_row(row) for row in rows)

    def pause(self, connection: Caller, namespace: str, name: str) -> StoredSchedule:
        """Fire no tick until it is resumed, also if its app declares it again.

        Raises ScheduleNotFound.
        """
        if self.get(connection, namespace, name).state is ScheduleState.UNDECLARED:
            return self._set_state(
                connection, namespace, name, ScheduleState.UNDECLARED, reason=PAUSED_BEFORE
            )
        return self._set_state(connection, namespace, name, ScheduleState.PAUSED)

    def resume(self, connection: Caller, namespace: str, name: str) -> StoredSchedule:
        """Fire from the next tick on; an active one stays as it is.

        Raises ScheduleNotFound, and ScheduleConflict for one that is declared no more, or whose
        ticks cannot be computed here.
        """
        stored = self.get(connection, namespace, name)
        if stored.state is ScheduleState.UNDECLARED:
            raise ScheduleConflict(
                name,
                f"is declared no more by the app {stored.app}: declare it and migrate, or "
                "delete it",
            )
        if stored.state is ScheduleState.ACTIVE:
            return stored
        check_understood(stored)
        following = self._next(connection, name, stored.ticks, stored.jitter)
        return self._set_state(connection, namespace, name, ScheduleState.ACTIVE, following)

    def now(
        self, connection: Caller, namespace: str, name: str
    ) -> tuple[int, dict[str, Any], str, datetime]:
        """Its id, the members of its runs, their input as text, and the time.

        Raises ScheduleNotFound.
        """
        parameters = {"namespace": namespace, "name": name}
        rows = execute(connection, self._sql["run_now"], parameters)
        if not rows:
            raise ScheduleNotFound(name)
        id, members, input, now = rows[0]
        return id, json.loads(members), input, now

    def apply(
        self,
        connection: Caller,
        declared: Sequence[NewSchedule],
        *,
        namespace: str,
        app: str,
        plans: Mapping[str, Plan],
        id_prefix: Callable[[str], str],
    ) -> AppliedSchedules:
        """Make the stored schedules of an app those that it declares.

        A name that another app, or a call at run time, has taken raises ScheduleConflict. One that
        is declared no more is paused, and told from those that a person paused. Runs of those that
        were made at run time get the versions, queues and limits of the plans as they are now; one
        whose plan is gone, or has a limit without a key for its input, is stopped. `id_prefix`
        gives the prefix of the ids of a namespace.
        """
        execute(connection, self._sql["alone"], {})
        created, changed = [], []
        for new in declared:
            name = new.schedule.name
            try:
                stored, same_run = self._lock(connection, new)
            except ScheduleNotFound:
                self.create(connection, new)
                created.append(name)
                continue
            if stored.app != app or not stored.declared:
                owner = f"the app {stored.app}" if stored.app != app else "a call at run time"
                raise ScheduleConflict(name, f"belongs to {owner}: choose another name")
            if not same_run or not stored.defines(new.schedule):
                stored = self._change(connection, stored, new)
                changed.append(name)
            if stored.state is ScheduleState.UNDECLARED:
                if stored.reason == PAUSED_BEFORE:
                    self._set_state(connection, namespace, name, ScheduleState.PAUSED)
                else:
                    following = self._next(connection, name, stored.ticks, stored.jitter)
                    self._set_state(connection, namespace, name, ScheduleState.ACTIVE, following)
                changed += [name] if name not in changed else []
        names = {new.schedule.name for new in declared}
        undeclared, stopped = [], []
        parameters = {"namespace": namespace, "app": app, "plans": list(plans)}
        for row in execute(connection, self._sql["of_app"], parameters):
            stored = StoredSchedule.from_row(row)
            if stored.declared:
                if stored.name not in names and stored.state is not ScheduleState.UNDECLARED:
                    paused = stored.state is ScheduleState.PAUSED
                    self._set_state(
                        connection,
                        namespace,
                        stored.name,
                        ScheduleState.UNDECLARED,
                        reason=PAUSED_BEFORE if paused else None,
                    )
                    undeclared.append(stored.name)
            elif stored.state is ScheduleState.ACTIVE:
                reason = f"the app {app} has no plan {stored.plan}"
                self._set_state(
                    connection, stored.namespace, stored.name, ScheduleState.STOPPED, reason=reason
                )
                stopped.append(stored.name)
        execute(
            connection,
            self._sql["refresh"],
            {
                "app": app,
                "plans": list(plans),
                "versions": [plan.version for plan in plans.values()],
                "queues": [plan.queue for plan in plans.values()],
            },
        )
        stopped += self._refresh_limits(connection, app, plans, id_prefix)
        return AppliedSchedules(
            created=created, changed=changed, undeclared=undeclared, stopped=stopped
        )

    def _refresh_limits(
        self,
        connection: Caller,
        app: str,
        plans: Mapping[str, Plan],
        id_prefix: Callable[[str], str],
    ) -> list[str]:
        """Compute the limits of schedules that were made at run time; the names of the stopped."""
        stopped = []
        limited = [name for name, plan in plans.items() if plan.limits]
        parameters: dict[str, Any] = {
            "app": app,
            "plans": list(plans),
            "limited": limited,
            "after_id": 0,
        }
        while rows := execute(connection, self._sql["of_limited_plans"], parameters):
            changed = []
            for id, namespace, name, state, plan, input, noted, digest in rows:
                try:
                    found = limits_of(
                        plans[plan].limits, json.loads(input), prefix=id_prefix(namespace)
                    )
                except BadPayload as error:
                    logger.error(
                        "a limit has no key for the input of a schedule, whose runs keep the "
                        "limits they had: it is stopped, others go on",
                        extra={
                            "action": "schedule_stopped",
                            "schedule": name,
                            "namespace": namespace,
                            "reason": str(error),
                        },
                    )
                    if state == ScheduleState.ACTIVE.value:
                        self._set_state(
                            connection,
                            namespace,
                            name,
                            ScheduleState.STOPPED,
                            reason=str(error)[:1000].replace("\0", ""),
                        )
                        stopped.append(name)
                    continue
                limits = [each.to_dict() for each in found]
                if limits != json.loads(noted or "[]"):
                    changed.append((id, digest, json.dumps(limits)))
            if changed:
                ids, digests, texts = zip(*changed, strict=True)
                execute(
                    connection,
                    self._sql["note_limits"],
                    {"ids": int_array(ids), "digests": array(digests), "limits": array(texts)},
                )
            parameters["after_id"] = rows[-1][0]
        return stopped

    def declared(
        self, connection: Caller, *, namespace: str, app: str, plans: Mapping[str, Plan]
    ) -> list[StoredSchedule]:
        """The stored schedules that an app declares or has declared, and those of lost plans."""
        parameters = {"namespace": namespace, "app": app, "plans": list(plans)}
        rows = execute(connection, self._sql["of_app"], parameters)
        return [StoredSchedule.from_row(row) for row in rows]

    def _lock(self, connection: Caller, new: NewSchedule) -> tuple[StoredSchedule, bool]:
        rows = execute(connection, self._sql["lock"], new.parameters)
        if not rows:
            raise ScheduleNotFound(new.schedule.name)
        *row, same_run = rows[0]
        return StoredSchedule.from_row(row), same_run

    def _change(
        self, connection: Caller, stored: StoredSchedule, new: NewSchedule
    ) -> StoredSchedule:
        schedule = new.schedule
        moves = (stored.ticks, stored.jitter) != (schedule.ticks, schedule.jitter)
        following: dict[str, Any] = {"tick": None, "due_at": None}
        if moves:
            following = self._next(connection, schedule.name, schedule.ticks, schedule.jitter)
        parameters = new.parameters | following | {"moves": moves}
        return StoredSchedule.from_row(execute(connection, self._sql["change"], parameters)[0][:-1])

    def _set_state(
        self,
        connection: Caller,
        namespace: str,
        name: str,
        state: ScheduleState,
        following: Mapping[str, Any] | None = None,
        *,
        reason: str | None = None,
    ) -> StoredSchedule:
        """With `following`, the tick that it goes on with."""
        rows = execute(
            connection,
            self._sql["set_state"],
            {
                "namespace": namespace,
                "name": name,
                "state": state.value,
                "reason": reason,
                **(following or {"tick": None, "due_at": None}),
            },
        )
        if not rows:
            raise ScheduleNotFound(name)
        return StoredSchedule.from_row(rows[0][:-1])

    def _next(
        self, connection: Caller, name: str, ticks: Ticks, jitter: float
    ) -> dict[str, datetime | None]:
        """The next tick by the clock of Postgres, and when it is due."""
        ((now,),) = execute(connection, self._sql["clock"], {})
        tick = ticks.after(now.astimezone(UTC))
        if tick is None:
            return {"tick": None, "due_at": None}
        return {"tick": tick, "due_at": tick + timedelta(seconds=jitter_s(name, tick, jitter))}
