"""The timeline of a run for operators: its journal and rows as sentences."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from beatless.orchestrator.child_calls import RIVALS, ChildrenWait
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.long_history import MANY_EVENTS, MAX_EVENTS, length
from beatless.orchestrator.open_waits import WaitOutcome
from beatless.orchestrator.progress import (
    BESIDE_OTHERS,
    CHANGED_CALL,
    CONNECTION_LOST,
    FINAL,
    FOLLOWING,
    GIVEN_BACK,
    ON_CANCEL,
    PROCESS_DIED,
    RAN_OUT,
    RETRY_IN,
    SNOOZED,
    TAKEN_OVER,
    UNKNOWN_STEP,
)
from beatless.orchestrator.records import DispatchStatus, GroupPlace, Run, runs_before
from beatless.orchestrator.state import SUCCEEDS, WAITS
from beatless.outbox.message import shard_of
from beatless.outbox.times import MOST_S

HANDOVER_S = 0.01
"""Seconds between two steps above which another worker has taken the run over."""

NO_OUTCOME = "no outcome: its process or lease died"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One line of the timeline."""

    at: int
    """Milliseconds since 1970, by the clock of Postgres."""
    kind: str
    """accepted, wait, attempt, signal, cancel, undo, finished, pruned, history, lease, dispatch,
    relay, publish, dead letter, or difference."""
    text: str
    step: str | None = None
    attempt: int | None = None
    seconds: float | None = None
    """How long it took."""

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Wait:
    """A time in which no worker had the run."""

    since: int
    due: int | None
    """The time at which a worker could have taken it; None if the journal does not have it."""
    reason: str = ""
    """Why not before."""
    then: str = "for a worker to take it"
    """The reason for the wait from then on."""

    def moments(self, ended: int) -> Iterator[Moment]:
        """The reason for which the run waited until an attempt began."""
        due = ended if self.due is None else min(max(self.since, self.due), ended)
        for begin, end, text in (
            (self.since, due, self.reason),
            (due, ended, self.then),
        ):
            if (passed := (end - begin) / 1000) >= HANDOVER_S:
                yield Moment(at=begin, kind="wait", text=f"waited {text}", seconds=passed)


def timeline(
    run: Run,
    events: Sequence[Event],
    status: DispatchStatus,
    children: ChildrenWait | None = None,
    consumers: int | None = None,
) -> list[Moment]:
    """Attempts, waits, leases, dispatches and publishes of a run, in order; then where it stands.

    An attempt without an outcome is one whose process died or lost its lease. `children` are those
    of `waits_for_children`, `consumers` the workers of its queue, if it was sent to the broker.
    """
    waits = open_waits(events)
    wait = " and for ".join(map(named_waits, waits)) or "nothing that is known here"
    if children is not None:
        wait = f"its children: {children.occurrence}, {children}"
    # An attempt is known at its end, and stands at its beginning. None is before the start.
    history = sorted(_history(run, events), key=lambda each: (each.kind != "accepted", each.at))
    until = "when it is received" if children is None else "when they have ended"
    return [
        *_pruned(run),
        *history,
        *_length(run, status, events),
        *_now(run, status, stands_at(events), wait, until, consumers),
    ]


def _pruned(run: Run) -> Iterator[Moment]:
    if run.pruned_seq:
        text = f"events 1 to {run.pruned_seq} were removed after the retention time"
        yield Moment(at=_ms(run.created_at), kind="pruned", text=text)


def _length(run: Run, status: DispatchStatus, events: Sequence[Event]) -> Iterator[Moment]:
    if (many := length(events)) >= MANY_EVENTS and not run.state.final:
        text = f"the history has {many:,} events; with {MAX_EVENTS:,} the run fails"
        yield Moment(at=_ms(status.now), kind="history", text=f"{text}: see run.again")


