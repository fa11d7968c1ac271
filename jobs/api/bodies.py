"""The requests of the API as models, and the rules of their text."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from datetime import timedelta
from difflib import get_close_matches
from http import HTTPStatus
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from beatless.api.problems import Problem
from beatless.client.approvals import LINK_S
from beatless.client.requests import (
    OPTIONS,
    RunRequest,
    check_texts,
    checked_tags,
    json_members,
)
from beatless.cursors import decode_page
from beatless.errors import BadRequest
from beatless.orchestrator.groups import WEIGHTS
from beatless.orchestrator.limit import MAX_AT_ONCE
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.records import FailedRunFilter, Place
from beatless.orchestrator.schedule import CatchUp, Overlap, Schedule, StoredSchedule
from beatless.orchestrator.state import RunState
from beatless.outbox.times import MOST_S


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
    """RunState accepts states of a newer version; a filter accepts only known ones."""
    if state not in set(RunState):
        raise ValueError(f"is none of {', '.join(RunState)}")
    return state


KnownState = Annotated[RunState, AfterValidator(_known)]


NAMED = 3
"""Unknown members that a refusal names."""

NAME_CHARS = 64
"""Of an unknown member's name so much is shown, and compared: no member has a longer one."""


class Body(BaseModel):
    """A request that refuses members that it does not have, and names the nearest one."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _has_these_members(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        known = [each.alias or name for name, each in cls.model_fields.items()]
        unknown = [name for name in given if name not in known]
        if unknown:
            named = ", ".join(_with_nearest(name, known) for name in unknown[:NAMED])
            told = f"it has no {named}; its members: {', '.join(known)}"
            raise PydanticCustomError("unknown_member", "{told}", {"told": told})
        return given


def _with_nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name[:NAME_CHARS], known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    return f"{name[:NAME_CHARS]!r}{meant}"


class RunBody(Body):
    """The members of a RunRequest that travel in a body."""

    def request(self, *, traceparent: str | None) -> RunRequest:
        """As the client takes it, unchecked."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return RunRequest(**given, traceparent=traceparent)


JSON_TYPES = {timedelta: float, Mapping[str, str]: dict[str, str]}
"""The JSON form of Python's types: a duration is a number of seconds."""


def _json_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(map(_json_type, get_args(hint)))]  # noqa: UP007 - built at run time
    return JSON_TYPES.get(hint, hint)


def _members_of_a_run() -> dict[str, Any]:
    """The fields of StartRequest: those of RunRequest, with types that JSON has."""
    hints = get_type_hints(RunRequest)
    found: dict[str, Any] = {}
    for each in json_members():
        shown: dict[str, Any] = {}
        if option := OPTIONS.get(each.name):
            unit = " In seconds." if timedelta in get_args(hints[each.name]) else ""
            shown = {"description": option.help + unit, "examples": [option.example]}
            if option.numbers is not None:
                shown |= {"ge": option.numbers[0], "le": option.numbers[-1]}
        default = ... if each.default is MISSING else each.default
        found[each.name] = (_json_type(hints[each.name]), Field(default, **shown))
    return found


if TYPE_CHECKING:
    StartRequest = RunBody
else:
    StartRequest = create_model(
        "StartRequest", __base__=RunBody, __doc__="A run to start.", **_members_of_a_run()
    )


class CancelRequest(Body):
    """Why a run is cancelled."""

    reason: str | None = Field(default=None, max_length=1000)


class SignalBody(Body):
    """A signal for a run."""

    name: str = Field(max_length=100, examples=["paid"])
    data: Any = None
    key: str | None = Field(default=None, max_length=256)


class ApprovalBody(Body):
    """The decision of an approval."""

    data: Any = Field(default=None, examples=[{"approved": True}])
    """Of the type of the form, whose schema is at `/v1/runs/{id}/waits`."""
    by: str = Field(min_length=1, max_length=200, examples=["ann@example.com"])
    """The person who decides."""
    key: str | None = Field(default=None, max_length=256)
    """Of this decision: the same one again decides nothing else."""


class ApprovalLinkBody(Body):
    """A link by which a person decides an approval."""

    by: str = Field(min_length=1, max_length=200, examples=["ann@example.com"])
    """The person who may decide by it."""
    expires_in: float = Field(default=LINK_S, gt=0, le=MOST_S, allow_inf_nan=False)
    """In seconds."""


