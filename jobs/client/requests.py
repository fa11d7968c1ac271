"""One run to start: its options, and their rules."""

import inspect
import re
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, TypedDict, TypeVar, get_type_hints

from beatless.errors import BadRequest, UnknownPlan
from beatless.namespaces import id_prefix, stored_id
from beatless.orchestrator.events import encode, storable
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun
from beatless.outbox.times import problem_with_moment, problem_with_seconds

Start = TypeVar("Start", bound=Callable[..., Any])

RUN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
CELERYS_OWN = frozenset({"celeryev", "control.pidbox"})
"""The exchanges behind the prefix that carry Celery's events and control messages."""

TAGS_BYTES = 16 * 1024
"""Of all names and values in UTF-8: tags are for finding runs."""


PRIORITIES = range(10)

INPUT = "the run's input"
"""Its name in errors."""


class RunOptions(TypedDict, total=False):
    """The keywords of `start_run` in every client; a test compares them with RunRequest."""

    run_id: str | None
    key: str | None
    queue: str | None
    delay: float | timedelta | None
    not_before: datetime | None
    deadline: float | timedelta | None
    priority: int
    tags: Mapping[str, str] | None
    traceparent: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """One run of a `start_runs` call; the members are those of `start_run`.

    The body of `POST /v1/runs` and its model are made from the fields: see `json_members`.

    >>> from beatless import RunRequest
    >>> orders = [RunRequest(plan="checkout", input={"order": n}) for n in (1, 2)]
    >>> [run.input for run in app.client.start_runs(orders)]
    [{'order': 1}, {'order': 2}]
    """

    plan: str
    input: Any = None
    run_id: str | None = None
    key: str | None = None
    queue: str | None = None
    delay: float | timedelta | None = None
    not_before: datetime | None = None
    deadline: float | timedelta | None = None
    priority: int = field(default=0, metadata={"range": PRIORITIES})
    tags: Mapping[str, str] | None = None
    traceparent: str | None = field(default=None, metadata={"header": True})


def json_members() -> list[Field[Any]]:
    """The fields of a RunRequest that the body of a request has; the others are headers."""
    return [each for each in fields(RunRequest) if not each.metadata.get("header")]


def shows_run_options(start: Start) -> Start:
    """Let `help` and `inspect.signature` list the options of a run in place of `**options`."""
    shown = inspect.signature(start)
    hints = get_type_hints(RunRequest)
    options = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=hints[each.name],
        )
        for each in fields(RunRequest)
        if each.name in RunOptions.__annotations__
    ]
    given = shown.parameters.values()
    before = [each for each in given if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    after = [each for each in given if each.kind is inspect.Parameter.KEYWORD_ONLY]
    vars(start)["__signature__"] = shown.replace(parameters=[*before, *options, *after])
    return start


def new_run_id() -> str:
    """A UUID of version 7 (RFC 9562): its order is the order of creation, within a millisecond."""
    stamp = time.time_ns() // 1_000_000
    number = (stamp << 80) | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=number))


def seconds(name: str, given: float | timedelta | None) -> float | None:
    """A duration in seconds. Raises BadRequest for the option of this name."""
    duration = given.total_seconds() if isinstance(given, timedelta) else given
    if duration is not None and (problem := problem_with_seconds(duration)):
        raise BadRequest(name, problem)
    return duration


def check_moment(name: str, given: datetime | None) -> None:
    """Raises BadRequest for a time that Postgres cannot store."""
    if given is not None and (problem := problem_with_moment(given)):
        raise BadRequest(name, problem)


def check_texts(**texts: str | None) -> None:
    """Raises BadRequest, naming it, for an argument that no stored text can equal."""
    for name, text in texts.items():
        if text is not None and not storable(text):
            raise BadRequest(name, "has a NUL or half of a surrogate pair: give valid text")


def queue_name(queue: str) -> str:
    """The name, if a queue can have it. Raises BadRequest."""
    if not isinstance(queue, str) or not QUEUE.fullmatch(queue):
        raise BadRequest("queue", f"is {queue!r:.200}, which does not match ^{QUEUE.pattern}$")
    return queue


def checked_tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    """A copy of the tags; None gives none. Raises BadRequest."""
    for name, value in (tags or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or not storable(name + value):
            raise BadRequest("tags", "must map strings to strings of valid text, without NUL")
    if sum(len((name + value).encode()) for name, value in (tags or {}).items()) > TAGS_BYTES:
        raise BadRequest(
            "tags", f"are longer than {TAGS_BYTES} bytes: put large values into the input"
        )
    return dict(tags or {})


def new_run(
    request: RunRequest, *, plans: Mapping[str, Plan], namespace: str, max_event_bytes: int
) -> NewRun:
    """The run that is asked for, checked. Raises UnknownPlan, BadRequest and BadPayload."""
    plan = plans.get(request.plan)
    if plan is None:
        raise UnknownPlan(request.plan, list(plans))
    given = new_run_id() if request.run_id is None else request.run_id
    run_id = stored_id(namespace, given) if isinstance(given, str) else ""
    chosen = run_id.removeprefix(id_prefix(namespace))
    if not RUN_ID.fullmatch(chosen) or chosen in (".", ".."):
        raise BadRequest("run_id", f"is {given!r:.200}, which does not match ^{RUN_ID.pattern}$")
    queue = queue_name(plan.queue if request.queue is None else request.queue)
    if queue in CELERYS_OWN:
        raise BadRequest("queue", f"is {queue!r}, a name of Celery's own: choose another")
    if request.key is not None and not (
        isinstance(request.key, str) and 0 < len(request.key) <= 256 and storable(request.key)
    ):
        raise BadRequest("key", "must be a string of 1 to 256 characters of valid text, no NUL")
    if not isinstance(request.priority, int) or request.priority not in PRIORITIES:
        raise BadRequest("priority", f"is {request.priority!r}, which is not 0 to 9")
    if request.delay is not None and request.not_before is not None:
        raise BadRequest("delay", "and not_before cannot both be given")
    check_moment("not_before", request.not_before)
    delay = seconds("delay", request.delay)
    deadline = seconds("deadline", request.deadline)
    if deadline is not None and deadline <= (delay or 0):
        raise BadRequest("deadline", f"is {deadline:g} s from now, before the run may start")
    return NewRun(
        run_id=run_id,
        namespace=namespace,
        plan=plan.name,
        plan_version=plan.version,
        queue=queue,
        priority=request.priority,
        input=encode(
            plan.default_input if request.input is None else request.input,
            where=INPUT,
            limit=max_event_bytes,
        ),
        key=request.key,
        not_before=request.not_before,
        delay=delay,
        deadline=deadline,
        tags=checked_tags(request.tags),
        default_queue=request.queue is None,
        default_input=request.input is None,
    )
