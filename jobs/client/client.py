"""Starts, reads and follows the runs of one app."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Unpack

from beatless.client.approvals import ApprovalCalls
from beatless.client.children import ChildrenCalls
from beatless.client.dead_letters import DeadLetterCalls
from beatless.client.failed_runs import FailedRunCalls
from beatless.client.groups import GroupCalls
from beatless.client.limits import LimitCalls
from beatless.client.pages import RunPage, page_of
from beatless.client.plans import PlanCalls
from beatless.client.queues import QueueCalls
from beatless.client.requests import (
    RunOptions,
    RunRequest,
    check_state,
    check_texts,
    checked_tags,
    request_of,
    shows_run_options,
)
from beatless.client.schedules import ScheduleCalls
from beatless.client.streams import StreamCalls
from beatless.client.tails import TailCalls
from beatless.errors import BadRequest
from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.plan import on_cancel_steps
from beatless.orchestrator.queues import QueueStatements
from beatless.orchestrator.records import NewRun, Place, Run
from beatless.orchestrator.state import RunState
from beatless.orchestrator.timeline import Moment, timeline, waits_for_children
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller, execute_lazily

logger = logging.getLogger("beatless.client")

STARTED = {
    "joined": "run joined",
    "skipped": "start skipped",
    "input_replaced": "input replaced",
}
"""The log lines of starts that have stored no run."""


class Client(
    StreamCalls,
    ApprovalCalls,
    ChildrenCalls,
    FailedRunCalls,
    DeadLetterCalls,
    GroupCalls,
    LimitCalls,
    PlanCalls,
    QueueCalls,
    ScheduleCalls,
    TailCalls,
):
    """Starts, reads and follows the runs of one app. Threads may share it.

    Long, because each way to start a run has its documentation here.

    The ids of runs in another namespace than `default` begin with its name: `acme~order-1`. They
    may be given with and without it. So no caller can read, or take, an id of another namespace.

    >>> from beatless import Client
    >>> isinstance(app.client, Client)
    True
    >>> run = app.client.start_run("checkout", {"order": 1}, key="order:1")
    >>> app.client.get_run(run.run_id).state
    <RunState.QUEUED: 'queued'>
    """

    @shows_run_options
    def start_run(
        self,
        plan: str,
        input: Any = None,
        *,
        connection: Caller | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """Store a run; it will be executed if and when the transaction commits.

        `connection` is your own SQLAlchemy Connection or Session, or psycopg connection: the run is
        then part of your transaction, and nothing is committed here. `key` names the run's purpose:
        a second start with the same key and content gives back the first run, also if the plan's
        default queue or input, which it did not name, are others by now. Of a plan's runs with one
        `dedupe_key` one is unfinished at a time: by `while_unfinished` this start joins it (the
        default), is skipped, or replaces it; with `debounce` (and `max_wait`, both seconds or
        timedeltas) it starts when no other start has come for so long, with the last input. The
        run's `start` tells which it was. `delay` is seconds or
        a timedelta; higher `priority` (0 to 9) goes first within a queue. A run that has not ended
        `deadline` (seconds or a timedelta) from now fails then, in the middle of a step if need be.
        `traceparent` (W3C Trace Context) is the trace it joins; default: OpenTelemetry's current
        one. One that cannot be read is left out.

        Raises UnknownPlan, BadRequest, BadPayload, RunConflict (key or id used with other content).

        >>> run = client.start_run("checkout", {"order": 1}, key="order:1", priority=5)
        >>> again = client.start_run("checkout", {"order": 1}, key="order:1", priority=5)
        >>> again.run_id == run.run_id
        True
        """
        request = request_of(plan, input, options, takes_connection=True)
        return self.start_runs([request], connection=connection)[0]

    @shows_run_options
    async def astart_run(
        self,
        plan: str,
        input: Any = None,
        *,
        connection: AsyncCaller | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """`start_run` in your asynchronous transaction.

        Every call with `connection=` has such a twin: `acancel_run`, `asignal_run`, `aget_run` ….
        `connection` is your own SQLAlchemy AsyncConnection or AsyncSession (on the psycopg driver),
        or psycopg AsyncConnection. The run is part of your transaction, as with `start_run`, and
        nothing blocks the event loop; a cancel of the task ends the statement and with it your
        transaction. Without `connection` the call is a transaction itself, in a thread: it goes on
        if the task is cancelled.

        Raises what `start_run` raises.

        >>> import asyncio
        >>> from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
        >>> async def order(number):
        ...     engine = create_async_engine(app.engine.url)
        ...     async with AsyncSession(engine) as session, session.begin():
        ...         run = await app.client.astart_run(
        ...             "checkout", {"order": number}, connection=session
        ...         )
        ...     await engine.dispose()
        ...     return await app.client.aget_run(run.run_id)
        >>> asyncio.run(order(1)).input
        {'order': 1}
        """
        return await self._awaited(
            connection, lambda given: self.start_run(plan, input, connection=given, **options)
        )

    def start_runs(
        self, requests: Sequence[RunRequest], *, connection: Caller | None = None
    ) -> list[Run]:
        """Store many runs in one statement and one transaction; the runs in the given order.

        >>> from beatless import RunRequest
        >>> orders = [RunRequest(plan="checkout", input={"order": n}) for n in (1, 2, 3)]
        >>> len(client.start_runs(orders))
        3
        """
        if isinstance(requests, RunRequest) or not isinstance(requests, Sequence):
            raise TypeError(
                f"start_runs takes a list of RunRequest: start_runs([…]), not {requests!r:.200}"
            )
        for each in requests:
            if not isinstance(each, RunRequest):
                raise TypeError(
                    "start_runs takes a list of RunRequest, as RunRequest(plan=…, input=…), and in "
                    f"it is {each!r:.200}"
                )
        if not requests:
            return []
        new = []
        with ExitStack() as spans:
            idle = self._tracing.idle()
            for wanted, request in [(self._checked(each), each) for each in requests]:
                if idle and request.traceparent is None:
                    new.append(wanted)
                    continue
                span = self._tracing.starting(
                    wanted.plan, wanted.run_id, traceparent=request.traceparent
                )
                if len(requests) == 1:
                    carried = spans.enter_context(span)  # around the transaction
                else:
                    with span as carried:
                        pass  # side by side, not one in the other
                new.append(replace(wanted, trace_context=carried) if carried else wanted)
            runs = self._in_transaction(
                connection,
                lambda caller: self._create(caller, new),
                by_driver=True,
                # A run alone is stored or not; of many, a conflict takes all back.
                each_statement=len(new) == 1 and new[0].dedupe_key is None,
            )
        if connection is None and logger.isEnabledFor(logging.INFO):
            for run in runs:
                _log_run(STARTED.get(run.start or "", "run stored"), run)
        return runs

    async def astart_runs(
        self, requests: Sequence[RunRequest], *, connection: AsyncCaller | None = None
    ) -> list[Run]:
        """`start_runs` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.start_runs(requests, connection=given)
        )

    def _create(self, caller: Caller, new: Sequence[NewRun]) -> list[Run]:
        self._queue_limit.check(caller, self._namespace, {run.queue for run in new})
        if all(run.dedupe_key is None for run in new):
            return self._journal.create_runs(caller, new)
        undo = on_cancel_steps(self._plans.values())
        return self._duplicates.start_runs(caller, new, undo=undo)

    def list_runs(
        self,
        *,
        state: str | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        retried: bool | None = None,
        step: str | None = None,
        dedupe_key: str | None = None,
        group: str | None = None,
        before: Run | Place | None = None,
        limit: int = 50,
        connection: Caller | None = None,
    ) -> list[Run]:
        """Runs, newest first. `before` is the last run of the page before, or its time and id.

        `retried` keeps those with a retry, or those without; `step` those that
        have not ended and are in this step, or go on with it (a name, or an occurrence `name#2`);
        `dedupe_key` and `group` those that were started with it.

        Raises BadRequest for a state that there is not.

        >>> for order in (1, 2):
        ...     run = client.start_run("checkout", {"order": order}, tags={"customer": "ada"})
        >>> found = client.list_runs(state="queued", tags={"customer": "ada"})
        >>> [run.input["order"] for run in found]
        [2, 1]
        """
        check_state(state)
        check_texts(plan=plan, queue=queue, step=step, dedupe_key=dedupe_key, group=group)
        last = (before.created_at, before.run_id) if isinstance(before, Run) else before
        return self._in_transaction(
            connection,
            lambda caller: list(
                self._journal.list_runs(
                    caller,
                    namespace=self._namespace,
                    state=state,
                    plan=plan,
                    queue=queue,
                    tags=checked_tags(tags) if tags else None,
                    retried=retried,
                    step=step,
                    dedupe_key=dedupe_key,
                    group=group,
                    before=last,
                    limit=limit,
                )
            ),
        )

    async def alist_runs(
        self,
        *,
        state: str | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        retried: bool | None = None,
        step: str | None = None,
        dedupe_key: str | None = None,
        group: str | None = None,
        before: Run | Place | None = None,
        limit: int = 50,
        connection: AsyncCaller | None = None,
    ) -> list[Run]:
        """`list_runs` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection,
            lambda given: self.list_runs(
                state=state,
                plan=plan,
                queue=queue,
                tags=tags,
                retried=retried,
                step=step,
                dedupe_key=dedupe_key,
                group=group,
                before=before,
                limit=limit,
                connection=given,
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
        dedupe_key: str | None,
        group: str | None,
        before: Place | None,
        limit: int,
        max_bytes: int,
    ) -> RunPage:
        """`list_runs` for a server: ends after so many bytes and has few runs in memory at once."""
        check_state(state)
        check_texts(plan=plan, queue=queue, step=step, dedupe_key=dedupe_key, group=group)

        def read(caller: Caller) -> RunPage:
            found = self._journal.list_runs(
                caller,
                namespace=self._namespace,
                state=state,
                plan=plan,
                queue=queue,
                tags=checked_tags(tags) if tags else None,
                retried=retried,
                step=step,
                dedupe_key=dedupe_key,
                group=group,
                before=before,
                limit=limit,
                read=execute_lazily,
            )
            return page_of(((run, (run.created_at, run.run_id)) for run in found), limit, max_bytes)

        return self._in_transaction(None, read)

    def events(
        self,
        run_id: str,
        from_seq: int = 0,
        limit: int | None = None,
        *,
        connection: Caller | None = None,
    ) -> list[Event]:
        """The stored events after `from_seq`. Raises RunNotFound and EventsPruned.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> [event.type for event in client.events(run.run_id)]
        ['RunStarted']
        """
        if from_seq < 0:
            raise BadRequest("from_seq", "is negative; 0 gives everything")

        def read(caller: Caller) -> list[Event]:
            run = self._get(caller, run_id)
            return self._journal.read(caller, run.run_id, after=from_seq, limit=limit)

        return self._in_transaction(connection, read)

    async def aevents(
        self,
        run_id: str,
        from_seq: int = 0,
        limit: int | None = None,
        *,
        connection: AsyncCaller | None = None,
    ) -> list[Event]:
        """`events` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.events(run_id, from_seq, limit, connection=given)
        )

    def event_page(self, run: Run, from_seq: int, limit: int) -> tuple[list[EventText], bool]:
        """`events` for a server: as text, few at once, and whether there may be more."""
        return self._in_transaction(
            None,
            lambda caller: self._journal.read_page(caller, run.run_id, after=from_seq, limit=limit),
        )

    def explain(self, run_id: str, *, connection: Caller | None = None) -> list[Moment]:
        """Its attempts, waits, leases, dispatches and publishes. Raises RunNotFound.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.explain(run.run_id)[0].text
        'accepted, plan checkout ...'
        """

        def look(caller: Caller) -> list[Moment]:
            run = self._get(caller, run_id)
            events = self._journal.read(caller, run.run_id, after=run.pruned_seq)
            status = self._journal.dispatch_status(caller, run.run_id)
            children = None
            if run.state is RunState.WAITING and (started := waits_for_children(events)):
                children = ChildRuns(self._journal).waited_for(caller, run.run_id, started)
            consumers = None
            if status.dispatch is not None and status.dispatch[0] == "sent":
                workers = QueueStatements(self._journal.schema).workers(caller)
                consumers = sum(run.queue in worker.queues for worker in workers)
            return timeline(run, self._told(events), status, children, consumers)

        return self._in_transaction(connection, look)

    async def aexplain(self, run_id: str, *, connection: AsyncCaller | None = None) -> list[Moment]:
        """`explain` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(connection, lambda given: self.explain(run_id, connection=given))

    def _told(self, events: Sequence[Event]) -> Sequence[Event]:
        """The events that `explain` may show: all."""
        return events

    def cancel_run(
        self, run_id: str, *, reason: str | None = None, connection: Caller | None = None
    ) -> Run:
        """Ask a run to stop, durably; the run as it is then.

        A run that waits ends at once. One that runs ends after the step in flight. One whose plan
        has an `on_cancel` step, and that has begun, ends after that step. One that has ended stays
        as it is. Raises RunNotFound.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.cancel_run(run.run_id, reason="sold out").state.value
        'cancelled'
        """
        check_texts(reason=reason)
        undo = on_cancel_steps(self._plans.values())
        with self._naming(run_id):
            run = self._in_transaction(
                connection,
                lambda caller: self._cancel(caller, run_id, reason, undo),
            )
        if connection is None:
            _log_run("cancel stored", run)
        return run

    async def acancel_run(
        self, run_id: str, *, reason: str | None = None, connection: AsyncCaller | None = None
    ) -> Run:
        """`cancel_run` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.cancel_run(run_id, reason=reason, connection=given)
        )

    def _cancel(
        self, caller: Caller, run_id: str, reason: str | None, undo: Mapping[str, str | None]
    ) -> Run:
        stored = self.stored_id(run_id)
        found = self._cancels.cancel(
            caller,
            [stored],
            reason=reason,
            undo=undo,
            source="api",
            namespace=self._namespace,
        )
        return found[0] if found else self._get(caller, run_id)


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
