"""What people do with runs: start, read, follow, cancel. Holds no state of a run."""

import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy import exc

from beatless.auth import Tokens
from beatless.errors import (
    BadRequest,
    HistoryChanged,
    SchemaBehind,
    StatementTimeout,
    UnknownPlan,
    Unreachable,
    WrongEncoding,
)
from beatless.namespaces import DEFAULT_NAMESPACE, check_namespace, id_prefix
from beatless.orchestrator.errors import CannotRetry, OrchestratorError
from beatless.orchestrator.events import Event, EventText, encode, storable
from beatless.orchestrator.executor import reusable
from beatless.orchestrator.journal import GivenUp, Journal, NewRun, Place, Run
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.queues import QueueState
from beatless.orchestrator.state import RunState
from beatless.orchestrator.timeline import Moment, timeline
from beatless.outbox.clock import monotonic
from beatless.outbox.letters import DeadLetter, LetterStatements
from beatless.outbox.queries import Caller, execute_lazily, refuse_two_phase
from beatless.outbox.times import problem_with_moment, problem_with_seconds
from beatless.queue_limit import QueueLimit
from beatless.queues import Queues
from beatless.schema import head
from beatless.stream import Streams
from beatless.tracing import Tracing
from beatless.transactions import transact

logger = logging.getLogger("beatless.client")

T = TypeVar("T")

RUN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUEUE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
CELERYS_OWN = frozenset({"celeryev", "control.pidbox"})
"""The exchanges behind the prefix that carry Celery's events and control messages."""

ENDED = (
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
)
"""What a server says that is there and has ended the statement."""

