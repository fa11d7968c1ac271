"""The app of one test, and reads of its stored data."""

import re
import reprlib
from collections.abc import Sized
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from beatless.app import App
from beatless.client import Client
from beatless.local.child import Launch, spawn
from beatless.namespaces import namespace_of
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.records import Run
from beatless.outbox.message import shard_of
from beatless.outbox.observer import Signal
from beatless.outbox.queries import execute
from beatless.testing.broker_guard import Guard
from beatless.testing.processes import MAX_LINE_CHARS, Processes
from beatless.testing.replays import described


class BaseKit:
    """Holds the app of a test, its processes and its last signals. Changes nothing stored."""

    def __init__(
        self, app: App, *, directory: Path, guard: Guard | None, launch: Launch = spawn
    ) -> None:
        self.app = app
        self.client = app.client
        self._processes = Processes(app, directory=directory, guard=guard, launch=launch)
        self._last: dict[type[Signal], Signal] = {}

    def event_types(self, run_id: str) -> list[str]:
        """The types of the stored events, in order.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.event_types(run.run_id)
        ['RunStarted']
        """
        return [event.type for event in self._client(run_id).events(run_id)]

    def describe(self, run_id: str) -> str:
        """The state of a run: its row, last events, outbox, dispatch, and its processes.

        Without their content: no input, result or message body.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> print(beatless.describe(run.run_id))
        run test-...: queued
          last_seq 1, claimed 0 times, by None
          event 1 RunStarted
          ...
        """
        client = self._client(run_id)
        run = client.get_run(run_id)
        lines = [f"run {run_id} at {datetime.now(UTC).isoformat()}: {run.state}"]
        lines.append(f"  last_seq {run.last_seq}, claimed {run.attempt} times, by {run.worker}")
        lines += [
            f"  event {e.seq} {e.type} {e.step or ''}"
            for e in client.events(run_id, max(run.pruned_seq, run.last_seq - 5))
        ]
        outbox = self._outbox(run.run_id)
        lines += [f"  outbox {first} to {last}" for first, last in outbox[:5]] or ["  outbox empty"]
        lines += [f"  outbox with {len(outbox) - 5} rows more"] if len(outbox) > 5 else []
        with self.app.engine.connect() as connection:
            dispatch = execute(
                connection,
                "SELECT state, due_at, reason, attempts FROM "
                f"{self.app.settings.schema}.dispatches WHERE run_id = %(run_id)s",
                {"run_id": run.run_id},
            )
        lines += [f"  dispatch {row}" for row in dispatch] or ["  no dispatch"]
        lines += described(self.app, run.run_id)
        for kind, signal in self._last.copy().items():  # a relay in a thread may add to it
            name = re.sub(r"\B([A-Z])", r"_\1", kind.__name__).lower()
            told = {field.name: shown(getattr(signal, field.name)) for field in fields(signal)}
            lines.append(f"  this process, last {name}: {told}")
        lines += [f"  {line}" for line in self._processes.described()]
        return "\n".join(lines)

    def _observe(self, signal: Signal) -> None:
        self._last[type(signal)] = signal

    def _client(self, run_id: str) -> Client:
        """The client that sees this run."""
        return self.app.client_for(namespace_of(run_id))

    def _runs(self, **wanted: Any) -> list[Run]:
        """The newest runs of each namespace, all together oldest first."""
        schema = self.app.settings.schema
        with self.app.engine.connect() as connection:
            names = execute(connection, f"SELECT DISTINCT namespace FROM {schema}.runs", {})
        found = [run for (name,) in names for run in self.app.client_for(name).list_runs(**wanted)]
        return sorted(found, key=lambda run: (run.created_at, run.run_id))

    def _outbox(self, stored_id: str) -> list[tuple[int, int]]:
        """(first seq, last seq) of the events that are not published yet."""
        with self.app.engine.connect() as connection:
            return execute(
                connection,
                f"SELECT from_seq, to_seq FROM {self.app.settings.schema}.run_outbox "
                "WHERE shard = %(shard)s AND run_id = %(run_id)s ORDER BY id",
                {"shard": shard_of(stored_id), "run_id": stored_id},
            )


def shown(value: Any) -> Any:
    """A fact without the payload in it: of a lease its run, of a collection its length."""
    if isinstance(value, Lease):
        return value.run.run_id
    if isinstance(value, str):
        return str(value)[:MAX_LINE_CHARS]
    if isinstance(value, Sized):
        return len(value)
    return value if value is None or isinstance(value, (int, float)) else reprlib.repr(value)
