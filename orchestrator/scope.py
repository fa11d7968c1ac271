"""What is entered around the work on a run and its steps, as the spans of a trace."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from beatless.orchestrator.lease import Lease

Scope = Callable[[Lease, str | None, int], AbstractContextManager[str | None]]
"""Entered around the work on a run (no step) and around each attempt of a step (its occurrence).

Gives the W3C `traceparent` of the work, if it is traced.
"""


def no_scope(_lease: Lease, _step: str | None, _attempt: int) -> AbstractContextManager[str | None]:
    """The scope of an executor whose work is not traced."""
    return nullcontext()
