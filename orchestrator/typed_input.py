"""The declared type of a plan's input: checks, conversion, JSON Schema. By pydantic or msgspec."""

import dataclasses
import sys
import typing
from typing import Any, NewType, Protocol

from beatless.orchestrator.errors import BadPayload

INPUT = "the run's input"
"""Its name in errors."""

UNKNOWN_MEMBER = ("unexpected_keyword_argument", "extra_forbidden")
"""The types of error by which pydantic refuses a member that a type does not have."""

NO_MEMBER = "the plan's type of input has no such member"


STARS = (
    "pydantic writes stars in its place; give JSON, or declare a str, which App(redact=…) hides "
    "wherever runs are shown"
)


class TypedInput(Protocol):
    """A type of input: a dataclass, a TypedDict, a model of pydantic, a Struct of msgspec."""

    def load(self, value: Any) -> Any:
        """The value of this type that stored JSON stands for. Raises BadPayload, naming the member.

        Members that a dataclass or TypedDict does not have are left out.
        """

    def dump(self, value: Any) -> Any:
        """The JSON of a value that is given: one of this type, or JSON already. Raises BadPayload.

        Also for members that a dataclass or TypedDict does not have.
        """

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the type."""


class InputOfPlan(TypedInput, Protocol):
    """The type of the input of a plan's runs."""

    def filled(self, stored: Any, loaded: Any) -> Any:
        """Stored JSON with the members that it leaves to the defaults of the type."""


class Untyped:
    """The input of a plan that declares no type: any JSON."""

    def load(self, value: Any) -> Any:
        return value

    def dump(self, value: Any) -> Any:
        return value

    def filled(self, stored: Any, loaded: Any) -> Any:
        del loaded
        return stored

    def schema(self) -> dict[str, Any]:
        return {}


class PydanticInput:
    """A type that pydantic knows."""

    def __init__(self, type: Any, *, where: str = INPUT, no_member: str = NO_MEMBER) -> None:
        """`where` names the value in errors, `no_member` is the reason for an unknown member.

        Raises ImportError without pydantic, and its error for a type that it cannot check.
        """
        from pydantic import ConfigDict, TypeAdapter

        self._where, self._no_member = where, no_member
        self._stored = TypeAdapter(type)
        """Of an input that may have been given to an earlier version, with members of then."""
        new_type: Any = NewType  # under a name, because a dataclass itself takes no config
        self._given = TypeAdapter(new_type("Input", type), config=ConfigDict(extra="forbid"))
        """Of one that is given now. Members that the type does not have are refused.

        The config is that of dataclasses and TypedDicts without one of their own, also within
        others; models of pydantic have theirs.
        """
        self.schema()

    def load(self, value: Any) -> Any:
        return self._checked(self._stored, value)

    def dump(self, value: Any) -> Any:
        checked = self._checked(self._given, value)
        if isinstance(value, dict | list | str | int | float | None):
            return value
        path = _secret(self._given.dump_python(checked, round_trip=True))
        if path is not None:
            raise BadPayload(f"{self._where}{path}", f"is refused: {STARS}")
        # By the names and without the members that are computed, as `load` takes it.
        told = self._given.dump_python(checked, mode="json", by_alias=True, round_trip=True)
        self._checked(self._given, told)
        return told

    def filled(self, stored: Any, loaded: Any) -> Any:
        from pydantic_core import PydanticSerializationError

        try:
            whole = self._stored.dump_python(
                loaded, mode="json", by_alias=True, round_trip=True, warnings=False
            )
        except PydanticSerializationError:  # a default that is no JSON: there is nothing to add
            return stored
        return _with_members(stored, whole, loaded)

    def schema(self) -> dict[str, Any]:
        return self._given.json_schema()

    def _checked(self, adapter: Any, value: Any) -> Any:
        """The value of the type that JSON stands for. Raises BadPayload, naming the member."""
        from pydantic import ValidationError

        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
            )
            reason = self._no_member if first["type"] in UNKNOWN_MEMBER else first["msg"]
            raise BadPayload(f"{self._where}{path}", f"is refused: {reason}") from error


