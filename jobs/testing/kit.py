"""The test kit: drive runs step by step, crash, move time, and inspect the outcome.

Everything is real: Postgres, Redis, the relay's drain, the executor. Nothing sleeps: a test calls
what a process would do by itself, and where processes are wanted it waits for their
announcements. See docs/testing.md.
"""

import itertools
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from kombu.message import Message

from beatless.app import App
from beatless.client.requests import RunOptions, shows_run_options
from beatless.local.child import Child, Launch, spawn
from beatless.orchestrator.executor import Executor
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.plan_versions import PlanVersions
from beatless.orchestrator.records import Run, SentDecision, SentSignal
from beatless.outbox.faults import SimulatedCrash
from beatless.outbox.queries import Caller
from beatless.testing.broker_guard import Guard
from beatless.testing.replays import check_goes_on, check_replay
from beatless.testing.task_inbox import TaskInbox
from beatless.testing.time_calls import TimeCalls
from beatless.transactions import transact_by_driver
from beatless.verify import PUBLISH_GRACE_S, verify

UNSET: Any = object()
"""Marks an argument that was not given, where None is a value."""


class Kit(TimeCalls):
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
        launch: Launch = spawn,
    ) -> None:
        """`directory` is where processes of the test write their logs; `guard` fences them in.

        `launch` launches them.
        """
        super().__init__(app, directory=directory or Path.cwd(), guard=guard, launch=launch)
        self.relay = app.relay(observer=self._observe)
        self._ids = (f"{run_prefix}-{number}" for number in itertools.count(1))
        self._executor: Executor | None = None
        self._executed: dict[str, Plan | None] = {}
        """The plan that has executed each run here; None if there were two."""
        self._begun: dict[str, Plan] = {}
        """The plan by which a worker here has begun or gone on with each run, the last one."""
        self._inbox = TaskInbox(app)
        self._pid = os.getpid()

    # Starting

    @shows_run_options
    def start_run(
        self,
        plan: str,
        input: Any = None,
        *,
        connection: Caller | None = None,
        **options: Unpack[RunOptions],
    ) -> Run:
        """`client.start_run` with a run id that names the test: `test-<worker>-<test>-<number>`.

        >>> beatless.start_run("checkout", {"order": 1}).run_id
        'test-...'
        """
        options.setdefault("run_id", next(self._ids))
        return self.client.start_run(plan, input, connection=connection, **options)

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

    def signal(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        connection: Caller | None = None,
    ) -> SentSignal:
        """`client.signal_run`, in the namespace of the run.

        >>> run = beatless.start_run("payment")
        >>> executed = beatless.work_until_idle()
        >>> sent = beatless.signal(run.run_id, "paid", {"amount": 12})
        >>> executed = beatless.work_until_idle()
        >>> beatless.client.get_run(run.run_id).result
        {'amount': 12}
        """
        client = self._client(run_id)
        return client.signal_run(run_id, name, data, key=key, connection=connection)

    def approve(
        self,
        run_id: str,
        name: str,
        data: Any = None,
        *,
        by: str = "tester",
        key: str | None = None,
        connection: Caller | None = None,
    ) -> SentDecision:
        """`client.approve_run`, in the namespace of the run. Without data, a yes to a Verdict.

        >>> run = beatless.start_run("complaint")
        >>> executed = beatless.work_until_idle()
        >>> sent = beatless.approve(run.run_id, "Refund", by="ann@example.com")
        >>> executed = beatless.work_until_idle()
        >>> beatless.client.get_run(run.run_id).result
        {'by': 'ann@example.com', 'refunded': True}
        """
        decision = {"approved": True} if data is None else data
        client = self._client(run_id)
        return client.approve_run(run_id, name, decision, by=by, key=key, connection=connection)

    def waits(self, run_id: str) -> list[OpenWait]:
        """The open waits of a run.

        >>> run = beatless.start_run("payment")
        >>> executed = beatless.work_until_idle()
        >>> [(wait.occurrence, wait.names) for wait in beatless.waits(run.run_id)]
        [('paid', ['paid'])]
        """
        return self._client(run_id).waits(run_id)

    def children(self, run_id: str) -> list[Run]:
        """The runs that a run has started, in the order of the calls: a thousand at most.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> beatless.children(run.run_id)
        []
        """
        return self._client(run_id).children(run_id, limit=1000)

    # The work of the processes

    def drain_outbox_once(self, run_id: str | None = None) -> int:
        """One drain of the relay: publish due messages, of one run or all; their number.

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
        executed, _ = self._execute_next()
        return executed

    def work_until_idle(self, *, limit: int = 10_000) -> int:
        """`work_once` until nothing is dispatched or left to drain; how many were executed.

        A message whose run is not to be executed any more, as the second one of a run, does not
        count. Runs that wait for a later time stay: see `advance`. Raises AssertionError after
        `limit`.

        >>> runs = [beatless.start_run("checkout", {"order": n}) for n in (1, 2)]
        >>> beatless.work_until_idle()
        2
        """
        for done in range(limit):
            self.drain_outbox_once()
            executed, taken = self._execute_next()
            if not executed:
                if taken:  # else nothing has happened since the drain
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
        client = self._client(run_id)
        plan = self.app.plans[client.get_run(run_id).plan]
        run_id = client.get_run(run_id).run_id
        self._store_former(plan, run_id)
        executed = self.executor().execute(plan, run_id, 0, max_steps=1)
        self._check_replay(plan, run_id, executed)
        return executed

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
            if not at.startswith(("relay.", "retention.", "schedule.")):
                self.forget_worker()
        else:
            times = "" if nth == 1 else f" {nth} times"
            raise AssertionError(f"the crash point {at} was not reached{times}")
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

        A broker that waits for acknowledgements delivers the worker's messages again.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> first = beatless.step(run.run_id)
        >>> beatless.forget_worker()
        >>> beatless.step(run.run_id)  # by another worker
        True
        """
        if self._executor is not None:
            self._executor.disconnect()
            note = partial(self.app.leases.note_death, worker=self._executor.worker)
            # A session of its own would be one in five of a short test's.
            transact_by_driver(self.app.engine, note, twice=True, each_statement=True)
            self._executor = None
        self._inbox.release()

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

        It has the plans of that App, not those of `beatless_plans`. Settings are
        those of the test's app, and those given here: `fault="step.before@2:kill"` crashes it.

        >>> worker = beatless.worker_process("shop.app:app", concurrency=2)
        >>> worker.alive
        True
        """
        return self._processes.start(
            app, ["worker", "--concurrency", str(concurrency), *arguments], settings
        )

    def relay_process(self, app: str, **settings: Any) -> Child:
        """A real relay, listening; it ends with the test.

        >>> relay = beatless.relay_process("shop.app:app")
        >>> relay.alive
        True
        """
        return self._processes.start(app, ["relay"], settings)

    def verify(self) -> None:
        """Raises AssertionError if anything stored breaks a guarantee.

        >>> run = beatless.start_run("checkout", {"order": 1})
        >>> executed = beatless.work_until_idle()
        >>> beatless.verify()
        """
        # `advance` passes no time for a relay that only drains when it is called.
        patience = PUBLISH_GRACE_S + self._advanced_s
        with self.app.engine.connect() as connection:
            found = verify(connection, self.app.settings.schema, patience=patience)
        if found:
            raise AssertionError("\n".join(str(violation) for violation in found))

    def close(self) -> None:
        """End the test's processes and close its connections, all of them even if one fails."""
        with ExitStack() as last:
            last.callback(self.app.close)
            last.callback(self.app.executors.close)
            last.callback(self.relay.stop)
            last.callback(self.forget_worker)
            last.callback(self._processes.end)

    def _execute_next(self) -> tuple[bool, int]:
        """Execute the next dispatched run: whether there was one, and the messages taken for it."""
        taken = 0
        while (message := self._inbox.take()) is not None:
            taken += 1
            if self._execute(message):
                return True, taken
        return False, taken

    def _execute(self, message: Message) -> bool:
        """Execute the message; False if its run was not claimable any more."""
        plan = self.app.plans.get(message.headers.get("task"))
        if plan is None:
            self._inbox.execute_task(message)
            return True
        (run_id, dispatch), _, _ = message.payload
        late = self.app.celery.conf.task_acks_late
        if not late:
            self._inbox.acknowledge(message)
        self._store_former(plan, run_id)
        try:
            executed = self.executor().execute(plan, run_id, dispatch)
            self._check_replay(plan, run_id, executed)
        except Exception:
            # Not so after a crash: the dead acknowledge nothing.
            if late:
                self._inbox.acknowledge(message)
            raise
        if late:
            self._inbox.acknowledge(message)
        return executed

    def _store_former(self, plan: Plan, run_id: str) -> None:
        """Store the order of the steps in the plan that the run was begun with, as its worker has.

        No sooner than another plan has its place: few tests have such a deploy.
        """
        former = self._begun.setdefault(run_id, plan)
        if former is not plan:
            self._begun[run_id] = plan
            with self.app.engine.begin() as connection:
                PlanVersions(self.app.settings.schema).store(connection, [former])

    def _check_replay(self, plan: Plan, run_id: str, executed: bool) -> None:
        """Raises AssertionError if the plan does not do the same when it is called again."""
        first = run_id not in self._executed
        if self._executed.setdefault(run_id, plan) is not plan:
            self._executed[run_id] = None  # a deploy
        elif executed and not first:
            check_goes_on(self.app, plan, run_id)
        check_replay(self._client(run_id), plan, run_id, first=first)
