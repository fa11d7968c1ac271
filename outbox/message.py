"""Outbox messages: an event message goes to Redis, a task message to the Celery broker."""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

SHARDS = 16

UNREADABLE = {"beatless.unreadable": "nested too deeply, or a number of it has too many digits"}
"""Stands for JSON that only SQL can have written so: it must not have the lists fail."""


def shard_of(run_id: str) -> int:
    """The shard whose relay carries this run's messages. The same for ever: it is stored."""
    return zlib.crc32(run_id.encode()) % SHARDS


ESCAPED = {end: f"\\u{end:04x}" for end in (0x85, 0x2028, 0x2029)}
"""Ends of a line in Unicode that are none in JSON: in it only as part of a string."""

LINE_ENDS = tuple((chr(end).encode(), escaped.encode()) for end, escaped in ESCAPED.items())


def one_line(text: bytes) -> bytes:
    """The same JSON, for readers with other ends of a line beside `\\n`."""
    if not text.isascii():
        for end, escaped in LINE_ENDS:
            text = text.replace(end, escaped)
    return text.replace(b"\r", b" ")  # only ever between two parts


def escape_line_ends(text: str) -> str:
    """JSON of `json.dumps`, for such readers: that has no other end of a line than these."""
    return text if text.isascii() else text.translate(ESCAPED)


def channel_for(prefix: str, origin: str, run_id: str) -> str:
    """The Redis channel of a run's events. Pub/sub knows no database numbers, hence the origin."""
    return f"{prefix}:events:{origin}:{run_id}"


def every_channel(prefix: str) -> str:
    """The pattern of all of them, of any origin, as Redis' ACL must name it.

    Redis compares a pattern that is subscribed to with those of its ACL as text.
    """
    return f"{prefix}:events:*"


def run_of(channel: str) -> str:
    """The run whose events go through this channel."""
    return channel.split(":", 3)[-1]


class PickedEvents(NamedTuple):
    """One outbox row with the events it stands for."""

    shard: int
    id: int
    run_id: bytes
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EventMessage:
    """The committed events of one run and one batch, as newline-joined JSON."""

    origin: str
    """Which history they are of, see the fragment `origin`: a Redis may serve several databases."""
    run_id: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskMessage:
    """The order to execute a run: ids only, everything else is read from Postgres."""

    run_id: str
    task: str
    queue: str
    attempt: int
    reason: str = "start"
    """Why the relay sends it: see `dispatches.reason`; `unclaimed` if the last one was lost."""

    @property
    def task_id(self) -> str:
        """Distinct for every attempt, because Celery remembers revoked ids for hours."""
        return f"{self.run_id}.{self.attempt}"
