"""The declaration of a schedule, and its state as it is stored."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Self
from zoneinfo import ZoneInfo

from beatless.orchestrator.open_enum import OpenEnum
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.ticks import (
    Ticks,
    problem_with_cron,
    problem_with_every,
    problem_with_zone,
)
from beatless.outbox.times import is_number

SCHEDULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,127}")

MAX_JITTER_S = 86_400
"""Seconds by which a tick can be put off at random, at most."""


class CatchUp(OpenEnum):
    """The ticks that are fired later of those that were missed by more than a minute."""

    ONE = "one"
    ALL = "all"
    NONE = "none"


class Overlap(OpenEnum):
    """The treatment of a tick while a run of the same schedule has not ended."""

    ALLOW = "allow"
    SKIP = "skip"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True, init=False)
class Schedule:
    """Starts a run of a plan at each tick of a cron expression, or every so many seconds.

    `plan` is a Plan or its name. `cron` has the five fields of cron(8), in the time zone `tz`
    (a name of the IANA database); `every` is seconds or a timedelta, whole seconds, counted from
    the epoch. `catch_up` says which ticks are fired later that nobody fired in time, by more than
    a minute: the last of them ("one"), "all", or "none". `overlap` says what is done with a tick
    while a run of the schedule has not ended: start another ("allow"), "skip" the tick, or
    "replace": cancel the run, and start when it has ended. `jitter` puts each tick off by up to
    so many seconds, always the same for one tick. `queue`, `priority`, `tags`, `deadline` and
    `group` are those of the runs.

    Raises PlanError for what cannot work.

    >>> from beatless import Plan, Schedule, step
    >>> @step
    ... def report(ctx): ...
    >>> nightly = Schedule("nightly", Plan("report", [report]), cron="0 2 * * *", tz="Europe/Paris")
    >>> nightly.plan, nightly.catch_up.value
    ('report', 'one')
    """

    name: str
    plan: str
    input: Any
    cron: str | None
    every: int | None
    tz: str
    catch_up: CatchUp
    overlap: Overlap
    jitter: float
    queue: str | None
    priority: int
    tags: Mapping[str, str] | None
    deadline: float | None
    group: str | None

    def __init__(
        self,
        name: str,
        plan: Plan | str,
        *,
        cron: str | None = None,
        every: float | timedelta | None = None,
        tz: str = "UTC",
        input: Any = None,
        catch_up: str = "one",
        overlap: str = "allow",
        jitter: float | timedelta = 0,
        queue: str | None = None,
        priority: int = 0,
        tags: Mapping[str, str] | None = None,
        deadline: float | timedelta | None = None,
        group: str | None = None,
    ) -> None:
        every_s, jitter_s, deadline_s = _seconds(every), _seconds(jitter), _seconds(deadline)
        if not isinstance(name, str) or not SCHEDULE_NAME.fullmatch(name):
            raise PlanError(
                f"name is {name!r:.200}, which does not match ^{SCHEDULE_NAME.pattern}$"
            )
        if (cron is None) == (every is None):
            raise PlanError(f"schedule {name}: give either cron= or every=")
        checks = (
            ("cron", problem_with_cron(cron) if cron is not None else ""),
            ("every", problem_with_every(every_s) if every is not None else ""),
            ("tz", problem_with_zone(tz)),
            ("catch_up", _problem_with_choice(catch_up, CatchUp)),
            ("overlap", _problem_with_choice(overlap, Overlap)),
            ("jitter", problem_with_jitter(jitter_s, every_s)),
        )
        for member, problem in checks:
            if problem:
                raise PlanError(f"schedule {name}: {member} {problem}")
        members: dict[str, Any] = {
            "name": name,
            "plan": plan.name if isinstance(plan, Plan) else plan,
            "input": input,
            "cron": " ".join(cron.split()) if cron is not None else None,
            "every": int(every_s) if every_s is not None else None,
            "tz": tz,
            "catch_up": CatchUp(catch_up),
            "overlap": Overlap(overlap),
            "jitter": float(jitter_s or 0),
            "queue": queue,
            "priority": priority,
            "tags": tags,
            "deadline": deadline_s,
            "group": group,
        }
        for member, value in members.items():
            object.__setattr__(self, member, value)

    @property
    def ticks(self) -> Ticks:
        """Its ticks."""
        return Ticks(cron=self.cron, every_s=self.every, tz=self.tz)


class ScheduleState(OpenEnum):
    """Whether a schedule fires, and if not, why not."""

    ACTIVE = "active"
    PAUSED = "paused"
    """By a person."""
    UNDECLARED = "undeclared"
    """Its app declares it no more."""
    STOPPED = "stopped"
    """A tick could not be written: `reason` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSchedule:
    """A schedule as it is stored now.

    >>> from beatless import Schedule
    >>> stored = app.client.create_schedule(Schedule("nightly", "checkout", cron="0 2 * * *"))
    >>> stored.state.value, stored.next_tick.hour, stored.last_run_id
    ('active', 2, None)
    """

    name: str
    namespace: str
    app: str
    """The name of the app that it belongs to."""
    declared: bool
    """In `App(schedules=…)`; False if it was made at run time."""
    plan: str
    input: Any
    cron: str | None
    every: int | None
    """Seconds."""
    tz: str
    catch_up: CatchUp
    overlap: Overlap
    jitter: float
    """Seconds."""
    queue: str | None
    """Of its runs; None: their plan's."""
    priority: int
    tags: dict[str, str] | None
    deadline: float | None
    """Seconds from the start of a run."""
    group: str | None
    """Of its runs."""
    state: ScheduleState
    reason: str | None
    """Why it is stopped."""
    next_tick: datetime | None
    """The tick that is fired next; None if it is not active, or none comes."""
    last_tick: datetime | None
    last_run_id: str | None
    last_fired_at: datetime | None
    last_late_s: float | None
    """Seconds from the time at which the last tick was due to its start."""
    failures: int
    """Ticks that could not be written."""
    created_at: datetime

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        """From the columns that every statement over schedules reads."""
        names = tuple(field.name for field in fields(cls))
        members = dict(zip(names, row, strict=True))
        return cls(
            **members
            | {
                "catch_up": CatchUp(members["catch_up"]),
                "overlap": Overlap(members["overlap"]),
                "state": ScheduleState(members["state"]),
            }
        )

    @property
    def ticks(self) -> Ticks:
        """Its ticks."""
        return Ticks(cron=self.cron, every_s=self.every, tz=self.tz)

    @property
    def understood(self) -> bool:
        """Whether its ticks can be computed here.

        Not those of a newer version's rule, nor those in a zone that this machine lacks.
        """
        return (
            (self.cron is None) != (self.every is None)
            and (self.cron is None or not problem_with_cron(self.cron))
            and (self.every is None or not problem_with_every(self.every))
            and not problem_with_zone(self.tz)
        )

    def defines(self, schedule: Schedule) -> bool:
        """Whether it has the ticks and rules of this declaration; its runs are not compared."""
        return (
            self.ticks == schedule.ticks
            and self.catch_up is schedule.catch_up
            and self.overlap is schedule.overlap
            and self.jitter == schedule.jitter
        )

    def local(self, tick: datetime) -> datetime:
        """A tick in the time zone of the schedule; in UTC if this machine lacks that."""
        return tick.astimezone(UTC if problem_with_zone(self.tz) else ZoneInfo(self.tz))

    def next_ticks(self, count: int = 5) -> list[datetime]:
        """The ticks that come next, the first of them `next_tick`.

        That alone if it is not `understood`.
        """
        found: list[datetime] = []
        tick, understood = self.next_tick, self.understood
        while tick is not None and len(found) < count:
            found.append(tick)
            tick = self.ticks.after(tick) if understood else None
        return found

    def to_dict(self) -> dict[str, Any]:
        """The schedule as a JSON object, with `next_ticks`; times are ISO 8601."""
        members = {each.name: getattr(self, each.name) for each in fields(self)}
        shown = {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name, value in members.items()
        }
        return shown | {"next_ticks": [tick.isoformat() for tick in self.next_ticks()]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfill:
    """Runs that were started for ticks of the past."""

    id: str
    """The value of their tag `backfill`, by which they are found and cancelled."""
    runs: int


def check_schedules(schedules: Sequence[Schedule], plans: Mapping[str, Plan]) -> None:
    """Raises PlanError for two of one name, and for one whose plan is not among these."""
    seen: set[str] = set()
    for schedule in schedules:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedules are a list of Schedule(…): {schedule!r:.200} is none")
        if schedule.name in seen:
            raise PlanError(f"two schedules are called {schedule.name}")
        if schedule.plan not in plans:
            raise PlanError(
                f"schedule {schedule.name} starts runs of plan {schedule.plan}, which the App does "
                "not have: add it to plans=[…]"
            )
        seen.add(schedule.name)


def _seconds(given: float | timedelta | None) -> float | None:
    return given.total_seconds() if isinstance(given, timedelta) else given


def _problem_with_choice(given: object, choices: type[StrEnum]) -> str:
    names = [str(choice) for choice in choices]
    return "" if given in names else f"is {given!r:.200}; choose {', '.join(names)}"


def problem_with_jitter(given: Any, every_s: float | None) -> str:
    if not (is_number(given) and 0 <= given <= MAX_JITTER_S):
        return f"is {given!r:.200}, which is not 0 to {MAX_JITTER_S} seconds"
    if every_s is not None and is_number(every_s) and given > every_s:
        # One that is overtaken is late by no relay's fault, and would count as missed.
        return f"is {given} seconds, more than every={every_s:g}: ticks would overtake each other"
    return ""
