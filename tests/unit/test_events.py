"""Events and the encoding of what users hand in."""

import dataclasses
import json
import math
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.events import Event, EventType, encode, is_unreadable

LIMIT = 1000

# What JSON and Postgres can hold: no NUL, no lone surrogates, no NaN.
text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
unstorable = st.sampled_from([math.nan, math.inf, -math.inf, "a\0b", "\ud800", {1}, b"x", object()])


@given(values)
def test_what_is_json_is_encoded_and_read_back_the_same(value):
    assert json.loads(encode(value, where="x", limit=10**6)) == value


@given(values, unstorable, st.lists(st.sampled_from(["k", 0]), max_size=5))
def test_an_offence_is_found_at_any_depth_and_named(good, bad, path):
    value, expected = bad, "x"
    for place in path:
        value = {"k": value, "other": good} if place == "k" else [value, good]
    for place in reversed(path):
        expected += ".k" if place == "k" else "[0]"

    with pytest.raises(BadPayload) as raised:
        encode(value, where="x", limit=10**6)

    assert raised.value.where == expected


@given(text.map(lambda tail: "\\u0000" + tail))
def test_the_six_characters_that_spell_a_nul_are_no_nul(value):
    assert json.loads(encode({"a": [value]}, where="x", limit=LIMIT)) == {"a": [value]}


@pytest.mark.parametrize("key", ["x\0", "x\ud800"])
def test_a_key_that_postgres_cannot_store_is_refused(key):
    with pytest.raises(
        BadPayload, match=r"^input\.a has the key 'x\\.*', which has text that Postgres"
    ):
        encode({"a": {key: 1}}, where="input", limit=LIMIT)


def test_the_limit_counts_bytes_not_characters():
    assert encode("é" * 499, where="x", limit=LIMIT)
    with pytest.raises(BadPayload, match=r"^x is 1002 bytes as JSON, the limit is 1000 "):
        encode("é" * 500, where="x", limit=LIMIT)


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels - 1):
        value = [value]
    return value


def holding_itself() -> list:
    value: list = []
    value += [value, value]
    return value


@pytest.mark.parametrize("make", [lambda: nested(101), lambda: nested(5000), holding_itself])
def test_what_a_reader_could_not_read_back_is_refused(make):
    with pytest.raises(BadPayload, match=r"^x holds itself, or is nested deeper than 100 levels$"):
        encode(make(), where="x", limit=10**6)


def test_a_hundred_levels_are_fine():
    assert json.loads(encode(nested(100), where="x", limit=10**6)) == nested(100)
    assert encode([{}] * 1000, where="x", limit=10**6)


events = st.builds(
    Event,
    run_id=st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True),
    seq=st.integers(1, 2**31 - 1),
    ts=st.integers(0, 2**53),
    type=st.sampled_from([member.value for member in EventType]),
    source=st.sampled_from(["api", "worker", "relay"]),
    step=st.none() | text,
    attempt=st.none() | st.integers(1, 100),
    data=st.none() | st.dictionaries(text, values, max_size=3),
    v=st.integers(1, 9),
)


@given(events)
def test_an_event_survives_the_wire(event):
    assert Event.from_json(json.dumps(event.to_dict())) == event


@given(events)
def test_members_that_a_newer_version_adds_are_ignored(event):
    assert Event.from_dict(event.to_dict() | {"colour": "blue"}) == event


def wire(data: str) -> str:
    return f'{{"run_id":"r","seq":1,"ts":0,"type":"DebugTrace","source":"w","data":{data}}}'


@pytest.mark.parametrize("text", [wire("[" * 12_000 + "]" * 12_000), wire("1" * 5000), wire("[1]")])
def test_data_that_only_sql_can_have_written_is_an_unreadable_event(text):
    assert is_unreadable(Event.from_json(text))


@pytest.mark.parametrize("data", ['{"a":1}', "[[1]]"])
def test_an_event_that_is_cut_off_is_none(data):
    text = wire(data)
    for end in range(len(text)):
        with pytest.raises(ValueError):
            Event.from_json(text[:end])


@given(events)
def test_absent_members_are_left_out(event):
    assert None not in event.to_dict().values()
    assert event.final == (event.type == "RunFinished")


@dataclasses.dataclass
class Line:
    number: int


class Model(pydantic.BaseModel):
    number: int


class Struct:
    """As msgspec makes them."""

    __struct_fields__ = ("number",)


class Color(Enum):
    RED = "red"


REFUSED: dict[str, tuple[Any, str]] = {
    # with what to do instead
    "datetime": (datetime(2026, 1, 1, tzinfo=UTC), "use .isoformat()"),
    "date": (date(2026, 1, 1), "use .isoformat()"),
    "time": (time(1), "use .isoformat()"),
    "timedelta": (timedelta(1), "use .total_seconds()"),
    "Decimal": (Decimal("1.10"), "use str("),
    "UUID": (uuid.uuid4(), "use str("),
    "path": (Path("a"), "use str("),
    "Enum": (Color.RED, "use .value"),
    "bytes": (b"x", "use base64"),
    "bytearray": (bytearray(b"x"), "use base64"),
    "set": ({1}, "use sorted("),
    "dataclass": (Line(1), "use dataclasses.asdict("),
    "pydantic": (Model(number=1), "use .model_dump(mode="),
    "msgspec": (Struct(), "use msgspec.to_builtins("),
    "any object": (object(), "is an object, which is not JSON"),
    "a class": (Line, "is a type, which is not JSON"),
    "not a number": (math.nan, "use None or a string"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_value_of_another_type_is_refused_with_its_path_and_what_to_do(kind: str) -> None:
    value, advice = REFUSED[kind]
    with pytest.raises(BadPayload) as refused:
        encode({"deep": [1, {"x": value}]}, where="the result", limit=LIMIT)
    assert refused.value.where == "the result.deep[1].x"
    assert advice in str(refused.value)
