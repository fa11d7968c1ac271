"""Rows of runs as values: the arguments and results of the journal. No I/O."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

from beatless.orchestrator.errors import EventsPruned
from beatless.orchestrator.events import Event
from beatless.orchestrator.limit import RunLimit, rate_of
from beatless.orchestrator.options import STORED, StoredOptions
from beatless.orchestrator.state import RunState
from beatless.outbox.message import shard_of

ENDLESS_YEAR = 9000
"""From this year on a run is due that waits without an end: no other can be due so late."""

StartOutcome = Literal["started", "found", "joined", "skipped", "input_replaced"]
"""The outcome of a start: a new run; the one that was started with this `key` or `run_id` before;
or the unfinished one with this `dedupe_key`, which is joined, for which the start was skipped, or
which has this input in place of an earlier one."""

WhileUnfinished = Literal["join", "skip", "replace"]
"""The effect of a start while a run with its `dedupe_key` is unfinished."""

RUN_COLUMNS = (
    "run_id",
    "namespace",
    "plan",
    "plan_version",
    "queue",
    "state",
    "input",
    "result",
    "error",
    "key",
    "last_seq",
    "attempt",
    "worker",
    "cancel_requested_at",
    "not_before",
    "deadline_at",
    "retry_of",
    "parent_id",
    "child_no",
    "created_at",
    "started_at",
    "finished_at",
    "pruned_seq",
    "schedule",
    "tick",
    *STORED,
)

_ROW = (*RUN_COLUMNS, "retried_by", "waits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(StoredOptions):
    """One execution of a plan, as it is stored now.

    >>> run = app.client.start_run("checkout", {"order": 1}, tags={"shop": "berlin"})
    >>> run.plan, run.state.value, run.input, run.tags, run.last_seq
    ('checkout', 'queued', {'order': 1}, {'shop': 'berlin'}, 1)
    """

    run_id: str
    namespace: str
    plan: str
    plan_version: str
    queue: str
    state: RunState
    input: Any
    result: Any
    error: dict[str, Any] | None
    key: str | None
    last_seq: int
    attempt: int
    """How often a worker has taken the run."""
    worker: str | None
    """Its last worker, which has it while it is running."""
    cancel_requested_at: datetime | None
    not_before: datetime | None
    deadline_at: datetime | None
    tags: dict[str, str]
    retry_of: str | None
    parent_id: str | None = None
    """The id of the run that has started it with `run.child` or `run.map`."""
    child_no: int | None = None
    """Its number among the children of that run."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    pruned_seq: int
    """Its events up to here were removed after the retention time."""
    schedule: str | None = None
    """The name of the schedule that has started it."""
    tick: datetime | None = None
    """The tick of that schedule: when it was to start, not when it did."""
    retried_by: str | None = None
    """The id of its newest retry."""
    start: StartOutcome | None = field(default=None, compare=False)
    """The outcome of the start that has returned it; None of a run that was read."""

    @classmethod
    def from_row(cls, row: Sequence[Any], start: StartOutcome | None = None) -> Self:
        """From the columns of the table; then what only some statements have looked for.

        That is `retried_by`, and whether the run waits for a signal or a time.
        """
        members = dict(zip(_ROW, row, strict=False))  # it may be shorter
        waits = members.pop("waits", False)
        members["state"] = RunState.WAITING if waits else RunState(members["state"])
        due = members["not_before"]
        # One that has begun may wait for a slot of its next step.
        if due is not None and due.year >= ENDLESS_YEAR and (waits or members["attempt"]):
            members["not_before"] = None
        return cls(**members, start=start)

    def require_events(self, after: int) -> None:
        """Raises EventsPruned unless every event after this seq is kept."""
        if after < self.pruned_seq:
            kept = self.pruned_seq + 1 if self.pruned_seq < self.last_seq else None
            raise EventsPruned(self.run_id, after, kept)

    def to_dict(self) -> dict[str, Any]:
        """The run as a JSON object; times are ISO 8601."""
        return {
            name: value.isoformat() if isinstance(value, datetime) else value
            for name in (*RUN_COLUMNS, "retried_by", "start")
            for value in [getattr(self, name)]
        }


