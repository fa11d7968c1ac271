"""The signals that a run has received and the waits that are open, folded from its events. Pure.

It knows no plan: a wait is an occurrence, the names of signals that end it, and its end. A wait
takes the oldest signal of its names that no wait has taken. A signal in the journal wins over a
time-out, however late the journal is looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from beatless.orchestrator.events import Event, EventType, NewEvent, encode
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

    @classmethod
    def from_started(cls, occurrence: str, data: Mapping[str, Any], *, seq: int) -> Self:
        """From a WaitStarted with this data."""
        return cls(
            occurrence=occurrence,
            kind=WaitKind(data["kind"]),
            names=data.get("names", ()),
            seq=seq,
            until_ms=data.get("until"),
        )

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        """From its JSON object. Members that this version does not know are ignored."""
        known = {each.name: members[each.name] for each in fields(cls)}
        return cls(**known | {"kind": WaitKind(members["kind"])})

    def to_dict(self) -> dict[str, Any]:
        """The wait as JSON."""
        return asdict(self) | {"names": list(self.names)}

    def ended(self, now_ms: float) -> bool:
        """Whether its time has come."""
        return self.until_ms is not None and now_ms >= self.until_ms

    def finished(self, signal: Signal | None, **data: Any) -> NewEvent:
        """Its WaitFinished: by this signal, or without one by its time."""
        facts: dict[str, Any] = {"kind": self.kind.value}
        if signal is not None:
            facts |= {"outcome": WaitOutcome.RECEIVED.value, "name": signal.name, "seq": signal.seq}
        elif self.kind is WaitKind.SLEEP:
            facts["outcome"] = WaitOutcome.SLEPT.value
        else:
            facts["outcome"] = WaitOutcome.TIMED_OUT.value
        return _event(EventType.WAIT_FINISHED, self.occurrence, facts | data)


def wait_started(occurrence: str, wait: Wait, **data: Any) -> NewEvent:
    """The start of a wait. Postgres adds `until` to its data, from `seconds`."""
    facts: dict[str, Any] = {"kind": wait.kind.value}
    if wait.names:
        facts["names"] = list(wait.names)
    if wait.seconds is not None:
        facts["seconds"] = wait.seconds
    return _event(EventType.WAIT_STARTED, occurrence, facts | data)


@dataclass(slots=True)
class OpenWaits:
    """The open waits of a run by occurrence, and its signals that no wait has taken."""

    waits: dict[str, OpenWait] = field(default_factory=dict)
    signals: list[Signal] = field(default_factory=list)
    """Oldest first."""

    def begin(self, occurrence: str, kind: WaitKind, names: Sequence[str], *, seq: int) -> OpenWait:
        """Note a wait that this claim has begun."""
        found = OpenWait(occurrence=occurrence, kind=kind, names=names, seq=seq, until_ms=None)
        self.waits[occurrence] = found
        return found

    def note(self, event: Event) -> Signal | None:
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
            case EventType.SIGNAL_RECEIVED:
                self.signals.append(Signal(name=data["name"], data=data.get("data"), seq=event.seq))
            case EventType.WAIT_FINISHED:
                return self.end(event.step or "", data.get("seq"))
        return None

    def end(self, occurrence: str, seq: int | None) -> Signal | None:
        """Close a wait, by the signal of this seq if there was one: the signal."""
        self.waits.pop(occurrence, None)
        for place, signal in enumerate(self.signals):
            if signal.seq == seq:
                return self.signals.pop(place)
        return None

    def oldest(self, names: Sequence[str]) -> Signal | None:
        """The oldest signal of these names that no wait has taken."""
        return next((signal for signal in self.signals if signal.name in names), None)


def _event(type: EventType, occurrence: str, data: dict[str, Any]) -> NewEvent:
    text = encode(data, where=f"wait {occurrence}", limit=DATA_BYTES)
    return NewEvent(type=type, step=occurrence, data=text)