def _history(run: Run, events: Sequence[Event]) -> Iterator[Moment]:
    attempts: dict[str | None, Event] = {}
    """Those that are open, by their steps: several, of a run with branches."""
    begun: dict[str | None, Event] = {}
    """The waits that are open."""
    waits: Wait | None = None
    for event in events:
        data = event.data or {}
        outcome = ""
        match event.type:
            case EventType.RUN_STARTED:
                text = f"accepted, plan {data.get('plan')} {data.get('version')}, "
                text += f"queue {data.get('queue')}"
                if "retry_of" in data:
                    text += f", a retry of {data['retry_of']}"
                if data.get("reused", {}).get("next"):
                    text += f" from step {data['reused']['next']}"
                for name, value in run.chosen_options().items():
                    text += f", {name} {json.dumps(value, ensure_ascii=False)}"
                yield Moment(at=event.ts, kind="accepted", text=text)
                due = max(event.ts, data.get("not_before") or event.ts)
                waits = Wait(event.ts, due, "for its time")
            case EventType.INPUT_REPLACED:
                text = "another start with its dedupe key has replaced its input"
                yield Moment(at=event.ts, kind="input", text=text)
                waits = Wait(event.ts, max(event.ts, data.get("not_before") or 0), "for its time")
            case EventType.STEP_STARTED:
                beside = data.get("version", 0) >= BESIDE_OTHERS
                dead = [each for each in attempts if not beside or each == event.step]
                for step in dead:
                    yield _attempt(attempts.pop(step), event.ts, NO_OUTCOME)
                if not dead and waits is not None:
                    yield from waits.moments(event.ts)
                attempts[event.step], waits = event, None
            case EventType.STEP_FINISHED:
                outcome, waits = "finished", Wait(event.ts, event.ts, then="for another worker")
                if "next" in data:
                    outcome += f", on to {data['next'] or 'the end'}"
            case EventType.STEP_FAILED:
                error = data.get("error") or {}
                outcome = f"failed: {error.get('type')}: {error.get('message')}"
                due = None if data.get(FINAL) else data.get("retry_at")
                if RETRY_IN in data:
                    due = event.ts + round(1000 * data[RETRY_IN])
                waits = Wait(event.ts, due or event.ts, "for the back-off of its next attempt")
            case EventType.DEBUG_TRACE if data.get("name") == SNOOZED:
                seconds = float(data.get("seconds") or 0.0)
                due = event.ts + round(seconds * 1000)
                outcome, waits = "snoozed", Wait(event.ts, due, f"a snooze of {seconds:g} s")
            case EventType.DEBUG_TRACE if data.get("name") == GIVEN_BACK:
                outcome = "given back: its worker stopped or was busy, another one makes it again"
                if data.get(RAN_OUT):
                    outcome = "no outcome: its lease ran out, which does not count as a failure"
                elif data.get(PROCESS_DIED):
                    outcome = "no outcome: its process died, and others ran beside it"
                waits = Wait(event.ts, event.ts, then="for another worker")
            case EventType.DEBUG_TRACE if data.get("name") == CONNECTION_LOST:
                outcome = "its transaction was taken back: the connection broke"
                if data.get("refused"):
                    outcome = "no connection was to be had for its transaction"
                waits = Wait(event.ts, None, "for a connection and a worker")
            case EventType.DEBUG_TRACE if data.get("name") == TAKEN_OVER:
                how = "its lease ran out" if data.get(RAN_OUT) else "its worker died"
                text = f"{how}; the plan's function was called again"
                yield Moment(at=event.ts, kind="attempt", text=text)
            case EventType.WAIT_STARTED:
                begun[event.step], waits = event, None
            case EventType.SIGNAL_RECEIVED:
                text = f"signal {data.get('name')} was received"
                if decision := data.get("decision"):
                    text = f"approval {data.get('name')} was decided by {decision.get('by')}"
                yield Moment(at=event.ts, kind="signal", text=text)
            case EventType.WAIT_FINISHED:
                yield _waited(begun.pop(event.step, event), event)
                waits = Wait(event.ts, event.ts, then="for another worker")
            case EventType.CHILDREN_STARTED:
                text = f"started {_children(data)}"
                yield Moment(at=event.ts, kind="children", text=text, step=event.step)
            case EventType.CHILDREN_FINISHED:
                text = f"the wait for {_children(data)} has ended"
                if won := data.get("won"):
                    text += f": child {won} came first, and the others were cancelled"
                elif error := data.get("error"):
                    text += f": {error.get('run_id')} failed: {error.get('type')}"
                elif failed := data.get("failed"):
                    text += f": {failed} of {data.get('count')} failed"
                yield Moment(at=event.ts, kind="children", text=text, step=event.step)
                waits = Wait(event.ts, event.ts, then="for another worker")
            case EventType.RUN_RESTARTED:
                text = f"begins again with another input: generation {data.get('generation')}"
                yield Moment(at=event.ts, kind="accepted", text=text)
                waits = Wait(event.ts, event.ts, then="for another worker")
            case EventType.UNDO_STARTED:
                error = data.get("error") or {}
                text = f"failed: {error.get('type')}: {error.get('message')}; its steps are undone"
                yield Moment(at=event.ts, kind="undo", text=text)
                waits = Wait(event.ts, event.ts, then="for a worker that undoes its steps")
            case EventType.CANCEL_REQUESTED:
                reason = data.get("reason")
                text = "a cancel was accepted" + (f": {reason}" if reason else "")
                yield Moment(at=event.ts, kind="cancel", text=text)
            case EventType.RUN_FINISHED:
                for started in attempts.values():
                    yield _attempt(started, event.ts, NO_OUTCOME)
                attempts.clear()
                passed = (event.ts - events[0].ts) / 1000
                text = str(data.get("outcome"))
                yield Moment(at=event.ts, kind="finished", text=text, seconds=passed)
        if outcome and event.step in attempts:
            yield _attempt(attempts.pop(event.step), event.ts, outcome)
            if attempts:
                waits = None  # others are in flight
    for started in attempts.values():
        yield Moment(
            at=started.ts,
            kind="attempt",
            text="runs, or its process has died",
            step=started.step,
            attempt=started.attempt,
        )


