"""Calls that show the runs that a run has started."""

from collections.abc import Sequence

from beatless.client.base import BaseClient
from beatless.client.pages import NumberedRunPage, numbered_page_of
from beatless.client.requests import check_state
from beatless.orchestrator.child_calls import ChildEnd
from beatless.orchestrator.children import ChildRuns
from beatless.orchestrator.records import Run
from beatless.outbox.awaited import AsyncCaller
from beatless.outbox.queries import Caller, execute_lazily


class ChildrenCalls(BaseClient):
    """The children of a run."""

    def children(
        self,
        run_id: str,
        *,
        state: str | None = None,
        after: int = 0,
        limit: int = 50,
        connection: Caller | None = None,
    ) -> list[Run]:
        """The runs that a run has started: by `run.child` and `run.map`, in the order of the calls.

        `after` is the `child_no` of the last one of the page before. Raises RunNotFound, and
        BadRequest for a state that there is not.

        >>> run = client.start_run("checkout", {"order": 1})
        >>> client.children(run.run_id)
        []
        """
        check_state(state)

        def look(caller: Caller) -> list[Run]:
            stored = self._get(caller, run_id).run_id
            children = ChildRuns(self._journal)
            return list(children.page(caller, stored, state=state, after=after, limit=limit))

        return self._in_transaction(connection, look)

    async def achildren(
        self,
        run_id: str,
        *,
        state: str | None = None,
        after: int = 0,
        limit: int = 50,
        connection: AsyncCaller | None = None,
    ) -> list[Run]:
        """`children` in your asynchronous transaction: see `astart_run`."""
        return await self._awaited(
            connection,
            lambda given: self.children(
                run_id, state=state, after=after, limit=limit, connection=given
            ),
        )

    def page_of_children(
        self, run_id: str, *, state: str | None, after: int, limit: int, max_bytes: int
    ) -> NumberedRunPage:
        """`children` for a server: ends after so many bytes and has few runs in memory at once."""

        def look(caller: Caller) -> NumberedRunPage:
            stored = self._get(caller, run_id).run_id
            found = ChildRuns(self._journal).page(
                caller, stored, state=state, after=after, limit=limit, read=execute_lazily
            )
            return numbered_page_of(found, limit, max_bytes)

        return self._in_transaction(None, look)

    def ends_of_children(self, run_id: str, first: int, last: int) -> Sequence[ChildEnd]:
        """The children with these numbers that have ended."""
        return self._in_transaction(
            None,
            lambda caller: ChildRuns(self._journal).ends(
                caller, self.stored_id(run_id), first, last
            ),
        )
