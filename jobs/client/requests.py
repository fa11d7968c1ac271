"""One run to start: its options, and their rules."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from datetime import datetime, timedelta
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from beatless.errors import BadRequest, UnknownPlan
from beatless.namespaces import id_prefix, stored_id
from beatless.orchestrator.events import encode, storable
from beatless.orchestrator.function_plan import given_input
from beatless.orchestrator.limit import limits_of
from beatless.orchestrator.options import (
    STORED,
    Option,
    StoredKeywords,
    StoredOptions,
    described,
    problem_with_key,
    problem_with_tags,
)
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun, WhileUnfinished, new_run_id
from beatless.orchestrator.state import RunState
from beatless.orchestrator.typed_input import INPUT
from beatless.outbox.times import is_number, problem_with_moment, problem_with_seconds

Start = TypeVar("Start", bound=Callable[..., Any])

RUN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
CELERYS_OWN = frozenset({"celeryev", "control.pidbox"})
"""The exchanges behind the prefix that carry Celery's events and control messages."""

EXAMPLE_TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
"""Of W3C Trace Context."""


def seconds_of(given: float | timedelta | None) -> float | None:
    """A duration in seconds."""
    return given.total_seconds() if isinstance(given, timedelta) else given


def problem_with_duration(given: Any) -> str:
    """The problem with seconds or a timedelta."""
    problem = problem_with_seconds(seconds_of(given))
    if not problem or is_number(given) or isinstance(given, timedelta):
        return problem
    also = "; a moment is not_before=" if isinstance(given, datetime) else ""
    return f"is {given!r:.200}: give seconds, as 90, or a timedelta{also}"


def problem_with_while_unfinished(given: Any) -> str:
    """The problem with the effect of a start while another run with its key is unfinished."""
    choices = get_args(WhileUnfinished)
    return "" if given in choices else f"is {given!r:.200}; choose {', '.join(choices)}"


def problem_with_period(given: Any) -> str:
    """The problem with seconds or a timedelta that must not be 0."""
    return problem_with_duration(given) or ("" if seconds_of(given) else "is 0 seconds: give more")