def _waited(started: Event, finished: Event) -> Moment:
    """A wait of the plan, from its beginning to its end."""
    outcome = str((finished.data or {}).get("outcome"))
    by = (finished.data or {}).get("by")
    text = {
        WaitOutcome.RECEIVED.value: f"waited for {named_waits(started)}, and received it"
        + (f" from {by}" if by else ""),
        WaitOutcome.TIMED_OUT.value: f"waited for {named_waits(started)} until its time-out",
        WaitOutcome.SLEPT.value: "slept",
    }.get(outcome, f"waited: {outcome}")
    return Moment(
        at=started.ts,
        kind="wait",
        text=text,
        step=finished.step,
        seconds=(finished.ts - started.ts) / 1000,
    )


def named_waits(started: Event) -> str:
    """What the wait of a WaitStarted waits for, as part of a sentence."""
    if started.type == EventType.CHILDREN_STARTED:
        return "its children"
    if title := (started.data or {}).get("title"):
        return f'the approval "{title}"'
    names = (started.data or {}).get("names") or []
    return f"signal {' or '.join(names)}" if names else "its time"


def _children(data: Mapping[str, Any]) -> str:
    """The children of an event, as part of a sentence."""
    count, first = data.get("count") or 0, data.get("first") or 0
    if rivals := data.get(RIVALS):
        return f"the first of children {', '.join(map(str, rivals))}"
    if count == 1:
        return f"child {first}, a run of plan {data.get('plan')}"
    numbers = f"children {first} to {first + count - 1}" if count else "no children"
    return f"{numbers}, {count} runs of plan {data.get('plan')}"


def open_waits(events: Sequence[Event]) -> list[Event]:
    """The beginnings of the waits at which a run is, by its events: several in branches."""
    found: dict[str | None, Event] = {}
    for event in events:
        match event.type:
            case EventType.WAIT_STARTED | EventType.CHILDREN_STARTED:
                found[event.step] = event
            case EventType.WAIT_FINISHED | EventType.CHILDREN_FINISHED:
                found.pop(event.step, None)
    return list(found.values())


def waits_for_children(events: Sequence[Event]) -> Event | None:
    """The last ChildrenStarted of a run that waits, and waits for no signal or time."""
    if any(event.type == EventType.WAIT_STARTED for event in open_waits(events)):
        return None
    started = [event for event in events if event.type == EventType.CHILDREN_STARTED]
    return started[-1] if started else None


def _attempt(started: Event, ended: int, text: str) -> Moment:
    return Moment(
        at=started.ts,
        kind="attempt",
        text=text,
        step=started.step,
        attempt=started.attempt,
        seconds=(ended - started.ts) / 1000,
    )


def stands_at(events: Sequence[Event]) -> str | None:
    """The step that an unfinished run is in, or goes on with; None if it has not begun.

    By the journal alone. After a step that another version of the plan would not know, that one.
    """
    place = None
    promised: str | None = None
    for event in events:
        data = event.data or {}
        match event.type:
            case EventType.RUN_STARTED:
                reused = data.get("reused")
                place = _name(reused.get("next")) if isinstance(reused, dict) else None
            case EventType.STEP_STARTED | EventType.WAIT_STARTED:
                place, promised = event.step, None
            case EventType.CHILDREN_STARTED:
                place = event.step
            case EventType.STEP_FINISHED | EventType.WAIT_FINISHED | EventType.CHILDREN_FINISHED:
                place = _name(data.get("next")) or _name(data.get(FOLLOWING)) or event.step
            case EventType.CANCEL_REQUESTED:
                promised = _name(data.get(ON_CANCEL))
    return promised or place


def _name(stored: object) -> str | None:
    """None for anything but a name, as only SQL can have written it."""
    return stored if isinstance(stored, str) else None


def _worker(name: str | None) -> str:
    """The name of a worker, with the process that it names: a person may have to end that."""
    found = re.fullmatch(r"(.+):([0-9]+):[^:]+", name or "")
    return f"{name}, which is process {found[2]} on {found[1]}" if found else str(name)


