"""The number of events to read from the journal at once."""

from collections.abc import Sequence

from beatless.orchestrator.events import EventText
from beatless.orchestrator.journal import PAGE_BYTES

MAX_PAGE_EVENTS = 500

FIRST_PAGE_EVENTS = 64


class Pager:
    """The number of events to read: as many as fit into a page, judging by the last one.

    Events that do not fit are built by Postgres in vain.
    """

    def __init__(self) -> None:
        self.limit = FIRST_PAGE_EVENTS

    def learn(self, page: Sequence[EventText]) -> None:
        if page:
            size = sum(len(event.text) for event in page)
            self.limit = max(1, min(MAX_PAGE_EVENTS, PAGE_BYTES * len(page) // max(1, size)))
