"""The committed facts of a run, as readers get them and as writers hand them in."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import PurePath
from typing import Any, Self
from uuid import UUID

from beatless.orchestrator.errors import BadPayload
from beatless.outbox.message import UNREADABLE, one_line

NESTING = 100
"""Levels of lists and objects in a value: every reader must get it back, on any Python's stack."""


NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class EventType(StrEnum):
    """The types of events."""

    RUN_STARTED = "RunStarted"
    STEP_STARTED = "StepStarted"
    STEP_FINISHED = "StepFinished"
    STEP_FAILED = "StepFailed"
    DEBUG_TRACE = "DebugTrace"
    STEP_OUTPUT = "StepOutput"
    CANCEL_REQUESTED = "CancelRequested"
    WAIT_STARTED = "WaitStarted"
    SIGNAL_RECEIVED = "SignalReceived"
    WAIT_FINISHED = "WaitFinished"
    CHILDREN_STARTED = "ChildrenStarted"
    CHILDREN_FINISHED = "ChildrenFinished"
    RUN_RESTARTED = "RunRestarted"
    UNDO_STARTED = "UndoStarted"
    INPUT_REPLACED = "InputReplaced"
    RUN_FINISHED = "RunFinished"


KNOWN_TYPES = frozenset(EventType)
"""Of these the data is an object; an event of a newer version may have any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One committed fact. `seq` is its place in the run: 1, 2, 3 … without a gap.

    >>> run = app.client.start_run("checkout", {"order": 1})
    >>> event = app.client.events(run.run_id)[0]
    >>> event.seq, event.type, event.source, event.final
    (1, 'RunStarted', 'api', False)
    """

    run_id: str
    seq: int
    ts: int
    """Milliseconds since 1970, by the clock of Postgres."""
    type: str
    source: str
    """Its writer: api, worker or relay."""
    step: str | None = None
    attempt: int | None = None
    data: dict[str, Any] | None = None
    v: int = 1

    @property
    def final(self) -> bool:
        """True for RunFinished: nothing follows."""
        return self.type == EventType.RUN_FINISHED

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read an event from Postgres or Redis. Unknown members are ignored.

        Its data, the last member, may be what only SQL can have written: see `is_unreadable`.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError:  # cut off, or no event at all
            raise
        except (RecursionError, ValueError):
            whole = text if isinstance(text, str) else text.decode()
            head, found, _ = whole.partition(',"data":')
            if not found:
                raise
            return cls.from_dict(json.loads(head + "}") | {"data": UNREADABLE})

    @classmethod
    def from_dict(cls, members: Mapping[str, Any]) -> Self:
        run_id, data = members["run_id"], members.get("data")
        if members["type"] in KNOWN_TYPES and not isinstance(data, dict | None):
            data = dict(UNREADABLE)
        return cls(
            run_id=run_id,
            seq=members["seq"],
            ts=members["ts"],
            type=members["type"],
            source=members["source"],
            step=members.get("step"),
            attempt=members.get("attempt"),
            data=data,
            v=members.get("v", 1),
        )

    def to_dict(self) -> dict[str, Any]:
        """The event as interface.md's JSON object: absent members are left out."""
        members: dict[str, Any] = {
            "run_id": self.run_id,
            "seq": self.seq,
            "ts": self.ts,
            "type": self.type,
            "v": self.v,
            "source": self.source,
        }
        for name in ("step", "attempt", "data"):
            if (value := getattr(self, name)) is not None:
                members[name] = value
        return members


def is_unreadable(event: Event) -> bool:
    """Whether something else stands for its data, as for such an input.

    It is nested too deeply, has a number of too many digits, or no members.
    """
    return event.data == UNREADABLE


