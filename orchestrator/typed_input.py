"""The declared type of a plan's input: checks, conversion, JSON Schema. By pydantic."""

from typing import Any, NewType, Protocol

from beatless.orchestrator.errors import BadPayload

INPUT = "the run's input"
"""Its name in errors."""

UNKNOWN_MEMBER = ("unexpected_keyword_argument", "extra_forbidden")
"""The types of error by which pydantic refuses a member that a type does not have."""

NO_MEMBER = "the plan's type of input has no such member"


class TypedInput(Protocol):
    """A type of input: a dataclass, a TypedDict, a model of pydantic, or anything that it knows."""

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
        return self._given.dump_python(checked, mode="json")

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
    return loaded.get(name) if isinstance(loaded, dict) else getattr(loaded, name, None)


def typed_input(type: Any) -> InputOfPlan:
    """Of this type; None: any JSON. Raises ImportError, and pydantic's errors."""
    return Untyped() if type is None else PydanticInput(type)
