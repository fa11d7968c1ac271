"""Makes a history smaller that has a violation: what is left of it still has the same one.

By delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input",
2002): first the other runs go, then halves, quarters and so on of the records, until none can.
"""

from collections.abc import Callable, Sequence

from tests.faults.checker import Violation, check
from tests.faults.history import Record

MOST_CHECKS = 2000
"""Checks after which what has been reached is good enough."""


def shrunk(records: Sequence[Record], violation: Violation) -> list[Record]:
    """The fewest records that were found in which this violation is, word for word."""

    def violated(found: Sequence[Record]) -> bool:
        try:
            return violation in check(found)
        except (KeyError, IndexError):  # a record without one that it stands on
            return False

    own = [r for r in records if r.get("run_id", violation.run_id) == violation.run_id]
    return reduced(own if violated(own) else list(records), violated)


def reduced(records: list[Record], violated: Callable[[Sequence[Record]], bool]) -> list[Record]:
    """The records without all those parts, from large to small, that are not needed."""
    size, checks = max(1, len(records) // 2), 0
    while checks < MOST_CHECKS:
        start, before = 0, len(records)
        while start < len(records) and checks < MOST_CHECKS:
            without = records[:start] + records[start + size :]
            checks += 1
            if violated(without):
                records = without
            else:
                start += size
        if size == 1 and len(records) == before:
            break
        size = max(1, size // 2)
    return records
