"""The fields of a form: from a JSON Schema to HTML, and from answers back to JSON."""

from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from beatless import BadPayload, Goto, Verdict, approve
from beatless.api.form_fields import decision_of, fields_of, html_of, refused_field
from beatless.orchestrator.forms import find_form, form_of
from beatless.orchestrator.outcomes import PlanError


class Way(Enum):
    BANK = "bank"
    VOUCHER = "voucher"


@dataclass
class Line:
    number: int


class Everything(BaseModel):
    amount: Annotated[int, Field(ge=1, le=9, description="in <euros>")]
    price: Decimal
    share: float = 0.5
    way: Way = Way.BANK
    day: date | None = None
    size: Literal[1, 2] = 1
    sure: bool
    lines: list[Line] = []
    note: str | None = None


@dataclass
class Deep:
    lines: list[Line] = field(default_factory=list)
    next: "Deep | None" = None


FORM = form_of(Everything)
GIVEN = {
    "f.amount": "7",
    "f.price": "12.30",
    "f.share": "0.25",
    "f.way": '"voucher"',
    "f.day": "2026-12-24",
    "f.size": "2",
    "f.sure": "true",
    "f.lines": '[{"number": 3}]',
    "f.note": "",
    "other": "x",
}


def test_each_type_has_a_field_whose_answer_the_form_takes() -> None:
    stored = dict(FORM.schema) | {"properties": dict(sorted(FORM.schema["properties"].items()))}
    fields = fields_of(stored)
    assert [(each.name, each.kind, each.required) for each in fields] == [
        ("amount", "integer", True),
        ("price", "string", True),
        ("share", "number", False),
        ("way", "choice", False),
        ("day", "string", False),
        ("size", "choice", False),
        ("sure", "boolean", True),
        ("lines", "json", False),
        ("note", "string", False),
    ]
    found = FORM.type.load(FORM.type.dump(decision_of(fields, GIVEN)))
    assert found == Everything(
        amount=7,
        price=Decimal("12.30"),
        share=0.25,
        way=Way.VOUCHER,
        day=date(2026, 12, 24),
        size=2,
        sure=True,
        lines=[Line(3)],
    )


@pytest.mark.parametrize("member", ["amount", "share"])
def test_a_whole_number_of_many_digits_stays_what_it_is(member: str) -> None:
    found = decision_of(fields_of(FORM.schema), GIVEN | {f"f.{member}": "1970670598291982290"})
    assert found[member] == 1970670598291982290


def test_what_a_person_has_written_is_in_the_form_again_as_text() -> None:
    shown = html_of(fields_of(FORM.schema), {**GIVEN, "f.note": '"><script>', "f.amount": "<b>"})
    assert "<script>" not in shown
    assert "&quot;&gt;&lt;script&gt;" in shown
    assert "in &lt;euros&gt;" in shown
    assert 'min="1" max="9"' in shown
    assert '<input type="date"' in shown
    assert '<option value="&quot;voucher&quot;" selected>' in shown


def test_an_answer_that_is_no_number_or_no_json_is_refused_with_its_name() -> None:
    fields = fields_of(FORM.schema)
    with pytest.raises(BadPayload, match=r"the decision\.amount is refused"):
        FORM.type.dump(decision_of(fields, GIVEN | {"f.amount": "many"}))
    with pytest.raises(BadPayload, match=r"the decision\.lines is not JSON"):
        decision_of(fields, GIVEN | {"f.lines": "[1"})
    with pytest.raises(BadPayload, match=r"the decision\.sure is refused"):
        FORM.type.dump(decision_of(fields, {**GIVEN, "f.sure": "maybe"}))


def test_a_verdict_is_asked_by_two_buttons() -> None:
    fields = fields_of(form_of(None).schema)
    shown = html_of(fields)
    nothing = "<button hidden disabled></button>"  # the first one is what the key Enter presses
    assert shown.startswith(nothing)
    assert shown.removeprefix(nothing).count("<button") == 2
    assert 'name="f.approved" value="false">Reject' in shown
    assert decision_of(fields, {"f.approved": "false", "f.comment": "no"}) == {
        "approved": False,
        "comment": "no",
    }


def test_an_answer_that_is_written_by_hand_needs_no_prefix() -> None:
    fields = fields_of(form_of(None).schema)
    assert decision_of(fields, {"approved": "true"}) == {"approved": True}
    assert decision_of(fields, {"approved": "true", "f.approved": "false"}) == {"approved": False}


def test_the_field_in_which_a_value_was_refused_is_found() -> None:
    fields = fields_of(FORM.schema)
    for where in ("the decision.lines", "the decision.lines.0.text", "the decision.lines[1]"):
        assert refused_field(fields, where) == "f.lines"
    for where in ("the decision", "the decision.linesman", ""):
        assert refused_field(fields, where) is None


def test_a_schema_without_members_has_one_field_for_json() -> None:
    (only,) = fields_of(form_of(int).schema)
    assert only.kind == "json"
    assert refused_field([only], "the decision") == "f.decision"
    assert decision_of([only], {"f.decision": "7"}) == 7
    assert fields_of({}) == [only]


def test_a_form_that_holds_itself_has_fields() -> None:
    assert [each.kind for each in fields_of(form_of(Deep).schema)] == ["json", "json"]
    loop: dict[str, Any] = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}
    assert fields_of(loop)[0].kind == "json"


def test_a_type_is_found_by_its_name_and_nothing_is_imported_for_it() -> None:
    assert find_form(form_of(Everything).reference) is form_of(Everything)
    assert find_form("beatless.orchestrator.forms:Verdict") is form_of(Verdict)

    @dataclass
    class Local:
        number: int

    reference = form_of(Local).reference
    assert find_form(reference) is None
    assert find_form(reference, [print, Local]) is form_of(Local)
    for strange in ("", ":", "antigravity:fly", "sys:path", "os:system", "builtins:print.x"):
        assert find_form(strange) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"title": ""}, "must be text"),
        ({"title": "x" * 201}, "must be text"),
        ({"title": "\0?"}, "NUL"),
        ({"title": "¿?"}, "give it one"),
        ({"title": "a?", "name": "a b"}, "must match"),
        ({"title": "a?", "form": object()}, "no type of JSON"),
        ({"title": "a?", "form": list[int]}, "a name of its own"),
        ({"title": "a?", "timeout": 0}, "timeout must be more than 0"),
        ({"title": "a?", "on_timeout": Goto("b")}, "no timeout"),
        ({"title": "a?", "timeout": 1, "on_timeout": "b"}, "give it a Goto"),
    ],
)
def test_an_approval_that_cannot_work_is_refused_with_what_to_do(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        approve(**options)
