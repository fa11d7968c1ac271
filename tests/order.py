"""The order in which the workers of pytest-xdist begin the tests of a session."""

from collections.abc import Mapping, Sequence
from typing import Any


def longest_first(items: Sequence[Any], minutes: Mapping[Any, float], workers: int) -> list[Any]:
    """The items; those that take minutes, the longest first, at the begin of each worker's part.

    pytest-xdist begins with parts of equal size (`--dist worksteal`). One that began last would
    run alone, while the other workers have nothing left to do.
    """
    begins = [0]
    for others in range(workers, 1, -1):
        begins.append(begins[-1] + (len(items) - begins[-1]) // others)
    places = {
        item: begins[number % workers] + number // workers
        for number, item in enumerate(sorted(minutes, key=lambda item: -minutes[item]))
    }
    found = [item for item in items if item not in minutes]
    for item in sorted(places, key=lambda each: places[each]):
        found.insert(places[item], item)
    return found
