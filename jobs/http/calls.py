"""The calls of the API, each as a flow: a generator of requests without I/O.

A flow yields a Call, is sent what its answer means, and returns the result of the whole: a list is
asked for page by page. The two clients perform the flows, one in a thread and one in a loop; their
methods are made from this table, and a test compares it with the client of an app.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from datetime import datetime, timedelta
from types import NoneType
from typing import Any, TypeAlias, TypeVar, Unpack, get_args

from beatless.client.requests import (
    RunOptions,
    RunRequest,
    json_members,
    new_run_id,
    shows_run_options,
)
from beatless.cursors import encode_page
from beatless.errors import BadRequest
from beatless.http.wire import Call, json_of, named_error, pairs_of, path_of, record_of, run_of
from beatless.orchestrator.events import Event
from beatless.orchestrator.journal import Run
from beatless.orchestrator.queues import QueueState
from beatless.outbox.letters import DeadLetter

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

Flow: TypeAlias = Generator[Call[Any], Any, T]

PAGE = 500
"""Runs, events or dead letters that one request asks for at most."""


def ask(call: Call[T]) -> Flow[T]:
    """The flow of one request."""
    result: T = yield call
    return result


def named_as(flow: Callable[..., Any], method: Method) -> Method:
    """Give a client's method the name, the signature and the docstring of its flow."""
    shown = inspect.signature(flow)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    result = get_args(shown.return_annotation)[-1]
    signature = shown.replace(
        parameters=[itself, *shown.parameters.values()],
        return_annotation=None if result is NoneType else result,
    )
    vars(method).update(__signature__=signature)
    method.__name__, method.__doc__ = flow.__name__, flow.__doc__
    return method


@shows_run_options
def start_run(plan: str, input: Any = None, **options: Unpack[RunOptions]) -> Flow[Run]:
    """Store a run. Raises UnknownPlan, BadRequest, BadPayload, RunConflict."""
    request = RunRequest(plan=plan, input=input, **options)
    body = {each.name: json_of(getattr(request, each.name)) for each in json_members()}
    # It has its id before it is sent: an answer that was lost is asked for again.
    body |= {"input": input, "run_id": new_run_id() if request.run_id is None else request.run_id}
    body = {name: value for name, value in body.items() if value is not None}
    headers = {"traceparent": request.traceparent} if request.traceparent else None
    return ask(Call(method="POST", path=path_of("runs"), body=body, headers=headers, read=run_of))


def get_run(run_id: str) -> Flow[Run]:
    """The run as it is stored now. Raises RunNotFound."""
    return ask(Call(method="GET", path=path_of("runs", run_id), read=run_of))


def list_runs(
    *,
    state: str | None = None,
    plan: str | None = None,
    queue: str | None = None,
    tags: Mapping[str, str] | None = None,
    retried: bool | None = None,
    step: str | None = None,
    before: Run | tuple[datetime, str] | None = None,
    limit: int = 50,
) -> Flow[list[Run]]:
    """Runs, newest first. `before` is the last run of the page before, or its time and id.

    `retried` keeps those that somebody has retried, or those that nobody has; `step` those that
    have not ended and are in this step, or go on with it.
    """
    found: list[Run] = []
    while len(found) < limit:
        last = (before.created_at, before.run_id) if isinstance(before, Run) else before
        query = {
            "state": state,
            "plan": plan,
            "queue": queue,
            "tag": pairs_of(tags),
            "retried": None if retried is None else str(retried).lower(),
            "step": step,
            "cursor": encode_page(*last) if last else None,
            "limit": min(limit - len(found), PAGE),
        }
        answer = yield from _get("runs", query=query)
        found += map(run_of, answer["runs"])
        if answer["next"] is None:
            break
        before = found[-1]
    return found


def events(run_id: str, from_seq: int = 0, limit: int | None = None) -> Flow[list[Event]]:
    """The stored events after `from_seq`. Raises RunNotFound and EventsPruned."""
    found: list[Event] = []
    while limit is None or len(found) < limit:
        wanted = PAGE if limit is None else min(limit - len(found), PAGE)
        query = {"from_seq": from_seq + len(found), "limit": wanted}
        answer = yield from _get("runs", run_id, "events", query=query)
        found += map(Event.from_dict, answer["events"])
        if not answer["events"] or found[-1].seq >= answer["last_seq"]:
            break
    return found