class RunOptions(StoredKeywords, total=False):
    """The keywords of `start_run` in every client; a test compares them with RunRequest."""

    run_id: str | None
    key: str | None
    queue: str | None
    delay: float | timedelta | None
    not_before: datetime | None
    deadline: float | timedelta | None
    while_unfinished: WhileUnfinished | None
    debounce: float | timedelta | None
    max_wait: float | timedelta | None
    traceparent: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest(StoredOptions):
    """One run of a `start_runs` call; the members are those of `start_run`.

    The options are its own fields with a description, and those of `StoredOptions`.

    >>> from beatless import RunRequest
    >>> orders = [RunRequest(plan="checkout", input={"order": n}) for n in (1, 2)]
    >>> [run.input for run in app.client.start_runs(orders)]
    [{'order': 1}, {'order': 2}]
    """

    plan: str
    input: Any = None
    run_id: Annotated[
        str | None,
        Option(
            help="Your own id for the run.",
            metavar="ID",
            example="order-1",
        ),
    ] = None
    key: Annotated[
        str | None,
        Option(
            help="Start it once: the same key gives back the same run.",
            example="order:1",
            problem=problem_with_key,
        ),
    ] = None
    queue: Annotated[
        str | None,
        Option(
            help="Default: the plan's.",
            metavar="Q",
            example="mail",
        ),
    ] = None
    delay: Annotated[
        float | timedelta | None,
        Option(
            help="Start it so much later.",
            metavar="30s",
            example=90,
            problem=problem_with_duration,
        ),
    ] = None
    not_before: Annotated[
        datetime | None,
        Option(
            help="Start it then, e.g. 2026-12-24T18:00:00+01:00.",
            flag="--at",
            metavar="TIME",
            example="2096-12-24T18:00:00+01:00",
            problem=problem_with_moment,
        ),
    ] = None
    deadline: Annotated[
        float | timedelta | None,
        Option(
            help="Fail if it has not ended so much later.",
            metavar="1h",
            example=7200,
            problem=problem_with_duration,
        ),
    ] = None
    while_unfinished: Annotated[
        WhileUnfinished | None,
        Option(
            help="While a run with this dedupe key is unfinished: join it, skip the start, or "
            "replace it. Default: join.",
            metavar="join|skip|replace",
            example="replace",
            problem=problem_with_while_unfinished,
        ),
    ] = None
    debounce: Annotated[
        float | timedelta | None,
        Option(
            help="Start it so long after the last start with this dedupe key, with that input.",
            metavar="5s",
            example=5,
            problem=problem_with_period,
        ),
    ] = None
    max_wait: Annotated[
        float | timedelta | None,
        Option(
            help="Start it so long after the first of these starts, at the latest.",
            metavar="1m",
            example=60,
            problem=problem_with_period,
        ),
    ] = None
    traceparent: Annotated[
        str | None,
        Option(
            help="The trace that it joins.",
            header=True,
            example=EXAMPLE_TRACE,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raises BadRequest for a plan that is not named."""
        given: object = self.plan
        if not isinstance(given, str):
            name = getattr(given, "name", None)
            example = name if isinstance(name, str) else "checkout"
            problem = f'is {given!r:.200}; give the name of one, as in start_run("{example}")'
            raise BadRequest("plan", problem)


REQUEST_FIELDS = tuple(sorted(fields(RunRequest), key=lambda each: each.name in STORED))
"""Plan and input, the options of a RunRequest, and those that a run keeps."""

DESCRIBED = described(RunRequest)

OPTIONS: Mapping[str, Option] = {
    each.name: DESCRIBED[each.name] for each in REQUEST_FIELDS if each.name in DESCRIBED
}
"""The descriptions of all options, in this order."""

CHECKED = tuple(
    (each.name, DESCRIBED[each.name], each.default)
    for each in REQUEST_FIELDS
    if each.name in DESCRIBED
)
"""The options with their descriptions and defaults, which need no check."""


def request_of(
    plan: str, input: Any, options: RunOptions, *, takes_connection: bool = False
) -> RunRequest:
    """The request of a call of `start_run`. Raises TypeError for an option that it does not have.

    And BadRequest for a plan that is not named. `takes_connection` is of clients in the database.
    """
    if unknown := sorted(options.keys() - OPTIONS.keys()):
        names = [*OPTIONS, "connection"] if takes_connection else [*OPTIONS]
        near = get_close_matches(unknown[0], names, n=1, cutoff=0.8)
        meant = f" (did you mean {near[0]}?)" if near else ""
        session = "; connection takes a session too" if takes_connection else ""
        raise TypeError(
            f"start_run has no option {', '.join(unknown)}{meant}; it has: {', '.join(names)} "
            f"(key makes a start idempotent{session})"
        )
    return RunRequest(plan=plan, input=input, **options)


def json_members() -> list[Field[Any]]:
    """The fields of a RunRequest that the body of a request has; the others are headers."""
    return [
        each for each in REQUEST_FIELDS if each.name not in OPTIONS or not OPTIONS[each.name].header
    ]


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
        for each in REQUEST_FIELDS
        if each.name in OPTIONS
    ]
    given = shown.parameters.values()
    before = [each for each in given if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    after = [each for each in given if each.kind is inspect.Parameter.KEYWORD_ONLY]
    vars(start)["__signature__"] = shown.replace(parameters=[*before, *options, *after])
    return start


def seconds(name: str, given: float | timedelta | None) -> float | None:
    """A duration in seconds. Raises BadRequest for the option of this name."""
    if given is not None and (problem := problem_with_duration(given)):
        raise BadRequest(name, problem)
    return seconds_of(given)


def check_texts(**texts: str | None) -> None:
    """Raises BadRequest, naming it, for an argument that no stored text can equal."""
    for name, text in texts.items():
        if text is not None and not storable(text):
            raise BadRequest(name, "has a NUL or half of a surrogate pair: give valid text")


def check_state(state: str | None) -> None:
    """Raises BadRequest for a state that there is not."""
    states = [known.value for known in RunState]
    if state is not None and state not in states:
        raise BadRequest("state", f"is {state!r}; choose {', '.join(states)}")


def queue_name(queue: str) -> str:
    """The name, if a queue can have it. Raises BadRequest."""
    if not isinstance(queue, str) or not QUEUE.fullmatch(queue):
        raise BadRequest("queue", f"is {queue!r:.200}, which does not match ^{QUEUE.pattern}$")
    return queue


def checked_tags(tags: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The tags of a filter. Raises BadRequest."""
    if tags is not None and (problem := problem_with_tags(tags)):
        raise BadRequest("tags", problem)
    return tags


def new_run(
    request: RunRequest, *, plans: Mapping[str, Plan], namespace: str, max_event_bytes: int
) -> NewRun:
    """The run that is asked for, checked. Raises UnknownPlan, BadRequest and BadPayload."""
    plan = plans.get(request.plan)
    if plan is None:
        raise UnknownPlan(request.plan, list(plans))
    for name, option, default in CHECKED:
        value = getattr(request, name)
        if value is not default and (problem := option.problem_with(value)):
            raise BadRequest(name, problem)
    prefix = id_prefix(namespace)
    run_id = prefix + new_run_id() if request.run_id is None else _checked_id(request, namespace)
    queue = queue_name(plan.queue if request.queue is None else request.queue)
    if queue in CELERYS_OWN:
        raise BadRequest("queue", f"is {queue!r}, a name of Celery's own: choose another")
    if request.delay is not None and request.not_before is not None:
        raise BadRequest("delay", "and not_before cannot both be given")
    delay, deadline = seconds_of(request.delay), seconds_of(request.deadline)
    debounce, max_wait = seconds_of(request.debounce), seconds_of(request.max_wait)
    _check_duplicates(request)
    if debounce is not None and max_wait is not None and max_wait < debounce:
        raise BadRequest("max_wait", "is shorter than debounce: give at least as much")
    if deadline is not None and deadline <= (delay or max_wait or debounce or 0):
        raise BadRequest("deadline", f"is {deadline:g} s from now, before the run may start")
    input = given_input(plan, request.input)
    return NewRun(
        run_id=run_id,
        namespace=namespace,
        plan=plan.name,
        plan_version=plan.version,
        queue=queue,
        input=encode(input, where=INPUT, limit=max_event_bytes),
        key=request.key,
        not_before=request.not_before,
        delay=delay if debounce is None else debounce,
        deadline=deadline,
        while_unfinished=request.while_unfinished or "join",
        debounce=debounce,
        max_wait=max_wait,
        default_queue=request.queue is None,
        default_input=request.input is None,
        limits=limits_of(plan.limits, input, prefix=prefix),
        **request.stored_options(),
    )


def _checked_id(request: RunRequest, namespace: str) -> str:
    """The id that the request names, as it is stored. Raises BadRequest."""
    given: object = request.run_id
    run_id = stored_id(namespace, given) if isinstance(given, str) else ""
    chosen = run_id.removeprefix(id_prefix(namespace))
    if not RUN_ID.fullmatch(chosen) or chosen in (".", ".."):
        raise BadRequest("run_id", f"is {given!r:.200}, which does not match ^{RUN_ID.pattern}$")
    return run_id


def _check_duplicates(request: RunRequest) -> None:
    """Raises BadRequest for options about duplicates that do not go together."""
    if request.dedupe_key is None:
        for name in ("while_unfinished", "debounce"):
            if getattr(request, name) is not None:
                raise BadRequest(name, "needs a dedupe_key, of which it is the duplicates")
    if request.debounce is None:
        if request.max_wait is not None:
            raise BadRequest("max_wait", "needs debounce, whose wait it ends")
        return
    for name, why in {
        "while_unfinished": "debounce replaces the input of a run that has not begun, and has that "
        "of one that has begun wait for its end",
        "delay": "debounce says when the run starts",
        "not_before": "debounce says when the run starts",
        "key": "an input that replaces another one has no run of its own to be found by it",
    }.items():
        if getattr(request, name) is not None:
            raise BadRequest(name, f"and debounce cannot both be given: {why}")
