"""The declared type of a plan's input: which members it takes when a run is started, and later."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from beatless import BadPayload
from beatless.orchestrator.typed_input import typed_input


@dataclass
class Line:
    number: int


@dataclass
class Order:
    lines: list[Line] = field(default_factory=list)


@dataclass
class Lenient:
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="ignore")
    number: int = 1


class Typed(TypedDict):
    number: int


class Model(BaseModel):
    number: int = 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = 1


@pytest.mark.parametrize(
    ("kind", "given", "member"),
    [
        (Order, {"line": []}, "line"),
        (Order, {"lines": [{"number": 1, "gift": True}]}, r"lines\[0\]\.gift"),
        (Typed, {"number": 1, "numbr": 2}, "numbr"),
        (Strict, {"numbr": 2}, "numbr"),
        (list[Line], [{"number": 1, "gift": True}], "gift"),
    ],
)
def test_a_member_that_the_type_does_not_have_is_refused(
    kind: Any, given: Any, member: str
) -> None:
    told = rf"the run's input.*{member} is refused: the plan's type of input has no such member"
    with pytest.raises(BadPayload, match=told):
        typed_input(kind).dump(given)


@pytest.mark.parametrize("kind", [Lenient, Model])
def test_a_type_that_ignores_other_members_is_given_them(kind: Any) -> None:
    given = {"number": 2, "numbr": 3}
    assert typed_input(kind).dump(given) == given
    assert typed_input(kind).load(given) == kind(number=2)


def test_a_stored_input_has_members_that_the_type_had_once() -> None:
    stored = {"lines": [{"number": 1, "gift": True}], "coupon": "x"}
    assert typed_input(Order).load(stored) == Order([Line(1)])


def test_a_value_of_the_type_becomes_the_json_of_its_members() -> None:
    assert typed_input(Order).dump(Order([Line(1)])) == {"lines": [{"number": 1}]}


def test_the_schema_says_that_there_are_no_other_members() -> None:
    schema = typed_input(Order).schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Line"]["additionalProperties"] is False
    assert "additionalProperties" not in typed_input(Model).schema()
