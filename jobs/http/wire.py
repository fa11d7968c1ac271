"""Requests and answers of the API as values. Does no I/O."""

import json
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeAlias, TypeVar, get_args, get_type_hints
from urllib.parse import quote

import httpx2

from beatless.approval_links import ApprovalLink
from beatless.client.requests import check_texts
from beatless.errors import (
    AccessDenied,
    BadRequest,
    QueueBusy,
    SchemaBehind,
    StatementTimeout,
    UnknownPlan,
    Unreachable,
)
from beatless.orchestrator.errors import (
    AlreadyDecided,
    ApprovalNotOpen,
    BadPayload,
    CannotRetry,
    EventsPruned,
    RunConflict,
    RunEnded,
    RunIsActive,
    RunNotFound,
    ScheduleConflict,
    ScheduleNotFound,
    SignalConflict,
)
from beatless.orchestrator.events import encode
from beatless.orchestrator.groups import GroupState
from beatless.orchestrator.limits import LimitState
from beatless.orchestrator.queues import QueueState
from beatless.orchestrator.records import Run, SentDecision
from beatless.orchestrator.schedule import StoredSchedule
from beatless.orchestrator.state import RunState
from beatless.orchestrator.typed_input import INPUT
from beatless.outbox.backoff import Backoff
from beatless.outbox.letters import DeadLetter

T = TypeVar("T")
R = TypeVar(
    "R",
    Run,
    QueueState,
    DeadLetter,
    SentDecision,
    ApprovalLink,
    StoredSchedule,
    GroupState,
    LimitState,
)

AGAIN = frozenset({429, 500, 502, 503, 504})
"""Answers of a server, or of a proxy before it, that may be another one in a moment."""

MAX_RETRY_AFTER_S = 60.0
"""The most seconds that a server may ask for with Retry-After."""

ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        AlreadyDecided,
        ApprovalNotOpen,
        BadPayload,
        BadRequest,
        CannotRetry,
        EventsPruned,
        QueueBusy,
        RunConflict,
        RunEnded,
        RunIsActive,
        RunNotFound,
        ScheduleConflict,
        ScheduleNotFound,
        SchemaBehind,
        SignalConflict,
        StatementTimeout,
        UnknownPlan,
    )
}
"""The errors that a problem document may name: those of the in-process client."""

TIMES = {
    record: frozenset(
        name
        for name, hint in get_type_hints(record).items()
        if hint is datetime or datetime in get_args(hint)
    )
    for record in R.__constraints__
}

TRIES = 5
"""How often a call is tried whose answer does not come."""

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
"""A stream holds its connection: no number of them may keep another from being opened."""

NAME_CHARACTERS = 1000
"""More than the longest name that the API knows."""

QUERY_CHARACTERS = 32_000
"""Of all names and values together: servers and proxies refuse longer URLs without a word."""

UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and the meaning of its answer."""

    method: str
    path: str
    read: Callable[[Any], T]
    """Makes the result of the JSON of a good answer; it gets None for an empty one."""
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] | None = None
    query: Mapping[str, Any] | None = None
    repeatable: bool = True
    """Whether doing it twice is as good as once."""
    unchanged: int = 0
    """The status of an answer that means: nothing was done, and that is all right."""


Exchange: TypeAlias = Generator[Call[Any], Any, T]
"""The requests of one call of a client, and its result."""


def ask(call: Call[T]) -> Exchange[T]:
    """The exchange of one request."""
    result: T = yield call
    return result


def authorization(token: str | None) -> dict[str, str]:
    """The headers of every request."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def arguments_of(call: Call[Any]) -> dict[str, Any]:
    """The request as httpx2 takes it. Raises BadRequest and BadPayload, naming the member.

    Refused here, because half of a surrogate pair, NaN or deep nesting cannot even be sent.
    """
    query = call.query or {}
    for name, given in query.items():
        for value in given if isinstance(given, list) else [given]:
            check_texts(**{name: str(value)})
    if sum(len(f"{name}{given}") for name, given in query.items()) > QUERY_CHARACTERS:
        raise BadRequest("query", f"of {', '.join(query)} is too long for a URL: ask for less")
    headers = dict(call.headers or {})
    if call.body is None:
        return {"params": call.query, "headers": headers}
    told = {"input": INPUT}
    members = ",".join(
        f"{json.dumps(name)}:{encode(value, where=told.get(name, name), limit=sys.maxsize)}"
        for name, value in call.body.items()
    )
    headers["Content-Type"] = "application/json"
    return {"params": call.query, "headers": headers, "content": f"{{{members}}}".encode()}


