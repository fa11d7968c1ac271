"""Cursors over HTTP: of a page of runs, and of a place in a stream."""

import base64
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from beatless.errors import BadRequest
from beatless.orchestrator.events import storable

EVENT_ID = re.compile(r"(?:([0-9a-z]{1,40})\.)?([0-9]{1,9})")

TAIL_ID = re.compile(r"([0-9a-z]{1,40})\.([0-9]{1,16})\.([0-9]{1,16})")

BEGIN = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailPlace:
    """How far a tail has come, by the clock of Postgres."""

    epoch: str
    """Of the history that it is a place in."""
    began: datetime
    """Events before it are not the tail's."""
    seen: datetime
    """Every event until then was given, but for those that were committed or published late."""


def encode_page(created_at: datetime, run_id: str) -> str:
    """The cursor of the runs that come after this one in a list."""
    text = json.dumps([created_at.isoformat(), run_id])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_page(cursor: str) -> tuple[datetime, str]:
    """(created_at, run_id) of a cursor. Raises BadRequest."""
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        moment, run_id = json.loads(base64.urlsafe_b64decode(padded))
        given = datetime.fromisoformat(moment)
        # Postgres takes no time zone that is 16 hours or more away.
        found = given.astimezone(UTC) if given.tzinfo else None
    except (ValueError, TypeError, RecursionError, OverflowError):
        found, run_id = None, None
    if found is None or not isinstance(run_id, str) or not storable(run_id):
        raise BadRequest("cursor", "is not one of ours: pass the `next` of the page before")
    return found, run_id


def parse_event_id(text: str, name: str) -> tuple[str | None, int]:
    """(epoch or None, seq) of `5` or `<epoch>.5`. Raises BadRequest."""
    found = EVENT_ID.fullmatch(text)
    if found is None:
        raise BadRequest(name, f"is {text[:100]!r}; it must be a seq or <epoch>.<seq>")
    return found[1], int(found[2])


def encode_tail(place: TailPlace) -> str:
    """The id of a frame of a tail: the epoch, and two times in microseconds since 1970."""
    times = [(each - BEGIN) // timedelta(microseconds=1) for each in (place.began, place.seen)]
    return ".".join([place.epoch, *map(str, times)])


def parse_tail_id(text: str, name: str) -> TailPlace:
    """The place in a tail. Raises BadRequest."""
    found = TAIL_ID.fullmatch(text)
    if found is None:
        raise BadRequest(name, f"is {text[:100]!r}; it must be the id of a frame of this stream")
    began, seen = (BEGIN + timedelta(microseconds=int(found[each])) for each in (2, 3))
    return TailPlace(epoch=found[1], began=began, seen=seen)
