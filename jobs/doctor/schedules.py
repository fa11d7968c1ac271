"""The check of schedules: what is declared against what is stored, and whether ticks are fired."""

from collections.abc import Iterator

from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, counted, ok, problem, warn
from beatless.doctor.probe import Need, Probe
from beatless.orchestrator.schedule import Schedule, ScheduleState, StoredSchedule

MAX_LATE_S = 60.0
"""Seconds after which a tick that nobody has fired is reported."""

MAX_NAMES = 5
"""Reported at once."""


@check("schedules", needs={Need.SCHEMA})
def schedules(probe: Probe) -> Iterator[Verdict]:
    """Schedules that are stopped or late, and those that are stored otherwise than declared."""
    sql = probe.sql(__file__, names=MAX_NAMES)
    stopped = probe.rows(sql["stopped"])
    if stopped:
        names = "; ".join(f"{name}: {reason}" for name, reason in stopped)
        yield problem(
            f"schedules are stopped, as a tick could not be written: {names}",
            "mend the cause, then `beatless schedules resume NAME`",
        )
    late_s, name = next(iter(probe.rows(sql["latest"])), (0.0, ""))
    if late_s > MAX_LATE_S:
        yield problem(
            f"schedule {name} has been due for {late_s:.0f} s, and no relay fires it",
            "start a relay of the newest version in use, for older ones leave alone what they do "
            "not know; or end the transaction that holds the schedule",
        )
    stored = {each.name: each for each in probe.app.client.declared_schedules() if each.declared}
    declared = {each.name: each for each in probe.app.schedules}
    differ = [
        name
        for name, each in sorted(declared.items())
        if name not in stored or not is_stored(each, stored[name])
    ]
    differ += [
        name
        for name, each in sorted(stored.items())
        if name not in declared and each.state is ScheduleState.ACTIVE
    ]
    if differ:
        yield warn(
            f"schedules are stored otherwise than the app {probe.app.name} declares them: "
            + ", ".join(differ[:MAX_NAMES]),
            "run `beatless migrate` with this code; or this code is not what is deployed",
        )
    if not stopped and late_s <= MAX_LATE_S and not differ:
        yield ok(f"{counted(len(declared), 'schedule')} of this app, none is late")


def is_stored(schedule: Schedule, stored: StoredSchedule) -> bool:
    """Whether a schedule is stored as it is declared."""
    return (
        stored.state is not ScheduleState.UNDECLARED
        and stored.defines(schedule)
        and stored.plan == schedule.plan
        and schedule.input in (None, stored.input)
        and stored.queue == schedule.queue
        and stored.priority == schedule.priority
        and dict(stored.tags or {}) == dict(schedule.tags or {})
        and stored.deadline == schedule.deadline
    )
