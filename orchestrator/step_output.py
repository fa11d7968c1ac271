"""The output of steps: small pieces, as the tokens of a model, of which many share an event.

`ctx.emit` only appends to memory. The pieces are written 25 ms after the first of them or as soon
as there are 64, by a thread of the process together with those of other steps (`OutputThread`); and
before all that the step writes otherwise.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import psycopg

from beatless.orchestrator.errors import LeaseLost, StepEnded
from beatless.orchestrator.events import EventType, NewEvent, encode
from beatless.orchestrator.records import Appended

logger = logging.getLogger(__name__)

EVENT_PIECES = 64
"""Pieces of one event at most."""

INTERVAL_S = 0.025
"""Seconds that a piece waits for others."""

MOST_PIECES = 1024
"""Pieces of one attempt that wait: then the step waits until Postgres has taken them."""

MOST_BYTES = 1024 * 1024
"""The same, in bytes; also those of one statement, but for a piece that is larger by itself."""

FRAME_BYTES = 64
"""Above the size of an event's data beside its pieces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Output of one attempt that is written in one statement with that of others."""

    run_id: str
    token: int
    after: int
    """The seq of the last event that the owner of the lease has seen."""
    events: Sequence[NewEvent]
    connection: Callable[[], psycopg.Connection[Any]]
    """Gives one that nobody else uses before the portion is ended."""
    disconnect: Callable[[], None]


class OutputWriter(Protocol):
    """The one writer of a run, as the output of its step needs it."""

    def write_output(self, output: "StepOutput") -> None:
        """Commit what an attempt has emitted. Raises LeaseLost, and StepEnded after its end."""

    def begin_portion(self, output: "StepOutput") -> Portion | None:
        """What is to be written now, by this thread; None if there is none, another writes, or it
        is `in_doubt`.

        Nobody else writes before `end_portion`. Raises as `write_output`.
        """

    def end_portion(
        self, output: "StepOutput", appended: Appended | None, *, in_doubt: bool
    ) -> None:
        """It was written; or was not, or it is not known whether it was."""


class StepOutput:
    """The pieces of one attempt that are not in the journal yet. For any thread."""

    def __init__(
        self,
        *,
        run_id: str,
        step: str,
        attempt: int,
        max_event_bytes: int,
        writer: OutputWriter,
        announce: Callable[["StepOutput", bool], None],
    ) -> None:
        """`announce` has the pieces stored soon; at once if it is True."""
        self.run_id = run_id
        self.step = step
        self._attempt = attempt
        self._event_bytes = max(1, max_event_bytes - FRAME_BYTES)
        self._writer = writer
        self._announce = announce
        self._mutex = threading.Lock()
        self._pieces: deque[tuple[str, int]] = deque()
        """As JSON, with their sizes."""
        self._waiting_bytes = 0
        self._taken = 0
        """Pieces that have been put into events."""
        self._events: list[NewEvent] = []
        self._closed = False
        self.error: Exception | None = None
        """The reason for which the pieces cannot be stored: raised by the next call."""
        self.first = 0
        """The number of the first piece of `pending`."""
        self.tried = False
        """The events of `pending` may have been written: the answer was lost, or has not come."""
        self.in_doubt = False
        """The same, and no thread was writing them when `begin_portion` was called last."""

    def add(self, piece: Any) -> int:
        """Keep a piece; how often it is full: from 1 on, the step shall wait for `write`.

        Raises BadPayload, StepEnded, and `error`.
        """
        text = encode(piece, where=f"step {self.step}: a piece of output", limit=self._event_bytes)
        size = len(text) if text.isascii() else len(text.encode())
        with self._mutex:
            if self.error is not None:
                raise self.error
            if self._closed:
                raise StepEnded(self.run_id, self.step)
            self._pieces.append((text, size))
            self._waiting_bytes += size
            waiting, waiting_bytes = len(self._pieces), self._waiting_bytes
        if waiting in (1, EVENT_PIECES):
            self._announce(self, waiting == EVENT_PIECES)
        return max(waiting // MOST_PIECES, waiting_bytes // MOST_BYTES)

    def close(self) -> None:
        """Take no more."""
        with self._mutex:
            self._closed = True

    def finish(self) -> None:
        """Store the last pieces. Raises LeaseLost and the error of Postgres."""
        self.write()

    def abandon(self) -> None:
        """The same after a body has failed: its failure is told, whatever happens here."""
        try:
            self.finish()
        except (LeaseLost, StepEnded):
            return
        except psycopg.Error as error:
            self.refused(error)

    def refused(self, error: psycopg.Error) -> None:
        """Note that the pieces cannot be stored."""
        self.error = error
        logger.warning(
            "the output of a step could not be stored",
            extra={
                "action": "output_failed",
                "run_id": self.run_id,
                "step": self.step,
                "reason": str(error),
            },
        )

    def write(self) -> None:
        """Store the pieces now, by themselves."""
        self._writer.write_output(self)

    def begin_portion(self) -> Portion | None:
        """As of `OutputWriter`."""
        return self._writer.begin_portion(self)

    def end_portion(self, appended: Appended | None, *, in_doubt: bool = False) -> None:
        """As of `OutputWriter`."""
        self._writer.end_portion(self, appended, in_doubt=in_doubt)

    @property
    def waiting(self) -> bool:
        """Whether there are pieces that are not in the journal."""
        with self._mutex:
            return bool(self._pieces or self._events)

    @property
    def added(self) -> int:
        """How many pieces there have been."""
        with self._mutex:
            return self._taken + len(self._pieces)

    def pending(self, added: int) -> list[NewEvent]:
        """The events to be written next, the same until `written`: empty when so many pieces are.

        For one thread at a time.
        """
        if not self._events and self._taken < added:
            taken_bytes = 0
            while self._pieces and taken_bytes < MOST_BYTES:
                event, size = self._next_event()
                self._events.append(event)
                taken_bytes += size
        return self._events

    def written(self) -> None:
        """The events of `pending` are in the journal."""
        self._events, self.tried = [], False

    def _next_event(self) -> tuple[NewEvent, int]:
        texts: list[str] = []
        with self._mutex:
            event_bytes = 0
            for text, size in islice(self._pieces, EVENT_PIECES):
                if texts and event_bytes + size + 1 > self._event_bytes:
                    break
                texts.append(text)
                event_bytes += size + 1
            for _ in texts:
                self._waiting_bytes -= self._pieces.popleft()[1]
            first, self._taken = self._taken, self._taken + len(texts)
        if not self._events:
            self.first = first
        data = f'{{"first":{first},"pieces":[{",".join(texts)}]}}'
        event = NewEvent(
            type=EventType.STEP_OUTPUT, step=self.step, attempt=self._attempt, data=data
        )
        return event, event_bytes
