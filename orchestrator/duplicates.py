"""Starts runs with a dedupe key: of those with one key one is unfinished, and its successor waits.

Starts with one key happen one after another: an advisory lock holds up the second until the end of
the first one's transaction. A start that finds a run which it joins, or for which it is skipped,
waits for nobody. The index `dispatches_dedupe` decides whatever this code believes.

Claims, cancels and ends do not take that lock: they are met on the run's row. A run ends while its
successor is being stored: see `successors`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from beatless.orchestrator.cancels import Cancels
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.options import OPTION_SQL
from beatless.orchestrator.records import NewRun, Run
from beatless.outbox.message import shard_of
from beatless.outbox.queries import Caller, array, execute
from beatless.outbox.statements import statements


class Duplicates:
    """The starts of one schema by their dedupe keys, in a transaction of the caller or of ours."""

    def __init__(self, journal: Journal, cancels: Cancels) -> None:
        self._journal = journal
        self._cancels = cancels
        self._sql = statements(__file__, journal.schema, run_options=OPTION_SQL["run_options"])

    def start_runs(
        self, connection: Caller, new: Sequence[NewRun], *, undo: Mapping[str, str | None]
    ) -> list[Run]:
        """Store runs; those with a dedupe key one by one, in the given order. Raises RunConflict.

        `undo` is that of `Cancels.cancel`, for runs that are replaced.
        """
        plain = [run for run in new if run.dedupe_key is None]
        stored = iter(self._journal.create_runs(connection, plain) if plain else [])
        keyed = [run for run in new if run.dedupe_key is not None]
        if len(keyed) > 1 or any(_replaces(run) for run in keyed):
            # First: a start that is repeated may still be in its transaction, and is not replaced.
            self._lock(connection, keyed)
        used = self._used(connection, keyed)
        runs = []
        for run in new:
            if run.dedupe_key is None:
                runs.append(next(stored))
                continue
            known = None
            if run.run_id in used or run.key in used:
                known = self._journal.find(connection, run)
            runs.append(known or self._start(connection, run, undo))
            used |= {run.run_id, run.key or run.run_id}
        return runs

    def lock_unfinished(self, connection: Caller, new: NewRun) -> Run | None:
        """The unfinished run with the dedupe key of this one; none is started until the commit."""
        self._lock(connection, [new])
        found = self._unfinished(connection, new)
        return found[0] if found else None

    def _start(self, connection: Caller, new: NewRun, undo: Mapping[str, str | None]) -> Run:
        if new.debounce is not None:
            return self._debounce(connection, new)
        if new.while_unfinished == "replace":
            return self._replace(connection, new, undo)
        aside = self._stand_aside(connection, new)
        if aside is None:
            self._lock(connection, [new])
            aside = self._stand_aside(connection, new)
        return aside or self._store(connection, new)

    def _stand_aside(self, connection: Caller, new: NewRun) -> Run | None:
        found = self._unfinished(connection, new)
        if not found:
            return None
        return replace(found[0], start="joined" if new.while_unfinished == "join" else "skipped")

    def _replace(self, connection: Caller, new: NewRun, undo: Mapping[str, str | None]) -> Run:
        found = self._unfinished(connection, new)
        if found:
            self._cancels.cancel(
                connection,
                [run.run_id for run in found],
                reason=f"run {new.run_id} replaces it",
                undo=undo,
                source="api",
            )
            found = self._unfinished(connection, new)
        return self._store(connection, new, behind=bool(found))

    def _debounce(self, connection: Caller, new: NewRun) -> Run:
        """Give the run that has not begun this input, or store one that has it."""
        parameters = self._of_key(new) | {
            "input": new.input,
            "default_input": new.default_input,
            "limits": json.dumps(new.stored_limits) if new.limits else None,
            "debounce": new.debounce,
            "max_wait": new.max_wait,
        }
        rows = execute(connection, self._sql["replace_input"], parameters)
        if rows:
            return Run.from_row(rows[0][:-1], "input_replaced")
        return self._store(connection, new, behind=bool(self._unfinished(connection, new)))

    def _store(self, connection: Caller, new: NewRun, *, behind: bool = False) -> Run:
        (run,) = self._journal.create_runs(connection, [replace(new, dedupe_next=behind)])
        if behind and run.start == "started":
            execute(connection, self._sql["note"], self._of_key(new) | {"run_id": new.run_id})
        return run

    def _used(self, connection: Caller, new: Sequence[NewRun]) -> set[str]:
        """Those of their ids and keys that runs have."""
        parameters = {
            "namespace": new[0].namespace,
            "run_ids": array(run.run_id for run in new),
            "keys": array(run.key for run in new if run.key is not None),
        }
        rows = execute(connection, self._sql["used"], parameters)
        return {name for row in rows for name in row if name is not None}

    def _unfinished(self, connection: Caller, new: NewRun) -> list[Run]:
        rows = execute(connection, self._sql["unfinished"], self._of_key(new))
        return [Run.from_row(row) for row in rows]

    def _of_key(self, new: NewRun) -> dict[str, object]:
        return {
            "plan": new.plan,
            "dispatch_key": f"{new.namespace}/{new.dedupe_key}",
            "shard": shard_of(new.run_id),
        }

    def _lock(self, connection: Caller, new: Sequence[NewRun]) -> None:
        if new:
            # Sorted: two batches with the same keys do not wait for each other.
            keys = sorted({f"{run.namespace}/{run.plan}/{run.dedupe_key}" for run in new})
            execute(connection, self._sql["lock"], {"keys": array(keys)})


def _replaces(new: NewRun) -> bool:
    """Whether the start changes an unfinished run that it finds."""
    return new.debounce is not None or new.while_unfinished == "replace"