@dataclass(frozen=True, slots=True)
class EventText:
    """An event as text, for forwarding: objects take a multiple of the memory."""

    seq: int
    type: str
    text: bytes
    """Its JSON in one line, for any reader's end of a line."""

    @classmethod
    def of(cls, seq: int, type: str, text: str) -> Self:
        """From the JSON that Postgres has built."""
        return cls(seq, type, one_line(text.encode()))

    @classmethod
    def read(cls, line: bytes, run_id: str | None = None) -> Self:
        """From another source, of this run if it is given.

        Raises ValueError, TypeError and KeyError.
        """
        event = Event.from_json(line)
        if run_id not in (None, event.run_id):
            raise ValueError("an event is of another run")
        if type(event.seq) is not int or event.seq <= 0:
            raise ValueError("a seq is not a positive integer")
        if not NAME.fullmatch(event.type):
            raise ValueError("a type is not a name")
        return cls.of(event.seq, event.type, line.decode())

    @property
    def final(self) -> bool:
        """True for RunFinished: nothing follows."""
        return self.type == EventType.RUN_FINISHED

    def event(self) -> Event:
        """The type of the event."""
        return Event.from_json(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent:
    """An event before it has a seq. `data` is JSON text, already checked by `encode`."""

    type: EventType
    step: str | None = None
    attempt: int | None = None
    data: str | None = None


_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
"""Kept: json.dumps makes one for each call that has options."""


def encode(value: Any, *, where: str, limit: int) -> str:
    """A value as JSON text that Postgres can store.

    Raises BadPayload, naming the place, for values that are not JSON, NaN and infinities, NUL
    characters, deep nesting, and anything above `limit` bytes.
    """
    try:
        text = _ENCODER.encode(value)
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as error:
        _check_nesting(value, where)
        path, reason = _offence(value, where)
        raise BadPayload(path, reason or f"cannot be stored as JSON: {error}") from error
    if text.count("[") + text.count("{") > NESTING:
        _check_nesting(value, where)
    # Twice the backslash: json.dumps writes the character NUL as the six characters \u0000.
    if "\\u0000" in text and (found := _offence(value, where))[1]:
        raise BadPayload(*found)
    if size > limit:
        raise BadPayload(
            where,
            f"is {size} bytes as JSON, the limit is {limit} (BEATLESS_MAX_EVENT_BYTES): "
            "store it elsewhere and keep a reference",
        )
    return text


def as_stored(event: NewEvent) -> dict[str, Any]:
    """The data of an event as a resumed run would read it: decoded from the stored text."""
    data: dict[str, Any] = json.loads(event.data or "{}", parse_float=_as_jsonb)
    return data


def _as_jsonb(number: str) -> float | int:
    """A float as Postgres gives it back: jsonb writes 1e+16 as 10000000000000000."""
    return int(Decimal(number)) if "e+" in number else float(number)


def storable(text: str) -> bool:
    """Whether Postgres can hold the text: no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _check_nesting(value: Any, where: str) -> None:
    """Raises BadPayload for a value that is nested too deeply, or that holds itself."""
    level = [value]
    for _ in range(NESTING):
        # By identity: one list that holds itself twice must not double with each level.
        level = list(
            {
                id(item): item
                for outer in level
                if isinstance(outer, (list, tuple, dict))
                for item in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(item, (list, tuple, dict))
            }.values()
        )
        if not level:
            return
    raise BadPayload(where, f"holds itself, or is nested deeper than {NESTING} levels")


def _advice(value: Any) -> str:
    """How to store a value of a common type: it comes back as JSON, so the step says what as."""
    match value:
        case date() | time():  # a datetime is a date
            return ": use .isoformat()"
        case timedelta():
            return ": use .total_seconds()"
        case Decimal() | UUID() | PurePath():
            return ": use str(…)"
        case Enum():
            return ": use .value"
        case bytes() | bytearray():
            return ": use base64, or store it elsewhere and keep a reference"
        case set() | frozenset():
            return ": use sorted(…)"
    if isinstance(value, type):
        return ""
    if is_dataclass(value):
        return ": use dataclasses.asdict(…)"
    if callable(getattr(value, "model_dump", None)):
        return ': use .model_dump(mode="json")'
    if hasattr(value, "__struct_fields__"):
        return ": use msgspec.to_builtins(…)"
    return ""


def _offence(value: Any, path: str) -> tuple[str, str]:
    """The first thing inside a value that cannot be stored: its path and the reason."""
    match value:
        case None | bool():
            return path, ""
        case int():
            try:
                str(value)
            except ValueError:
                return path, "is a number of thousands of digits: use a string"
            return path, ""
        case str():
            if "\0" in value:
                return path, "holds a NUL character, which Postgres cannot store"
            if not storable(value):
                return path, "holds half of a surrogate pair, which is not valid text"
            return path, ""
        case float():
            finite = math.isfinite(value)
            return path, "" if finite else f"is {value!r}, which is not JSON: use None or a string"
        case list() | tuple():
            members = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
        case dict():
            for key in value:
                if not isinstance(key, str | int | float | None):
                    return path, f"has the key {key!r}: JSON object keys are strings"
                if not storable(str(key)):
                    return (
                        path,
                        f"has the key {key!r}, which has text that Postgres cannot store",
                    )
            members = [(f"{path}.{key}", item) for key, item in value.items()]
        case _:
            name = type(value).__name__
            article = "an" if name[0] in "AEIOaeio" else "a"
            return path, f"is {article} {name}, which is not JSON{_advice(value)}"
    for member_path, item in members:
        found = _offence(item, member_path)
        if found[1]:
            return found
    return path, ""
