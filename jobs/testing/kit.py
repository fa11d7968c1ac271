"""The test kit: drive runs step by step, crash, move time, and inspect the outcome.

Everything is real: Postgres, Redis, the relay's drain, the executor. Nothing sleeps: what a process
would do by itself, a test does by a call, and where processes are wanted it waits for what they
announce. See docs/testing.md.
"""

import itertools
import os
import re
import reprlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from celery.worker.request import Request
from kombu import Connection
from kombu.message import Message

from beatless.app import App
from beatless.client import Client
from beatless.client.streams import check_cursor
from beatless.errors import WaitTimeout
from beatless.local.child import Child
from beatless.namespaces import namespace_of
from beatless.orchestrator.events import Event
from beatless.orchestrator.executor import Executor
from beatless.orchestrator.journal import Run
from beatless.orchestrator.lease import Lease
from beatless.outbox.clock import monotonic
from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.message import shard_of
from beatless.outbox.observer import Signal
from beatless.outbox.publishers import worker_queue
from beatless.outbox.queries import execute
from beatless.outbox.times import MOST_S, is_number
from beatless.streams.streams import Streams
from beatless.streams.subscription import Subscription
from beatless.testing.broker_guard import Guard
from beatless.verify import PATIENCE, verify

UNSET: Any = object()
"""Marks an argument that was not given, where None is a value."""

LOOK_EVERY = 0.5
"""Seconds without news after which a wait looks into the journal: without a relay nobody tells."""

FENCED = (
    "import sys, beatless.cli, beatless.testing.broker_guard\n"
    "with beatless.testing.broker_guard.fenced(sys.argv.pop(1)):\n"
    "    beatless.cli.main()"
)
"""A process of a test: `beatless`, which publishes on the test's own broker and on no other."""

MOST_ADVANCE_S = 100 * MOST_S

LINE = 300
"""Characters of a text that are shown when a wait took too long."""


