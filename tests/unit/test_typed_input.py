"""The declared type of a plan's input: which members it takes when a run is started, and later."""

from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr, computed_field
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


class Renamed(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int = Field(alias="orderNumber")
    lines: list[Line] = Field(validation_alias="orderLines", serialization_alias="orderLines")

    @computed_field
    def count(self) -> int:
        return len(self.lines)


def test_a_value_of_the_type_becomes_json_that_its_type_takes() -> None:
    given = Renamed(orderNumber=7, orderLines=[Line(1)])
    stored = typed_input(Renamed).dump(given)
    assert stored == {"orderNumber": 7, "orderLines": [{"number": 1}]}
    assert typed_input(Renamed).load(stored) == given


class OneWay(BaseModel):
    number: int = Field(validation_alias="in", serialization_alias="out")


class Card(BaseModel):
    holders: dict[str, list[SecretStr]]


def test_a_value_that_its_type_would_not_read_back_is_refused() -> None:
    with pytest.raises(BadPayload, match=r"the run's input.in is refused: Field required"):
        typed_input(OneWay).dump(OneWay(**{"in": 1}))
    card = Card(holders={"ann": ["1", "2"]})
    with pytest.raises(BadPayload, match=r"holders\.ann\[0\] is refused: pydantic writes stars"):
        typed_input(Card).dump(card)
    with pytest.raises(BadPayload, match=r"the run's input is refused: pydantic writes stars"):
        typed_input(SecretStr).dump(SecretStr("a"))
    assert typed_input(Card).dump({"holders": {}}) == {"holders": {}}


def test_the_schema_says_that_there_are_no_other_members() -> None:
    schema = typed_input(Order).schema()
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Line"]["additionalProperties"] is False
    assert "additionalProperties" not in typed_input(Model).schema()


class Aliased(BaseModel):
    number: int = Field(alias="orderNumber")
    gift: bool = Field(default=False, alias="asGift")
    secret: SecretStr = SecretStr("none")


@dataclass(frozen=True)
class Tag:
    name: str = "none"
    weight: int = 1


@dataclass
class Nested:
    line: Line
    rest: list[Tag] = field(default_factory=list)
    tags: set[Tag] = field(default_factory=set)
    pause: float = 0.5
    price: Decimal = Decimal(1)


class NoJson(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    number: int
    at: Any = Field(default_factory=object)


@pytest.mark.parametrize(
    ("kind", "stored", "filled"),
    [
        (Order, {}, {"lines": []}),
        (Lenient, {}, {"number": 1}),
        (Model, {}, {"number": 1}),
        (Order, {"lines": [], "dropped": 1}, {"lines": [], "dropped": 1}),
        (
            Aliased,
            {"orderNumber": 7, "secret": "s3cret"},
            {"orderNumber": 7, "asGift": False, "secret": "s3cret"},
        ),
        (
            Nested,
            {"line": {"number": 1}, "rest": [{"name": "a"}, {}], "price": 2.5},
            {
                "line": {"number": 1},
                "rest": [{"name": "a", "weight": 1}, {"name": "none", "weight": 1}],
                "tags": [],
                "pause": 0.5,
                "price": 2.5,
            },
        ),
        (
            list[Tag],
            [{}, {"weight": 3}],
            [{"name": "none", "weight": 1}, {"name": "none", "weight": 3}],
        ),
        (dict[str, Tag], {"a": {}}, {"a": {"name": "none", "weight": 1}}),
        (Order | None, None, None),
        (NoJson, {"number": 1}, {"number": 1}),
        (int, 7, 7),
        (None, {"any": []}, {"any": []}),
    ],
)
def test_stored_json_is_filled_with_the_defaults_of_its_type_and_otherwise_as_it_was_given(
    kind: Any, stored: Any, filled: Any
) -> None:
    typed = typed_input(kind)
    before = deepcopy(stored)
    assert typed.filled(stored, typed.load(stored)) == filled
    assert stored == before


def test_the_members_of_a_set_which_has_no_order_are_as_they_were_given() -> None:
    typed = typed_input(Nested)
    stored = {"line": {"number": 1}, "tags": [{"name": str(n)} for n in range(20)]}
    assert typed.filled(stored, typed.load(stored))["tags"] == stored["tags"]
