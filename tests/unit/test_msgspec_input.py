"""Structs of msgspec as types of inputs and forms."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgspec
import pytest

from beatless import BadPayload, RunContext, plan
from beatless.orchestrator.arguments import digest
from beatless.orchestrator.forms import form_of
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.typed_input import typed_input


class Line(msgspec.Struct):
    number: int
    gift: bool = False


class Order(msgspec.Struct, omit_defaults=True, rename="camel"):
    order_id: int
    lines: list[Line] = []
    due_at: datetime | None = None
    price: Decimal = Decimal(0)
    by_day: dict[int, Line] = {}


class Card(msgspec.Struct, tag="card"):
    number: str


class Cash(msgspec.Struct, tag="cash"):
    amount: int


class Tree(msgspec.Struct):
    below: list["Tree"] = []


STORED = {
    "orderId": 7,
    "lines": [{"number": 1}],
    "dueAt": "2026-01-02T03:04:05Z",
    "price": "9.90",
    "byDay": {"3": {"number": 2, "gift": True}},
}
LOADED = Order(
    7,
    [Line(1)],
    datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    Decimal("9.90"),
    {3: Line(2, gift=True)},
)


def test_a_struct_becomes_json_and_comes_back() -> None:
    kind = typed_input(Order)
    assert kind.load(STORED) == LOADED
    assert kind.load(kind.dump(LOADED)) == LOADED
    assert kind.dump(STORED) is STORED


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        (Order, {"orderId": "7"}, r"input.orderId is refused: Expected `int`, got `str`"),
        (Order, {}, r"input is refused: Object missing required field `orderId`"),
        (Order, {"orderId": 7, "lines": [{"number": []}]}, r"input.lines\[0\].number is refused"),
        (Order, {"order_id": 7, "orderId": 7}, r"input.order_id is refused: .* no such member"),
        (Order, {"orderId": 7, "lines": [{"number": 1, "gft": 1}]}, r"lines\[0\].gft is refused"),
        (list[Line], [{"number": 1, "gft": 1}], r"input\[0\].gft is refused"),
        (Card | Cash, {"type": "card", "amount": 1}, r"input is refused: .*`number`"),
        (Card | Cash, {"type": "card", "number": "1", "amount": 1}, r"input.amount is refused"),
        (Order, 7, r"input is refused: Expected `object`, got `int`"),
        (Order, Line(1), r"input is refused: Object missing required field `orderId`"),
        (Order, object(), r"input is refused: .* type object is unsupported"),
    ],
)
def test_what_is_none_of_the_type_is_refused_with_its_path(
    kind: Any, given: Any, told: str
) -> None:
    with pytest.raises(BadPayload, match=told):
        typed_input(kind).dump(given)


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"below": [deep]}
    with pytest.raises(BadPayload, match="input is refused: it is nested too deeply"):
        typed_input(Tree).dump(deep)


def test_unions_of_structs_are_told_by_their_tags() -> None:
    kind = typed_input(Card | Cash)
    assert kind.dump(Cash(3)) == {"type": "cash", "amount": 3}
    assert kind.load({"type": "card", "number": "1"}) == Card("1")


def test_a_stored_input_has_members_that_the_struct_had_once() -> None:
    assert typed_input(Line).load({"number": 1, "dropped": 2}) == Line(1)


def test_steps_find_the_defaults_also_those_that_the_struct_omits() -> None:
    kind = typed_input(Order)
    stored = {"orderId": 7, "lines": [{"number": 1}], "dropped": 1}
    assert kind.filled(stored, kind.load(stored)) == {
        "orderId": 7,
        "lines": [{"number": 1, "gift": False}],
        "dropped": 1,
        "dueAt": None,
        "price": "0",
        "byDay": {},
    }


class Paid(msgspec.Struct):
    by: Card | Cash = msgspec.field(default_factory=lambda: Cash(0))
    note: str | msgspec.UnsetType = msgspec.UNSET


def test_defaults_are_members_that_the_type_takes_again() -> None:
    kind = typed_input(Paid)
    filled = kind.filled({}, kind.load({}))
    assert filled == {"by": {"type": "cash", "amount": 0}}
    assert kind.load(filled) == Paid()


def test_the_schema_has_the_members_in_view_and_says_that_there_are_no_others() -> None:
    schema = typed_input(Order).schema()
    assert list(schema["properties"]) == ["orderId", "lines", "dueAt", "price", "byDay"]
    assert (schema["required"], schema["additionalProperties"]) == (["orderId"], False)
    assert schema["$defs"]["Line"]["additionalProperties"] is False
    assert "$defs" not in typed_input(Line).schema()
    assert typed_input(Tree).schema()["$defs"]["Tree"]["type"] == "object"


class Odd(msgspec.Struct):
    number: int
    key: UUID
    of: complex


def test_a_struct_that_is_no_json_is_refused_when_the_plan_is_made() -> None:
    with pytest.raises(PlanError, match=r"plan odd: input=.* is no type of JSON: (?s:.*)complex"):

        @plan("odd", input=Odd)
        def odd(run: RunContext[Odd]) -> None:
            return None


class Refund(msgspec.Struct):
    amount: int
    why: str = ""


def test_a_struct_is_compared_as_an_argument_of_a_step() -> None:
    assert digest("s", [Line(1)], {}) == digest("s", [{"number": 1, "gift": False}], {})
    assert digest("s", [Line(1)], {}) != digest("s", [Line(2)], {})


class Coins(msgspec.Struct, tag="coins"):
    amount: int


def test_structs_of_other_tags_and_with_members_that_are_not_set_are_compared() -> None:
    assert digest("s", [Cash(1)], {}) != digest("s", [Coins(1)], {})
    assert digest("s", [Paid(Cash(1))], {}) != digest("s", [Paid(Cash(1), note="x")], {})


def test_a_struct_is_a_form() -> None:
    form = form_of(Refund)
    assert form.type.load({"amount": 3}) == Refund(3)
    assert form.schema["x-order"] == ["amount", "why"]
    with pytest.raises(BadPayload, match=r"the decision.because is refused: the form has no such"):
        form.type.dump({"amount": 3, "because": "x"})
