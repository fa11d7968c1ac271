"""The output of steps: small pieces, as the tokens of a model, of which many share an event.

`ctx.emit` only appends to memory. The pieces are written 25 ms after the first of them or as soon
as there are 64, by a thread of the process; and before all that the step writes otherwise.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

import psycopg

from beatless.orchestrator.errors import LeaseLost, StepEnded
from beatless.orchestrator.events import EventType, NewEvent, encode
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

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


class StepOutput:
    """The pieces of one attempt that are not in the journal yet. For any thread."""

    def __init__(
        self,
        *,
        run_id: str,
        step: str,
        attempt: int,
        max_event_bytes: int,
        write: Callable[["StepOutput"], None],
        announce: Callable[["StepOutput", bool], None],
    ) -> None:
        """`write` stores the pieces now. `announce` has them stored soon; at once if it is True."""
        self.run_id = run_id
        self.step = step
        self._attempt = attempt
        self._event_bytes = max(1, max_event_bytes - FRAME_BYTES)
        self._write = write
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
        """The events of `pending` may have been written: the answer was lost."""

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
        self._write(self)

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
        """Store the pieces now."""
        self._write(self)

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


class OutputThread:
    """A thread that writes the output of this process's steps, so that none of them needs a timer.

    1. sleep until a step emits
    2. wait 25 ms, or until an event is full
    3. write all that has been emitted meanwhile, attempt by attempt, as each step would itself

    A step is told at its next call, or at its end, of what goes wrong.
    """

    def __init__(self, *, observer: Observer = ignore) -> None:
        self._observer = observer
        self._outputs: dict[StepOutput, None] = {}
        self._full = False
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: LastingThread | None = None

    def announce(self, output: StepOutput, full: bool) -> None:
        """Write this output soon; at once if an event of it is full."""
        with self._changed:
            was_empty = not self._outputs
            self._outputs[output] = None
            self._full |= full
            if self._thread is None:
                thread = LastingThread("output", self._run, observer=self._observer)
                thread.start()
                self._thread = thread  # one that could not be started is started with the next
            elif was_empty or full:
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def once(self) -> None:
        """Write what has been announced."""
        with self._changed:
            outputs, self._outputs, self._full = list(self._outputs), {}, False
        for output in outputs:
            try:
                output.write()
            except (LeaseLost, StepEnded):
                continue  # the step learns of it by itself
            except psycopg.Error as error:
                output.refused(error)

    def _run(self, thread: LastingThread) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outputs or self._stopping)
                self._changed.wait_for(lambda: self._full or self._stopping, INTERVAL_S)
                if self._stopping:
                    return
            self.once()
            thread.works()
