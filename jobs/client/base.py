"""The collaborators of a client, its namespace and its transactions."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import sqlalchemy

from beatless.approval_links import ApprovalLinks
from beatless.client.queue_limit import QueueLimit
from beatless.client.requests import RunRequest, check_texts, new_run
from beatless.namespaces import DEFAULT_NAMESPACE, check_namespace, namespace_of, stored_id
from beatless.observe.tracing import Tracing
from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.duplicates import Duplicates
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.inbox import Inbox
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun, Run
from beatless.orchestrator.schedules import Schedules
from beatless.outbox.awaited import AsyncCaller, awaiting
from beatless.outbox.letters import LetterStatements
from beatless.outbox.queries import Caller, refuse_autocommit, refuse_two_phase
from beatless.queues import Queues
from beatless.streams.streams import Streams
from beatless.transactions import (
    on_a_given_connection,
    reaching_postgres,
    transact,
    transact_by_driver,
)

T = TypeVar("T")

DEFAULT_APP = "default"
"""The name of an app that has none: whose schedules these are."""


class BaseClient:
    """Holds the collaborators of a client; runs statements for its namespace. No state of a run."""

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
        app_name: str = DEFAULT_APP,
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
        self._inbox = Inbox(journal.schema)
        self._links = ApprovalLinks(journal.schema)
        self._cancels = Cancels(journal.schema, max_event_bytes=journal.max_event_bytes)
        self._duplicates = Duplicates(journal, self._cancels)
        self._schedules = Schedules(journal.schema)
        self._namespace = check_namespace(namespace)
        self._app_name = app_name

    def stored_id(self, run_id: str) -> str:
        """The id as it is stored: with the name of the namespace.

        Raises BadRequest for text that no id can have.
        """
        check_texts(run_id=run_id)
        return stored_id(self._namespace, run_id)

    def get_run(self, run_id: str, *, connection: Caller | None = None) -> Run:
        """The run as it is stored now. Raises RunNotFound.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.get_run(run.run_id).state.value
        'queued'
        """
        return self._in_transaction(
            connection, lambda caller: self._get(caller, run_id), each_statement=True
        )

    async def aget_run(self, run_id: str, *, connection: AsyncCaller | None = None) -> Run:
        """`get_run` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(connection, lambda given: self.get_run(run_id, connection=given))

    def _get(self, caller: Caller, run_id: str) -> Run:
        with self._naming(run_id):
            return self._journal.get(caller, self.stored_id(run_id), namespace=self._namespace)

    @contextmanager
    def _naming(self, given: str) -> Iterator[None]:
        """RunNotFound names the id that was given; a note says which client would see it."""
        try:
            yield
        except RunNotFound:
            error = RunNotFound(given)
            if (named := namespace_of(given)) not in (self._namespace, DEFAULT_NAMESPACE):
                error.add_note(
                    f"this client sees the runs of the namespace {self._namespace}; those of "
                    f'{named} are seen by app.client_for("{named}")'
                )
            raise error from None

    def _checked(self, request: RunRequest) -> NewRun:
        """Raises UnknownPlan, BadRequest and BadPayload."""
        return new_run(
            request,
            plans=self._plans,
            namespace=self._namespace,
            max_event_bytes=self._journal.max_event_bytes,
        )

    def epoch(self) -> str:
        """Changes when the database's history may have changed: a seq means nothing beyond it.

        >>> client.epoch() == client.epoch()
        True
        """
        return self._in_transaction(None, self._streams.epoch)

    async def _awaited(self, given: AsyncCaller | None, call: Callable[[Caller | None], T]) -> T:
        """Call on the caller's asynchronous connection, or without one in a thread.

        The call in a thread goes on if its caller is cancelled; one on a connection is cancelled.
        """
        if given is None:
            return await asyncio.to_thread(call, None)
        return await awaiting(given, call)

    def _in_transaction(
        self,
        given: Caller | None,
        act: Callable[[Caller], T],
        *,
        by_driver: bool = False,
        each_statement: bool = False,
    ) -> T:
        """Act on the caller's connection, or on one of ours, in a transaction of its own.

        `by_driver` is for an act that does nothing but `execute`, which is faster so. Of such an
        act `each_statement` commits each on one of ours, if it reads or writes in one statement.
        Everything here can be repeated: a start has its run id, a cancel is stored once.
        """
        if given is not None:
            refuse_two_phase(given)
            refuse_autocommit(given)
            with on_a_given_connection(self._journal.schema, self._engine):
                return act(given)
        with reaching_postgres(self._journal.schema, self._engine):
            if by_driver or each_statement:
                return transact_by_driver(
                    self._engine, act, twice=True, each_statement=each_statement
                )
            return transact(self._engine, act, twice=True)