TAGS_BYTES = 16 * 1024
"""Of all names and values in UTF-8: tags are for finding runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """One run of a `start_runs` call; the members are those of `start_run`."""

    plan: str
    input: Any = None
    run_id: str | None = None
    key: str | None = None
    queue: str | None = None
    delay: float | timedelta | None = None
    not_before: datetime | None = None
    deadline: float | timedelta | None = None
    priority: int = 0
    tags: Mapping[str, str] | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """Runs as JSON objects: as many as were asked for, or as fit into so many bytes."""

    lines: list[str]
    next: Place | None
    """Where the rest begins; None if there is none."""
    refused: Sequence[Exception] = ()


def new_run_id() -> str:
    """A UUID of version 7 (RFC 9562): its order is the order of creation, within a millisecond."""
    stamp = time.time_ns() // 1_000_000
    number = (stamp << 80) | secrets.randbits(80)
    number = number & ~(0xF << 76) | 0x7 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=number))


class Client:
    """Starts, reads and follows the runs of one app. Threads may share it.

    The ids of runs in another namespace than `default` begin with its name: `acme~order-1`. They
    may be given with and without it. So nobody can ask for, or take, an id of somebody else's.
    """

    def __init__(
        self,
        *,
        plans: Mapping[str, Plan],
        journal: Journal,
        engine: sqlalchemy.Engine,
        streams: Streams,
        queues: Queues,
        queue_limit: QueueLimit,
        tracing: Tracing,
        namespace: str = DEFAULT_NAMESPACE,
    ) -> None:
        """Raises BadRequest for a namespace that cannot be one."""
        self._plans = plans
        self._journal = journal
        self._engine = engine
        self._streams = streams
        self._queues = queues
        self._queue_limit = queue_limit
        self._tracing = tracing
        self._letters = LetterStatements(journal.schema)
        self._namespace = check_namespace(namespace)
        self._id_prefix = id_prefix(namespace)

    # Starting

    def start_run(
        self,
        plan: str,
        input: Any = None,
        *,
        run_id: str | None = None,
        key: str | None = None,
        queue: str | None = None,
        delay: float | timedelta | None = None,
        not_before: datetime | None = None,
        deadline: float | timedelta | None = None,
        priority: int = 0,
        tags: Mapping[str, str] | None = None,
        traceparent: str | None = None,
        connection: Caller | None = None,
    ) -> Run:
        """Store a run; it will be executed if and when the transaction commits.

        `connection` is your own SQLAlchemy Connection or Session, or psycopg connection: the run is
        then part of your transaction, and nothing is committed here. `key` names the run's purpose:
        a second start with the same key and content gives back the first run, also if the plan's
        default queue or input, which it did not name, are others by now. `delay` is seconds or
        a timedelta; higher `priority` (0 to 9) goes first within a queue. A run that has not ended
        `deadline` (seconds or a timedelta) from now fails then, in the middle of a step if need be.
        `traceparent` (W3C Trace Context) is the trace it joins; default: OpenTelemetry's current
        one. One that cannot be read is left out.

        Raises UnknownPlan, BadRequest, BadPayload, RunConflict (key or id used with other content).
        """
        request = RunRequest(
            plan=plan,
            input=input,
            run_id=run_id,
            key=key,
            queue=queue,
            delay=delay,
            not_before=not_before,
            deadline=deadline,
            priority=priority,
            tags=tags,
            traceparent=traceparent,
        )
        return self.start_runs([request], connection=connection)[0]

    def start_runs(
        self, requests: Sequence[RunRequest], *, connection: Caller | None = None
    ) -> list[Run]:
        """Store many runs in one statement and one transaction; the runs in the given order."""
        if not requests:
            return []
        new = []
        with ExitStack() as spans:
            for wanted, request in [(self._new_run(each), each) for each in requests]:
                span = self._tracing.starting(
                    wanted.plan, wanted.run_id, traceparent=request.traceparent
                )
                if len(requests) == 1:
                    carried = spans.enter_context(span)  # around the transaction
                else:
                    with span as carried:
                        pass  # side by side, not one in the other
                new.append(replace(wanted, trace_context=carried) if carried else wanted)
            runs = self._do(connection, lambda caller: self._create(caller, new))
        if connection is None and logger.isEnabledFor(logging.INFO):
            for run in runs:
                _log_run("run stored", run)
        return runs

    def _create(self, caller: Caller, new: Sequence[NewRun]) -> list[Run]:
        self._queue_limit.check(caller, self._namespace, {run.queue for run in new})
        return self._journal.create_runs(caller, new)

    def _new_run(self, request: RunRequest) -> NewRun:
        plan = self._plans.get(request.plan)
        if plan is None:
            raise UnknownPlan(request.plan, list(self._plans))
        given = new_run_id() if request.run_id is None else request.run_id
        run_id = self.stored_id(given) if isinstance(given, str) else ""
        chosen = run_id.removeprefix(self._id_prefix)
        if not RUN_ID.fullmatch(chosen) or chosen in (".", ".."):
            raise BadRequest("run_id", f"is {given!r}, which does not match ^{RUN_ID.pattern}$")
        queue = _queue_name(plan.queue if request.queue is None else request.queue)
        if queue in CELERYS_OWN:
            raise BadRequest("queue", f"is {queue!r}, a name of Celery's own: choose another")
        if request.key is not None and not (
            isinstance(request.key, str) and 0 < len(request.key) <= 256 and storable(request.key)
        ):
            raise BadRequest("key", "must be a string of 1 to 256 characters of valid text, no NUL")
        if not isinstance(request.priority, int) or not 0 <= request.priority <= 9:
            raise BadRequest("priority", f"is {request.priority!r}, which is not 0 to 9")
        if request.delay is not None and request.not_before is not None:
            raise BadRequest("delay", "and not_before cannot both be given")
        _check_time("not_before", request.not_before)
        delay = _seconds("delay", request.delay)
        deadline = _seconds("deadline", request.deadline)
        if deadline is not None and deadline <= (delay or 0):
            raise BadRequest("deadline", f"is {deadline:g} s from now, before the run may start")
        return NewRun(
            run_id=run_id,
            namespace=self._namespace,
            plan=plan.name,
            plan_version=plan.version,
            queue=queue,
            priority=request.priority,
            input=encode(
                plan.default_input if request.input is None else request.input,
                where="the run's input",
                limit=self._journal.max_event_bytes,
            ),
            key=request.key,
            not_before=request.not_before,
            delay=delay,
            deadline=deadline,
            tags=_tags(request.tags),
            default_queue=request.queue is None,
            default_input=request.input is None,
        )

    def stored_id(self, run_id: str) -> str:
        """The id as it is stored: with the name of the namespace."""
        return run_id if run_id.startswith(self._id_prefix) else self._id_prefix + run_id

    # Reading

    def get_run(self, run_id: str, *, connection: Caller | None = None) -> Run:
        """The run as it is stored now. Raises RunNotFound."""
        return self._do(
            connection,
            lambda caller: self._get(caller, run_id),
        )

    def _get(self, caller: Caller, run_id: str) -> Run:
        return self._journal.get(caller, self.stored_id(run_id), namespace=self._namespace)

    def list_runs(
        self,
        *,
        state: str | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        retried: bool | None = None,
        step: str | None = None,
        before: Run | Place | None = None,
        limit: int = 50,
        connection: Caller | None = None,
    ) -> list[Run]:
        """Runs, newest first. `before` is the last run of the page before, or its time and id.

        `retried` keeps those that somebody has retried, or those that nobody has; `step` those that
        have not ended and are in this step, or go on with it (a name, or an occurrence `name#2`).

        Raises BadRequest for a state that there is not.
        """
        _check_state(state)
        last = (before.created_at, before.run_id) if isinstance(before, Run) else before
        return self._do(
            connection,
            lambda caller: list(
                self._journal.list_runs(
                    caller,
                    namespace=self._namespace,
                    state=state,
                    plan=plan,
                    queue=queue,
                    tags=_tags(tags) if tags else None,
                    retried=retried,
                    step=step,
                    before=last,
                    limit=limit,
                )
            ),
        )

    def page_of_runs(
        self,
        *,
        state: str | None,
        plan: str | None,
        queue: str | None,
        tags: Mapping[str, str] | None,
        retried: bool | None,
        step: str | None,
        before: Place | None,
        limit: int,
        max_bytes: int,
    ) -> RunPage:
        """`list_runs` for a server: ends after so many bytes and has few runs in memory at once."""
        _check_state(state)

        def read(caller: Caller) -> RunPage:
            found = self._journal.list_runs(
                caller,
                namespace=self._namespace,
                state=state,
                plan=plan,
                queue=queue,
                tags=_tags(tags) if tags else None,
                retried=retried,
                step=step,
                before=before,
                limit=limit,
                read=execute_lazily,
            )
            return _page(((run, (run.created_at, run.run_id)) for run in found), limit, max_bytes)

        return self._do(None, read)

    def events(
        self,
        run_id: str,
        from_seq: int = 0,
        limit: int | None = None,
        *,
        connection: Caller | None = None,
    ) -> list[Event]:
        """The stored events after `from_seq`. Raises RunNotFound and EventsPruned."""
        if from_seq < 0:
            raise BadRequest("from_seq", "is negative; 0 gives everything")

        def read(caller: Caller) -> list[Event]:
            run = self._get(caller, run_id)
            return self._journal.read(caller, run.run_id, after=from_seq, limit=limit)

        return self._do(connection, read)

    def event_page(self, run: Run, from_seq: int, limit: int) -> tuple[list[EventText], bool]:
        """`events` for a server: as text, few at once, and whether there may be more."""
        return self._do(
            None,
            lambda caller: self._journal.read_page(caller, run.run_id, after=from_seq, limit=limit),
        )

    def epoch(self) -> str:
        """Changes when the database's history may have changed: a seq means nothing beyond it."""
        return self._do(None, self._streams.epoch)

    def explain(self, run_id: str, *, connection: Caller | None = None) -> list[Moment]:
        """Its attempts, waits, leases, dispatches and publishes. Raises RunNotFound."""

        def look(caller: Caller) -> list[Moment]:
            run = self._get(caller, run_id)
            events = self._journal.read(caller, run.run_id, after=run.pruned_seq)
            standing = self._journal.standing(caller, run.run_id)
            return timeline(run, self._told(events), standing)

        return self._do(connection, look)

    def _told(self, events: Sequence[Event]) -> Sequence[Event]:
        """Of these events, what `explain` may tell: all."""
        return events

    # Following

    def stream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> Iterator[Event]:
        """Every event after `from_seq`, in order and once, as it is committed, to RunFinished.

        Goes on through the loss of Redis (then slower) and of Postgres. Ends at once for a run that
        ended at or before `from_seq`. Raises RunNotFound (later too, if the run is removed),
        BadRequest for a `from_seq` beyond the head, EventsPruned for events that are not kept any
        more, WaitTimeout if no RunFinished came within `timeout` seconds. When the database was
        restored or failed over, what was seen may be gone: it raises HistoryChanged; or it calls
        `on_reset`, which must forget the events, and gives all of them from the first.
        """
        timeout = _seconds("timeout", timeout)
        run = self._check_stream(run_id, from_seq)
        if on_reset is None:
            return self._streams.follow(run, from_seq, timeout=timeout)
        return self._follow_anew(run, from_seq, timeout, on_reset)

    def _follow_anew(
        self, run: Run, after: int, timeout: float | None, on_reset: Callable[[], None]
    ) -> Iterator[Event]:
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                yield from self._streams.follow(run, after, timeout=left)
                return
            except HistoryChanged:
                on_reset()
                run, after = self.get_run(run.run_id), 0

    def astream_run(
        self,
        run_id: str,
        from_seq: int = 0,
        *,
        timeout: float | None = None,
        on_reset: Callable[[], None] | None = None,
    ) -> AsyncIterator[Event]:
        """`stream_run` for asyncio. All streams of a loop share one connection to Redis."""
        timeout = _seconds("timeout", timeout)

        async def events() -> AsyncIterator[Event]:
            run = await self._streams.in_thread(self._check_stream, run_id, from_seq)
            after, deadline = from_seq, None if timeout is None else monotonic() + timeout
            while True:
                left = None if deadline is None else max(0.0, deadline - monotonic())
                try:
                    async for event in self._streams.afollow(run, after, timeout=left):
                        yield event
                    return
                except HistoryChanged:
                    if on_reset is None:
                        raise
                    on_reset()
                    run, after = await self._streams.in_thread(self.get_run, run_id), 0

        return events()

    def stream_token(self, run_id: str) -> str:
        """A token that may follow this run over HTTP for some minutes, for `EventSource`'s URL.

        Raises RunNotFound.
        """
        run = self.get_run(run_id)
        with reaching_postgres(self._journal.schema):
            return Tokens(self._engine, self._journal.schema).create_for_stream(
                run.run_id, namespace=self._namespace, maker=None
            )

    def _check_stream(self, run_id: str, from_seq: int) -> Run:
        run = self.get_run(run_id)
        check_cursor(run, from_seq)
        return run

    def wait_for_run(self, run_id: str, timeout: float | None = None) -> Run:
        """Wait for the end of a run and return it. Raises RunNotFound and WaitTimeout."""
        timeout = _seconds("timeout", timeout)
        left, deadline = timeout, None if timeout is None else monotonic() + timeout
        while not (run := self.get_run(run_id)).state.final:
            try:
                for _ in self._streams.follow(run, run.last_seq, timeout=left):
                    pass
            except HistoryChanged:
                # The end counts, in whichever history it comes.
                left = None if deadline is None else max(0.0, deadline - monotonic())
        return run

    # Acting

    def cancel_run(
        self, run_id: str, *, reason: str | None = None, connection: Caller | None = None
    ) -> Run:
        """Ask a run to stop, durably; the run as it is then.

        A run that waits ends at once. One that runs ends after the step in flight. One whose plan
        has an `on_cancel` step, and that has begun, ends after that step. One that has ended stays
        as it is. Raises RunNotFound.
        """
        undo = {
            name: None if plan.on_cancel is None else plan.on_cancel.name
            for name, plan in self._plans.items()
        }
        run = self._do(
            connection,
            lambda caller: self._journal.cancel(
                caller,
                self.stored_id(run_id),
                namespace=self._namespace,
                reason=reason,
                undo=undo,
            ),
        )
        if connection is None:
            _log_run("cancel stored", run)
        return run

    def remove_run(self, run_id: str) -> None:
        """Take a run away with all of its events. Raises RunNotFound, RunIsActive."""
        run_id = self.get_run(run_id).run_id
        with reaching_postgres(self._journal.schema):
            self._queues.remove_run(run_id, namespace=self._namespace)

    def clean(self, state: str, older_than: float | timedelta, limit: int = 1000) -> int:
        """Take away up to `limit` runs that ended in this state so long ago; how many."""
        seconds = _age(older_than)
        with reaching_postgres(self._journal.schema):
            return self._queues.clean(
                state, seconds=seconds, limit=limit, namespace=self._namespace
            )

    def count_finished(self, state: str, older_than: float | timedelta) -> tuple[int, int]:
        """(runs, events) that `clean` would take away without a limit."""
        seconds = _age(older_than)
        with reaching_postgres(self._journal.schema):
            return self._queues.count_finished(state, seconds=seconds, namespace=self._namespace)

    # Dead letters

    def failed_runs(
        self,
        *,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        error: str | None = None,
        within: float | timedelta | None = None,
        limit: int = 100,
    ) -> list[Run]:
        """The runs that were given up on: failed, and retried by nobody. Oldest end first.

        Those whose events were pruned cannot be retried and are not among them. `error` is looked
        for in "type: message" of the error, whatever its case; `within` keeps those that failed so
        many seconds ago or less. `run.error` has the last traceback.
        """
        chosen = _given_up(plan, queue, tags, error, within)

        def read(caller: Caller) -> list[Run]:
            found = self._journal.given_up(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            )
            return [run for run, _ in found]

        return self._do(None, read)

    def page_of_failed_runs(self, chosen: GivenUp, *, limit: int, max_bytes: int) -> RunPage:
        """`failed_runs` for a server: ends after so many bytes, has few runs in memory at once."""

        def read(caller: Caller) -> RunPage:
            found = self._journal.given_up(
                caller, namespace=self._namespace, chosen=chosen, limit=limit, read=execute_lazily
            )
            return _page(found, limit, max_bytes)

        return self._do(None, read)

    def count_failed_runs(self, chosen: GivenUp, *, limit: int) -> int:
        """How many `failed_runs` there are, counted no further than `limit`."""
        return self._do(
            None,
            lambda caller: self._journal.count_given_up(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            ),
        )

    def retry_failed(
        self,
        *,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        error: str | None = None,
        within: float | timedelta | None = None,
        limit: int = 100,
    ) -> tuple[list[Run], list[Exception]]:
        """`retry_run` for all of `failed_runs`: the new runs, and why others cannot be retried.

        Each is a transaction of its own: what was started before an interruption stays, and is not
        among those of the next call. Two calls at once retry each run once.
        """
        chosen = _given_up(plan, queue, tags, error, within)
        started: list[Run] = []
        refused: list[Exception] = []
        for found, _ in self._retry_each(chosen, limit):
            started.append(found) if isinstance(found, Run) else refused.append(found)
        return started, refused

    def retry_page(self, chosen: GivenUp, *, limit: int, max_bytes: int) -> RunPage:
        """`retry_failed` for a server: goes no further after so many bytes of new runs."""
        refused: list[Exception] = []
        tried: list[Place] = []

        def started() -> Iterator[tuple[Run, Place]]:
            for found, place in self._retry_each(chosen, limit):
                tried.append(place)
                if isinstance(found, Run):
                    yield found, place
                else:
                    refused.append(found)

        page = _page(started(), limit, max_bytes)
        following = page.next or (tried[-1] if len(tried) == limit else None)
        return replace(page, refused=refused, next=following)

    def _retry_each(self, chosen: GivenUp, limit: int) -> Iterator[tuple[Run | Exception, Place]]:
        """The new run or why there is none, and the place of the run that failed."""
        places = self._do(
            None,
            lambda caller: self._journal.places_given_up(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            ),
        )
        for place in places:
            try:
                yield self._retry(place[1], None, None, once=True), place
            except (UnknownPlan, BadRequest, OrchestratorError) as reason:
                yield reason, place

    def dead_letters(self, limit: int = 100, after: int = 0) -> list[DeadLetter]:
        """Event messages that could not be published, oldest first, with an id above `after`.

        See `failed_runs` for runs.
        """
        return self._do(None, lambda caller: self._letters.list(caller, limit=limit, after=after))

    def dead_letter(self, letter_id: int) -> DeadLetter:
        """One of `dead_letters`. Raises BadRequest if there is no such letter."""
        found = self.dead_letters(limit=1, after=letter_id - 1)
        if not found or found[0].id != letter_id:
            raise BadRequest("dead letter", f"{letter_id} does not exist")
        return found[0]

    def requeue_dead_letter(self, letter_id: int) -> None:
        """Publish the message again. Raises BadRequest if there is no such letter."""
        if not self._do(None, lambda caller: self._letters.requeue(caller, letter_id)):
            raise BadRequest("dead letter", f"{letter_id} does not exist")

    def requeue_dead_letters(self, *, reason: str = "", limit: int = 1000) -> int:
        """Publish many messages again, oldest first; how many they were.

        Those that have `reason` in their reason, whatever its case.
        """
        return self._do(
            None,
            lambda caller: self._letters.requeue_some(caller, reason=reason, limit=limit),
        )

    def discard_dead_letter(self, letter_id: int) -> None:
        """Forget the message; its events stay in the journal. Raises BadRequest."""
        if not self._do(None, lambda caller: self._letters.discard(caller, letter_id)):
            raise BadRequest("dead letter", f"{letter_id} does not exist")

    # Queues, for the whole fleet

    def queues(self) -> list[QueueState]:
        """Every queue that has runs or is paused, with its counts."""
        with reaching_postgres(self._journal.schema):
            return self._queues.states()

    def pause_queue(self, queue: str) -> None:
        """After this returned no run of the queue starts anywhere; those that run go on."""
        with reaching_postgres(self._journal.schema):
            self._queues.pause(_queue_name(queue))

    def resume_queue(self, queue: str) -> None:
        """Let the queue's runs start again."""
        with reaching_postgres(self._journal.schema):
            self._queues.resume(_queue_name(queue))

    def drain_queue(self, queue: str) -> int:
        """Take away the runs that wait, leave those that run; how many were taken away."""
        with reaching_postgres(self._journal.schema):
            return self._queues.drain(_queue_name(queue))

    def obliterate_queue(self, queue: str, *, force: bool = False) -> int:
        """Take away the queue with all of its runs; how many. Raises QueueBusy without `force`."""
        with reaching_postgres(self._journal.schema):
            return self._queues.obliterate(_queue_name(queue), force=force)

    def retry_run(
        self, run_id: str, from_step: str | None = None, *, connection: Caller | None = None
    ) -> Run:
        """Start a new run that goes on where an ended one has failed; the new run.

        It has the same plan, input, queue, priority, tags and length of deadline, an id of its own,
        no key, and `retry_of`. Finished steps are not executed again: their results are taken over,
        those before `from_step` if it is given (a name, or an occurrence such as `Act#12`). A run
        that its `on_cancel` step has undone begins at the beginning.

        Raises RunNotFound, UnknownPlan and CannotRetry.
        """
        return self._retry(run_id, from_step, connection, once=False)

    def _retry(
        self, run_id: str, from_step: str | None, connection: Caller | None, *, once: bool
    ) -> Run:
        new_id = new_run_id()  # drawn here: a start whose answer was lost is repeated

        def start(caller: Caller) -> Run:
            run = self._get(caller, run_id)
            if once and self._journal.retried(
                caller, run.run_id, by_other_than=self.stored_id(new_id)
            ):
                raise CannotRetry(run_id, "somebody has retried it meanwhile")
            if not run.state.final:
                raise CannotRetry(run_id, f"it is {run.state}; wait for its end or cancel it")
            if run.pruned_seq:
                raise CannotRetry(
                    run_id, "what it had finished is not kept any more; start it anew"
                )
            request = RunRequest(
                plan=run.plan,
                run_id=new_id,
                input=run.input,
                queue=run.queue,
                priority=run.priority,
                deadline=run.deadline_at - run.created_at if run.deadline_at else None,
            )
            # Its tags were checked when it was started, maybe before they had a limit. Its input is
            # not the plan's default of today if it is null.
            new = replace(
                self._new_run(request),
                retry_of=run.run_id,
                tags=run.tags,
                input=encode(run.input, where="its input", limit=self._journal.max_event_bytes),
            )
            events = self._journal.read(caller, run.run_id)
            reused = reusable(self._plans[run.plan], events, from_step)
            if reused is not None:
                limit = self._journal.max_event_bytes
                text = encode(reused, where=f"what run {run_id} has finished", limit=limit)
                new = replace(new, reused=text)
            follows = ((events[0].data or {}) if events else {}).get("traceparent")
            with self._tracing.starting(new.plan, new.run_id, follows=follows) as carried:
                new = replace(new, trace_context=carried)
                return self._journal.create_runs(caller, [new])[0]

        return self._do(connection, start)

    def _do(self, given: Caller | None, act: Callable[[Caller], T]) -> T:
        """Act on the caller's connection, or on one of ours, in a transaction of its own.

        Everything here can be repeated: a start has its run id, a cancel is stored once.
        """
        if given is not None:
            refuse_two_phase(given)
            return act(given)
        with reaching_postgres(self._journal.schema):
            return transact(self._engine, act, twice=True)