class MsgspecInput:
    """A Struct of msgspec, or a list, dict or union of them."""

    def __init__(self, type: Any, *, where: str = INPUT, no_member: str = NO_MEMBER) -> None:
        """As PydanticInput. Raises TypeError for a type that msgspec cannot check."""
        import msgspec

        self._msgspec = msgspec
        self._type, self._where, self._no_member = type, where, no_member
        self.schema()

    def load(self, value: Any) -> Any:
        try:
            return self._msgspec.convert(value, self._type, str_keys=True)
        except self._msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at `$")
            raise BadPayload(
                f"{self._where}{path.removesuffix('`')}", f"is refused: {reason}"
            ) from error
        except RecursionError as error:
            raise BadPayload(self._where, "is refused: it is nested too deeply") from error

    def dump(self, value: Any) -> Any:
        if not isinstance(value, dict | list | str | int | float | None):
            try:
                value = self._msgspec.to_builtins(value, str_keys=True)
            except (TypeError, ValueError) as error:  # msgspec's name the type, and no member
                raise BadPayload(self._where, f"is refused: {error}") from error
        path = _unknown(value, self.load(value))
        if path:
            raise BadPayload(f"{self._where}{path}", f"is refused: {self._no_member}")
        return value

    def filled(self, stored: Any, loaded: Any) -> Any:
        return _with_members(stored, self._whole(loaded), loaded)

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = self._msgspec.json.schema(self._type)
        kinds = schema.get("$defs", {})
        for kind in kinds.values():
            if kind.get("type") == "object" and "additionalProperties" not in kind:
                kind["additionalProperties"] = False
        if "$ref" in schema and (name := schema["$ref"].rpartition("/")[2]) in kinds:
            schema = {**kinds[name], **schema}  # its members in view, as pydantic has them
            del schema["$ref"]
            if not _refers(schema, name):
                del kinds[name]
            if not kinds:
                del schema["$defs"]
        return schema

    def _whole(self, loaded: Any) -> Any:
        """The JSON of a value with all members, also those that it omits as defaults."""
        if isinstance(loaded, self._msgspec.Struct) and not loaded.__struct_config__.array_like:
            names = zip(loaded.__struct_encode_fields__, loaded.__struct_fields__, strict=True)
            members = {encoded: getattr(loaded, name) for encoded, name in names}
            config = loaded.__struct_config__
            tag = {} if config.tag_field is None else {config.tag_field: config.tag}
            return tag | {
                name: self._whole(value)
                for name, value in members.items()
                if value is not self._msgspec.UNSET
            }
        if isinstance(loaded, list | tuple):
            return [self._whole(each) for each in loaded]
        if isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded):
            return {name: self._whole(value) for name, value in loaded.items()}
        try:
            return self._msgspec.to_builtins(loaded, str_keys=True)
        except (TypeError, ValueError):  # a default that is no JSON: there is nothing to add
            return None


def _secret(value: Any) -> str | None:
    """The path of a secret of pydantic's in a value; None if it has none."""
    if hasattr(value, "get_secret_value"):
        return ""
    match value:
        case dict():
            parts = [(f".{name}", each) for name, each in value.items()]
        case list() | tuple() | set() | frozenset():
            parts = [(f"[{index}]", each) for index, each in enumerate(value)]
        case _:
            return None
    found = (f"{path}{below}" for path, each in parts if (below := _secret(each)) is not None)
    return next(found, None)


def _refers(schema: Any, name: str) -> bool:
    """Whether a JSON Schema refers to this one of its definitions."""
    match schema:
        case dict():
            return schema.get("$ref") == f"#/$defs/{name}" or any(
                _refers(value, name) for value in schema.values()
            )
        case list():
            return any(_refers(each, name) for each in schema)
    return False


def _unknown(value: Any, loaded: Any) -> str:
    """The path of a member of JSON that the type of its loaded value does not have, or ""."""
    match value:
        case dict():
            known = _members_of(loaded)
            for name, each in value.items():
                if known is not None and name not in known:
                    return f".{name}"
                member = known[name] if known is not None else None
                if found := _unknown(each, member):
                    return f".{name}{found}"
        case list() if isinstance(loaded, list | tuple) and len(loaded) == len(value):
            for index, (each, member) in enumerate(zip(value, loaded, strict=True)):
                if found := _unknown(each, member):
                    return f"[{index}]{found}"
    return ""


def _members_of(loaded: Any) -> dict[str, Any] | None:
    """The members of an object by their names in JSON; None if it may have others."""
    if hasattr(loaded, "__struct_fields__"):
        names = zip(loaded.__struct_encode_fields__, loaded.__struct_fields__, strict=True)
        members = {encoded: getattr(loaded, name) for encoded, name in names}
        tag = loaded.__struct_config__.tag_field
        return members if tag is None else {**members, tag: None}
    if dataclasses.is_dataclass(loaded):
        return {each.name: getattr(loaded, each.name) for each in dataclasses.fields(loaded)}
    if isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded):
        return loaded
    return None


def _with_members(stored: Any, whole: Any, loaded: Any) -> Any:
    """JSON with the members of its whole that it lacks. Values that are there stay as they are.

    `loaded` is the value of the type: its lists have the order of the JSON, its sets have none.
    """
    match stored, whole:
        case dict(), dict():
            inner = {
                name: _with_members(value, whole.get(name), _member(loaded, name))
                for name, value in stored.items()
            }
            return {**whole, **inner}
        case list(), list() if isinstance(loaded, list | tuple) and len(loaded) == len(stored):
            return [_with_members(*each) for each in zip(stored, whole, loaded, strict=True)]
    return stored


def _member(loaded: Any, name: str) -> Any:
    if hasattr(loaded, "__struct_fields__"):
        return (_members_of(loaded) or {}).get(name)
    return loaded.get(name) if isinstance(loaded, dict) else getattr(loaded, name, None)


def _has_struct(type: Any) -> bool:
    """Whether it is a Struct of msgspec, or a list, dict or union of them."""
    msgspec = sys.modules.get("msgspec")  # who has made one has imported it
    if msgspec is None:
        return False
    if isinstance(type, msgspec.StructMeta):
        return True
    return any(_has_struct(each) for each in typing.get_args(type))


def typed(type: Any, *, where: str = INPUT, no_member: str = NO_MEMBER) -> InputOfPlan:
    """Of this type, by the package that knows it. Raises ImportError, and its errors."""
    kind = MsgspecInput if _has_struct(type) else PydanticInput
    return kind(type, where=where, no_member=no_member)


def typed_input(type: Any) -> InputOfPlan:
    """Of this type; None: any JSON. Raises ImportError, and the errors of pydantic or msgspec."""
    return Untyped() if type is None else typed(type)
