"""Calls about runs that failed: list, count and retry."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial

from beatless.client.base import BaseClient
from beatless.client.pages import RunPage, page_of
from beatless.client.requests import RunRequest, check_texts, checked_tags, seconds
from beatless.errors import BadRequest, UnknownPlan
from beatless.orchestrator.errors import CannotRetry, OrchestratorError
from beatless.orchestrator.events import encode
from beatless.orchestrator.function_plan import FunctionPlan
from beatless.orchestrator.history import history_of, reusable_calls
from beatless.orchestrator.records import FailedRunFilter, NewRun, Place, Run, new_run_id
from beatless.orchestrator.reuse import reusable
from beatless.orchestrator.undos import deadline_of
from beatless.orchestrator.unfit_events import UnreadableEvent, folded
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller, execute_lazily


class FailedRunCalls(BaseClient):
    """Failed runs without a retry."""

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
        """Failed runs without a retry, oldest end first.

        Those whose events were pruned cannot be retried and are not among them. `error` is looked
        for in "type: message" of the error, ignoring case; `within` keeps those that failed so
        many seconds ago or less. `run.error` has the last traceback.

        >>> run = client.start_run("checkout", {"order": 1, "declined": True})
        >>> executed = beatless.work_until_idle()
        >>> [failed.error["message"] for failed in client.failed_runs(error="card declined")]
        ['card declined']
        """
        chosen = _filter(plan, queue, tags, error, within)

        def read(caller: Caller) -> list[Run]:
            found = self._journal.failed.page(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            )
            return [run for run, _ in found]

        return self._in_transaction(None, read)

    def page_of_failed_runs(
        self, chosen: FailedRunFilter, *, limit: int, max_bytes: int
    ) -> RunPage:
        """`failed_runs` for a server: ends after so many bytes, has few runs in memory at once."""

        def read(caller: Caller) -> RunPage:
            found = self._journal.failed.page(
                caller, namespace=self._namespace, chosen=chosen, limit=limit, read=execute_lazily
            )
            return page_of(found, limit, max_bytes)

        return self._in_transaction(None, read)

    def count_failed_runs(self, chosen: FailedRunFilter, *, limit: int) -> int:
        """The number of `failed_runs`, counted up to `limit`."""
        return self._in_transaction(
            None,
            lambda caller: self._journal.failed.count(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            ),
        )

    def retry_run(
        self, run_id: str, from_step: str | None = None, *, connection: Caller | None = None
    ) -> Run:
        """Start a new run that goes on where an ended one has failed; the new run.

        It has the same plan, input, queue, priority, tags and length of deadline, an id of its own,
        no key, and `retry_of`. Finished steps are not executed again: their results are taken over,
        those before `from_step` if it is given (a name, or an occurrence such as `Act#12`). A run
        that its `on_cancel` step has undone begins at the beginning.

        Raises RunNotFound, UnknownPlan and CannotRetry.

        >>> run = client.start_run("checkout", {"order": 1, "declined": True})
        >>> executed = beatless.work_until_idle()
        >>> client.retry_run(run.run_id, from_step="charge").retry_of == run.run_id
        True
        """
        check_texts(from_step=from_step)
        return self._retry(run_id, from_step, connection, once=False)

    async def aretry_run(
        self, run_id: str, from_step: str | None = None, *, connection: AsyncCaller | None = None
    ) -> Run:
        """`retry_run` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection, lambda given: self.retry_run(run_id, from_step, connection=given)
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

        Each is a transaction of its own: runs started before an interruption stay, and are not
        among those of the next call. Two calls at once retry each run once.

        >>> order = {"order": 1, "declined": True}
        >>> run = client.start_run("checkout", order, tags={"day": "monday"})
        >>> executed = beatless.work_until_idle()
        >>> started, refused = client.retry_failed(tags={"day": "monday"}, within=3600)
        >>> len(started), refused
        (1, [])
        """
        chosen = _filter(plan, queue, tags, error, within)
        started: list[Run] = []
        refused: list[Exception] = []
        for found, _ in self._retry_each(chosen, limit):
            started.append(found) if isinstance(found, Run) else refused.append(found)
        return started, refused

    def retry_page(self, chosen: FailedRunFilter, *, limit: int, max_bytes: int) -> RunPage:
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

        page = page_of(started(), limit, max_bytes)
        following = page.next or (tried[-1] if len(tried) == limit else None)
        return replace(page, refused=refused, next=following)

    def _retry_each(
        self, chosen: FailedRunFilter, limit: int
    ) -> Iterator[tuple[Run | Exception, Place]]:
        """The new run or why there is none, and the place of the run that failed."""
        places = self._in_transaction(
            None,
            lambda caller: self._journal.failed.places(
                caller, namespace=self._namespace, chosen=chosen, limit=limit
            ),
        )
        for place in places:
            try:
                yield self._retry(place[1], None, None, once=True), place
            except (UnknownPlan, BadRequest, OrchestratorError) as reason:
                yield reason, place

    def _retry(
        self, run_id: str, from_step: str | None, connection: Caller | None, *, once: bool
    ) -> Run:
        new_id = new_run_id()  # drawn here: a start whose answer was lost is repeated

        def start(caller: Caller) -> Run:
            run = self._get(caller, run_id)
            if once and self._journal.retried(
                caller, run.run_id, by_other_than=self.stored_id(new_id)
            ):
                raise CannotRetry(run_id, "it has been retried meanwhile")
            if not run.state.final:
                raise CannotRetry(run_id, f"it is {run.state}; wait for its end or cancel it")
            if run.pruned_seq:
                raise CannotRetry(
                    run_id,
                    "the results of its finished steps were removed by retention; start a new run",
                )
            events = self._journal.read(caller, run.run_id)
            deadline_at = deadline_of(run, events)
            request = RunRequest(
                plan=run.plan,
                run_id=new_id,
                input=run.input,
                queue=run.queue,
                deadline=deadline_at - run.created_at if deadline_at else None,
            )
            checked = self._checked(request)
            plan = self._plans[run.plan]
            given = run.input
            if isinstance(plan, FunctionPlan):
                given = folded(partial(history_of, plan), events).as_given(run).input
            # Its options were checked when it was started, maybe by the rules of an older release.
            # Its input is not the plan's default of today if it is null.
            new = replace(
                checked,
                retry_of=run.run_id,
                schedule=run.schedule,
                tick=run.tick,
                input=encode(given, where="its input", limit=self._journal.max_event_bytes),
                **run.stored_options(),
            )
            if isinstance(plan, FunctionPlan):
                reused = reusable_calls(plan, events, from_step)
            else:
                reused = reusable(plan, events, from_step)
            if reused is not None:
                limit = self._journal.max_event_bytes
                text = encode(reused, where=f"the results of run {run_id}", limit=limit)
                new = replace(new, reused=text)
            self._check_key_is_free(caller, run_id, new)
            follows = ((events[0].data or {}) if events else {}).get("traceparent")
            with self._tracing.starting(new.plan, new.run_id, follows=follows) as carried:
                new = replace(new, trace_context=carried)
                return self._journal.create_runs(caller, [new])[0]

        try:
            return self._in_transaction(connection, start)
        except UnreadableEvent as error:
            event = f"event {error.event.seq} ({error.event.type})"
            problem = f"{event} of its journal cannot be read: {error.problem}; start a new run"
            raise CannotRetry(run_id, problem) from error

    def _check_key_is_free(self, caller: Caller, run_id: str, new: NewRun) -> None:
        """Raises CannotRetry while another run with its dedupe key is unfinished."""
        if new.dedupe_key is None:
            return
        holder = self._duplicates.lock_unfinished(caller, new)
        if holder is not None and holder.run_id != new.run_id:
            raise CannotRetry(
                run_id,
                f"run {holder.run_id} with its dedupe key {new.dedupe_key} is {holder.state}: wait "
                "for its end or cancel it",
            )


def _filter(
    plan: str | None,
    queue: str | None,
    tags: Mapping[str, str] | None,
    error: str | None,
    within: float | timedelta | None,
) -> FailedRunFilter:
    check_texts(plan=plan, queue=queue, error=error)
    return FailedRunFilter(
        plan=plan,
        queue=queue,
        tags=checked_tags(tags),
        error=error,
        seconds=seconds("within", within),
    )
