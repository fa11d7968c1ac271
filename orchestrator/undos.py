"""The steps of a run that are to be undone, folded from its journal. Pure.

A step is undone if it was begun: also if it failed, was timed out or died, for it may have had its
effect all the same. The last one that began is undone first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.history import StoredCall, note_outcome
from beatless.orchestrator.plan import Plan, step_of
from beatless.orchestrator.progress import GIVEN, ON_CANCEL, RENAMED_FROM, UNDO, Progress
from beatless.orchestrator.records import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Undone:
    """A step that is to be undone: the second argument of the step that undoes it.

    >>> from beatless import StepContext, Undone, step
    >>> @step
    ... def refund(ctx: StepContext, undone: Undone) -> None:
    ...     print("refund", undone.key, undone.result)
    >>> @step(undo=refund)
    ... def charge(ctx: StepContext) -> dict:
    ...     return {"charged": ctx.input["amount"]}
    >>> charge.undo.name
    'refund'
    """

    step: str
    """The occurrence: `charge`, then `charge#2`."""
    key: str
    """The `ctx.key` that it had: what others know its effect by."""
    finished: bool
    """False if it failed, or nobody knows how it ended: it may have had its effect all the same."""
    result: Any
    """As JSON; None if it has not finished."""
    args: tuple[Any, ...]
    """Those that the function of the plan gave it after the context, as JSON."""
    kwargs: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Undoing(Progress):
    """The place of a run that is being undone: the step that undoes another one, or the run."""

    named: str
    undoes: str | None
    """The name that the other one began with; None of the plan's `on_cancel` step."""

    @property
    def occurrence(self) -> str:
        return self.named


@dataclass(slots=True, kw_only=True)
class Undos:
    """All that the journal knows of the steps that are to be undone."""

    plan: Plan
    run_id: str
    error: dict[str, Any] | None = None
    """That of the run, which has failed; None of one that is cancelled."""
    cancelled: bool = False
    on_cancel: str | None = None
    """The step that the cancel has promised."""
    reason: str | None = None
    """That of the cancel."""
    results: Mapping[str, Any] = field(default_factory=dict)
    _calls: dict[str, StoredCall] = field(default_factory=dict)
    """By the names that they began with."""
    _begun: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The data of the first start of each step that is to be undone, in order."""
    _open: list[str] = field(default_factory=list)
    """Those of them that may not be undone yet: behind the last of these, all are."""
    _names: dict[str, str] = field(default_factory=dict)
    """The names that occurrences began with, by those that they had later."""

    def note(self, event: Event) -> None:
        """Take up an event of the run."""
        data = event.data or {}
        match event.type:
            case EventType.UNDO_STARTED:
                self.error = data.get("error")
            case EventType.CANCEL_REQUESTED:
                self.cancelled, self.reason = True, data.get("reason")
                self.on_cancel = data.get(ON_CANCEL)
        if event.step is None:
            return
        if event.type == EventType.STEP_STARTED:
            self._names[event.step] = data.get(RENAMED_FROM, event.step)
        key = self._names.get(event.step, event.step)
        call = self._calls.setdefault(key, StoredCall(occurrence=event.step, key=key))
        call.occurrence = event.step
        name = data.get("name") if event.type == EventType.DEBUG_TRACE else None
        note_outcome(call, event.type, name, data)
        if event.type == EventType.STEP_STARTED and UNDO in data and key not in self._begun:
            self._begun[key] = data
            self._open.append(key)

    def next(self) -> Undoing | None:
        """The next place, of which nothing has ended; None if all is undone."""
        while self._open:
            named = self._named(key := self._open[-1])
            if not self._ended(named):
                return self._place(named, key)
            self._open.pop()
        promised = self.on_cancel or (self.plan.on_cancel and self.plan.on_cancel.name)
        if self.cancelled and promised and not self._ended(promised):
            return self._place(promised, None)
        return None

    def end(self, place: Undoing, error: dict[str, Any] | None = None) -> None:
        """A place has ended, well or with an error."""
        call = self._call(place.named)
        call.ended, call.error = True, error

    def failures(self) -> list[dict[str, Any]]:
        """The steps that could not be undone, with the errors of their undoing."""
        found = []
        for key in self._begun:
            call = self._call(self._named(key))
            if call.error is not None:
                found.append({"undoes": key} | call.error)
        return found

    def failure_of_cancel(self) -> dict[str, Any] | None:
        """The error of the plan's `on_cancel` step, if that has failed."""
        promised = self.on_cancel or (self.plan.on_cancel and self.plan.on_cancel.name)
        return self._call(promised).error if promised else None

    def undone(self, key: str) -> Undone:
        """The step that began with this name, for the one that undoes it."""
        call, given = self._call(key), self._begun[key].get(GIVEN) or {}
        finished = call.ended and call.error is None
        return Undone(
            step=call.occurrence,
            key=f"{self.run_id}:{key}",
            finished=finished,
            result=call.result if finished else None,
            args=tuple(given.get("args", ())),
            kwargs=given.get("kwargs", {}),
        )

    def _named(self, key: str) -> str:
        """The occurrence of the step that undoes the one that began with this name."""
        return f"{self._begun[key][UNDO]}#undo:{key}"

    def _place(self, named: str, key: str | None) -> Undoing:
        call, found = self._call(named), self.plan.get(step_of(named))
        known = self.plan.undo_steps.values() if key is not None else [self.plan.on_cancel]
        step = found if found in known else None
        return Undoing(
            step=step,
            unknown=None if step is not None else step_of(named),
            named=named,
            undoes=key,
            results=dict(self.results),
            starts=call.starts,
            failures=call.failures,
            lost=call.lost,
            refused=call.refused,
            deaths=call.deaths,
            ran_out=call.ran_out,
            in_flight=call.in_flight,
            compensating=True,
        )

    def _call(self, name: str) -> StoredCall:
        return self._calls.get(name) or self._calls.setdefault(
            name, StoredCall(occurrence=name, key=name)
        )

    def _ended(self, name: str) -> bool:
        return self._call(name).ended


def undos_of(plan: Plan, run_id: str, events: Sequence[Event], results: Mapping[str, Any]) -> Undos:
    """Those of a run with these events, and these results of its steps."""
    undos = Undos(plan=plan, run_id=run_id, results=results)
    for event in events:
        undos.note(event)
    return undos


def deadline_of(run: Run, events: Sequence[Event]) -> datetime | None:
    """The deadline of a run, also of one that has none any more since it is undone."""
    for event in events:
        if event.type == EventType.UNDO_STARTED and "deadline_at" in (event.data or {}):
            return datetime.fromtimestamp((event.data or {})["deadline_at"] / 1000, UTC)
    return run.deadline_at