Place = tuple[datetime, str]
"""The position of a run in a list: its key in the order of the list, and its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """The place of an unfinished run."""

    plan: str
    plan_version: str
    place: Event
    """Its last RunStarted, StepStarted or StepFinished; results are left out."""
    cancelled: bool
    undo: str | None
    """The `on_cancel` step that the cancel has promised."""
    undoing: bool
    """The place came after the cancel: it is an attempt of the plan's `on_cancel` step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRunFilter:
    """A filter of failed runs that have no retry."""

    plan: str | None = None
    queue: str | None = None
    tags: Mapping[str, str] | None = None
    error: str | None = None
    """In "type: message" of the error, ignoring case."""
    seconds: float | None = None
    """Failed so many seconds ago or less."""
    after: Place | None = None
    """The place of the last run of the page before."""


def _in_utc(moment: datetime | None) -> str | None:
    """As text: Postgres takes no time zone that is 16 hours or more away from UTC."""
    return None if moment is None else moment.astimezone(UTC).isoformat()


_ENCODER = json.JSONEncoder(default=dict)


def _json_text(value: Any) -> str | None:
    return None if value is None else _ENCODER.encode(value)


def new_run_id() -> str:
    """A UUID of version 7 (RFC 9562): its order is the order of creation, within a millisecond."""
    stamp = time.time_ns() // 1_000_000
    number = (stamp << 80) | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    digits = f"{number:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRun(StoredOptions):
    """A checked request to start a run. `input` is JSON text."""

    run_id: str
    namespace: str
    plan: str
    plan_version: str
    queue: str
    input: str
    key: str | None
    not_before: datetime | None
    delay: float | None
    deadline: float | None
    """Seconds from now."""
    retry_of: str | None = None
    trace_context: Mapping[str, str] | None = None
    reused: str | None = None
    """JSON text of the step results that a retried run takes over."""
    default_queue: bool = False
    """The caller named none: it is the plan's, which may be another at the next start."""
    default_input: bool = False
    """As for the queue."""
    deadline_at: datetime | None = None
    """That of its parent: the earlier of the two counts."""
    parent_id: str | None = None
    child_no: int | None = None
    detached: bool = False
    """The end of its parent does not cancel it: it is the root of a tree of its own."""
    schedule: str | None = None
    schedule_id: int | None = None
    tick: datetime | None = None
    while_unfinished: WhileUnfinished = "join"
    """If it has a `dedupe_key`."""
    debounce: float | None = None
    """Seconds from the last input to the begin, in place of `while_unfinished`."""
    max_wait: float | None = None
    """Seconds from the first input to the begin, at most."""
    dedupe_next: bool = False
    """It waits for the end of the unfinished run with its `dedupe_key`."""
    limits: Sequence[RunLimit] = ()

    @property
    def stored_limits(self) -> list[dict[str, Any]]:
        """Its limits as JSON."""
        return [each.to_dict() for each in self.limits]

    @property
    def parameters(self) -> dict[str, Any]:
        """Those of the statement that stores this run alone."""
        return {
            "run_id": self.run_id,
            "shard": shard_of(self.run_id),
            "namespace": self.namespace,
            "plan": self.plan,
            "plan_version": self.plan_version,
            "queue": self.queue,
            "input": self.input,
            "key": self.key,
            "not_before": _in_utc(self.not_before),
            "delay": self.delay,
            "deadline": self.deadline,
            "retry_of": self.retry_of,
            "trace_context": _json_text(self.trace_context or None),
            "reused": self.reused,
            "default_queue": self.default_queue,
            "default_input": self.default_input,
            "parent_id": self.parent_id,
            "child_no": self.child_no,
            "detached": None if self.parent_id is None else self.detached,
            "deadline_at": self.deadline_at.isoformat() if self.deadline_at else None,
            "schedule": self.schedule,
            "schedule_id": self.schedule_id,
            "tick": self.tick.isoformat() if self.tick else None,
            "limits": _json_text(self.stored_limits) if self.limits else None,
            **{
                name: _json_text(value) if STORED[name].sql_type == "jsonb" else value
                for name, value in self.stored_options().items()
            },
        }

    def to_json(self, *, whole: bool = True) -> str:
        """The members as the statement reads them; `whole`: also those that it has not."""
        members = {
            "run_id": self.run_id,
            "shard": shard_of(self.run_id),
            "namespace": self.namespace,
            "plan": self.plan,
            "plan_version": self.plan_version,
            "queue": self.queue,
            "key": self.key,
            "not_before": _in_utc(self.not_before),
            "delay": self.delay,
            "deadline": self.deadline,
            "retry_of": self.retry_of,
            "trace_context": dict(self.trace_context) if self.trace_context else None,
            "default_queue": self.default_queue,
            "default_input": self.default_input,
        }
        if self.parent_id is not None:
            members |= {
                "deadline_at": self.deadline_at.isoformat() if self.deadline_at else None,
                "parent_id": self.parent_id,
                "child_no": self.child_no,
                "detached": self.detached,
            }
        if self.schedule is not None:
            members |= {
                "schedule": self.schedule,
                "schedule_id": self.schedule_id,
                "tick": self.tick.isoformat() if self.tick else None,
            }
        if self.dedupe_next:
            members["dedupe_next"] = True
        if self.limits:
            members["limits"] = self.stored_limits
        members |= self.stored_options()
        if self.dedupe_key is None:
            del members["dedupe_key"]
        if not whole:
            members = {name: value for name, value in members.items() if value is not None}
        text = _ENCODER.encode(members)[:-1] + f',"input":{self.input}'
        if self.reused is not None:
            text += f',"reused":{self.reused}'
        return text + "}"

    def difference(
        self,
        existing: Run,
        default_queue: bool | None,
        default_input: bool | None,
        *,
        same_input: bool,
    ) -> str | None:
        """The first member in which a stored run of this key or id differs; None if none does.

        `default_queue` and `default_input`: its caller named none; None of an older release, which
        did not note it. A member that neither start named is the same, whatever the plan's is now.
        """
        queue = self.default_queue and default_queue is not False
        input = self.default_input and default_input is not False
        members = {
            "namespace": existing.namespace == self.namespace,
            "plan": existing.plan == self.plan,
            "queue": queue or existing.queue == self.queue,
            "input": input or same_input,
            "key": existing.key == self.key,
        }
        return next((name for name, same in members.items() if not same), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSignal:
    """A checked signal for a run. `data` is JSON text."""

    run_id: str
    name: str
    key: str
    data: str

    def to_json(self) -> str:
        """The members as the statement reads them."""
        members = {
            "run_id": self.run_id,
            "shard": shard_of(self.run_id),
            "name": self.name,
            "key": self.key,
        }
        return f'{json.dumps(members)[:-1]},"data":{self.data}}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class SentSignal:
    """A signal that is stored for its run.

    >>> run = app.client.start_run("checkout", {"order": 1})
    >>> sent = app.client.signal_run(run.run_id, "paid", {"amount": 12}, key="psp:42")
    >>> sent.id, sent.new
    ('psp:42', True)
    """

    run_id: str
    id: str
    """Its key, or a random one."""
    new: bool
    """Whether it was stored now; False if it was sent before."""
    waits_for: Sequence[str]
    """The names of the signals that the run waited for when this was sent: another one is kept for
    a later wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentDecision:
    """The decision of an approval, which is stored for its run.

    >>> run = beatless.start_run("complaint")
    >>> executed = beatless.work_until_idle()
    >>> yes = {"approved": True}
    >>> sent = beatless.client.approve_run(run.run_id, "Refund", yes, by="ann@example.com")
    >>> sent.occurrence, sent.by, sent.new
    ('Refund', 'ann@example.com', True)
    """

    run_id: str
    occurrence: str
    """Of the wait."""
    by: str
    at: datetime
    """By the clock of Postgres."""
    new: bool
    """Whether it was stored now; False if this call had sent it before, or the same person the
    same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDecision:
    """A checked decision of an approval. `data` is JSON text."""

    run_id: str
    occurrence: str
    data: str
    by: str
    link: str | None
    """The id of the link by which it was sent."""
    key: str
    """That of its signal: each try of a call has the same one, and other calls have others."""

    def to_row(self) -> dict[str, Any]:
        """The parameters of its statement."""
        return {
            "run_id": self.run_id,
            "shard": shard_of(self.run_id),
            "occurrence": self.occurrence,
            "data": self.data,
            "by": self.by,
            "link": self.link,
            "key": self.key,
        }

    def sent(self, at: datetime, *, new: bool = True) -> SentDecision:
        """As it is stored since then."""
        return SentDecision(
            run_id=self.run_id, occurrence=self.occurrence, by=self.by, at=at, new=new
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Appended:
    """The result of an append."""

    last_seq: int
    cancelled: bool
    """A cancel was accepted before this append."""
    signalled: bool = False
    """Signals of the run wait to be taken into its journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPage:
    """A page of the events that give the place of a run."""

    events: Sequence[Event]
    """One at least."""
    restarted_seq: int
    """The seq of the event by which the run's function has begun again; 0 if it has not."""
    last: bool
    """Its last event is that of the run."""
    unfit: str = ""
    """How the run's row contradicts its journal, if it does: then only its last event is here."""

    @classmethod
    def of_rows(cls, rows: Sequence[Any]) -> Self:
        """From those of the statement `checkpoint_page`, one at least."""
        events = [Event.from_json(line) for line, _, _ in rows]
        _, last_seq, restarted = rows[-1]
        return cls(events=events, restarted_seq=restarted, last=events[-1].seq == last_seq)


MOST_COUNTED = 1000
"""Runs before another one that are counted, where thousands may wait."""


def runs_before(count: int) -> str:
    """How many runs those are, in words."""
    if count >= MOST_COUNTED:
        return f"{MOST_COUNTED:,} runs or more"
    return "1 run" if count == 1 else f"{count} runs"


@dataclass(frozen=True, slots=True, kw_only=True)
class FullLimit:
    """A limit that a run waits for."""

    id: str
    at_once: int | None
    starts: int | None
    period_s: float | None
    """Of a rate: so many begin in so many seconds."""
    held: int
    """Slots that are in use."""
    by: Sequence[str]
    """The ids of some of the runs that have them, those first that have them the longest."""
    before: int
    """Runs that are let in before this one; `MOST_COUNTED` stands for that many or more."""

    def __str__(self) -> str:
        name, _, key = self.id.partition(":")
        limit = f"{name} (key {key})" if key else name
        line = f"{runs_before(self.before)} before it"
        if self.starts is not None and self.period_s is not None:
            return f"{limit}: {rate_of(self.starts, self.period_s)} begin; {line}"
        more = ", …" if self.held > len(self.by) else ""
        users = f" by {', '.join(self.by)}{more}" if self.by else ""
        return f"{limit}: {self.held} of {self.at_once} in use{users}; {line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPlace:
    """The place of a run that waits for the turns of its group, or in a queue whose runs age."""

    weight: int
    age_after: float | None
    """Seconds after which a run of the queue comes before those of a higher priority."""
    is_aged: bool
    """Whether it has waited for so long."""
    before: int
    """Runs of its group, or of those without one, that are sent before this one; `MOST_COUNTED` as
    above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchStatus:
    """The state of a run in the tables beside `runs`."""

    now: datetime
    lease_expires_at: datetime | None
    dispatch: tuple[str, datetime, str, int] | None
    """Its state, when the relay looks at it next, the reason, and how often it was sent."""
    paused: bool
    unpublished: int | None
    """The first event that is not published."""
    dead_letters: Sequence[str]
    limit: FullLimit | None = None
    """The limit that it waits for."""
    group: GroupPlace | None = None
    """Where it stands in its group, if it is due and waits to be sent."""
    led: bool
    """Whether a relay leads the shard of the run."""