def _in_words(seconds: float) -> str:
    """A duration in the unit in which people think of it."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _before(run: Run, place: GroupPlace) -> str:
    """Which runs come before one that waits to be sent."""
    group = f"its group {run.group}, of the weight {place.weight}, has " if run.group else ""
    text = f"{group}{runs_before(place.before)} before it in the queue {run.queue}"
    if place.age_after is None:
        return text
    after = _in_words(place.age_after)
    if place.is_aged:
        return f"{text}; it waits for longer than {after}, and so comes before higher priorities"
    return f"{text}; after {after} it comes before higher priorities"


def _unclaimed(run: Run, consumers: int | None) -> str:
    """Why no worker has claimed a run that was sent, as far as the fleet has announced it."""
    text = "was sent to the broker, and no worker has claimed it yet: "
    if not consumers:
        return (
            f"{text}none tells that it consumes the queue {run.queue} (`beatless queues`): start "
            f"`beatless worker --queues {run.queue}`"
        )
    have = "the worker" if consumers == 1 else f"the {consumers:,} workers"
    return (
        f"{text}{have} of the queue {run.queue} had no process free, or took it without "
        f"knowing the plan {run.plan} (`beatless doctor --check workers`), or another fleet took "
        'it from the same broker (`--check "shared broker"`)'
    )


def _now(
    run: Run,
    status: DispatchStatus,
    place: str | None,
    wait: str,
    until: str,
    consumers: int | None,
) -> Iterator[Moment]:
    now = _ms(status.now)
    if run.attempt:
        often = "once" if run.attempt == 1 else f"{run.attempt} times, the last time"
        text = f"claimed {often} by {_worker(run.worker)}"
        if status.lease_expires_at is not None:
            left = (status.lease_expires_at - status.now).total_seconds()
            text += f"; the lease ends in {left:.1f} s" if left > 0 else "; the lease has run out"
        yield Moment(at=now, kind="lease", text=text)
    undone = [] if status.led else [*_left_undone(status)]
    if undone:
        text = f"no relay leads shard {shard_of(run.run_id)}, in which the run is: "
        text += f"{' and '.join(undone)} (`beatless doctor --check relays`)"
        yield Moment(at=now, kind="relay", text=text)
    if status.dispatch is not None:
        state, due_at, reason, attempts = status.dispatch
        left = (due_at - status.now).total_seconds()
        waits = "waits to be dispatched"
        if status.group is not None:
            waits += f": {_before(run, status.group)}"
        if left > 0:
            waits = f"is not due yet ({reason})"
        text = {
            "waiting": waits,
            "delayed": waits,
            "sent": _unclaimed(run, consumers),
            "running": "is executed",
        }.get(state, state)
        when = f"in {_in_words(left)}" if left > 0 else "now"
        if state == "delayed" and reason == WAITS:
            text = f"waits for {wait}"
            when = when if left < MOST_S + 86_400 else until
        if reason == SUCCEEDS:
            text = f"waits for the end of the run before it with the dedupe key {run.dedupe_key}"
            when = "when it has ended"
        if status.limit is not None:
            text, when = f"waits for the limit {status.limit}", "when there is room"
        often = "once" if attempts == 1 else f"{attempts} times"
        text += f"; dispatched {often}, looked at {when} (reason: {reason})"
        if status.paused:
            text += f"; the queue {run.queue} is paused"
        if reason == UNKNOWN_STEP and re.fullmatch("v[0-9]+", run.plan_version):
            text += f"; for a worker whose version of plan {run.plan} makes the calls that are "
            text += "stored: those that took it do not (`beatless plan check` tells the difference)"
        elif reason == UNKNOWN_STEP:
            text += f"; for a worker whose version of plan {run.plan} has step {place}, and "
            text += (
                "leaves out none that is next: those that took it do not (`beatless plan check`)"
            )
        if reason == CHANGED_CALL:
            text += f"; for a worker whose version of plan {run.plan} makes the same calls: those "
            text += "that took it give one of them other arguments (`beatless plan check`)"
        yield Moment(at=now, kind="dispatch", text=text)
    published = run.last_seq if status.unpublished is None else status.unpublished - 1
    yield Moment(at=now, kind="publish", text=f"{published} of {run.last_seq} events are published")
    for reason in status.dead_letters:
        yield Moment(at=now, kind="dead letter", text=reason)


def _left_undone(status: DispatchStatus) -> Iterator[str]:
    """The work on the run that waits for a relay."""
    if status.dispatch is not None:
        state, due_at, _, _ = status.dispatch
        if state in ("waiting", "delayed") and due_at <= status.now:
            yield "it is handed to no worker"
    if status.unpublished is not None:
        yield "its events are not published"


def _ms(when: datetime) -> int:
    return round(when.timestamp() * 1000)
