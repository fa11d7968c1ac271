"""Limits of durations: in Python, over HTTP, on the command line."""

from datetime import datetime
from typing import Any

MOST_S = 10 * 365 * 86_400.0
"""Ten years. Longer times could be stored, and not be read again: the years end with 9999."""

FIRST_YEAR, LAST_YEAR = 1000, 9998
"""In all time zones a year of four digits."""


def problem_with_seconds(given: Any) -> str:
    """The problem with a number of seconds, to follow its name; empty if it has none."""
    if is_number(given) and 0 <= given <= MOST_S:
        return ""
    return f"is {given!r}, which is not 0 seconds to ten years"


def is_number(given: Any) -> bool:
    """Whether it is one, and no truth value."""
    return isinstance(given, int | float) and not isinstance(given, bool)


def problem_with_moment(given: Any) -> str:
    """The same for a point in time."""
    if not isinstance(given, datetime):
        return f"is {given!r}, which is not a datetime"
    if given.tzinfo is None:
        return "has no time zone: use datetime.now(UTC) + …"
    if not FIRST_YEAR <= given.year <= LAST_YEAR:
        return f"is {given.isoformat()}, which is not in the years {FIRST_YEAR} to {LAST_YEAR}"
    return ""
