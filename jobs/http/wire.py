"""Requests and answers of the API as values. Does no I/O."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar, get_args, get_type_hints
from urllib.parse import quote

import httpx2

from beatless.client.requests import new_run_id
from beatless.cursors import encode_page
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
    BadPayload,
    CannotRetry,
    EventsPruned,
    RunConflict,
    RunIsActive,
    RunNotFound,
)
from beatless.orchestrator.events import Event
from beatless.orchestrator.journal import Run
from beatless.orchestrator.queues import QueueState
from beatless.orchestrator.state import RunState
from beatless.outbox.backoff import Backoff
from beatless.outbox.letters import DeadLetter

T = TypeVar("T")
R = TypeVar("R", Run, QueueState, DeadLetter)

AGAIN = frozenset({429, 500, 502, 503, 504})
"""Answers of a server, or of a proxy before it, that may be another one in a moment."""

LONGEST_PAUSE = 60.0
"""Seconds: what a server may ask for with Retry-After."""

PAGE = 500

ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        BadPayload,
        BadRequest,
        CannotRetry,
        EventsPruned,
        QueueBusy,
        RunConflict,
        RunIsActive,
        RunNotFound,
        SchemaBehind,
        StatementTimeout,
        UnknownPlan,
    )
}
"""What a problem document may name: what the in-process client raises."""

TIMES = {
    record: frozenset(
        name
        for name, hint in get_type_hints(record).items()
        if hint is datetime or datetime in get_args(hint)
    )
    for record in (Run, QueueState, DeadLetter)
}

TRIES = 5
"""How often a call is tried whose answer does not come."""

LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=20)
"""A stream holds its connection: no number of them may keep another from being opened."""

UNSENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One request, and what its answer means."""

    method: str
    path: str
    read: Callable[[Any], T]
    """Makes the result of the JSON of a good answer; it gets None for an empty one."""
    body: Any = None
    headers: Mapping[str, str] | None = None
    query: Mapping[str, Any] | None = None
    repeatable: bool = True
    """Whether doing it twice is as good as once."""
    unchanged: int = 0
    """The status of an answer that means: nothing was done, and that is all right."""


def authorization(token: str | None) -> dict[str, str]:
    """The headers of every request."""
    return {"Authorization": f"Bearer {token}"} if token else {}


