"""Forms of approvals: the type of a decision, which its sender and the worker check. Pure."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from beatless.orchestrator.errors import BadPayload
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.typed_input import TypedInput, typed

DECISION = "the decision"
"""Its name in errors."""

NO_MEMBER = "the form has no such member"

SCHEMA_BYTES = 32_768
"""The largest JSON Schema of a form: it is stored with each wait for an approval."""


ORDER = "x-order"
"""In the schema of a form: its members in order, which jsonb does not keep."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision of an approval without a form of its own.

    >>> from beatless import Verdict
    >>> Verdict(approved=True).comment
    ''
    """

    approved: bool
    comment: str = ""


class VerdictInput:
    """The type of a Verdict, without pydantic, which need not be installed."""

    def load(self, value: Any) -> Verdict:
        return Verdict(**self.dump(value))

    def dump(self, value: Any) -> dict[str, Any]:
        members = asdict(value) if isinstance(value, Verdict) else value
        if not isinstance(members, dict):
            raise BadPayload(DECISION, 'is refused: give it {"approved": true} or false')
        for name, kind in (("approved", bool), ("comment", str)):
            if name in members and not isinstance(members[name], kind):
                raise BadPayload(f"{DECISION}.{name}", f"is refused: it is no {kind.__name__}")
        if "approved" not in members:
            raise BadPayload(f"{DECISION}.approved", "is refused: Field required")
        for name in members:
            if name not in ("approved", "comment"):
                raise BadPayload(f"{DECISION}.{name}", f"is refused: {NO_MEMBER}")
        return members

    def schema(self) -> dict[str, Any]:
        return {
            "title": "Verdict",
            "type": "object",
            "properties": {
                "approved": {"title": "Approved", "type": "boolean"},
                "comment": {"title": "Comment", "type": "string", "default": ""},
            },
            "required": ["approved"],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The type of the decisions of an approval."""

    reference: str
    """`module:name` of the type, by which other processes find it."""
    type: TypedInput
    schema: Mapping[str, Any]
    """Its JSON Schema."""


def form_of(kind: Any) -> Form:
    """The form of a dataclass, TypedDict, model of pydantic or Struct; of None, that of a Verdict.

    Raises PlanError for a type that these cannot check, or without pydantic.
    """
    if kind is None:
        kind = Verdict
    if not isinstance(kind, type):
        # Those who send decisions find the type by its name, and `list[int]` has that of list.
        raise PlanError(
            f"form={kind!r} is no type of JSON with a name of its own: give it a dataclass, a "
            "TypedDict, a model of pydantic or a Struct of msgspec; other types may be those of "
            "its members"
        )
    try:
        return _form_of(kind)
    except ImportError as error:
        raise PlanError(
            f"form={kind!r} is checked by pydantic, which is not installed: pip install pydantic, "
            "or leave form away"
        ) from error
    except PlanError:
        raise
    except Exception as error:  # pydantic's, of several classes, and those of the user's type
        raise PlanError(f"form={kind!r} is no type of JSON: {error}") from error


@lru_cache(maxsize=256)
def _form_of(kind: Any) -> Form:
    """Kept: the function of a plan asks for it each time that it is called."""
    type: TypedInput = VerdictInput()
    if kind is not Verdict:
        type = typed(kind, where=DECISION, no_member=NO_MEMBER)
    schema = type.schema()
    named = (schema.get("$defs") or {}).get(str(schema.get("$ref")).rpartition("/")[2]) or schema
    schema[ORDER] = list(named.get("properties") or ())
    if len(json.dumps(schema)) > SCHEMA_BYTES:
        raise PlanError(f"form={kind!r} has a JSON Schema of more than {SCHEMA_BYTES} bytes")
    return Form(reference=_reference(kind), type=type, schema=schema)


def find_form(reference: str, candidates: Iterable[Any] = ()) -> Form | None:
    """The form of the type of this name that the process has: one of these, or of a loaded module.

    No module is imported for it. None if the process has none.
    """
    for each in candidates:
        if isinstance(each, type) and _reference(each) == reference:
            return form_of(each)
    module, _, name = reference.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return form_of(found) if isinstance(found, type) else None


def _reference(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}:{getattr(kind, '__qualname__', '')}"
