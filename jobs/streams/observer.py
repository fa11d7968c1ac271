"""The signals of streams; `beatless.outbox.observer` explains signals."""

from dataclasses import dataclass
from typing import Literal

from beatless.outbox.observer import Signal

BackfillReason = Literal[
    "start", "reconnect", "head_check", "without_redis", "gap", "overflow", "end"
]
"""Why a stream reads the journal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOpened(Signal):
    """A stream is followed from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamClosed(Signal):
    """A stream is followed no longer, for any reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backfilled(Signal):
    """A stream has read a page of the journal."""

    reason: BackfillReason
    events: int