def result_of(call: Call[T], response: httpx2.Response) -> T:
    """What the answer says, or the error that it names."""
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
    """The error that the in-process client would have raised, as far as the answer tells."""
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
    """Seconds that the server asks to wait; 0 if it does not say."""
    text = response.headers.get("Retry-After", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return max(0.0, min(seconds, LONGEST_PAUSE)) if seconds == seconds else 0.0


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


def start_run(
    plan: str,
    input: Any,
    *,
    run_id: str | None,
    key: str | None,
    queue: str | None,
    delay: float | timedelta | None,
    not_before: datetime | None,
    deadline: float | timedelta | None,
    priority: int,
    tags: Mapping[str, str] | None,
    traceparent: str | None,
) -> Call[Run]:
    """A start has its id before it is sent: an answer that was lost is asked for again."""
    body = {
        "plan": plan,
        "input": input,
        "run_id": new_run_id() if run_id is None else run_id,
        "key": key,
        "queue": queue,
        "delay": _seconds(delay),
        "not_before": None if not_before is None else not_before.isoformat(),
        "deadline": _seconds(deadline),
        "priority": priority,
        "tags": None if tags is None else dict(tags),
    }
    body = {name: value for name, value in body.items() if value is not None}
    headers = {"traceparent": traceparent} if traceparent else None
    return Call(method="POST", path="/v1/runs", body=body, headers=headers, read=run_of)


def get_run(run_id: str) -> Call[Run]:
    return Call(method="GET", path=_path("runs", run_id), read=run_of)


def list_runs(
    *,
    state: str | None,
    plan: str | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    retried: bool | None,
    step: str | None,
    before: Run | tuple[datetime, str] | None,
    limit: int,
) -> Call[tuple[list[Run], bool]]:
    """A page of runs, which may be shorter than asked for, and whether there may be more."""
    last = (before.created_at, before.run_id) if isinstance(before, Run) else before
    query = {
        "state": state,
        "plan": plan,
        "queue": queue,
        "tag": _pairs(tags),
        "retried": None if retried is None else str(retried).lower(),
        "step": step,
        "cursor": encode_page(*last) if last else None,
        "limit": min(limit, PAGE),
    }
    return Call(
        method="GET",
        path="/v1/runs",
        query={name: value for name, value in query.items() if value is not None},
        read=lambda found: (
            [run_of(members) for members in found["runs"]],
            found["next"] is not None,
        ),
    )


def events(run_id: str, after: int, limit: int) -> Call[tuple[list[Event], int]]:
    """A page of events, which may be shorter than asked for, and the last seq of the run."""
    return Call(
        method="GET",
        path=_path("runs", run_id, "events"),
        query={"from_seq": after, "limit": limit},
        read=lambda found: (
            [Event.from_dict(members) for members in found["events"]],
            int(found["last_seq"]),
        ),
    )


def cancel_run(run_id: str, reason: str | None) -> Call[Run | None]:
    """None where it had ended before: the run is as it was."""
    body = {} if reason is None else {"reason": reason}
    path = _path("runs", run_id, "cancel")
    return Call(
        method="POST",
        path=path,
        body=body,
        read=lambda found: run_of(found) if "run_id" in found else None,
        unchanged=409,
    )


def retry_run(run_id: str, from_step: str | None) -> Call[Run]:
    body = {} if from_step is None else {"from_step": from_step}
    path = _path("runs", run_id, "retry")
    return Call(method="POST", path=path, body=body, read=run_of, repeatable=False)


def remove_run(run_id: str) -> Call[None]:
    return Call(method="DELETE", path=_path("runs", run_id), read=_nothing, repeatable=False)


def clean(state: str, older_than: float | timedelta, limit: int) -> Call[int]:
    body = {"state": state, "older_than": _seconds(older_than), "limit": limit}
    return Call(
        method="POST",
        path="/v1/finished-runs/clean",
        body=body,
        read=_removed,
        repeatable=False,
    )


def count_finished(state: str, older_than: float | timedelta) -> Call[tuple[int, int]]:
    return Call(
        method="GET",
        path="/v1/finished-runs",
        query={"state": state, "older_than": _seconds(older_than)},
        read=lambda found: (int(found["runs"]), int(found["events"])),
    )


def failed_runs(**chosen: Any) -> Call[tuple[list[Run], str | None]]:
    """A page of runs, which may be shorter than asked for, and the cursor of the next one."""
    return Call(
        method="GET",
        path="/v1/failed-runs",
        query=_chosen(chosen),
        read=lambda found: ([run_of(members) for members in found["runs"]], found.get("next")),
    )


def retry_failed(**chosen: Any) -> Call[tuple[list[Run], list[Exception], str | None]]:
    """(new runs, refusals, cursor): if it is not None, not all that were asked for were tried."""
    return Call(
        method="POST",
        path="/v1/failed-runs/retry",
        body=_chosen(chosen),
        read=lambda found: (
            [run_of(members) for members in found["runs"]],
            [_refusal(members) for members in found["refused"]],
            found.get("next"),
        ),
        repeatable=False,
    )


def dead_letters(limit: int, after: int) -> Call[tuple[list[DeadLetter], bool]]:
    """A page of them, and whether there may be more."""
    return Call(
        method="GET",
        path="/v1/dead-letters",
        query={"limit": min(limit, PAGE), "after": after},
        read=lambda found: (
            [record_of(DeadLetter, members) for members in found["dead_letters"]],
            found.get("next") is not None,
        ),
    )


def dead_letter(letter_id: int) -> Call[DeadLetter]:
    return Call(
        method="GET",
        path=_path("dead-letters", str(letter_id)),
        read=lambda found: record_of(DeadLetter, found),
    )


def requeue_dead_letter(letter_id: int) -> Call[None]:
    path = _path("dead-letters", str(letter_id), "requeue")
    return Call(method="POST", path=path, read=_nothing, repeatable=False)


def requeue_dead_letters(*, reason: str, limit: int) -> Call[int]:
    return Call(
        method="POST",
        path="/v1/dead-letters/requeue",
        body={"reason": reason, "limit": limit},
        read=lambda found: int(found["requeued"]),
        repeatable=False,
    )


def discard_dead_letter(letter_id: int) -> Call[None]:
    path = _path("dead-letters", str(letter_id))
    return Call(method="DELETE", path=path, read=_nothing, repeatable=False)


def queues() -> Call[list[QueueState]]:
    return Call(
        method="GET",
        path="/v1/queues",
        read=lambda found: [record_of(QueueState, members) for members in found["queues"]],
    )


def pause_queue(queue: str) -> Call[None]:
    return Call(method="POST", path=_path("queues", queue, "pause"), read=_nothing)


def resume_queue(queue: str) -> Call[None]:
    return Call(method="POST", path=_path("queues", queue, "resume"), read=_nothing)


def drain_queue(queue: str) -> Call[int]:
    return Call(
        method="POST", path=_path("queues", queue, "drain"), read=_removed, repeatable=False
    )


def obliterate_queue(queue: str, *, force: bool) -> Call[int]:
    query = {"force": "true"} if force else {}
    path = _path("queues", queue)
    return Call(method="DELETE", path=path, query=query, read=_removed, repeatable=False)


def stream_token(run_id: str) -> Call[str]:
    path = _path("runs", run_id, "stream-token")
    return Call(method="POST", path=path, read=lambda found: str(found["token"]))


def stream_path(run_id: str) -> str:
    return _path("runs", run_id, "stream")


def _path(*parts: str) -> str:
    return "/v1/" + "/".join(_part(part) for part in parts)


def _part(part: str) -> str:
    # A part of its own, whatever it holds: `../queues` must not become another request.
    if part in ("", ".", "..") or "/" in part:
        raise BadRequest("name", f"is {part!r}, which cannot be a part of a URL")
    return quote(part, safe="~")


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """What chooses failed runs, without what was left open."""
    given = {**options, "within": _seconds(options["within"]), "tag": _pairs(options["tags"])}
    del given["tags"]
    if "limit" in given:
        given["limit"] = min(given["limit"], PAGE)
    return {name: value for name, value in given.items() if value is not None}


def _pairs(tags: Mapping[str, str] | None) -> list[str]:
    return [f"{name}={value}" for name, value in (tags or {}).items()]


def _refusal(members: Mapping[str, Any]) -> Exception:
    return named_error(members) or BadRequest("retry", f"is refused: {members['detail']}")


def _removed(found: Any) -> int:
    return int(found["removed"])


def _nothing(_found: Any) -> None:
    return None


def _seconds(given: float | timedelta | None) -> float | None:
    return given.total_seconds() if isinstance(given, timedelta) else given
