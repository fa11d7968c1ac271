"""Pages of runs, schedules and approvals, which end after so many bytes."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from beatless.orchestrator.records import Place, Run
from beatless.orchestrator.schedule import StoredSchedule

P = TypeVar("P")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePage:
    """Schedules as JSON objects, in the order of their names."""

    lines: list[str]
    next: str | None
    """The name of the last one, if there may be more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalPage:
    """Open approvals as JSON objects, each with its run's id, plan and queue."""

    lines: list[str]
    next: Place | None
    """That of the last run that was looked at, if there may be more."""


def schedule_page_of(found: Iterable[StoredSchedule], limit: int, max_bytes: int) -> SchedulePage:
    """The first `limit` schedules, or as many of them as reach `max_bytes`."""
    lines, name = _lines_of(((each.to_dict(), each.name) for each in found), limit, max_bytes)
    return SchedulePage(lines=lines, next=name)


def numbered_page_of(found: Iterable[Run], limit: int, max_bytes: int) -> NumberedRunPage:
    """The first `limit` children, or as many of them as reach `max_bytes`."""
    page = page_of(((run, (run.created_at, str(run.child_no))) for run in found), limit, max_bytes)
    return NumberedRunPage(lines=page.lines, next=None if page.next is None else int(page.next[1]))


def page_of(found: Iterable[tuple[Run, Place]], limit: int, max_bytes: int) -> RunPage:
    """The first `limit` runs, or as many of them as reach `max_bytes`."""
    lines, place = _lines_of(((run.to_dict(), place) for run, place in found), limit, max_bytes)
    return RunPage(lines=lines, next=place)


def line_of(shown: dict[str, Any]) -> str:
    """An object as it travels."""
    return json.dumps(shown, ensure_ascii=False, separators=(",", ":"))


def _lines_of(
    found: Iterable[tuple[dict[str, Any], P]], limit: int, max_bytes: int
) -> tuple[list[str], P | None]:
    """As many as fit, and the place of the last one if there may be more."""
    lines: list[str] = []
    size = 0
    for shown, place in found:
        lines.append(line_of(shown))
        size += len(lines[-1].encode())
        if size >= max_bytes or len(lines) == limit:
            return lines, place
    return lines, None