def stream_token(run_id: str) -> Flow[str]:
    """A token that may follow this run for some minutes, for `EventSource`'s URL.

    Raises RunNotFound.
    """
    path = path_of("runs", run_id, "stream-token")
    return ask(Call(method="POST", path=path, read=lambda found: str(found["token"])))


def cancel_run(run_id: str, *, reason: str | None = None) -> Flow[Run]:
    """Ask a run to stop, durably; one that has ended stays as it is. Raises RunNotFound."""
    cancelled = yield from ask(
        Call(
            method="POST",
            path=path_of("runs", run_id, "cancel"),
            body={} if reason is None else {"reason": reason},
            read=lambda found: run_of(found) if "run_id" in found else None,
            unchanged=409,  # it had ended before: the run is as it was
        )
    )
    return cancelled or (yield from get_run(run_id))


def retry_run(run_id: str, from_step: str | None = None) -> Flow[Run]:
    """Start a new run that goes on where an ended one has failed; the new run.

    Not tried again when its answer is lost: there could be two. Raises RunNotFound,
    UnknownPlan and CannotRetry.
    """
    body = {} if from_step is None else {"from_step": from_step}
    path = path_of("runs", run_id, "retry")
    return ask(Call(method="POST", path=path, body=body, read=run_of, repeatable=False))


def remove_run(run_id: str) -> Flow[None]:
    """Take a run away with all of its events. Raises RunNotFound, RunIsActive."""
    path = path_of("runs", run_id)
    return ask(Call(method="DELETE", path=path, read=_nothing, repeatable=False))


def clean(state: str, older_than: float | timedelta, limit: int = 1000) -> Flow[int]:
    """Take away up to `limit` runs that ended in this state so long ago; how many."""
    body = {"state": state, "older_than": json_of(older_than), "limit": limit}
    path = path_of("finished-runs", "clean")
    return ask(Call(method="POST", path=path, body=body, read=_removed, repeatable=False))


def count_finished(state: str, older_than: float | timedelta) -> Flow[tuple[int, int]]:
    """(runs, events) that `clean` would take away without a limit."""
    answer = yield from _get(
        "finished-runs", query={"state": state, "older_than": json_of(older_than)}
    )
    return int(answer["runs"]), int(answer["events"])


def failed_runs(
    *,
    plan: str | None = None,
    queue: str | None = None,
    tags: Mapping[str, str] | None = None,
    error: str | None = None,
    within: float | timedelta | None = None,
    limit: int = 100,
) -> Flow[list[Run]]:
    """The runs that were given up on: failed, and retried by nobody. Oldest end first.

    `error` is looked for in "type: message" of the error, `within` keeps those
    that failed so many seconds ago or less. `remove_run` discards one.
    """
    chosen = _failed(plan, queue, tags, error, within)
    found: list[Run] = []
    cursor = None
    while len(found) < limit:
        query = chosen | {"limit": min(limit - len(found), PAGE), "cursor": cursor}
        answer = yield from _get("failed-runs", query=query)
        found += map(run_of, answer["runs"])
        cursor = answer.get("next")
        if cursor is None:
            break
    return found


def retry_failed(
    *,
    plan: str | None = None,
    queue: str | None = None,
    tags: Mapping[str, str] | None = None,
    error: str | None = None,
    within: float | timedelta | None = None,
    limit: int = 100,
) -> Flow[tuple[list[Run], list[Exception]]]:
    """`retry_run` for all of `failed_runs`: the new runs, and why others cannot be retried.

    Not tried again when its answer is lost: it can be called again, and then tells of those
    only that were left. Two calls at once retry each run once.
    """
    chosen = _failed(plan, queue, tags, error, within)
    started: list[Run] = []
    refused: list[Exception] = []
    cursor = None
    while (left := limit - len(started) - len(refused)) > 0:
        body = chosen | {"limit": min(left, PAGE), "cursor": cursor}
        answer = yield from ask(
            Call(
                method="POST",
                path=path_of("failed-runs", "retry"),
                body=_given(body),
                read=_as_it_is,
                repeatable=False,
            )
        )
        started += map(run_of, answer["runs"])
        refused += map(_refusal, answer["refused"])
        cursor = answer.get("next")
        if cursor is None:
            break
    return started, refused


