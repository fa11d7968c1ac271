"""The signals that a run has received and the waits that are open, folded from its events. Pure.

It knows no plan: a wait is an occurrence, the names of signals that end it, and its end. A wait
takes the oldest signal of its names that no wait has taken, an approval the decision that was made
for this occurrence. A signal in the journal wins over a time-out, however late the journal is
looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Self

from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import Event, EventType, NewEvent, encode
from beatless.orchestrator.forms import Form
from beatless.orchestrator.waits import Wait, WaitKind

DATA_BYTES = 65_536
"""Above the needs of the events here, whose data is ours: names and a time."""


class WaitOutcome(StrEnum):
    """The ends of a wait."""

    RECEIVED = "received"
    TIMED_OUT = "timed_out"
    SLEPT = "slept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A named fact that was sent to a run, as a step finds it in `ctx.results`. Always true.

    >>> from beatless import Signal
    >>> paid = Signal(name="paid", data={"amount": 12}, seq=7)
    >>> paid.name, paid.data["amount"]
    ('paid', 12)
    """

    name: str
    data: Any
    seq: int
    """The seq of its SignalReceived."""

    def to_dict(self) -> dict[str, Any]:
        """The signal as JSON."""
        return {"name": self.name, "data": self.data, "seq": self.seq}


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """The decision of a person, as a step finds it in `ctx.results`. Always true, also if it is no.

    >>> from datetime import UTC, datetime
    >>> from beatless import Approval, Verdict
    >>> no = Verdict(approved=False, comment="sold out")
    >>> at = datetime(2026, 12, 24, tzinfo=UTC)
    >>> refund = Approval(name="refund", data=no, by="ann@example.com", at=at, seq=7)
    >>> bool(refund), refund.data.approved
    (True, False)
    """

    name: str
    """The occurrence of the wait."""
    data: Any
    """The decision, of the type of the form."""
    by: str
    """The person who has decided."""
    at: datetime
    """The time of the decision, by the clock of Postgres."""
    seq: int
    """The seq of its SignalReceived."""

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        """From its JSON object."""
        at = datetime.fromtimestamp(members["at"] / 1000, UTC)
        return cls(**{**members, "at": at})

    def to_dict(self) -> dict[str, Any]:
        """The approval as JSON, if its data is."""
        at = round(self.at.timestamp() * 1000)
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"at": at}

    def as_form(self, form: Form) -> Self:
        """With the data of the type of the form. Raises BadPayload."""
        return replace(self, data=form.type.load(self.data))


Received = Signal | Approval
"""The facts that end a wait before its time."""


def received_of(members: Mapping[str, Any]) -> Received:
    """A signal, or an approval, from its JSON object. Members of newer versions are ignored."""
    kind = Approval if "by" in members else Signal
    known = {each.name: members[each.name] for each in fields(kind) if each.name in members}
    return Approval.from_dict(known) if kind is Approval else Signal(**known)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenWait:
    """A wait that has begun and not ended."""

    occurrence: str
    kind: WaitKind
    names: Sequence[str]
    seq: int
    """The seq of its WaitStarted."""
    until_ms: int | None
    """Its end, in milliseconds since 1970 by the clock of Postgres; None if it is not known here:
    it has none, or began in this claim."""
    title: str | None = None
    """The question of an approval."""
    schema: Mapping[str, Any] | None = None
    """The JSON Schema of its decision."""
    form: str | None = None
    """The name of the type of its decision: `module:name`."""

    @classmethod
    def from_started(cls, occurrence: str, data: Mapping[str, Any], *, seq: int) -> Self:
        """From a WaitStarted with this data."""
        return cls(
            occurrence=occurrence,
            kind=WaitKind(data["kind"]),
            names=data.get("names", ()),
            seq=seq,
            until_ms=data.get("until"),
            title=data.get("title"),
            schema=data.get("schema"),
            form=data.get("form"),
        )

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        """From its JSON object. Members that this version does not know are ignored."""
        known = {each.name: members[each.name] for each in fields(cls) if each.name in members}
        return cls(**known | {"kind": WaitKind(members["kind"])})

    @property
    def exact(self) -> str:
        """The name by which a decision is of this occurrence and of no later one: `refund#1`."""
        return exact_name(self.occurrence)

    def to_dict(self) -> dict[str, Any]:
        """The wait as JSON."""
        members = asdict(self) | {"names": list(self.names)}
        if self.kind is WaitKind.APPROVAL:
            members["exact"] = self.exact
        if self.kind is not WaitKind.APPROVAL:
            for name in ("title", "schema", "form"):
                del members[name]
        return members

    def ended(self, now_ms: float) -> bool:
        """Whether its time has come."""
        return self.until_ms is not None and now_ms >= self.until_ms

    def problem_with(self, signal: Received | None, form: Form | None) -> str:
        """The problem with a decision that this version of the plan cannot take; "" if none."""
        if form is not None and isinstance(signal, Approval):
            try:
                signal.as_form(form)
            except BadPayload as error:
                return f"approval {self.occurrence}, decided by {signal.by}: {error}"
        return ""

    def finished(self, signal: Received | None, **data: Any) -> NewEvent:
        """Its WaitFinished: by this signal, or without one by its time."""
        facts: dict[str, Any] = {"kind": self.kind.value}
        if signal is not None:
            facts |= {"outcome": WaitOutcome.RECEIVED.value, "name": signal.name, "seq": signal.seq}
            if isinstance(signal, Approval):
                facts["by"] = signal.by
        elif self.kind is WaitKind.SLEEP:
            facts["outcome"] = WaitOutcome.SLEPT.value
        else:
            facts["outcome"] = WaitOutcome.TIMED_OUT.value
        return _event(EventType.WAIT_FINISHED, self.occurrence, facts | data)


