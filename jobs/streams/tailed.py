"""What a tail is asked for, and what it gives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from beatless.orchestrator.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The events of a tail: all of a namespace, or those of these types, of such runs."""

    namespace: str
    plans: Sequence[str] = ()
    """One of these; without any, every plan."""
    queue: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    """All of these."""
    events: Sequence[str] = ()
    """One of these types; without any, every type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TailedEvent:
    """An event that `Client.tail` gives, and the plan of its run.

    >>> tail = app.client.tail(timeout=10)
    >>> run = app.client.start_run("checkout", {"order": 1})
    >>> drained = beatless.drain_outbox_once()
    >>> told = next(tail)
    >>> told.plan, told.event.type, told.event.run_id == run.run_id
    ('checkout', 'RunStarted', True)
    >>> tail.close()
    """

    plan: str
    event: Event
