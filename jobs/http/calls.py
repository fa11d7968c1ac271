"""The calls of the API, each as an exchange: a generator of requests without I/O.

An exchange yields a Call, is sent the value of its answer, and returns the result of the whole: a
list is asked for page by page. The clients perform the exchanges, one in a thread and one in a
loop. Their methods are made from this table; a test compares them with those of an app's client.
"""

import inspect
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from types import NoneType
from typing import Any, TypeVar, Unpack, get_args

from beatless.client.requests import (
    RunOptions,
    json_members,
    request_of,
    shows_run_options,
)
from beatless.client.signals import new_signal_key
from beatless.cursors import encode_page
from beatless.errors import BadRequest
from beatless.http.wire import (
    Call,
    Exchange,
    ask,
    json_of,
    named_error,
    pairs_of,
    path_of,
    record_of,
    run_of,
)
from beatless.observe.tracing import TRACEPARENT
from beatless.orchestrator.events import Event
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.queues import QueueState
from beatless.orchestrator.records import Run, SentSignal, new_run_id
from beatless.outbox.letters import DeadLetter

Method = TypeVar("Method", bound=Callable[..., Any])

PAGE = 500
"""Runs, events or dead letters that one request asks for at most."""


def named_as(exchange: Callable[..., Any], method: Method) -> Method:
    """Give a client's method the name, the signature and the docstring of its exchange."""
    shown = inspect.signature(exchange)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    result = get_args(shown.return_annotation)[-1]
    signature = shown.replace(
        parameters=[itself, *shown.parameters.values()],
        return_annotation=None if result is NoneType else result,
    )
    vars(method).update(__signature__=signature)
    method.__name__, method.__doc__ = exchange.__name__, exchange.__doc__
    return method


@shows_run_options
def start_run(plan: str, input: Any = None, **options: Unpack[RunOptions]) -> Exchange[Run]:
    """Store a run. Raises UnknownPlan, BadRequest, BadPayload, RunConflict.

    >>> run = client.start_run("checkout", {"order": 1}, key="order:1")
    >>> client.start_run("checkout", {"order": 1}, key="order:1").run_id == run.run_id
    True
    """
    request = request_of(plan, input, options)
    body = {each.name: json_of(getattr(request, each.name)) for each in json_members()}
    # It has its id before it is sent: an answer that was lost is asked for again.
    body |= {"input": input, "run_id": new_run_id() if request.run_id is None else request.run_id}
    body = {name: value for name, value in body.items() if value is not None}
    traced = TRACEPARENT.fullmatch(request.traceparent or "")
    headers = {"traceparent": traced.string} if traced else None
    return ask(Call(method="POST", path=path_of("runs"), body=body, headers=headers, read=run_of))


def get_run(run_id: str) -> Exchange[Run]:
    """The run as it is stored now. Raises RunNotFound.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> client.get_run(run.run_id).state.value
    'queued'
    """
    return ask(Call(method="GET", path=path_of("runs", run_id), read=run_of))


