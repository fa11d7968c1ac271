"""The declared type of a plan's input: checks, conversion, JSON Schema. By pydantic."""

from typing import Any, Protocol

from beatless.orchestrator.errors import BadPayload

INPUT = "the run's input"
"""Its name in errors."""


class TypedInput(Protocol):
    """A type of input: a dataclass, a TypedDict, a model of pydantic, or anything that it knows."""

    def load(self, value: Any) -> Any:
        """The value of this type that JSON stands for. Raises BadPayload, naming the member."""

    def dump(self, value: Any) -> Any:
        """The JSON of a value: one of this type, or JSON already. Raises BadPayload."""

    def schema(self) -> dict[str, Any]:
        """The JSON Schema of the type."""


class Untyped:
    """The input of a plan that declares no type: any JSON."""

    def load(self, value: Any) -> Any:
        return value

    def dump(self, value: Any) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


class PydanticInput:
    """A type that pydantic knows."""

    def __init__(self, type: Any) -> None:
        """Raises ImportError without pydantic, and its error for a type that it cannot check."""
        from pydantic import TypeAdapter

        self._type = type
        self._adapter = TypeAdapter(type)
        self.schema()

    def load(self, value: Any) -> Any:
        from pydantic import ValidationError

        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            path = "".join(
                f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]
            )
            raise BadPayload(f"{INPUT}{path}", f"is refused: {first['msg']}") from error

    def dump(self, value: Any) -> Any:
        if isinstance(value, dict | list | str | int | float | None):
            self.load(value)
            return value
        return self._adapter.dump_python(self.load(value), mode="json")

    def schema(self) -> dict[str, Any]:
        return self._adapter.json_schema()


def typed_input(type: Any) -> TypedInput:
    """Of this type; None: any JSON. Raises ImportError, and pydantic's errors."""
    return Untyped() if type is None else PydanticInput(type)