def dead_letters(limit: int = 100, after: int = 0) -> Flow[list[DeadLetter]]:
    """Event messages that could not be published, oldest first, with an id above `after`."""
    found: list[DeadLetter] = []
    while len(found) < limit:
        query = {"limit": min(limit - len(found), PAGE), "after": after}
        answer = yield from _get("dead-letters", query=query)
        found += (record_of(DeadLetter, members) for members in answer["dead_letters"])
        if answer.get("next") is None:
            break
        after = found[-1].id
    return found


def dead_letter(letter_id: int) -> Flow[DeadLetter]:
    """One of `dead_letters`. Raises BadRequest if there is no such letter."""
    return record_of(DeadLetter, (yield from _get("dead-letters", str(letter_id))))


def requeue_dead_letter(letter_id: int) -> Flow[None]:
    """Publish the message again. Raises BadRequest if there is no such letter."""
    path = path_of("dead-letters", str(letter_id), "requeue")
    return ask(Call(method="POST", path=path, read=_nothing, repeatable=False))


def requeue_dead_letters(*, reason: str = "", limit: int = 1000) -> Flow[int]:
    """Publish many messages again, oldest first; how many they were.

    Those that have `reason` in their reason, whatever its case.
    """
    return ask(
        Call(
            method="POST",
            path=path_of("dead-letters", "requeue"),
            body={"reason": reason, "limit": limit},
            read=lambda found: int(found["requeued"]),
            repeatable=False,
        )
    )


def discard_dead_letter(letter_id: int) -> Flow[None]:
    """Forget the message; its events stay in the journal. Raises BadRequest."""
    path = path_of("dead-letters", str(letter_id))
    return ask(Call(method="DELETE", path=path, read=_nothing, repeatable=False))


def queues() -> Flow[list[QueueState]]:
    """Every queue that has runs or is paused, with its counts."""
    answer = yield from _get("queues")
    return [record_of(QueueState, members) for members in answer["queues"]]


def pause_queue(queue: str) -> Flow[None]:
    """After this returned no run of the queue starts anywhere; those that run go on."""
    return ask(Call(method="POST", path=path_of("queues", queue, "pause"), read=_nothing))


def resume_queue(queue: str) -> Flow[None]:
    """Let the queue's runs start again."""
    return ask(Call(method="POST", path=path_of("queues", queue, "resume"), read=_nothing))


def drain_queue(queue: str) -> Flow[int]:
    """Take away the runs that wait, leave those that run; how many were taken away."""
    path = path_of("queues", queue, "drain")
    return ask(Call(method="POST", path=path, read=_removed, repeatable=False))


def obliterate_queue(queue: str, *, force: bool = False) -> Flow[int]:
    """Take away the queue with all of its runs; how many. Raises QueueBusy without `force`."""
    query = {"force": "true"} if force else {}
    path = path_of("queues", queue)
    return ask(Call(method="DELETE", path=path, query=query, read=_removed, repeatable=False))


def _get(*parts: str, query: Mapping[str, Any] | None = None) -> Flow[Any]:
    """The JSON of an answer, to a query without what was left open."""
    given = None if query is None else _given(query)
    return ask(Call(method="GET", path=path_of(*parts), query=given, read=_as_it_is))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _failed(
    plan: str | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    error: str | None,
    within: float | timedelta | None,
) -> dict[str, Any]:
    """The choice of failed runs."""
    return {
        "plan": plan,
        "queue": queue,
        "error": error,
        "within": json_of(within),
        "tag": pairs_of(tags),
    }


def _refusal(members: Mapping[str, Any]) -> Exception:
    return named_error(members) or BadRequest("retry", f"is refused: {members['detail']}")


def _removed(found: Any) -> int:
    return int(found["removed"])


def _as_it_is(found: Any) -> Any:
    return found


def _nothing(_found: Any) -> None:
    return None
