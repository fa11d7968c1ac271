"""The statements over the children of runs: their starts, their results, their cancel."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg

from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.child_calls import (
    ChildEnd,
    Children,
    ChildrenLook,
    ChildrenTurn,
    ChildrenWait,
    Tends,
    next_turn,
    turn_of_rivals,
)
from beatless.orchestrator.events import Event
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.records import NewRun, Run
from beatless.orchestrator.state import RunState, stored
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, Read, execute, int_array
from beatless.outbox.statements import statements
from beatless.outbox.waking import Woken

CANCELS = 100
"""Children that one transaction of a relay cancels."""

STATEMENT_BYTES = 8 * 1024 * 1024
"""Inputs of children that one statement stores: it has them in memory several times."""

PARENT_ENDED = "its parent has ended, or needs it no more"
"""The reason of the cancel of a child."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tended:
    """What was done for the children of a call."""

    turn: ChildrenTurn
    others: int
    """Unfinished children of other calls."""
    cancelled: bool
    """Their parent is: none was started."""
    wakes_on_failure: bool

    @property
    def needs_parent(self) -> bool:
        """Whether it goes on at once, and is not parked: there is something for it to do."""
        turn = self.turn
        return (turn.done or turn.again or turn.changed) and not self.cancelled


class ChildRuns:
    """The statements of one schema over the children of runs."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._sql = statements(
            __file__, journal.schema, batch=CANCELS, run_options=OPTION_SQL["run_options"]
        )

    def start(self, connection: Caller, run_id: str, runs: Sequence[NewRun]) -> None:
        """Store children of a run whose row this transaction has locked."""
        if runs:
            for some in _pages(runs):
                self._journal.create_runs(connection, some)
            last = max(run.child_no or 0 for run in runs)
            execute(connection, self._sql["count"], {"run_id": run_id, "last": last})

    def tend(self, connection: Caller, run_id: str, tends: Tends) -> Tended:
        """Start those that can be started now, and have those cancelled that are not needed.

        The row of the parent is locked. None is started of a parent that is cancelled.
        """
        children = tends.children
        if children is None:
            return self._end_all(connection, run_id)
        if children.rivals:
            return self._tend_rivals(connection, run_id, children)
        place = {"run_id": run_id, "first": children.first, "last": children.last}
        look, others, cancelled = self._look(connection, run_id, children)
        turn = next_turn(children, look)
        if turn.done and turn.failed is None and not children.collects:
            for (number,) in execute(connection, self._sql["removed"], place):
                turn = replace(turn, failed=number)
        if turn.done and children.collects:
            counted = place | {"count": children.count}
            ((failures,),) = execute(connection, self._sql["failures"], counted)
            turn = replace(turn, failures=failures)
        if turn.start and not cancelled:
            runs = tends.runs(turn.start)
            self.start(connection, run_id, runs or ())
            turn = replace(turn, changed=runs is None)
        if turn.failed is not None and look.unfinished:
            execute(connection, self._sql["stop"], place | {"shard": shard_of(run_id)})
        return Tended(
            turn=turn,
            others=others,
            cancelled=cancelled,
            wakes_on_failure=not children.collects and turn.failed is None,
        )

    def _end_all(self, connection: Caller, run_id: str) -> Tended:
        ((unfinished, others),) = execute(connection, self._sql["look_at_all"], {"run_id": run_id})
        if unfinished:
            place = {"run_id": run_id, "shard": shard_of(run_id), "first": None, "last": None}
            execute(connection, self._sql["stop"], place)
        turn = ChildrenTurn(start=range(0), left=0, done=not unfinished)
        return Tended(turn=turn, others=others, cancelled=False, wakes_on_failure=False)

    def _tend_rivals(self, connection: Caller, run_id: str, children: Children) -> Tended:
        parameters = {"run_id": run_id, "rivals": int_array(children.rivals)}
        ((unfinished, others, won, cancelled),) = execute(
            connection, self._sql["look_at_rivals"], parameters
        )
        look = ChildrenLook(started=children.count, unfinished=unfinished, failed=None, won=won)
        turn = turn_of_rivals(look)
        if won is not None and unfinished:
            shard = {"shard": shard_of(run_id)}
            execute(connection, self._sql["stop_rivals"], parameters | shard)
        return Tended(turn=turn, others=others, cancelled=cancelled, wakes_on_failure=False)

    def _look(
        self, connection: Caller, run_id: str, children: Children
    ) -> tuple[ChildrenLook, int, bool]:
        """These children, how many others are unfinished, and whether their parent is cancelled."""
        parameters = {
            "run_id": run_id,
            "first": children.first,
            "last": children.last,
            "count": children.count,
            "collects": children.collects,
        }
        ((started, unfinished, others, failed, cancelled),) = execute(
            connection, self._sql["look"], parameters
        )
        look = ChildrenLook(started=started, unfinished=unfinished, failed=failed)
        return look, others, cancelled

    def waited_for(self, connection: Caller, run_id: str, started: Event) -> ChildrenWait:
        """How many children of this ChildrenStarted have ended.

        A run that starts them one by one may wait for any of them: then, of all so far.
        """
        children = Children.from_event(started)
        if children.run_id is not None:
            children = replace(children, first=1, count=children.last)
        look, _, _ = self._look(connection, run_id, children)
        ended = look.started - look.unfinished
        return ChildrenWait(occurrence=started.step or "", ended=ended, count=children.count)

    def wait(self, connection: Caller, run_id: str, tended: Sequence[Tended]) -> None:
        """Note when the parent, which was parked, is to be woken: for the first that may need it.

        In the order in which they were tended: only the first may have started further ones.
        """
        parameters = {
            "run_id": run_id,
            "left": max(each.others + each.turn.left for each in tended),
            "on_failure": any(each.wakes_on_failure for each in tended),
        }
        execute(connection, self._sql["await"], parameters)

    def ends(self, connection: Caller, run_id: str, first: int, last: int) -> list[ChildEnd]:
        """The children with these numbers that have ended."""
        rows = execute(
            connection, self._sql["ends"], {"run_id": run_id, "first": first, "last": last}
        )
        return [
            ChildEnd(number=number, run_id=child, result=result, error=error)
            for number, child, result, error in rows
        ]

    def page(
        self,
        connection: Caller,
        run_id: str,
        *,
        state: str | None = None,
        after: int = 0,
        limit: int = 50,
        read: Read = execute,
    ) -> Iterator[Run]:
        """The children of a run in the order of their numbers, from the one after `after` on."""
        parked = {RunState.QUEUED.value: False, RunState.WAITING.value: True}
        parameters = {
            "run_id": run_id,
            "state": stored(state),
            "parked": parked.get(state or ""),
            "after": after,
            "limit": limit,
        }
        rows = read(connection, self._sql["page"], parameters)
        return (Run.from_row(row) for row in rows)


def _pages(runs: Sequence[NewRun]) -> Iterator[Sequence[NewRun]]:
    """The runs in pages of so many bytes: a statement that is too large fails for ever."""
    page: list[NewRun] = []
    size = 0
    for run in runs:
        size += len(run.input or "")
        if page and size > STATEMENT_BYTES:
            yield page
            page, size = [], len(run.input or "")
        page.append(run)
    yield page


class CancelsChildren:
    """Cancels the children of runs that have ended, for a relay. Waits for no row."""

    def __init__(self, journal: Journal, undo: Mapping[str, str | None]) -> None:
        """`undo` has the name of each plan's `on_cancel` step, as of `Cancels`."""
        self._cancels = Cancels(journal.schema, max_event_bytes=journal.max_event_bytes)
        self._undo = undo
        self._sql = statements(
            __file__, journal.schema, batch=CANCELS, run_options=OPTION_SQL["run_options"]
        )

    def step(self, connection: psycopg.Connection[Any], shards: Sequence[int]) -> Woken:
        """Cancel some of the children by the notes of these shards."""
        with connection.transaction():
            rows = execute(connection, self._sql["lock_to_cancel"], {"shards": list(shards)})
            run_ids = list(dict.fromkeys(run_id for run_id, _ in rows))
            cancelled = run_ids and self._cancels.cancel(
                connection, run_ids, reason=PARENT_ENDED, undo=self._undo, source="relay"
            )
        ((found, gone),) = execute(
            connection, self._sql["forget_cancels"], {"shards": list(shards)}
        )
        return Woken(done=gone + len(cancelled), left=found - gone)