def result_of(call: Call[T], response: httpx2.Response) -> T:
    """The value of an answer. Raises the error that it names."""
    if response.is_success or response.status_code == call.unchanged:
        return call.read(response.json() if response.content else None)
    raise error_of(response)


def pause_after(
    call: Call[Any], tried: int, outcome: httpx2.Response | httpx2.TransportError, backoff: Backoff
) -> float | None:
    """Seconds to wait before the call is tried again; None if this was its last try."""
    if isinstance(outcome, httpx2.Response):
        if outcome.status_code not in AGAIN or not call.repeatable or tried >= TRIES:
            return None
        return backoff.delay(tried) + pause_of(outcome)
    if tried >= TRIES or not (call.repeatable or isinstance(outcome, UNSENT)):
        return None
    return backoff.delay(tried)


def unreachable(url: httpx2.URL, error: Exception) -> Unreachable:
    """A request that got no answer."""
    return Unreachable(f"the API at {url}", str(error) or type(error).__name__)


def error_of(response: httpx2.Response) -> Exception:
    """The error that the in-process client would have raised, as far as the answer names it."""
    try:
        document = response.json()
    except ValueError:
        document = None
    if not isinstance(document, dict):
        document = {}
    detail = str(document.get("detail") or response.reason_phrase or "no reason given")
    named = named_error(document)
    if named is not None:
        return named
    status = response.status_code
    if status in (401, 403):
        return AccessDenied(status, detail)
    if status in (400, 404, 409, 410, 413, 422):
        return BadRequest("request", f"is refused ({status}): {detail}")
    return Unreachable("the API", f"it answered {status}: {detail}")


def named_error(document: Mapping[str, Any]) -> Exception | None:
    """The error that a document names; None if this version does not know it."""
    known = ERRORS.get(str(document.get("error")))
    arguments = document.get("arguments")
    if known is None or not isinstance(arguments, list):
        return None
    try:
        return known(*arguments)
    except TypeError:
        return None


def pause_of(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; 0 if it asks for none."""
    text = response.headers.get("Retry-After", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, min(seconds, MAX_RETRY_AFTER_S)) if seconds == seconds else 0.0


def record_of(kind: type[R], members: Mapping[str, Any]) -> R:
    """A value from its JSON object. Members that this version does not know are ignored."""
    values: dict[str, Any] = {entry.name: members.get(entry.name) for entry in fields(kind)}
    for name in TIMES[kind]:
        if isinstance(text := values[name], str):
            values[name] = datetime.fromisoformat(text)
    return kind(**values)


def run_of(members: Mapping[str, Any]) -> Run:
    """A run from its JSON object."""
    return record_of(Run, {**members, "state": RunState(members["state"])})


def path_of(*parts: str) -> str:
    """The path of parts below `/v1`. Raises BadRequest for one that would name another path."""
    return "/v1/" + "/".join(_part(part) for part in parts)


def _part(part: str) -> str:
    # Quoted as one part: `../queues` must not become another request.
    check_texts(name=part)
    if part in ("", ".", "..") or "/" in part or len(part) > NAME_CHARACTERS:
        raise BadRequest("name", f"is {part!r:.200}, which cannot be a part of a URL")
    return quote(part, safe="~")


def json_of(value: Any) -> Any:
    """An option as JSON has it: seconds for a duration, text for a time, an object for tags."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.isoformat()
    return dict(value) if isinstance(value, Mapping) else value


def pairs_of(tags: Mapping[str, str] | None) -> list[str]:
    """Tags as a query has them."""
    return [f"{name}={value}" for name, value in (tags or {}).items()]
