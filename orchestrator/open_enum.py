"""Enums whose values a newer version may extend. Pure."""

from enum import StrEnum
from typing import Self


class OpenEnum(StrEnum):
    """An enum of stored values that takes those of a newer version as they are.

    They can be shown and stored again, equal themselves, and are no member: what is done for a
    member is not done for them.

    >>> from beatless.orchestrator.open_enum import OpenEnum
    >>> class Color(OpenEnum):
    ...     RED = "red"
    >>> Color("blue").value, Color("blue") == Color("blue"), Color("blue") in list(Color)
    ('blue', True, False)
    """

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        if not isinstance(value, str):
            return None
        unknown = str.__new__(cls, value)
        unknown._name_, unknown._value_ = value, value
        return unknown
