"""The fields of a form: read from a JSON Schema, written as HTML, and its answers as JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.forms import DECISION, ORDER

Schema = Mapping[str, Any]

PREFIX = "f."
"""Before the names of the members, in the names of the fields."""

WHOLE = "decision"
"""The name of the only field of a form whose schema has no members: its JSON."""

MOST_REFERENCES = 8
"""Of a schema to another one of its definitions."""

INPUTS = {"date": "date", "time": "time", "email": "email", "uri": "url", "password": "password"}
"""The type of input for a format of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormField:
    """A member of a decision, as a person fills it in."""

    name: str
    title: str
    about: str
    kind: str
    """`boolean`, `integer`, `number`, `string`, `choice`, or `json` for all else."""
    required: bool
    choices: Sequence[Any]
    default: Any
    input: str
    """The type of the HTML input."""
    limits: Mapping[str, Any]
    """Attributes of the HTML input."""

    @property
    def decides(self) -> bool:
        """Whether two buttons ask for it: a yes, and a no."""
        return self.kind == "boolean" and self.required and self.name == "approved"


def fields_of(schema: Schema) -> list[FormField]:
    """The fields for a decision of this schema; one for its JSON if the schema has no members."""
    whole = _resolved(schema, schema)
    members = whole.get("properties")
    if not isinstance(members, Mapping) or not members:
        return [_field(WHOLE, {"title": "Decision (JSON)"}, required=True, kind="json")]
    required, order = whole.get("required") or (), [*(whole.get(ORDER) or ()), *members]
    return [
        _field(name, _resolved(members[name], schema), required=name in required)
        for name in dict.fromkeys(order)
        if name in members
    ]


def _field(name: str, member: Schema, *, required: bool, kind: str | None = None) -> FormField:
    choices = member.get("enum") or ([member["const"]] if "const" in member else [])
    known = kind or ("choice" if choices else str(member.get("type")))
    if known not in ("boolean", "integer", "number", "string", "choice"):
        known = "json"
    shapes = {
        "minLength": "minlength",
        "maxLength": "maxlength",
        "minimum": "min",
        "maximum": "max",
    }
    limits = {html: member[key] for key, html in shapes.items() if key in member}
    if known == "number":
        limits["step"] = "any"
    return FormField(
        name=name,
        title=str(member.get("title") or name),
        about=str(member.get("description") or ""),
        kind=known,
        required=required,
        choices=choices,
        default=member.get("default"),
        input="number"
        if known in ("integer", "number")
        else INPUTS.get(str(member.get("format")), "text"),
        limits=limits,
    )


def _resolved(member: Any, schema: Schema, most: int = MOST_REFERENCES) -> Schema:
    """A schema without references at its top; of several that may be, the one that text can be."""
    for left in reversed(range(most)):
        if not isinstance(member, Mapping):
            return {}
        if "$ref" in member:
            name = str(member["$ref"]).rpartition("/")[2]
            named = (schema.get("$defs") or {}).get(name) or {}
            member = {**named, **{key: value for key, value in member.items() if key != "$ref"}}
        elif isinstance(ways := member.get("anyOf") or member.get("oneOf"), list):
            ways = [_resolved(each, schema, left) for each in ways if each != {"type": "null"}]
            texts = [each for each in ways if each.get("type") == "string"]
            chosen = texts[0] if texts else ways[0] if len(ways) == 1 else {}
            rest = {key: value for key, value in member.items() if key not in ("anyOf", "oneOf")}
            member = {**chosen, **rest}
        else:
            return member
    return {}


def html_of(fields: Sequence[FormField], answers: Mapping[str, str] | None = None) -> str:
    """The fields, with these answers in them, and the buttons."""
    rows = [_row(each, answers) for each in fields if not each.decides]
    decides = next((each for each in fields if each.decides), None)
    if decides is None:
        buttons = '<button class="primary">Send the decision</button>'
    else:
        name = escape(PREFIX + decides.name)
        buttons = (
            f'<button class="primary" name="{name}" value="true">Approve</button>'
            f'<button class="danger" name="{name}" value="false">Reject</button>'
        )
    # The key Enter presses the first button: nobody shall approve by it.
    nothing = "" if decides is None else "<button hidden disabled></button>"
    return f'{nothing}{"".join(rows)}<div class="actions">{buttons}</div>'


