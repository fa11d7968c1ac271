"""The pauses in the work on one run, at which the work on other runs may come first."""

from collections.abc import Generator
from enum import Enum, auto

from beatless.orchestrator.records import Appended
from beatless.orchestrator.requests import RunBody
from beatless.orchestrator.settlement import Proposal


class Directive(Enum):
    """Answers to a turn that are not the outcome of a commit."""

    HAND_BACK = auto()
    """To a RunBody: do not call the body, and give the run back."""
    IN_DOUBT = auto()
    """To a Proposal: it may have been committed, by a statement whose answer was lost."""


HAND_BACK, IN_DOUBT = Directive.HAND_BACK, Directive.IN_DOUBT

Turn = RunBody | Proposal

Answer = Appended | Directive | None

Turns = Generator[Turn, Answer, None]
"""The work on one run, with a pause before each body and before each commit of a boundary.

A Proposal that was committed meanwhile is answered with its Appended. With None the work goes on by
itself: it calls the body, or commits the boundary alone.
"""
