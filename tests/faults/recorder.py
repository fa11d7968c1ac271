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
from tests.faults.fleet import UNATTENDED
from tests.faults.history import Record
from tests.faults.plans import PLANS, ROUTES


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

    def records(self) -> list[Record]:
        """What has been written down until now."""
        with self._lock:  # a long line is written in parts
            lines = self.path.read_text().splitlines()
        return list(map(json.loads, lines))

    def part(self, session: psycopg.Connection, ledger: Path) -> list[Record]:
        """The history until now, while nobody calls.

        In this order: what a viewer was shown is stored, and what is stored has had its effects.
        """
        told = self.records()
        stored = list(stored_by(session))
        return [*told, *stored, *plans(), *effects_in(ledger)]

    def write_stored(self, session: psycopg.Connection, ledger: Path) -> None:
        """Add what is in Postgres and in the ledger of the bodies when all is over."""
        left = session.execute("SELECT count(*) FROM run_outbox").fetchone()
        for record in (*plans(), *stored_by(session), *effects_in(ledger)):
            self.write(**record)
        self.write("outbox", rows=left[0] if left else 0)


def plans() -> Iterator[Record]:
    """The plans of the load."""
    for plan in PLANS:
        routes = ROUTES.get(plan.name)
        steps = {"routes": routes} if routes else {"steps": [step.name for step in plan.steps]}
        retries = {
            step.name: {
                "error": "ValueError",
                "attempts": step.retry.max_attempts,
                "delays_s": [step.retry.delay(n) for n in range(1, step.retry.max_attempts)],
            }
            for step in (*plan.steps, *plan.undo_steps.values())
            if step.retry.max_attempts > 1
        }
        yield {
            "kind": "plan",
            "plan": plan.name,
            **steps,
            "cleanup": [
                *([plan.on_cancel.name] if plan.on_cancel else []),
                *(f"{each.undo.name}#undo:{each.name}" for each in plan.steps if each.undo),
            ],
            "retries": retries,
            **({"at_once": min(each.at_once for each in plan.limits)} if plan.limits else {}),
            "kept": any(each.hold for each in plan.limits),
            "step_at_once": {
                each.name: min(limit.at_once for limit in each.limits)
                for each in plan.steps
                if each.limits
            },
        }


def stored_by(session: psycopg.Connection) -> Iterator[Record]:
    """What is in Postgres, of one moment."""
    for kind, members in session.execute(STORED):
        record = {"kind": kind, **members}
        if kind == "event":
            record["text"] = text_of(Event.from_dict(record | {"ts": record["ms"]}))
        yield record


def effects_in(ledger: Path) -> Iterator[Record]:
    """What the bodies have written down."""
    if ledger.exists():
        yield from map(json.loads, ledger.read_text().splitlines())


STORED = f"""
SELECT 'run', jsonb_build_object('run_id', run_id, 'plan', plan, 'state', state,
  'last_seq', last_seq, 'key', key, 'dedupe_key', dedupe_key, 'number', input -> 'number',
  'attended', queue <> '{UNATTENDED}',
  'created_at', extract(epoch FROM created_at), 'parent_id', parent_id, 'child_no', child_no,
  'detached', parent_id IS NOT NULL AND root_id IS NULL,
  'cancel_requested_at', extract(epoch FROM cancel_requested_at),
  'deadline_at', extract(epoch FROM deadline_at), 'retry_of', retry_of, 'schedule', schedule,
  'tick', extract(epoch FROM tick)) FROM runs
UNION ALL
SELECT 'schedule', jsonb_build_object('name', name, 'state', state, 'reason', reason,
  'last_tick', extract(epoch FROM last_tick),
  'until', extract(epoch FROM CASE state WHEN 'active' THEN clock_timestamp() ELSE last_tick END))
  FROM schedules
UNION ALL
SELECT 'event', jsonb_build_object('run_id', run_id, 'seq', seq, 'ts', extract(epoch FROM ts),
  'ms', (date_part('epoch', ts) * 1000)::bigint, 'type', type, 'v', v, 'source', source,
  'step', step, 'attempt', attempt, 'data', data) FROM run_events
UNION ALL
SELECT 'slot', jsonb_build_object('limit_id', limit_id, 'run_id', run_id) FROM limit_slots
UNION ALL SELECT 'log', to_jsonb(l) FROM chaos_log l
UNION ALL SELECT 'look', to_jsonb(k) FROM chaos_looks k
UNION ALL SELECT 'row', to_jsonb(r) FROM chaos_rows r
"""