def _row(each: FormField, answers: Mapping[str, str] | None) -> str:
    name = PREFIX + each.name
    given = _text(each) if answers is None else _given(answers, each) or ""
    about = f"<small>{escape(each.about)}</small>" if each.about else ""
    label = escape(each.title) + ("" if each.required else " <small>(optional)</small>")
    if each.kind == "boolean":
        options = "".join(
            f'<label class="choice"><input type="radio" name="{escape(name)}" value="{value}"'
            f"{' required' if each.required else ''}{' checked' if given == value else ''}>"
            f"{word}</label>"
            for value, word in (("true", "Yes"), ("false", "No"))
        )
        return f"<fieldset><legend>{label}</legend>{options}{about}</fieldset>"
    return f"<label>{label}{_input(each, name, given)}{about}</label>"


def _input(each: FormField, name: str, given: str) -> str:
    common = f' name="{escape(name)}"' + (" required" if each.required else "")
    if each.kind == "choice":
        texts = [json.dumps(choice, ensure_ascii=False) for choice in each.choices]
        blank = "" if each.required and given else '<option value=""></option>'
        options = "".join(
            f'<option value="{escape(text)}"{" selected" if text == given else ""}>'
            f"{escape(str(choice))}</option>"
            for text, choice in zip(texts, each.choices, strict=True)
        )
        return f"<select{common}>{blank}{options}</select>"
    if each.kind == "json" or (each.input == "text" and not each.required and not each.limits):
        return f'<textarea rows="3"{common}>{escape(given)}</textarea>'
    limits = "".join(f' {key}="{escape(str(value))}"' for key, value in each.limits.items())
    return f'<input type="{each.input}" value="{escape(given)}"{limits}{common}>'


def _text(each: FormField) -> str:
    """The default, as a field has it."""
    if each.default is None or each.default == "":
        return ""
    if each.kind == "string":
        return str(each.default)
    return json.dumps(each.default, ensure_ascii=False)


def decision_of(fields: Sequence[FormField], answers: Mapping[str, str]) -> Any:
    """The JSON of a filled-in form. What is no number is left as text, which the form refuses.

    Raises BadPayload for what is to be JSON and is not.
    """
    found: dict[str, Any] = {}
    for each in fields:
        text = _given(answers, each)
        if text is None or (not text.strip() and not (each.required and each.kind == "string")):
            continue
        found[each.name] = _value(each, text)
    if [each.name for each in fields] == [WHOLE] and fields[0].kind == "json":
        return found.get(WHOLE)
    return found


def _given(answers: Mapping[str, str], each: FormField) -> str | None:
    """The text of a field; who writes the request by hand may leave the prefix away."""
    return answers.get(PREFIX + each.name, answers.get(each.name))


def refused_field(fields: Sequence[FormField], where: str) -> str | None:
    """The name of the field in which a value was refused, given the place of that value."""
    if [each.name for each in fields] == [WHOLE]:
        return PREFIX + WHOLE
    names = (each.name for each in fields)
    found = (name for name in names if re.match(rf"{DECISION}\.{re.escape(name)}(?!\w)", where))
    return next((PREFIX + name for name in found), None)


def _value(each: FormField, text: str) -> Any:
    match each.kind:
        case "boolean":
            return {"true": True, "false": False}.get(text, text)
        case "integer" | "number":
            with suppress(ValueError):  # a float would round a whole number of many digits
                return int(text)
            with suppress(ValueError):
                return float(text) if each.kind == "number" else text
        case "choice" | "json":
            try:
                return json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadPayload(f"{DECISION}.{each.name}", f"is not JSON: {error}") from error
    return text