class Kit:
    """The helpers of the `beatless` fixture, bound to one app with its own schema and prefix.

    >>> run = beatless.start_run("checkout", {"order": 1})
    >>> beatless.work_until_idle()
    1
    >>> beatless.client.get_run(run.run_id).state.value
    'completed'
    """

    def __init__(
        self,
        app: App,
        *,
        run_prefix: str = "test",
        directory: Path | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`directory` is where processes of the test write their logs; `guard` fences them in."""
        self.app = app
        self.client = app.client
        self.relay = app.relay(observer=self._observe)
        self._ids = (f"{run_prefix}-{number}" for number in itertools.count(1))
        self._directory = directory or Path.cwd()
        self._guard = guard
        self._executor: Executor | None = None
        self._children: list[Child] = []
        self._last: dict[type[Signal], Signal] = {}
        self._broker: Connection | None = None
        self._taking = threading.Lock()  # a channel is for one thread at a time
        self._advanced = 0.0
        self._pid = os.getpid()
        self._streams = Streams(
            journal=app.journal,
            engine=app.engine.execution_options(isolation_level="AUTOCOMMIT"),
            redis_client=app.redis,
            aredis_client=app.aredis,
            prefix=app.settings.prefix,
            head_check=LOOK_EVERY,
            without_redis=LOOK_EVERY,
            observer=app.metrics.streams,
        )

    # Starting

    def start_run(self, plan: str, input: Any = None, **options: Any) -> Run:
        """`client.start_run` with a run id that tells the test: `test-<worker>-<test>-<number>`.

        >>> beatless.start_run("checkout", {"order": 1}).run_id
        'test-...'
        """
        options.setdefault("run_id", next(self._ids))
        return self.client.start_run(plan, input, **options)

    def assert_started(
        self,
        plan: str,
        *,
        input: Any = UNSET,
        key: str | None = UNSET,
        tags: Mapping[str, str] | None = None,
        namespace: str | None = None,
        count: int = 1,
    ) -> list[Run]:
        """Exactly `count` runs of the plan were started like this; the runs, oldest first.

        In whichever namespace, unless it is given.

        >>> run = beatless.client.start_run("checkout", {"order": 7}, key="order:7")
        >>> [found] = beatless.assert_started("checkout", input={"order": 7}, key="order:7")
        >>> found.run_id == run.run_id
        True
        """
        found = [
            run
            for run in self._runs(plan=plan, tags=tags, limit=1_000_000)
            if (input is UNSET or run.input == input)
            and (key is UNSET or run.key == key)
            and namespace in (None, run.namespace)
        ]
        if len(found) != count:
            newest = self._runs(limit=20)[-20:]
            others = [f"{run.plan} {reprlib.repr(run.input)} key={run.key}" for run in newest]
            raise AssertionError(
                f"{len(found)} runs of {plan} were started like this, not {count}; "
                f"the newest runs are {others}"
            )
        return found

    # Doing what the processes do

    def drain_outbox_once(self, run_id: str | None = None) -> int:
        """One drain of the relay: publish what is due, of one run or all; how many messages.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.drain_outbox_once(run.run_id)  # RunStarted, and the task message
        2
        """
        return self.relay.drain_once(run_id)

    def work_once(self) -> bool:
        """Drain, then execute one dispatched run as a worker would; False if there was none.

        Other tasks of the same Celery app are executed too. Like a worker this logs their failures,
        and unlike one it waits for no `countdown`. Raises AssertionError for a task that the app
        does not have.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.work_once(), beatless.work_once()
        (True, False)
        """
        self.drain_outbox_once()
        while (message := self._take_message()) is not None:
            if self._execute(message):
                return True
        return False

    def work_until_idle(self, *, limit: int = 10_000) -> int:
        """`work_once` until nothing is dispatched any more, then drain; how many were executed.

        A message whose run is not to be executed any more, as the second one of a run, does not
        count. What waits for a later time stays: see `advance`. Raises AssertionError after
        `limit`.

        >>> runs = [beatless.start_run("checkout", {"order": n}) for n in (1, 2)]
        >>> beatless.work_until_idle()
        2
        """
        for done in range(limit):
            if not self.work_once():
                self.drain_outbox_once()
                return done
        raise AssertionError(f"still not idle after {limit} executions: does a plan run for ever?")

    def step(self, run_id: str) -> bool:
        """Execute exactly one step of the run and give it back; False if it is not due.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.step(run.run_id)
        True
        >>> beatless.event_types(run.run_id)
        ['RunStarted', 'StepStarted', 'StepFinished']
        """
        run = self._client(run_id).get_run(run_id)
        return self.executor().execute(self.app.plans[run.plan], run.run_id, 0, max_steps=1)

    @contextmanager
    def crash(self, at: str, *, nth: int = 1) -> Iterator[None]:
        """The worker "dies" in this block, at the n-th pass of a crash point (see `outbox.faults`).

        Its connections are gone and its lease stays until `advance` lets it run out. At a point of
        the relay it is `drain_outbox_once` that dies, and forgets what it had published. What
        follows in the block is not executed. Raises AssertionError if the point was never reached.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> with beatless.crash(at="step.committed"):
        ...     beatless.work_once()
        >>> beatless.advance(beatless.app.settings.lease_seconds)
        >>> beatless.work_until_idle()
        1
        """
        self.app.faults.arm(at, nth=nth, action="raise")
        try:
            yield
        except SimulatedCrash:
            # A drain that is broken off drops its own session, in a test or not.
            if not at.startswith(("relay.", "retention.")):
                self.forget_worker()
        else:
            raise AssertionError(f"the crash point {at} was not reached {nth} times")
        finally:
            self.app.faults.disarm(at)

    def executor(self) -> Executor:
        """The worker of `work_once` and `step`. Raises RuntimeError in a forked process.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> checkout = beatless.app.plans["checkout"]
        >>> beatless.executor().execute(checkout, run.run_id, 0, max_steps=2)
        True
        """
        if self._pid != os.getpid():
            raise RuntimeError(
                f"this kit is of process {self._pid}, before it forked: here its `client` can be "
                "used, and nothing that acts as a relay or a worker"
            )
        if self._executor is None:
            self._executor = self.app.executors.new(observer=self._observe)
        return self._executor

    def forget_worker(self) -> None:
        """Drop the worker's connections, as its death would; the next call starts another.

        A broker that waits for acknowledgements delivers again what the worker held.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> first = beatless.step(run.run_id)
        >>> beatless.forget_worker()
        >>> beatless.step(run.run_id)  # by another worker
        True
        """
        if self._executor is not None:
            self._executor.disconnect()
            self._executor = None
        with self._taking:
            if self._broker is not None:
                self._broker.release()
                self._broker = None

    def advance(self, seconds: float) -> None:
        """Let time pass without waiting: every stored time moves so far into the past.

        Leases, delays, retries, redispatches, retention and the ages of runs and tokens then are as
        they would be, in every process. The clocks of processes do not move, nor what they count
        with them: the `timeout` of a step that is running, a relay's pause after a failure. Raises
        ValueError for what is not 0 seconds to a thousand years.

        >>> run = beatless.start_run("checkout", {"order": 1}, delay=3600)
        >>> beatless.work_until_idle()
        0
        >>> beatless.advance(3600)
        >>> beatless.work_until_idle()
        1
        """
        if not (is_number(seconds) and 0 <= seconds <= MOST_ADVANCE_S):
            raise ValueError(f"seconds is {seconds!r}, which is not 0 seconds to a thousand years")
        schema = self.app.settings.schema
        moved = {"schema": schema, "seconds": seconds, "milliseconds": round(seconds * 1000)}
        with self.app.engine.begin() as connection:
            # In the order in which writers lock: a run, its events, its dispatch.
            tables = execute(
                connection,
                """
SELECT c.relname, array_agg(a.attname::text)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid
 WHERE n.nspname = %(schema)s AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
   AND a.atttypid = 'timestamptz'::regtype
 GROUP BY c.relname ORDER BY c.relname = 'dispatches', c.relname DESC""",
                moved,
            )
            for table, columns in tables:
                changes = ", ".join(
                    f"{column} = {column} - make_interval(secs => %(seconds)s)"
                    for column in columns
                )
                execute(connection, f"UPDATE {schema}.{table} SET {changes}", moved)
            for type, member in (("StepFailed", "retry_at"), ("RunStarted", "not_before")):
                execute(
                    connection,
                    f"""
UPDATE {schema}.run_events
   SET data = jsonb_set(data, '{{{member}}}', to_jsonb(
         (data ->> '{member}')::bigint - %(milliseconds)s))
 WHERE type = '{type}' AND jsonb_typeof(data -> '{member}') = 'number'""",
                    moved,
                )
            execute(connection, "SELECT pg_notify(%(c)s, '')", {"c": self.app.queries.channel})
        self._advanced += seconds

    # Waiting for processes

    def wait_for_run_completion(self, run_id: str, timeout: float = 60.0) -> Run:
        """Wait until the run has ended. Raises AssertionError, telling where everything stands.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_run_completion(run.run_id).result
        {'parcel': 'p_1'}
        """
        run = self._client(run_id).get_run(run_id)
        self._follow(run, run.last_seq, timeout)
        return self._client(run_id).get_run(run_id)

    def wait_for_event(
        self,
        run_id: str,
        type: str | None = None,
        *,
        step: str | None = None,
        seq: int | None = None,
        timeout: float = 60.0,
    ) -> Event:
        """Wait until the run has an event of this type, of this step, with this seq; the first one.

        Raises AssertionError if none came, as soon as the run has ended without.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_event(run.run_id, "StepFinished", step="charge").data["result"]
        {'charge': 'ch_1'}
        """
        wanted = {"type": type, "step": step, "seq": seq}
        run = self._client(run_id).get_run(run_id)
        reason = "has ended"
        try:
            for event in self._streams.follow(run, run.pruned_seq, timeout=timeout):
                facts = {"type": event.type, "step": event.step, "seq": event.seq}
                if all(value in (None, facts[name]) for name, value in wanted.items()):
                    return event
        except WaitTimeout:
            reason = f"still runs after {timeout:g} s"
        asked = " ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        raise AssertionError(
            f"run {run_id} {reason}, without an event {asked}\n{self.describe(run_id)}"
        )

    def wait_for_outbox_flush(
        self, run_id: str, seq: int | None = None, timeout: float = 60.0
    ) -> None:
        """Wait until the run's events (up to `seq`) have been published and forgotten.

        An event that is still to come is waited for. Raises RunNotFound, and AssertionError, as
        soon as the run has ended without event `seq`.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.wait_for_outbox_flush(run.run_id)
        """
        deadline = monotonic() + timeout
        stored_id = self._client(run_id).get_run(run_id).run_id
        subscription = Subscription(self.app.redis, self._streams.channel(stored_id))
        try:
            subscription.ensure()
            while not self._flushed(run_id, seq):
                if monotonic() >= deadline:
                    raise AssertionError(
                        f"the outbox still has events of run {run_id} after {timeout:g} s\n"
                        f"{self.describe(run_id)}"
                    )
                # A publication is announced here; that it is forgotten, soon after, is nowhere.
                subscription.next(0.02)
        finally:
            subscription.close()

    def _flushed(self, run_id: str, seq: int | None) -> bool:
        run = self._client(run_id).get_run(run_id)
        first = min((row[0] for row in self._outbox(run.run_id)), default=None)
        if seq is None:
            return first is None
        if run.state.final and run.last_seq < seq:
            raise AssertionError(
                f"run {run_id} has ended with event {run.last_seq}: there is no event {seq}"
            )
        return run.last_seq >= seq and (first is None or first > seq)

    def collect_stream(self, run_id: str, from_seq: int = 0, timeout: float = 60.0) -> list[Event]:
        """All events of the stream from there to RunFinished.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> [event.seq for event in beatless.collect_stream(run.run_id, from_seq=6)]
        [7, 8]
        """
        run = self._client(run_id).get_run(run_id)
        check_cursor(run, from_seq)
        return self._follow(run, from_seq, timeout)

    def event_types(self, run_id: str) -> list[str]:
        """The types of the stored events, in order.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.event_types(run.run_id)
        ['RunStarted']
        """
        return [event.type for event in self._client(run_id).events(run_id)]

    def _follow(self, run: Run, after: int, timeout: float) -> list[Event]:
        try:
            return list(self._streams.follow(run, after, timeout=timeout))
        except WaitTimeout as error:
            raise AssertionError(f"{error}\n{self.describe(run.run_id)}") from error

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

        >>> worker = beatless.worker_process("shop.app:app", concurrency=2)
        >>> worker.alive
        True
        """
        return self._process(
            app, ["worker", "--concurrency", str(concurrency), *arguments], settings
        )

    def relay_process(self, app: str, **settings: Any) -> Child:
        """A real relay, listening; it ends with the test.

        >>> relay = beatless.relay_process("shop.app:app")
        >>> relay.alive
        True
        """
        return self._process(app, ["relay"], settings)

    def _process(self, app: str, arguments: list[str], settings: dict[str, Any]) -> Child:
        given = {f"BEATLESS_{name.upper()}": str(value) for name, value in settings.items()}
        # It finds the modules that the test finds: `pythonpath` of pytest is on no path but this.
        given |= {"BEATLESS_APP": app, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        name = f"{arguments[0]}-{len(self._children) + 1}"
        fenced: dict[str, Any] = {}
        if self._guard is not None:
            spec = self._guard.spec(self._directory / f"{name}.refused")
            fenced["command"] = (sys.executable, "-P", "-c", FENCED, spec)
        child = Child(
            name,
            arguments,
            environ=os.environ | self.app.settings.to_env() | given,
            log=self._directory / f"{name}.log",
            **fenced,
        )
        self._children.append(child)
        child.start()
        child.wait_ready()
        return child

    # Looking

    def verify(self) -> None:
        """Raises AssertionError if anything stored breaks a guarantee.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.verify()
        """
        # `advance` passes no time for a relay that only drains when it is told to.
        patience = PATIENCE + self._advanced
        with self.app.engine.connect() as connection:
            found = verify(connection, self.app.settings.schema, patience=patience)
        if found:
            raise AssertionError("\n".join(str(violation) for violation in found))

    def describe(self, run_id: str) -> str:
        """The state of a run: its row, last events, outbox, dispatch, and its processes.

        Without what is in them: no input, result or message body.

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
        for kind, signal in self._last.copy().items():  # a relay in a thread may add to it
            name = re.sub(r"\B([A-Z])", r"_\1", kind.__name__).lower()
            told = {field.name: shown(getattr(signal, field.name)) for field in fields(signal)}
            lines.append(f"  this process, last {name}: {told}")
        for child in self._children:
            with suppress(OSError):
                said = child.log.read_text(errors="replace").strip().splitlines() or [""]
                last = said[-1][:LINE]
                lines.append(f"  {child.name} ({'alive' if child.alive else 'ended'}): {last}")
        return "\n".join(lines)

    def close(self) -> None:
        """End the test's processes and close its connections, all of them whatever fails."""
        with ExitStack() as last:
            last.callback(self.app.close)
            last.callback(self.app.executors.close)
            last.callback(self.relay.stop)
            last.callback(self.forget_worker)
            # A worker's farewell takes Celery two seconds, and nothing is lost without it.
            now = monotonic()
            workers = [child for child in self._children if child.name.startswith("worker")]
            for child in self._children:
                last.callback(child.reap, now if child in workers else now + 10)
            for child in self._children:
                if child not in workers:
                    last.callback(child.terminate)

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
        """(first seq, last seq) of what is not published yet."""
        with self.app.engine.connect() as connection:
            return execute(
                connection,
                f"SELECT from_seq, to_seq FROM {self.app.settings.schema}.run_outbox "
                "WHERE shard = %(shard)s AND run_id = %(run_id)s ORDER BY id",
                {"shard": shard_of(stored_id), "run_id": stored_id},
            )

    def _take_message(self) -> Message | None:
        """The next message of the app's queues, which are asked in the order of their names."""
        celery = self.app.celery
        with self._taking:
            if self._broker is None:
                self._broker = celery.connection_for_read()
            channel = self._broker.default_channel
            with self.app.engine.connect() as connection:
                names = execute(
                    connection, f"SELECT DISTINCT queue FROM {self.app.settings.schema}.runs", {}
                )
            for name in sorted(queue_names(self.app) | {name for (name,) in names}):
                queue = worker_queue(self.app.settings.prefix, name)(channel)
                queue.declare()
                message = queue.get(accept=celery.conf.accept_content)
                if message is not None:
                    return message
            return None

    def _execute(self, message: Message) -> bool:
        """Do what the message asks for; False if its run was not to be executed any more."""
        name = message.headers.get("task")
        plan = self.app.plans.get(name)
        if plan is None:
            self._execute_task(message, name)
            return True
        (run_id, dispatch), _, _ = message.payload
        late = self.app.celery.conf.task_acks_late
        acknowledge = self._alone(message.ack)
        if not late:
            acknowledge()
        try:
            executed = self.executor().execute(plan, run_id, dispatch)
        except Exception:
            # Not so after a crash: the dead acknowledge nothing.
            if late:
                acknowledge()
            raise
        if late:
            acknowledge()
        return executed

    def _execute_task(self, message: Message, name: Any) -> None:
        task = self.app.celery.tasks.get(name)
        if task is None:
            raise AssertionError(
                f"a message for the task {name!r} waits, which this app does not have: import the "
                "module that registers it with app.celery, or do not send it in this test"
            )
        Request(
            message,
            app=self.app.celery,
            task=task,
            on_ack=self._alone(message.ack_log_error),
            on_reject=self._alone(message.reject_log_error),
        ).execute()

    def _alone(self, answer: Callable[..., Any]) -> Callable[..., None]:
        """Answers the broker while nobody else uses the channel."""

        def call(*arguments: Any) -> None:
            with self._taking:
                answer(*arguments)

        return call


def queue_names(app: App) -> set[str]:
    """The queues that a worker of this app takes messages of, without those that a run named."""
    return {"default", *(plan.queue for plan in app.plans.values())}


def shown(value: Any) -> Any:
    """A fact without the payload in it: of a lease its run, of what can be counted how many."""
    if isinstance(value, Lease):
        return value.run.run_id
    if isinstance(value, str):
        return str(value)[:LINE]
    if isinstance(value, Sized):
        return len(value)
    return value if value is None or isinstance(value, (int, float)) else reprlib.repr(value)