class ScheduleMembers(Body):
    """The members of a schedule, but for its name and plan."""

    input: Any = None
    cron: str | None = Field(default=None, max_length=200, examples=["0 2 * * *"])
    every: int | None = Field(default=None, description="In seconds.", examples=[60])
    tz: str = Field(default="UTC", max_length=100, examples=["Europe/Brussels"])
    catch_up: CatchUp = CatchUp.ONE
    overlap: Overlap = Overlap.ALLOW
    jitter: float = Field(default=0, allow_inf_nan=False, description="In seconds.")
    queue: str | None = None
    priority: int = 0
    tags: dict[str, str] | None = None
    deadline: float | None = Field(default=None, allow_inf_nan=False, description="In seconds.")
    group: str | None = None


def _schedule(name: str, plan: str, members: Mapping[str, Any]) -> Schedule:
    try:
        return Schedule(name, plan, **members)
    except PlanError as error:
        raise BadRequest("schedule", f"cannot work: {error}") from error


class ScheduleRequest(ScheduleMembers):
    """A schedule to store."""

    name: str = Field(max_length=200, examples=["nightly"])
    plan: str = Field(max_length=200)

    def schedule(self) -> Schedule:
        """As the client takes it. Raises BadRequest."""
        members = {name: getattr(self, name) for name in ScheduleMembers.model_fields}
        return _schedule(self.name, self.plan, members)


class ScheduleChange(ScheduleMembers):
    """Members of a schedule to change; the others stay. `cron` takes the place of `every`."""

    plan: str = Field(default="", max_length=200)

    def changed(self, stored: StoredSchedule) -> Schedule:
        """As the client takes it. Raises BadRequest."""
        given = {name for name in self.model_fields_set if name in ScheduleMembers.model_fields}
        members = {
            name: getattr(self if name in given else stored, name)
            for name in ScheduleMembers.model_fields
        }
        if self.cron is not None and "every" not in given:
            members["every"] = None
        if self.every is not None and "cron" not in given:
            members["cron"] = None
        return _schedule(stored.name, self.plan or stored.plan, members)


class BackfillRequest(Body):
    """The ticks to start runs for: from the first time on, and before the second."""

    from_: AwareDatetime = Field(alias="from", examples=["2026-11-01T00:00:00Z"])
    to: AwareDatetime = Field(examples=["2026-11-08T00:00:00Z"])


class LimitBody(Body):
    """How many runs with the same key a limit lets run at once, or begin in a time: one of both."""

    at_once: int | None = Field(default=None, ge=1, le=MAX_AT_ONCE, examples=[5])
    rate: str | None = Field(default=None, max_length=20)


class GroupWeight(Body):
    """The turns of a group for one of a group with the weight 1."""

    group: str = Field(max_length=256, examples=["tenant-7"])
    weight: int = Field(ge=WEIGHTS[0], le=WEIGHTS[-1], strict=True, examples=[3])


class QueueBody(Body):
    """The setting of a queue: seconds after which a run that waits comes first; null: never."""

    age_after: float | None = Field(gt=0, le=315_360_000, examples=[600])


class RetryRequest(Body):
    """The body of a retry; without `from_step` it begins where the run failed."""

    from_step: str | None = Field(default=None, max_length=200)


class FailedRuns(Body):
    """The filter of failed runs."""

    plan: str | None = None
    queue: str | None = None
    tag: list[str] = []
    """name=value"""
    error: str | None = Field(default=None, max_length=1000)
    """In "type: message" of the error, ignoring case."""
    within: float | None = Field(default=None, ge=0, le=1e9, allow_inf_nan=False)
    """Failed so many seconds ago or less."""
    limit: int = Field(default=100, ge=1, le=1000)
    cursor: str | None = None
    """The `next` of the answer before."""

    def checked(self) -> FailedRunFilter:
        """As the client takes it. Raises Problem and BadRequest."""
        check_texts(plan=self.plan, queue=self.queue, error=self.error)
        return FailedRunFilter(
            plan=self.plan,
            queue=self.queue,
            tags=checked_tags(tags_of(self.tag)),
            error=self.error,
            seconds=self.within,
            after=place_of(self.cursor),
        )


class CountRequest(FailedRuns):
    """The filter and limit of a count of failed runs."""

    limit: int = Field(default=100_000, ge=1, le=100_000)


class FinishedRuns(Body):
    """The filter of finished runs."""

    state: KnownState
    """One in which runs end."""
    older_than: float = Field(ge=0, le=1e9, allow_inf_nan=False)
    """Ended so many seconds ago or more."""


class CleanRequest(FinishedRuns):
    """The filter of finished runs to remove, and the limit, oldest first."""

    limit: int = Field(default=1000, ge=1, le=100_000)


class Letters(Body):
    """The filter of dead letters."""

    reason: str = Field(default="", max_length=1000)
    """In their reason, ignoring case."""
    limit: int = Field(default=1000, ge=1, le=100_000)