def check_cursor(run: Run, after: int) -> None:
    """Raises BadRequest and EventsPruned unless everything after the seq can be followed."""
    if after < 0:
        raise BadRequest("from_seq", "is negative; 0 gives everything")
    if after > run.last_seq:
        raise beyond_the_head(run, after)
    run.require_events(after)


def beyond_the_head(run: Run, after: int) -> BadRequest:
    """What is wrong with a cursor of events that do not exist yet."""
    return BadRequest(
        "from_seq", f"is {after}, beyond the last event {run.last_seq} of run {run.run_id}"
    )


@contextmanager
def reaching_postgres(schema: str) -> Iterator[None]:
    """Turn the errors of an absent server or schema into ours, which say what to do."""
    try:
        yield
    except (exc.OperationalError, psycopg.OperationalError) as error:
        cause = error.orig if isinstance(error, exc.DBAPIError) else error
        reason = str(cause).strip().splitlines()[0]
        if isinstance(cause, ENDED):
            raise StatementTimeout(reason) from error
        raise Unreachable("Postgres", reason) from error
    except exc.TimeoutError as error:
        reason = "all connections of this process's pool are in use"
        raise Unreachable("Postgres", reason) from error
    except exc.DataError as error:
        # Only the database can be at fault: what is no text anywhere was refused before.
        if isinstance(error.orig, psycopg.errors.UntranslatableCharacter):
            found = re.search(r'in encoding "(\w+)"$', error.orig.diag.message_primary or "")
            raise WrongEncoding(
                f"of schema {schema}", found[1] if found else "another encoding"
            ) from error
        raise
    except exc.ProgrammingError as error:
        if isinstance(
            error.orig, (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)
        ):
            raise SchemaBehind(schema, None, head()) from error
        raise