def exact_name(occurrence: str) -> str:
    """The name that means this occurrence and no other: `name#1` of the first."""
    return occurrence if "#" in occurrence else f"{occurrence}#1"


def named_occurrence(exact: str) -> str:
    """The occurrence that such a name means."""
    name, _, visit = exact.partition("#")
    return name if visit == "1" else exact


def wait_started(occurrence: str, wait: Wait, **data: Any) -> NewEvent:
    """The start of a wait. Postgres adds `until` to its data, from `seconds`."""
    facts: dict[str, Any] = {"kind": wait.kind.value}
    if wait.names:
        facts["names"] = list(wait.names)
    if wait.seconds is not None:
        facts["seconds"] = wait.seconds
    if wait.form is not None:
        facts |= {
            "title": wait.title,
            "exact": exact_name(occurrence),
            "form": wait.form.reference,
            "schema": wait.form.schema,
        }
    return _event(EventType.WAIT_STARTED, occurrence, facts | data)


@dataclass(slots=True)
class OpenWaits:
    """The open waits of a run by occurrence, and its signals that no wait has taken."""

    waits: dict[str, OpenWait] = field(default_factory=dict)
    signals: list[Signal] = field(default_factory=list)
    """Oldest first."""
    decisions: dict[str, Approval] = field(default_factory=dict)
    """The decisions that no wait has taken, by the occurrence of their wait."""

    def begin(self, occurrence: str, kind: WaitKind, names: Sequence[str], *, seq: int) -> OpenWait:
        """Note a wait that this claim has begun."""
        found = OpenWait(occurrence=occurrence, kind=kind, names=names, seq=seq, until_ms=None)
        self.waits[occurrence] = found
        return found

    def note(self, event: Event) -> Received | None:
        """Take up an event about waits; of a WaitFinished, the signal that ended the wait."""
        data = event.data or {}
        match event.type:
            case EventType.WAIT_STARTED:
                occurrence = event.step or ""
                self.waits[occurrence] = OpenWait.from_started(occurrence, data, seq=event.seq)
            case EventType.CHILDREN_STARTED:
                self.waits[event.step or ""] = OpenWait(
                    occurrence=event.step or "",
                    kind=WaitKind.CHILDREN,
                    names=(),
                    seq=event.seq,
                    until_ms=None,
                )
            case EventType.CHILDREN_FINISHED:
                self.waits.pop(event.step or "", None)
            case EventType.SIGNAL_RECEIVED if "decision" in data:
                made = data["decision"]
                self.decisions.setdefault(
                    made["wait"],
                    Approval.from_dict(
                        {
                            "name": made["wait"],
                            "data": data.get("data"),
                            "by": made["by"],
                            "at": made["at"],
                            "seq": event.seq,
                        }
                    ),
                )
            case EventType.SIGNAL_RECEIVED:
                self.signals.append(Signal(name=data["name"], data=data.get("data"), seq=event.seq))
            case EventType.WAIT_FINISHED:
                return self.end(event.step or "", data.get("seq"))
        return None

    def end(self, occurrence: str, seq: int | None) -> Received | None:
        """Close a wait, by the signal of this seq if there was one: the signal."""
        self.waits.pop(occurrence, None)
        decision = self.decisions.pop(occurrence, None)
        if decision is not None and decision.seq == seq:
            return decision
        for place, signal in enumerate(self.signals):
            if signal.seq == seq:
                return self.signals.pop(place)
        return None

    def oldest(self, opened: OpenWait) -> Received | None:
        """The oldest signal that ends this wait, of those that no wait has taken."""
        if opened.kind is WaitKind.APPROVAL:
            return self.decisions.get(opened.occurrence)
        names = opened.names
        return next((signal for signal in self.signals if signal.name in names), None)


def _event(type: EventType, occurrence: str, data: dict[str, Any]) -> NewEvent:
    text = encode(data, where=f"wait {occurrence}", limit=DATA_BYTES)
    return NewEvent(type=type, step=occurrence, data=text)
