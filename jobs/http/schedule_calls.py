"""The calls of the API over schedules, each as an exchange: a generator of requests without I/O."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from beatless.http.wire import Call, Exchange, ask, json_of, path_of, record_of, run_of
from beatless.orchestrator.records import Run
from beatless.orchestrator.schedule import (
    Backfill,
    CatchUp,
    Overlap,
    Schedule,
    ScheduleState,
    StoredSchedule,
)

PAGE = 500
"""Schedules that one request asks for at most."""


def create_schedule(schedule: Schedule) -> Exchange[StoredSchedule]:
    """Store a schedule at run time: it fires from the next tick on.

    Not tried again when its answer is lost. Raises UnknownPlan, BadRequest, BadPayload, and
    ScheduleConflict if the name is used.

    >>> from beatless import Schedule
    >>> hourly = Schedule("sync-ada", "checkout", cron="0 * * * *", input={"order": 1})
    >>> client.create_schedule(hourly).state.value
    'active'
    """
    path, body = path_of("schedules"), _members(schedule)
    return ask(Call(method="POST", path=path, body=body, read=_stored, repeatable=False))


def update_schedule(schedule: Schedule) -> Exchange[StoredSchedule]:
    """Store another definition under the name of a schedule that was made at run time.

    Raises ScheduleNotFound, UnknownPlan, BadRequest, BadPayload, and ScheduleConflict for one that
    an app declares.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-bob", "checkout", cron="0 * * * *"))
    >>> client.update_schedule(Schedule("sync-bob", "checkout", every=60)).every
    60
    """
    body = _members(schedule)
    path = path_of("schedules", body.pop("name"))
    return ask(Call(method="PATCH", path=path, body=body, read=_stored))


def delete_schedule(name: str) -> Exchange[None]:
    """Take a schedule away; its runs stay.

    Raises ScheduleNotFound, and ScheduleConflict for one that an app declares.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-cleo", "checkout", cron="0 * * * *"))
    >>> client.delete_schedule("sync-cleo")
    """
    path = path_of("schedules", name)
    return ask(Call(method="DELETE", path=path, read=_nothing, repeatable=False))


def schedules(*, after: str = "", limit: int = 100) -> Exchange[list[StoredSchedule]]:
    """The schedules by name; `after` is the last name of the page before.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-dan", "checkout", cron="0 * * * *"))
    >>> [each.name for each in client.schedules() if each.name == "sync-dan"]
    ['sync-dan']
    """
    found: list[StoredSchedule] = []
    while len(found) < limit:
        query = {"after": after, "limit": min(limit - len(found), PAGE)}
        answer = yield from ask(
            Call(method="GET", path=path_of("schedules"), query=query, read=_as_it_is)
        )
        found += map(_stored, answer["schedules"])
        if answer["next"] is None:
            break
        after = answer["next"]
    return found


def schedule(name: str) -> Exchange[StoredSchedule]:
    """One schedule as it is stored now. Raises ScheduleNotFound.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-eve", "checkout", cron="0 0 1 1 *"))
    >>> client.schedule("sync-eve").next_tick.month
    1
    """
    return ask(Call(method="GET", path=path_of("schedules", name), read=_stored))


def pause_schedule(name: str) -> Exchange[StoredSchedule]:
    """Fire no tick until it is resumed; ticks of that time are passed over.

    Raises ScheduleNotFound.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-fay", "checkout", cron="0 * * * *"))
    >>> client.pause_schedule("sync-fay").state.value
    'paused'
    """
    return ask(Call(method="POST", path=path_of("schedules", name, "pause"), read=_stored))


def resume_schedule(name: str) -> Exchange[StoredSchedule]:
    """Fire from the next tick on, after a pause or after a tick that could not be written.

    Raises ScheduleNotFound, and ScheduleConflict for one that its app declares no more.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-gus", "checkout", cron="0 * * * *"))
    >>> paused = client.pause_schedule("sync-gus")
    >>> client.resume_schedule("sync-gus").state.value
    'active'
    """
    return ask(Call(method="POST", path=path_of("schedules", name, "resume"), read=_stored))


def run_schedule_now(name: str) -> Exchange[Run]:
    """Start a run of a schedule out of turn, also of one that is paused: its `tick` is now.

    Not tried again when its answer is lost: there could be two. Raises ScheduleNotFound, and
    UnknownPlan if the app lacks the plan.

    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-hal", "checkout", cron="0 * * * *"))
    >>> client.run_schedule_now("sync-hal").schedule
    'sync-hal'
    """
    path = path_of("schedules", name, "run-now")
    return ask(Call(method="POST", path=path, read=run_of, repeatable=False))


def backfill_schedule(name: str, start: datetime, end: datetime) -> Exchange[Backfill]:
    """Start a run for each tick from `start` on and before `end` that has none.

    Not tried again when its answer is lost. Raises ScheduleNotFound, UnknownPlan, and BadRequest
    for times without a zone or in the future, and for more than 10,000 ticks.

    >>> from datetime import UTC, datetime
    >>> from beatless import Schedule
    >>> made = client.create_schedule(Schedule("sync-ivy", "checkout", cron="0 2 * * *"))
    >>> first, last = datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 5, 4, tzinfo=UTC)
    >>> client.backfill_schedule("sync-ivy", first, last).runs
    3
    """
    path, body = (
        path_of("schedules", name, "backfill"),
        {"from": json_of(start), "to": json_of(end)},
    )
    return ask(Call(method="POST", path=path, body=body, read=_backfill, repeatable=False))


def cancel_backfill(backfill_id: str, *, reason: str | None = None) -> Exchange[int]:
    """Cancel the runs of a backfill that have not ended; how many.

    >>> client.cancel_backfill("0192d3a4-none-such")
    0
    """
    body = {} if reason is None else {"reason": reason}
    path = path_of("backfills", backfill_id, "cancel")
    return ask(Call(method="POST", path=path, body=body, read=_cancelled, repeatable=False))


def _members(schedule: Schedule) -> dict[str, Any]:
    return {name: json_of(value) for name, value in asdict(schedule).items()}


def _stored(members: Mapping[str, Any]) -> StoredSchedule:
    return record_of(
        StoredSchedule,
        {
            **members,
            "state": ScheduleState(members["state"]),
            "catch_up": CatchUp(members["catch_up"]),
            "overlap": Overlap(members["overlap"]),
        },
    )


def _backfill(members: Any) -> Backfill:
    return Backfill(id=members["id"], runs=members["runs"])


def _cancelled(members: Any) -> int:
    return int(members["cancelled"])


def _as_it_is(found: Any) -> Any:
    return found


def _nothing(_found: Any) -> None:
    return None