def _log_run(message: str, run: Run) -> None:
    logger.info(
        message,
        extra={
            "action": message.replace(" ", "_"),
            "run_id": run.run_id,
            "plan": run.plan,
            "queue": run.queue,
            "state": run.state.value,
            "seq": run.last_seq,
        },
    )


def _seconds(name: str, given: float | timedelta | None) -> float | None:
    """Seconds from now, checked."""
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if seconds is not None and (problem := problem_with_seconds(seconds)):
        raise BadRequest(name, problem)
    return seconds


def _given_up(
    plan: str | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    error: str | None,
    within: float | timedelta | None,
) -> GivenUp:
    return GivenUp(
        plan=plan,
        queue=queue,
        tags=_tags(tags),
        error=error,
        seconds=_seconds("within", within),
    )


def _check_state(state: str | None) -> None:
    states = [known.value for known in RunState]
    if state is not None and state not in states:
        raise BadRequest("state", f"is {state!r}; choose {', '.join(states)}")


def _check_time(name: str, given: datetime | None) -> None:
    if given is not None and (problem := problem_with_moment(given)):
        raise BadRequest(name, problem)


def _age(older_than: float | timedelta) -> float:
    seconds = _seconds("older_than", older_than)
    if seconds is None:
        raise BadRequest("older_than", "is missing: 0 takes away whatever has ended")
    return seconds


def _queue_name(queue: str) -> str:
    if not isinstance(queue, str) or not QUEUE.fullmatch(queue):
        raise BadRequest("queue", f"is {queue!r}, which does not match ^{QUEUE.pattern}$")
    return queue


def _tags(tags: Mapping[str, str] | None) -> dict[str, str]:
    for name, value in (tags or {}).items():
        if not isinstance(name, str) or not isinstance(value, str) or not storable(name + value):
            raise BadRequest("tags", "must map strings to strings of valid text, without NUL")
    if sum(len((name + value).encode()) for name, value in (tags or {}).items()) > TAGS_BYTES:
        raise BadRequest(
            "tags", f"are longer than {TAGS_BYTES} bytes: put what is large into the input"
        )
    return dict(tags or {})


def _page(found: Iterable[tuple[Run, Place]], limit: int, max_bytes: int) -> RunPage:
    lines: list[str] = []
    size = 0
    for run, place in found:
        lines.append(json.dumps(run.to_dict(), ensure_ascii=False, separators=(",", ":")))
        size += len(lines[-1].encode())
        if size >= max_bytes or len(lines) == limit:
            return RunPage(lines=lines, next=place)
    return RunPage(lines=lines, next=None)