def list_runs(
    *,
    state: str | None = None,
    plan: str | None = None,
    queue: str | None = None,
    tags: Mapping[str, str] | None = None,
    retried: bool | None = None,
    step: str | None = None,
    dedupe_key: str | None = None,
    group: str | None = None,
    before: Run | tuple[datetime, str] | None = None,
    limit: int = 50,
) -> Exchange[list[Run]]:
    """Runs, newest first. `before` is the last run of the page before, or its time and id.

    `retried` keeps those with a retry, or those without; `step` those that
    have not ended and are in this step, or go on with it; `dedupe_key` and `group` those with it.

    >>> run = client.start_run("checkout", {"order": 1}, tags={"customer": "ada"})
    >>> [found.input for found in client.list_runs(state="queued", tags={"customer": "ada"})]
    [{'order': 1}]
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
            "dedupe_key": dedupe_key,
            "group": group,
            "cursor": encode_page(*last) if last else None,
            "limit": min(limit - len(found), PAGE),
        }
        answer = yield from _get("runs", query=query)
        found += map(run_of, answer["runs"])
        if answer["next"] is None:
            break
        before = found[-1]
    return found


def events(run_id: str, from_seq: int = 0, limit: int | None = None) -> Exchange[list[Event]]:
    """The stored events after `from_seq`. Raises RunNotFound and EventsPruned.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> [event.type for event in client.events(run.run_id)]
    ['RunStarted']
    """
    found: list[Event] = []
    while limit is None or len(found) < limit:
        wanted = PAGE if limit is None else min(limit - len(found), PAGE)
        query = {"from_seq": from_seq + len(found), "limit": wanted}
        answer = yield from _get("runs", run_id, "events", query=query)
        found += map(Event.from_dict, answer["events"])
        if not answer["events"] or found[-1].seq >= answer["last_seq"]:
            break
    return found


def stream_token(run_id: str) -> Exchange[str]:
    """A token that may follow this run for some minutes, for `EventSource`'s URL.

    Raises RunNotFound.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> url = f"/v1/runs/{run.run_id}/stream?token={client.stream_token(run.run_id)}"
    """
    path = path_of("runs", run_id, "stream-token")
    return ask(Call(method="POST", path=path, read=lambda found: str(found["token"])))


def cancel_run(run_id: str, *, reason: str | None = None) -> Exchange[Run]:
    """Ask a run to stop, durably; one that has ended stays as it is. Raises RunNotFound.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> client.cancel_run(run.run_id, reason="sold out").state.value
    'cancelled'
    """
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


def signal_run(
    run_id: str, name: str, data: Any = None, *, key: str | None = None
) -> Exchange[SentSignal]:
    """Send a named JSON fact to a run, which the first `wait` for its name takes.

    `key` names the signal: a second one for the run with the same key and content is not sent
    again. Raises RunNotFound, RunEnded, SignalConflict, BadRequest and BadPayload.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> client.signal_run(run.run_id, "paid", {"amount": 12}, key="psp:42").new
    True
    """
    # It has its key before it is sent: an answer that was lost is asked for again.
    body = {"name": name, "data": data, "key": new_signal_key() if key is None else key}
    path = path_of("runs", run_id, "signals")
    return ask(Call(method="POST", path=path, body=body, read=_sent))


def waits(run_id: str) -> Exchange[list[OpenWait]]:
    """The waits of a run that have begun and not ended. Raises RunNotFound.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> client.waits(run.run_id)
    []
    """
    answer = yield from _get("runs", run_id, "waits")
    return [OpenWait.from_dict(members) for members in answer["waits"]]


def children(
    run_id: str, *, state: str | None = None, after: int = 0, limit: int = 50
) -> Exchange[list[Run]]:
    """The runs that a run has started: by `run.child` and `run.map`, in the order of the calls.

    `after` is the `child_no` of the last one of the page before. Raises RunNotFound.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> client.children(run.run_id)
    []
    """
    found: list[Run] = []
    while len(found) < limit:
        query = {"state": state, "cursor": after, "limit": min(limit - len(found), PAGE)}
        answer = yield from _get("runs", run_id, "children", query=query)
        found += map(run_of, answer["runs"])
        if answer["next"] is None:
            break
        after = int(answer["next"])
    return found


def retry_run(run_id: str, from_step: str | None = None) -> Exchange[Run]:
    """Start a new run that goes on where an ended one has failed; the new run.

    Not tried again when its answer is lost: there could be two. Raises RunNotFound,
    UnknownPlan and CannotRetry.

    >>> run = client.start_run("checkout", {"order": 1, "declined": True})
    >>> executed = beatless.work_until_idle()
    >>> client.retry_run(run.run_id, from_step="charge").retry_of == run.run_id
    True
    """
    body = {} if from_step is None else {"from_step": from_step}
    path = path_of("runs", run_id, "retry")
    return ask(Call(method="POST", path=path, body=body, read=run_of, repeatable=False))


def remove_run(run_id: str) -> Exchange[None]:
    """Take a run away with all of its events. Raises RunNotFound, RunIsActive.

    >>> run = client.start_run("checkout", {"order": 1})
    >>> stopped = client.cancel_run(run.run_id)
    >>> client.remove_run(run.run_id)
    """
    path = path_of("runs", run_id)
    return ask(Call(method="DELETE", path=path, read=_nothing, repeatable=False))


def clean(state: str, older_than: float | timedelta, limit: int = 1000) -> Exchange[int]:
    """Take away up to `limit` runs that ended in this state so long ago; how many.

    >>> run = client.cancel_run(client.start_run("checkout", {"order": 1}).run_id)
    >>> client.clean("cancelled", older_than=0) >= 1
    True
    """
    body = {"state": state, "older_than": json_of(older_than), "limit": limit}
    path = path_of("finished-runs", "clean")
    return ask(Call(method="POST", path=path, body=body, read=_removed, repeatable=False))


def count_finished(state: str, older_than: float | timedelta) -> Exchange[tuple[int, int]]:
    """(runs, events) that `clean` would take away without a limit.

    >>> run = client.cancel_run(client.start_run("checkout", {"order": 1}).run_id)
    >>> runs, events = client.count_finished("cancelled", older_than=0)
    >>> runs >= 1 and events >= 3
    True
    """
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
) -> Exchange[list[Run]]:
    """Failed runs without a retry, oldest end first.

    `error` is looked for in "type: message" of the error, `within` keeps those
    that failed so many seconds ago or less. `remove_run` discards one.

    >>> run = client.start_run("checkout", {"order": 1, "declined": True})
    >>> executed = beatless.work_until_idle()
    >>> [failed.error["message"] for failed in client.failed_runs(error="card declined")]
    ['card declined']
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
) -> Exchange[tuple[list[Run], list[Exception]]]:
    """`retry_run` for all of `failed_runs`: the new runs, and why others cannot be retried.

    Not tried again when its answer is lost: it can be called again, and then returns those
    only that were left. Two calls at once retry each run once.

    >>> order = {"order": 1, "declined": True}
    >>> run = client.start_run("checkout", order, tags={"day": "monday"})
    >>> executed = beatless.work_until_idle()
    >>> started, refused = client.retry_failed(tags={"day": "monday"}, within=3600)
    >>> len(started), refused
    (1, [])
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


def dead_letters(limit: int = 100, after: int = 0) -> Exchange[list[DeadLetter]]:
    """Event messages that could not be published, oldest first, with an id above `after`.

    >>> client.dead_letters(limit=10)
    []
    """
    found: list[DeadLetter] = []
    while len(found) < limit:
        query = {"limit": min(limit - len(found), PAGE), "after": after}
        answer = yield from _get("dead-letters", query=query)
        found += (record_of(DeadLetter, members) for members in answer["dead_letters"])
        if answer.get("next") is None:
            break
        after = found[-1].id
    return found


def dead_letter(letter_id: int) -> Exchange[DeadLetter]:
    """One of `dead_letters`. Raises BadRequest if there is no such letter.

    >>> letter = client.dead_letter(7)
    Traceback (most recent call last):
        ...
    beatless.errors.BadRequest: dead letter 7 does not exist
    """
    return record_of(DeadLetter, (yield from _get("dead-letters", str(letter_id))))


def requeue_dead_letter(letter_id: int) -> Exchange[None]:
    """Publish the message again. Raises BadRequest if there is no such letter.

    >>> for letter in client.dead_letters():
    ...     client.requeue_dead_letter(letter.id)
    """
    path = path_of("dead-letters", str(letter_id), "requeue")
    return ask(Call(method="POST", path=path, read=_nothing, repeatable=False))


def requeue_dead_letters(*, reason: str = "", limit: int = 1000) -> Exchange[int]:
    """Publish many messages again, oldest first; how many they were.

    Those that have `reason` in their reason, ignoring case.

    >>> client.requeue_dead_letters(reason="too large")
    0
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


