"""What tests of plans use: drive runs step by step, crash, move time, and look at what happened.

Everything is real: Postgres, Redis, the relay's drain, the executor. Nothing sleeps: what a process
would do by itself, a test does by a call, and where processes are wanted it waits for what they
announce. See docs/testing.md.
"""

import itertools
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from kombu import Connection

from jobs.app import App
from jobs.dev import Child
from jobs.errors import WaitTimeout
from jobs.stream import Subscription
from jobs.verify import verify
from orchestrator.events import Event
from orchestrator.executor import Executor
from orchestrator.journal import Run
from outbox.faults import SimulatedCrash
from outbox.message import shard_of
from outbox.publishers import channel_for, worker_queue
from outbox.queries import execute

UNSET: Any = object()
"""Marks an argument that was not given, where None is a value."""


class Kit:
    """The helpers of the `beatless` fixture, bound to one app with its own schema and prefix."""

    def __init__(
        self, app: App, *, run_prefix: str = "test", directory: Path | None = None
    ) -> None:
        """`directory` is where processes of the test write their logs."""
        self.app = app
        self.client = app.client
        self.relay = app.relay(observer=self._observe)
        self._ids = (f"{run_prefix}-{number}" for number in itertools.count(1))
        self._directory = directory or Path.cwd()
        self._executor: Executor | None = None
        self._children: list[Child] = []
        self._last: dict[str, dict[str, Any]] = {}
        self._broker: Connection | None = None
        self._taking = threading.Lock()  # a channel is for one thread at a time

    # Starting

    def start_run(self, plan: str, input: Any = None, **options: Any) -> Run:
        """`client.start_run` with a run id that tells the test: `test-<worker>-<test>-<number>`."""
        options.setdefault("run_id", next(self._ids))
        return self.client.start_run(plan, input, **options)

    def assert_started(
        self,
        plan: str,
        *,
        input: Any = UNSET,
        key: str | None = UNSET,
        tags: Mapping[str, str] | None = None,
        count: int = 1,
    ) -> list[Run]:
        """Exactly `count` runs of the plan were started like this; the runs, oldest first."""
        found = [
            run
            for run in reversed(self.client.list_runs(plan=plan, tags=tags, limit=1_000_000))
            if (input is UNSET or run.input == input) and (key is UNSET or run.key == key)
        ]
        if len(found) != count:
            others = [(run.plan, run.input, run.key) for run in self.client.list_runs(limit=20)]
            raise AssertionError(
                f"{len(found)} runs of {plan} were started like this, not {count}; "
                f"the newest runs are {others}"
            )
        return found

    # Doing what the processes do

    def drain_outbox_once(self, run_id: str | None = None) -> int:
        """One drain of the relay: publish what is due, of one run or all; how many messages."""
        return self.relay.drain_once(run_id)

    def work_once(self) -> bool:
        """Drain, then execute one dispatched run as a worker would; False if there was none."""
        self.drain_outbox_once()
        message = self._take_message()
        if message is None:
            return False
        name, (run_id, dispatch) = message
        self.executor().execute(self.app.plans[name], run_id, dispatch)
        return True

    def work_until_idle(self, *, limit: int = 10_000) -> int:
        """`work_once` until nothing is dispatched any more, then drain; how many were executed.

        What waits for a later time stays: see `advance`. Raises AssertionError after `limit`.
        """
        for done in range(limit):
            if not self.work_once():
                self.drain_outbox_once()
                return done
        raise AssertionError(f"still not idle after {limit} executions: does a plan run for ever?")

    def step(self, run_id: str) -> bool:
        """Execute exactly one step of the run and give it back; False if it is not due."""
        run = self.client.get_run(run_id)
        return self.executor().execute(self.app.plans[run.plan], run_id, 0, max_steps=1)

    @contextmanager
    def crash(self, at: str, *, nth: int = 1) -> Iterator[None]:
        """The worker "dies" in this block, at the n-th pass of a crash point (outbox.faults).

        Its connection is gone and its lease stays until `advance` lets it run out. Raises
        AssertionError if the point was never reached.
        """
        self.app.faults.arm(at, nth=nth, action="raise")
        try:
            yield
        except SimulatedCrash:
            self.forget_worker()
        else:
            raise AssertionError(f"the crash point {at} was not reached {nth} times")
        finally:
            self.app.faults.disarm(at)

    def executor(self) -> Executor:
        """The worker of `work_once` and `step`."""
        if self._executor is None:
            self._executor = self.app.executors.new(observer=self._observe)
        return self._executor

    def forget_worker(self) -> None:
        """Drop the worker's connection, as its death would; the next call starts another."""
        if self._executor is not None:
            self._executor.disconnect()
            self._executor = None

    def advance(self, seconds: float) -> None:
        """Let time pass without waiting: every stored due time moves so far into the past.

        Leases, delays, retries, redispatches and retention then behave as they would, in every
        process.
        """
        schema = self.app.settings.schema
        with self.app.engine.begin() as connection:
            for table, columns in (
                ("dispatches", ["due_at"]),
                (
                    "runs",
                    ["lease_expires_at", "not_before", "deadline_at", "finished_at", "pruned_at"],
                ),
                # Retention counts from the end of a run, and finds it by this event.
                ("run_events", ["ts"]),
            ):
                changes = ", ".join(
                    f"{column} = {column} - make_interval(secs => %(seconds)s)"
                    for column in columns
                )
                which = "WHERE type = 'RunFinished'" if table == "run_events" else ""
                execute(
                    connection,
                    f"UPDATE {schema}.{table} SET {changes} {which}",
                    {"seconds": seconds},
                )
            execute(connection, "SELECT pg_notify(%(c)s, '')", {"c": self.app.queries.channel})

    # Waiting for processes

    def wait_for_run_completion(self, run_id: str, timeout: float = 60.0) -> Run:
        """Wait until the run has ended. Raises AssertionError, telling where everything stands."""
        try:
            return self.client.wait_for_run(run_id, timeout)
        except WaitTimeout as error:
            raise AssertionError(f"{error}\n{self.describe(run_id)}") from error

    def wait_for_outbox_flush(
        self, run_id: str, seq: int | None = None, timeout: float = 60.0
    ) -> None:
        """Wait until the run's events (up to `seq`) have been published and forgotten."""
        deadline = monotonic() + timeout
        subscription = Subscription(self.app.redis, channel_for(self.app.settings.prefix, run_id))
        try:
            subscription.ensure()
            while any(seq is None or row[0] <= seq for row in self._outbox(run_id)):
                if monotonic() >= deadline:
                    raise AssertionError(
                        f"the outbox still has events of run {run_id} after {timeout:g} s\n"
                        f"{self.describe(run_id)}"
                    )
                subscription.next(0.02)
        finally:
            subscription.close()

    def collect_stream(self, run_id: str, from_seq: int = 0, timeout: float = 60.0) -> list[Event]:
        """All events of the stream from there to RunFinished."""
        try:
            return list(self.client.stream_run(run_id, from_seq, timeout=timeout))
        except WaitTimeout as error:
            raise AssertionError(f"{error}\n{self.describe(run_id)}") from error

    def event_types(self, run_id: str) -> list[str]:
        """The types of the stored events, in order."""
        return [event.type for event in self.client.events(run_id)]

    # Real processes

    def worker_process(
        self,
        app: str,
        *,
        concurrency: int = 1,
        arguments: Sequence[str] = (),
        **settings: Any,
    ) -> Child:
        """A real worker of `module:attribute`, ready; it ends with the test.

        It has the plans of that App, whatever `beatless_plans` gives to the test. Settings are
        those of the test's app, and those given here: `fault="step.before@2:kill"` crashes it.
        """
        return self._process(
            app, ["worker", "--concurrency", str(concurrency), *arguments], settings
        )

    def relay_process(self, app: str, **settings: Any) -> Child:
        """A real relay, listening; it ends with the test."""
        return self._process(app, ["relay"], settings)

    def _process(self, app: str, arguments: list[str], settings: dict[str, Any]) -> Child:
        given = {f"BEATLESS_{name.upper()}": str(value) for name, value in settings.items()}
        # It finds the modules that the test finds: `pythonpath` of pytest is on no path but this.
        given |= {"BEATLESS_APP": app, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        name = f"{arguments[0]}-{len(self._children) + 1}"
        child = Child(
            name,
            arguments,
            environ=os.environ | self.app.settings.to_env() | given,
            log=self._directory / f"{name}.log",
        )
        self._children.append(child)
        child.start()
        child.wait_ready()
        return child

    # Looking

    def verify(self) -> None:
        """Raises AssertionError if anything stored breaks a guarantee."""
        with self.app.engine.connect() as connection:
            found = verify(connection, self.app.settings.schema)
        if found:
            raise AssertionError("\n".join(str(violation) for violation in found))

    def describe(self, run_id: str) -> str:
        """Where a run stands: its row, last events, outbox, dispatch, and its processes."""
        run = self.client.get_run(run_id)
        lines = [f"run {run_id} at {datetime.now(UTC).isoformat()}: {run.state}"]
        lines.append(f"  last_seq {run.last_seq}, claimed {run.attempt} times, by {run.worker}")
        lines += [
            f"  event {e.seq} {e.type} {e.step or ''}" for e in self.client.events(run_id)[-5:]
        ]
        lines += [f"  outbox up to {row[0]}" for row in self._outbox(run_id)] or ["  outbox empty"]
        with self.app.engine.connect() as connection:
            dispatch = execute(
                connection,
                "SELECT state, due_at, reason, attempts FROM "
                f"{self.app.settings.schema}.dispatches WHERE run_id = %(run_id)s",
                {"run_id": run_id},
            )
        lines += [f"  dispatch {row}" for row in dispatch] or ["  no dispatch"]
        lines += [f"  this process, last {name}: {facts}" for name, facts in self._last.items()]
        for child in self._children:
            with suppress(OSError):
                last = child.log.read_text(errors="replace").strip().splitlines()[-1:]
                lines.append(f"  {child.name} ({'alive' if child.alive else 'ended'}): {last}")
        return "\n".join(lines)

    def close(self) -> None:
        """End the test's processes and close its connections."""
        # A worker's farewell takes Celery two seconds, and nothing is lost without it.
        now = monotonic()
        for child in self._children:
            if child.name.startswith("worker"):
                child.reap(now)
            else:
                child.terminate()
        for child in self._children:
            child.reap(now + 10)
        self.forget_worker()
        self.relay.stop()
        self.app.executors.close()
        if self._broker is not None:
            self._broker.release()
        self.app.close()

    def _observe(self, name: str, facts: dict[str, Any]) -> None:
        self._last[name] = facts

    def _outbox(self, run_id: str) -> list[tuple[int]]:
        with self.app.engine.connect() as connection:
            return execute(
                connection,
                f"SELECT to_seq FROM {self.app.settings.schema}.run_outbox "
                "WHERE shard = %(shard)s AND run_id = %(run_id)s ORDER BY id",
                {"shard": shard_of(run_id), "run_id": run_id},
            )

    def _take_message(self) -> tuple[str, Any] | None:
        """The next message of the app's queues, as (task, arguments)."""
        with self._taking:
            if self._broker is None:
                self._broker = self.app.celery.connection_for_read()
            channel = self._broker.default_channel
            with self.app.engine.connect() as connection:
                names = execute(
                    connection, f"SELECT DISTINCT queue FROM {self.app.settings.schema}.runs", {}
                )
            for (name,) in names:
                queue = worker_queue(self.app.settings.prefix, name)(channel)
                queue.declare()
                message = queue.get(accept=["json"])
                if message is not None:
                    message.ack()
                    arguments, _, _ = message.decode()
                    return message.headers["task"], arguments
            return None
