"""The children of one run under its lease: the rows by which they are started, and their ends."""

from collections.abc import Mapping
from dataclasses import replace

from beatless.orchestrator.child_calls import (
    ChildCall,
    Children,
    ChildrenLook,
    ChildrenTurn,
    ReadEnds,
    Tends,
    next_turn,
    removed,
)
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.records import NewRun

NONE_STARTED = ChildrenLook(started=0, unfinished=0, failed=None)


class ChildStarts:
    """Starts children of one run, and says how their calls have ended."""

    def __init__(
        self,
        lease: Lease,
        *,
        plan: str,
        plans: Mapping[str, Plan],
        read_ends: ReadEnds,
        max_event_bytes: int,
    ) -> None:
        """Children are runs of `plans`. `read_ends` reads those that have ended."""
        self._lease = lease
        self._plan = plan
        self._plans = plans
        self._read_ends = read_ends
        self._max_event_bytes = max_event_bytes

    def first(
        self, call: ChildCall, children: Children, *, compares: bool = True
    ) -> tuple[Children, list[NewRun]]:
        """The children that a call starts in the commit of its event.

        `compares`: whether the call is compared with the stored one when it is asked for again.
        Raises PlanError for a plan that the App does not have, and BadPayload for an input that a
        child cannot have.
        """
        call.check_plan(self._plans, parent=self._plan)
        call.check_inputs(self._max_event_bytes)
        if compares:
            children = replace(children, digests=call.page_digests())
        runs = self._runs(call, children, next_turn(children, NONE_STARTED).start)
        return (replace(children, run_id=runs[0].run_id) if call.alone else children), runs

    def tends(self, call: ChildCall | None, children: Children) -> Tends:
        """The children of a call, while the run waits for them; None if all were started."""

        def runs(numbers: range) -> list[NewRun] | None:
            if call is None:
                return []
            if not call.has_inputs(children, numbers):
                return None
            return self._runs(call, children, numbers)

        return Tends(children=children, runs=runs)

    def ended(self, children: Children, turn: ChildrenTurn) -> Children:
        """The children of a call that is done, with the failure that has ended it."""
        if children.rivals:
            lost = turn.won is None
            ended = replace(children, won=turn.won, failures=children.count if lost else 0)
            return self._failed(ended, children.first) if lost else ended
        if turn.failed is not None or (children.run_id is not None and not children.collects):
            children = self._failed(children, turn.failed or children.first)
        return replace(children, failures=turn.failures)

    def _failed(self, children: Children, number: int) -> Children:
        """The children of a call that this one has ended by its failure, if it has failed."""
        ends = self._read_ends(number, number)
        if not ends:
            return replace(children, error=removed(number))
        if ends[0].error is None:
            return children
        return replace(children, error=ends[0].failure)

    def _runs(self, call: ChildCall, children: Children, numbers: range) -> list[NewRun]:
        return call.runs(
            self._lease.run,
            children,
            numbers,
            trace_context=self._lease.trace_context,
            limit=self._max_event_bytes,
        )