def discard_dead_letter(letter_id: int) -> Exchange[None]:
    """Forget the message; its events stay in the journal. Raises BadRequest.

    >>> for letter in client.dead_letters():
    ...     client.discard_dead_letter(letter.id)
    """
    path = path_of("dead-letters", str(letter_id))
    return ask(Call(method="DELETE", path=path, read=_nothing, repeatable=False))


def queues() -> Exchange[list[QueueState]]:
    """Every queue that has runs or is paused, with its counts.

    >>> run = client.start_run("checkout", {"order": 1}, queue="mail")
    >>> [queue.queued for queue in client.queues() if queue.name == "mail"]
    [1]
    """
    answer = yield from _get("queues")
    return [record_of(QueueState, members) for members in answer["queues"]]


def pause_queue(queue: str) -> Exchange[None]:
    """After this returned no run of the queue starts anywhere; those that run go on.

    >>> client.pause_queue("mail")
    >>> [queue.paused_at is not None for queue in client.queues() if queue.name == "mail"]
    [True]
    """
    return ask(Call(method="POST", path=path_of("queues", queue, "pause"), read=_nothing))


def resume_queue(queue: str) -> Exchange[None]:
    """Let the queue's runs start again.

    >>> client.pause_queue("mail")
    >>> client.resume_queue("mail")
    """
    return ask(Call(method="POST", path=path_of("queues", queue, "resume"), read=_nothing))


def drain_queue(queue: str) -> Exchange[int]:
    """Take away the runs that wait, leave those that run; how many were taken away.

    Raises BadRequest for a queue that nothing knows.

    >>> run = client.start_run("checkout", {"order": 1}, queue="letters")
    >>> client.drain_queue("letters")
    1
    """
    path = path_of("queues", queue, "drain")
    return ask(Call(method="POST", path=path, read=_removed, repeatable=False))


def obliterate_queue(queue: str, *, force: bool = False) -> Exchange[int]:
    """Take away the queue with all of its runs; how many.

    Raises QueueBusy without `force`, and BadRequest for a queue that nothing knows.

    >>> run = client.start_run("checkout", {"order": 1}, queue="parcels")
    >>> client.obliterate_queue("parcels", force=True)
    1
    """
    query = {"force": "true"} if force else {}
    path = path_of("queues", queue)
    return ask(Call(method="DELETE", path=path, query=query, read=_removed, repeatable=False))


def _get(*parts: str, query: Mapping[str, Any] | None = None) -> Exchange[Any]:
    """The JSON of an answer, to a query without the options that are not set."""
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


def _sent(found: Any) -> SentSignal:
    return SentSignal(
        run_id=found["run_id"],
        id=found["id"],
        new=found["new"],
        waits_for=found.get("waits_for", ()),
    )


def _removed(found: Any) -> int:
    return int(found["removed"])


def _as_it_is(found: Any) -> Any:
    return found


def _nothing(_found: Any) -> None:
    return None
