"""The order of one stream: backfilled and live events, each exactly once. Does no I/O."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from beatless.orchestrator.events import EventText


class Cursor:
    """Puts backfilled and live events into order, each exactly once."""

    def __init__(self, after: int) -> None:
        self.seq = after
        self._early: dict[int, EventText] = {}

    def feed(self, events: Iterable[EventText]) -> Iterator[EventText]:
        """The events that are now next in order."""
        self._early.update((event.seq, event) for event in events if event.seq > self.seq)
        while event := self._early.pop(self.seq + 1, None):
            self.seq = event.seq
            yield event

    def offer(
        self, accept: Callable[[Sequence[EventText]], bool], events: Sequence[EventText]
    ) -> bool:
        """Have events accepted if they are the next ones in order; whether they were.

        They must follow one another.
        """
        if self._early or events[0].seq != self.seq + 1 or not accept(events):
            return False
        self.seq = events[-1].seq
        return True

    @property
    def missing(self) -> bool:
        """True while a later event has arrived before an earlier one: read the journal again."""
        return bool(self._early)

    def forget(self) -> None:
        """Drop early events, before the journal is read: there it is, or it was never committed.

        Kept, an event with a seq that no run reaches would have the journal read without pause.
        """
        self._early.clear()
