"""The requests of the API as models, and the rules of their text."""

from collections.abc import Sequence
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from beatless.api.problems import Problem
from beatless.cursors import decode_page
from beatless.errors import BadRequest
from beatless.orchestrator.events import storable
from beatless.orchestrator.journal import GivenUp, Place
from beatless.orchestrator.state import RunState

Text = TypeVar("Text", str, str | None)


def storable_text(value: Text) -> Text:
    """The text, if Postgres can store it. Raises Problem (422)."""
    if value is not None and not storable(value):
        raise Problem(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            "NUL characters and halves of surrogate pairs are in no name of ours",
        )
    return value


def tags_of(texts: Sequence[str]) -> dict[str, str]:
    """Tags that were given as `name=value`. Raises Problem (422)."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY, f"tag is {text!r}; write it like name=value"
            )
        found[name] = value
    return found


def place_of(cursor: str | None) -> Place | None:
    """The place that the `next` of a page names. Raises Problem (400)."""
    try:
        return None if cursor is None else decode_page(cursor)
    except BadRequest as error:
        raise Problem(HTTPStatus.BAD_REQUEST, str(error), error) from error


def _known(state: RunState) -> RunState:
    """RunState takes what a newer version has written; who asks shall ask for what there is."""
    if state not in set(RunState):
        raise ValueError(f"is none of {', '.join(RunState)}")
    return state


KnownState = Annotated[RunState, AfterValidator(_known)]


class StartRequest(BaseModel):
    """A run to start."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    input: Any = None
    run_id: str | None = None
    key: str | None = None
    queue: str | None = None
    delay: float | None = None
    """Seconds from now."""
    not_before: datetime | None = None
    deadline: float | None = None
    """Seconds from now."""
    priority: int = Field(default=0, ge=0, le=9)
    tags: dict[str, str] | None = None


class CancelRequest(BaseModel):
    """Why a run is cancelled."""

    model_config = ConfigDict(extra="forbid")

    reason: str | None = Field(default=None, max_length=1000)


class RetryRequest(BaseModel):
    """Where a retry begins; default: where the run failed."""

    model_config = ConfigDict(extra="forbid")

    from_step: str | None = Field(default=None, max_length=200)


class FailedRuns(BaseModel):
    """Which failed runs."""

    model_config = ConfigDict(extra="forbid")

    plan: str | None = None
    queue: str | None = None
    tag: list[str] = []
    """name=value"""
    error: str | None = Field(default=None, max_length=1000)
    """In "type: message" of the error, whatever its case."""
    within: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)
    """Failed so many seconds ago or less."""
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = None
    """The `next` of the answer before."""

    def checked(self) -> GivenUp:
        """As the client takes it. Raises Problem."""
        return GivenUp(
            plan=storable_text(self.plan),
            queue=storable_text(self.queue),
            tags=tags_of(self.tag),
            error=storable_text(self.error),
            seconds=self.within,
            after=place_of(self.cursor),
        )


class CountRequest(FailedRuns):
    """Which of them to count, and how far."""

    limit: int = Field(default=100_000, ge=1, le=100_000)


class FinishedRuns(BaseModel):
    """Which runs that have ended."""

    model_config = ConfigDict(extra="forbid")

    state: KnownState
    """One in which runs end."""
    older_than: float = Field(ge=0, le=1e9, allow_inf_nan=False)
    """Ended so many seconds ago or more."""


class CleanRequest(FinishedRuns):
    """Which of them to take away, and how many at most, oldest first."""

    limit: int = Field(default=1000, ge=1, le=100_000)


class Letters(BaseModel):
    """Which messages."""

    model_config = ConfigDict(extra="forbid")

    reason: str = Field(default="", max_length=1000)
    """In their reason, whatever its case."""
    limit: int = Field(default=1000, ge=1, le=100_000)
