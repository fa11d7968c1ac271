"""The journal: the ordered events of every run, in Postgres. The only writer of runs and events.

Each function is one statement and takes the connection it shall run on. None commits: on an
autocommit connection a statement is its own transaction, in the caller's transaction it is part of
that. `Journal` holds the statements of one schema.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from beatless.orchestrator.errors import EventsPruned, RunConflict, RunNotFound
from beatless.orchestrator.events import Event, EventText, EventType, NewEvent, encode
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.records import (
    MOST_COUNTED,
    Appended,
    CheckpointPage,
    DispatchStatus,
    FailedRunFilter,
    FullLimit,
    GroupPlace,
    NewRun,
    Place,
    Run,
    Unfinished,
)
from beatless.orchestrator.settlement import Settlement
from beatless.orchestrator.state import RunState, stored
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, Read, array, execute
from beatless.outbox.statements import statements

LAST_SEQ = 2**31 - 1
"""No run has an event beyond it: the column is an integer."""

PAGE_BYTES = 256 * 1024
"""Of events as JSON that a reader of pages has in memory at once."""

PAGE_EVENTS = 5000
"""Events that a claim reads at once; fewer if they are large."""

Send = Callable[[Caller, str, Mapping[str, Any]], Sequence[Any]]
"""`execute`, or what does more in the same commit."""

NEAR_RUNS = 10_000
"""Newest runs that are looked through before all runs with a tag, or with a retry, are read."""


def _list_of(
    sql: Mapping[str, str],
    state: RunState | None,
    *,
    plan: bool,
    queue: bool,
    tags: bool,
    retried: bool,
    step: bool,
    dedupe_key: bool,
    group: bool,
) -> str:
    """The statement that finds runs by the index of one of the filters that are given."""
    match state:
        case RunState.QUEUED:
            return sql["list_queued_at_step"] if step else sql["list_queued"]
        case RunState.WAITING:
            return sql["list_waiting_at_step"] if step else sql["list_waiting"]
        case RunState.RUNNING:
            return sql["list_running_at_step"] if step else sql["list_running"]
    if step:
        return sql["list_at_step"]
    if dedupe_key:
        return sql["list_of_dedupe_key"]
    if group:
        return sql["list_of_group"]
    if state in (RunState.FAILED, RunState.CANCELLED):
        if plan:
            return sql["list_unsuccessful_of_plan"]
        return sql["list_unsuccessful_of_queue"] if queue else sql["list_unsuccessful"]
    if tags:
        return sql["list_tagged"]
    if retried:
        return sql["list_retried"]
    if plan:
        return sql["list_of_plan"]
    return sql["list_of_queue"] if queue else sql["list"]


class FailedRuns:
    """The statements of one schema over failed runs without a retry."""

    def __init__(self, sql: Mapping[str, str]) -> None:
        self._sql = sql

    def page(
        self,
        connection: Caller,
        *,
        namespace: str,
        chosen: FailedRunFilter,
        limit: int,
        read: Read = execute,
    ) -> Iterator[tuple[Run, Place]]:
        """Failed runs without a retry that can be retried, oldest end first."""
        rows = self._read(connection, self._sql["failed_runs"], namespace, chosen, limit, read)
        return ((Run.from_row(row[2:]), (row[0], row[1])) for row in rows)

    def places(
        self, connection: Caller, *, namespace: str, chosen: FailedRunFilter, limit: int
    ) -> list[Place]:
        """The ids of `page`, with their places."""
        return [
            (at, run_id)
            for at, run_id in self._read(
                connection, self._sql["places_of_failed_runs"], namespace, chosen, limit
            )
        ]

    def count(
        self, connection: Caller, *, namespace: str, chosen: FailedRunFilter, limit: int
    ) -> int:
        """The number of runs that `page` would return."""
        statement = self._sql["count_failed_runs"]
        return int(self._read(connection, statement, namespace, chosen, limit)[0][0])

    def _read(
        self,
        connection: Caller,
        statement: str,
        namespace: str,
        chosen: FailedRunFilter,
        limit: int,
        read: Read = execute,
    ) -> Any:
        return read(
            connection,
            statement,
            {
                "namespace": namespace,
                "plan": chosen.plan,
                "queue": chosen.queue,
                "tags": json.dumps(dict(chosen.tags)) if chosen.tags else None,
                "error": chosen.error,
                "seconds": chosen.seconds,
                "after_at": chosen.after[0] if chosen.after else None,
                "after_id": chosen.after[1] if chosen.after else None,
                "limit": limit,
            },
        )


class Journal:
    """The statements of one schema over runs and their events."""

    def __init__(self, schema: str, *, max_event_bytes: int) -> None:
        self.schema = schema
        self.max_event_bytes = max_event_bytes
        self.sql = statements(
            __file__,
            schema,
            page_bytes=PAGE_BYTES,
            page_events=PAGE_EVENTS,
            near_runs=NEAR_RUNS,
            most_counted=MOST_COUNTED,
            **OPTION_SQL,
        )
        self.failed = FailedRuns(self.sql)

    def create_runs(self, connection: Caller, new: Sequence[NewRun]) -> list[Run]:
        """Store runs, their RunStarted, outbox rows and dispatches; the runs in the given order.

        A run whose key or id was used before is returned as it is stored, if it has the same
        content. Raises RunConflict if it has not.
        """
        firsts: dict[str, NewRun] = {}
        for run in new:
            firsts.setdefault(run.run_id, run)
        created = self._store(connection, firsts.values())
        if len(created) == len(new):
            return [created[run.run_id] for run in new]
        return [
            created[run.run_id]
            if run.run_id in created and run is firsts[run.run_id]
            else self._existing(connection, run)
            for run in new
        ]

    def create_missing_runs(self, connection: Caller, new: Sequence[NewRun]) -> int:
        """Store those of these runs whose key no run has, whatever its content; how many."""
        return len(self._store(connection, new))

    def _store(self, connection: Caller, new: Iterable[NewRun]) -> dict[str, Run]:
        """The runs, by id, whose id and key are unused."""
        new = list(new)
        keyed = any(run.dedupe_key is not None for run in new)
        if len(new) == 1 and not keyed:
            rows = execute(connection, self.sql["create_one"], new[0].parameters)
        else:
            text = f"[{','.join(run.to_json(whole=False) for run in new)}]"
            statement = self.sql["create_keyed"] if keyed else self.sql["create"]
            rows = execute(connection, statement, {"runs": text})
        return {row[0]: Run.from_row(row[:-1], "started") for row in rows}

    def _existing(self, connection: Caller, new: NewRun) -> Run:
        found = self.find(connection, new)
        if found is None:  # it was removed after it had kept the new one away
            return self._store(connection, [new]).get(new.run_id) or self._existing(connection, new)
        return found

    def find(self, connection: Caller, new: NewRun) -> Run | None:
        """The run that was started with this key or id before. Raises RunConflict.

        Its input is not compared if the new one could have replaced it.
        """
        rows = execute(
            connection,
            self.sql["find"],
            {
                "run_id": new.run_id,
                "namespace": new.namespace,
                "key": new.key,
                "input": new.input,
            },
        )
        if not rows:
            return None
        by_key = [
            row for row in rows if new.key is not None and Run.from_row(row[:-3]).key == new.key
        ]
        *row, default_queue, default_input, same_input = (by_key or rows)[0]
        existing = Run.from_row(row, "found")
        field = "key" if by_key else "run id"
        same_input = same_input or new.debounce is not None
        differs = new.difference(existing, default_queue, default_input, same_input=same_input)
        if differs is not None:
            raise RunConflict(existing.run_id, field, differs)
        return existing

    def append(
        self,
        connection: Caller,
        run_id: str,
        token: int,
        events: Sequence[NewEvent],
        after: int = 0,
        *,
        if_free: bool = False,
    ) -> Appended | None:
        """Commit events under a lease; None if the lease is gone and nothing was written.

        Also None if the journal has lost `after`, which the owner of the lease has seen: a failover
        that lost the last commits may keep the claim. With `if_free` also, instead of a wait, if
        another transaction holds the run's row at this moment.
        """
        rows = execute(
            connection,
            self.sql["append_if_free"] if if_free else self.sql["append"],
            {
                "run_id": run_id,
                "token": token,
                "after": after,
                "shard": shard_of(run_id),
                "n": len(events),
                "types": array(event.type.value for event in events),
                "steps": array(event.step for event in events),
                "attempts": array(event.attempt for event in events),
                "datas": array(event.data for event in events),
            },
        )
        return Appended(last_seq=rows[0][0], cancelled=rows[0][1]) if rows else None

    def has_output(
        self, connection: Caller, run_id: str, after: int, step: str, first: int
    ) -> bool:
        """Whether output of a step was committed after a seq whose first piece has this number."""
        parameters = {"run_id": run_id, "after": after, "step": step, "first": first}
        return bool(execute(connection, self.sql["has_output"], parameters)[0][0])

    def settle(
        self,
        connection: Caller,
        run_id: str,
        token: int,
        settlement: Settlement,
        after: int = 0,
        *,
        send: Send = execute,
        if_unsignalled: bool = False,
    ) -> Appended | None:
        """Commit a boundary under a lease; None as of `append`. `send` gives the rows.

        With `if_unsignalled` also None if signals of the run wait to be taken in.
        """
        normal, cancelled = settlement.normal, settlement.if_cancelled
        events = (*normal.events, *cancelled.events)
        rows = send(
            connection,
            self.sql["settle_if_unsignalled"] if if_unsignalled else self.sql["settle"],
            {
                "run_id": run_id,
                "token": token,
                "after": after,
                "shard": shard_of(run_id),
                "n": len(normal.events),
                "n_cancelled": len(cancelled.events),
                "state": normal.state.value,
                "state_cancelled": cancelled.state.value,
                "result": normal.result,
                "error": normal.error,
                "error_cancelled": cancelled.error,
                "delay": normal.delay_s,
                "delay_cancelled": cancelled.delay_s,
                "reason": settlement.reason,
                "places": array([1] * len(events)),
                "branches": array([False] * len(normal.events) + [True] * len(cancelled.events)),
                "types": array(event.type.value for event in events),
                "steps": array(event.step for event in events),
                "attempts": array(event.attempt for event in events),
                "datas": array(event.data for event in events),
            },
        )
        if not rows:
            return None
        last_seq, cancelled, signalled, _ = rows[0]
        return Appended(last_seq=last_seq, cancelled=cancelled, signalled=signalled)

    def get(self, connection: Caller, run_id: str, *, namespace: str) -> Run:
        """Raises RunNotFound."""
        rows = execute(connection, self.sql["get"], {"run_id": run_id, "namespace": namespace})
        if not rows:
            raise RunNotFound(run_id)
        return Run.from_row(rows[0])

    def get_of_any_namespace(self, connection: Caller, run_id: str) -> Run:
        """Raises RunNotFound."""
        rows = execute(connection, self.sql["get_of_any_namespace"], {"run_id": run_id})
        if not rows:
            raise RunNotFound(run_id)
        return Run.from_row(rows[0])

    def list_runs(
        self,
        connection: Caller,
        *,
        namespace: str,
        state: str | None = None,
        plan: str | None = None,
        queue: str | None = None,
        tags: Mapping[str, str] | None = None,
        retried: bool | None = None,
        step: str | None = None,
        dedupe_key: str | None = None,
        group: str | None = None,
        before: Place | None = None,
        limit: int = 50,
        read: Read = execute,
    ) -> Iterator[Run]:
        """Newest first. `before` is the place of the last run of the page before.

        `step` keeps unfinished runs that are in this step, or go on with it.

        With `execute_lazily` few of the runs are in memory at once.
        """
        statement = _list_of(
            self.sql,
            RunState(state) if state else None,
            plan=plan is not None,
            queue=queue is not None,
            tags=bool(tags),
            retried=bool(retried),
            step=step is not None,
            dedupe_key=dedupe_key is not None,
            group=group is not None,
        )
        rows = read(
            connection,
            statement,
            {
                "namespace": namespace,
                "state": stored(state),
                "plan": plan,
                "queue": queue,
                "tags": json.dumps(dict(tags)) if tags else None,
                "retried": retried,
                "step": step,
                "dedupe_key": dedupe_key,
                "group": group,
                "before_at": before[0] if before else None,
                "before_id": before[1] if before else None,
                "limit": limit,
            },
        )
        return (Run.from_row(row) for row in rows)

    def unfinished(
        self, connection: Caller, *, reasons: Sequence[str] | None = None, read: Read = execute
    ) -> Iterator[Unfinished]:
        """The places of all unfinished runs, or of those that wait for these reasons."""
        for run_id, plan, version, cancelled, undo, undoing, seq, type, step, data in read(
            connection, self.sql["unfinished"], {"reasons": list(reasons) if reasons else None}
        ):
            place = Event(run_id=run_id, seq=seq, ts=0, type=type, source="", step=step, data=data)
            yield Unfinished(
                plan=plan,
                plan_version=version,
                place=place,
                cancelled=cancelled,
                undo=undo,
                undoing=undoing,
            )

    def retried(self, connection: Caller, run_id: str, *, by_other_than: str) -> bool:
        """Whether there is a retry of this run; locks it against another one before the commit.

        Locked first and asked second: a retry that was committed while we waited is seen.
        """
        execute(connection, self.sql["lock_run"], {"run_id": run_id})
        return bool(
            execute(connection, self.sql["other_retry"], {"run_id": run_id, "but": by_other_than})
        )

    def read(
        self, connection: Caller, run_id: str, *, after: int = 0, limit: int | None = None
    ) -> list[Event]:
        """The events with a seq above `after`, in order. Raises EventsPruned and RunNotFound."""
        until = LAST_SEQ if limit is None else min(after + limit, LAST_SEQ)
        rows = execute(
            connection, self.sql["read"], {"run_id": run_id, "after": after, "until": until}
        )
        events = [Event.from_json(line) for (line,) in rows]
        self._check_kept(connection, run_id, after, events[0].seq if events else None)
        return events

    def read_page(
        self, connection: Caller, run_id: str, *, after: int, limit: int
    ) -> tuple[list[EventText], bool]:
        """`read` as text, no more than `PAGE_BYTES` of it if no event alone is larger.

        And whether there may be more.
        """
        until = min(after + limit, LAST_SEQ)
        rows = execute(
            connection, self.sql["read_page"], {"run_id": run_id, "after": after, "until": until}
        )
        page = [EventText.of(*row) for row in rows]
        self._check_kept(connection, run_id, after, page[0].seq if page else None)
        full = sum(len(event.text) for event in page) >= PAGE_BYTES
        return page, full or len(page) == limit

    def _check_kept(self, connection: Caller, run_id: str, after: int, first: int | None) -> None:
        if first != after + 1:
            # Read second: rows removed in between were read by the statement before, or missed.
            kept = execute(connection, self.sql["kept_events"], {"run_id": run_id})
            if not kept:
                raise RunNotFound(run_id)
            pruned, last = kept[0]
            if pruned > after:
                raise EventsPruned(run_id, after, pruned + 1 if pruned < last else None)

    def checkpoint_page(
        self,
        connection: Caller,
        run_id: str,
        *,
        names: Sequence[str],
        rest: str,
        behind: CheckpointPage | None = None,
    ) -> CheckpointPage:
        """A page of the events that give an unfinished run's place; the last has its last event.

        The starts, failures and ends of steps, a cancel and the traces of these names; of turns of
        one step that follow one another and did nothing but end with the trace `rest`, the last.
        `behind` is the page before. Raises RunNotFound.
        """
        parameters = {
            "run_id": run_id,
            "names": list(names),
            "rest": rest,
            "after": 0 if behind is None else behind.events[-1].seq,
            "restarted": None if behind is None else behind.restarted_seq,
            "token": None,
        }
        rows = execute(connection, self.sql["checkpoint_page"], parameters)
        if not rows:
            raise RunNotFound(run_id)
        return CheckpointPage.of_rows(rows)

    def checkpoint_events(
        self, connection: Caller, run_id: str, *, names: Sequence[str], rest: str
    ) -> Iterator[Event]:
        """The events of all of these pages. Raises RunNotFound."""
        page: CheckpointPage | None = None
        while page is None or not page.last:
            page = self.checkpoint_page(connection, run_id, names=names, rest=rest, behind=page)
            yield from page.events

    def dispatch_status(self, connection: Caller, run_id: str) -> DispatchStatus:
        """The state of a run in the tables beside `runs`. Raises RunNotFound."""
        rows = execute(
            connection, self.sql["dispatch_status"], {"run_id": run_id, "shard": shard_of(run_id)}
        )
        if not rows:
            raise RunNotFound(run_id)
        now, lease, state, due_at, reason, attempts, *rest = rows[0]
        paused, unpublished, letters, limit, group, led = rest
        return DispatchStatus(
            now=now,
            lease_expires_at=lease,
            dispatch=None if state is None else (state, due_at, reason, attempts),
            paused=paused,
            unpublished=unpublished,
            dead_letters=letters,
            limit=None if limit is None else FullLimit(**limit),
            group=None if group is None else GroupPlace(**group),
            led=led,
        )

    def heads(self, connection: Caller, run_ids: Sequence[str]) -> dict[str, int]:
        """The last seq of each of these runs, in one statement."""
        return dict(execute(connection, self.sql["heads"], {"run_ids": list(run_ids)}))

    def epoch(self, connection: Caller) -> tuple[str, int]:
        """(what changes with the database's history, up to where that is on disk)

        The origin of the schema and the timeline (idea: Centrifugo's stream epoch): that of what is
        written now, for the last checkpoint's is the old one until minutes after a failover. A
        standby writes nothing, and reports the checkpoint's. A position in the WAL that is smaller
        than before, on one timeline, is of an older copy of the disk.
        """
        epoch, flushed = execute(connection, self.sql["epoch"], {})[0]
        return epoch, flushed

    def renew(self, connection: Caller, epoch: str | None = None) -> None:
        """Make the epoch another one: the database is a copy. Only if it is this one, if given."""
        execute(connection, self.sql["renew"], {"epoch": epoch})

    def new_event(
        self,
        type: EventType,
        *,
        step: str | None = None,
        attempt: int | None = None,
        where: str,
        data: Mapping[str, Any] | None = None,
    ) -> NewEvent:
        """An event with its data checked. Raises BadPayload, naming `where` and the member."""
        text = None
        if data:
            text = encode(dict(data), where=where, limit=self.max_event_bytes)
        return NewEvent(type=type, step=step, attempt=attempt, data=text)
