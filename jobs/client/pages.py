"""Pages of runs, which end after so many bytes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from beatless.orchestrator.records import Place, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """Runs as JSON objects: as many as were asked for, or as fit into so many bytes."""

    lines: list[str]
    next: Place | None
    """Where the rest begins; None if there is none."""
    refused: Sequence[Exception] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedRunPage:
    """Runs as JSON objects, in the order of numbers."""

    lines: list[str]
    next: int | None
    """The number of the last one, if there may be more."""


def numbered_page_of(found: Iterable[Run], limit: int, max_bytes: int) -> NumberedRunPage:
    """The first `limit` children, or as many of them as reach `max_bytes`."""
    page = page_of(((run, (run.created_at, str(run.child_no))) for run in found), limit, max_bytes)
    return NumberedRunPage(lines=page.lines, next=None if page.next is None else int(page.next[1]))


def page_of(found: Iterable[tuple[Run, Place]], limit: int, max_bytes: int) -> RunPage:
    """The first `limit` runs, or as many of them as reach `max_bytes`."""
    lines: list[str] = []
    size = 0
    for run, place in found:
        lines.append(json.dumps(run.to_dict(), ensure_ascii=False, separators=(",", ":")))
        size += len(lines[-1].encode())
        if size >= max_bytes or len(lines) == limit:
            return RunPage(lines=lines, next=place)
    return RunPage(lines=lines, next=None)
