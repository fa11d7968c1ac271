"""Writes a history down while it happens, and adds at the end what is stored."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any

import psycopg

from beatless.orchestrator.events import Event
from tests.faults.history import Record
from tests.faults.plans import PLANS


def text_of(event: Event) -> str:
    """What a viewer must have seen of an event, to be compared."""
    return json.dumps(event.to_dict(), sort_keys=True)


class Recorder:
    """One line for each record. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w", buffering=1)
        self._lock = threading.Lock()

    def write(self, kind: str, **members: Any) -> None:
        line = json.dumps({"kind": kind, **members}, default=str) + "\n"
        with self._lock:
            self._file.write(line)

    @contextmanager
    def call(self, op: str, **members: Any) -> Iterator[Record]:
        """A call of a client. Its outcome is unknown until the caller says otherwise."""
        record: Record = {"op": op, "begin": time(), "outcome": "unknown", **members}
        try:
            yield record
        finally:
            self.write("call", **record | {"end": time()})

    def close(self) -> None:
        self._file.close()

    def write_stored(self, session: psycopg.Connection, ledger: Path) -> None:
        """What is in Postgres, and in the ledger of the bodies."""
        for plan in PLANS:
            cleanup = [plan.on_cancel.name] if plan.on_cancel else []
            steps = [step.name for step in plan.steps]
            snoozing = [step for step in steps if step == "snooze"]
            self.write("plan", plan=plan.name, steps=steps, cleanup=cleanup, snoozing=snoozing)
        for row in session.execute(STORED):
            self.write(row[0], **row[1])
        if ledger.exists():
            for line in ledger.read_text().splitlines():
                effect = json.loads(line)
                self.write(effect.pop("kind"), **effect)

    def records(self) -> Iterator[Record]:
        with self.path.open() as lines:
            for line in lines:
                record = json.loads(line)
                if record["kind"] == "event":
                    event = Event.from_dict(record | {"ts": record["ms"]})
                    record["text"] = text_of(event)
                yield record


STORED = """
SELECT 'run', jsonb_build_object('run_id', run_id, 'plan', plan, 'state', state,
  'last_seq', last_seq, 'key', key, 'created_at', extract(epoch FROM created_at),
  'deadline_at', extract(epoch FROM deadline_at), 'retry_of', retry_of) FROM runs
UNION ALL
SELECT 'event', jsonb_build_object('run_id', run_id, 'seq', seq, 'ts', extract(epoch FROM ts),
  'ms', (date_part('epoch', ts) * 1000)::bigint, 'type', type, 'v', v, 'source', source,
  'step', step, 'attempt', attempt, 'data', data) FROM run_events
UNION ALL SELECT 'log', to_jsonb(l) FROM chaos_log l
UNION ALL SELECT 'row', to_jsonb(r) FROM chaos_rows r
UNION ALL SELECT 'outbox', jsonb_build_object('rows', count(*)) FROM run_outbox
"""
