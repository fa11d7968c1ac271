"""Flower with runs in it: a run is a task by its own id, its steps are that task's children.

Flower hears the runs' events on Redis as any viewer does, and reads missed ones in Postgres. So
neither workers nor relays do anything for it, and its history is back when it starts again.
"""

import atexit
import logging
import os
import re
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from flower.app import Flower, rewrite_handler
from flower.command import apply_env_options, apply_options, extract_settings, setup_logging
from flower.command import settings as web_settings
from flower.events import EventsState
from flower.options import default_options
from flower.views.tasks import TaskView
from redis.backoff import NoBackoff
from redis.retry import Retry
from tornado.web import url

from beatless import loopback
from beatless.app import App
from beatless.errors import BadRequest
from beatless.orchestrator.errors import EventsPruned, RunNotFound
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.failure import was_cancelled
from beatless.outbox.backoff import Backoff
from beatless.outbox.clock import monotonic
from beatless.outbox.message import every_channel, run_of
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.threads import LastingThread
from beatless.settings import service_links
from beatless.streams.messages import parse
from beatless.transactions import first_line
from beatless.worker import canary

logger = logging.getLogger(__name__)

HISTORY = 500
"""Runs that are read when Flower starts, the newest."""

KNOWN = 50_000
"""Runs whose place is remembered."""

LOOK_S = 15.0
"""Seconds between looks at the history of the database, and at a connection that is silent."""

DELIVERY = re.compile(r"(.+)\.[0-9]+")
"""The id of a Celery task: of ours, the run's id and the number of the dispatch."""

OUTCOMES = {"completed": "succeeded", "failed": "failed", "cancelled": "revoked"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerOptions:
    """The address and access of Flower."""

    host: str
    port: int
    basic_auth: str | None = None
    read_only: bool = False
    steps: bool = True
    """Whether runs and steps are shown; without, only Celery's own events."""
    page_url: str | None = None
    """Where the run page is, for links to it."""


class FleetState(EventsState):  # type: ignore[misc]  # Flower has no types
    """Flower's tasks, told by two: Celery says which worker has a run, the journal all the rest.

    Lives in the thread of Flower's loop.
    """

    def __init__(self, *arguments: Any, plans: Container[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._plans = plans

    def event(self, event: dict[str, Any]) -> None:
        """Map Celery's events about a delivery to the task of its run."""
        found = DELIVERY.fullmatch(str(event.get("uuid", "")))
        if found is not None and canary.is_one(found[1]):
            return
        if found is None or not self._ours(event, found[1]):
            super().event(event)
            return
        told = event | {"uuid": found[1], "root_id": found[1], "parent_id": None}
        if event["type"] in ("task-received", "task-started"):
            super().event(told)
            self._learn_worker(self.tasks[found[1]])
        elif event["type"] in ("task-failed", "task-revoked") and not self._task(found[1]).ready:
            # The worker was lost, not the run: another one goes on with it.
            super().event(told | {"type": "task-retried"})

    def journal(self, event: Event) -> None:
        """One event of a run. Those of doctor's canaries would fill the list."""
        if canary.is_one(event.run_id):
            return
        data = event.data or {}
        run, run_id, moment = self._task(event.run_id), event.run_id, event.ts / 1000
        run.in_journal = True
        match event.type:
            case EventType.RUN_STARTED:
                self._tell(
                    run_id,
                    "sent",
                    moment,
                    name=data.get("plan"),
                    args="",
                    kwargs="",
                    routing_key=data.get("queue"),
                    received=run.received or moment,
                )
                self._seen_types.add(data.get("plan"))
            case EventType.STEP_STARTED:
                self._tell(run_id, "started", run.started or moment)
                self._tell_step(
                    event, "started", moment, received=moment, retries=(event.attempt or 1) - 1
                )
            case EventType.STEP_FINISHED:
                self._tell_step(event, "succeeded", moment)
            case EventType.STEP_FAILED:
                again = data.get("retry_at") is not None and not data.get("final")
                ended = "revoked" if was_cancelled(data) else "failed"
                why = {"exception": reason(data.get("error"))}
                self._tell_step(event, "retried" if again else ended, moment, **why)
                if again:
                    self._tell(run_id, "retried", moment, **why)
            case EventType.RUN_FINISHED:
                outcome = OUTCOMES.get(str(data.get("outcome")), "failed")
                took = {"runtime": moment - run.started} if run.started else {}
                self._tell(run_id, outcome, moment, exception=reason(data.get("error")), **took)
                run.uncounted = f"task-{outcome}"
                self._count(run)

    def _ours(self, event: dict[str, Any], run_id: str) -> bool:
        """Whether this is about a run, and not about another task of the same broker."""
        if "name" in event:  # when it is received; later events have only the id
            known = getattr(self.tasks.get(run_id), "in_journal", False)
            return known or event["name"] in self._plans
        return event["uuid"] not in self.tasks and run_id in self.tasks

    def _task(self, uuid: str) -> Any:
        return self.get_or_create_task(uuid)[0]

    def _tell(self, uuid: str, what: str, moment: float, **fields: Any) -> Any:
        evicted = self._eviction_candidate(uuid)
        task = self._task(uuid)
        task.root_id = task.root_id or uuid
        task.event(what, moment, moment, fields)
        self._index_task(task, evicted)
        return task

    def _tell_step(self, event: Event, what: str, moment: float, **fields: Any) -> None:
        run = self._task(event.run_id)
        uuid = f"{event.run_id}:{event.step}"
        step = self._task(uuid)
        name = f"{run.name}/{event.step}"
        step.root_id = step.parent_id = event.run_id
        step.worker = run.worker
        if what != "started" and step.started:
            fields["runtime"] = moment - step.started
        self._tell(uuid, what, moment, name=name, args="", kwargs="", **fields)
        self._seen_types.add(name)
        run.children.add(step)

    def _learn_worker(self, run: Any) -> None:
        for step in run.children:
            if step.worker is None:
                step.worker = run.worker
                self._index_task(step, None)
        self._count(run)

    def _count(self, run: Any) -> None:
        """Credit the worker with the run's end: its own word of it may come before or after."""
        kind = getattr(run, "uncounted", None)
        if kind is None or run.worker is None:
            return
        run.uncounted = None
        self.counter[run.worker.hostname][kind] += 1
        told = {"type": kind, "name": run.name, "runtime": run.runtime}
        self.metrics.observe_task(run.worker.hostname, told, run)


def reason(error: dict[str, Any] | None) -> str | None:
    """A failure in one line."""
    return None if error is None else f"{error.get('type')}: {error.get('message')}"


class Listener:
    """Brings every event of every run to `tell`, in order and once, as long as Flower lives."""

    def __init__(self, app: App, tell: Callable[[Event], None], *, look_s: float = LOOK_S) -> None:
        self._app = app
        self._look_s = look_s
        self._epoch = ""
        self._sql = statements(__file__, app.settings.schema)
        self._tell = tell
        self._seqs: OrderedDict[str, int] = OrderedDict()
        self._backoff = Backoff()
        self._failures = 0
        self._stopping = threading.Event()
        self._thread = LastingThread("flower", lambda _: self._run())

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._listen()
            except Exception as error:
                # Any error: a Flower without events looks as if nothing happened.
                self._failures += 1
                delay = self._backoff.delay(self._failures)
                logger.warning(
                    "flower receives no events of runs, will retry",
                    extra={"action": "flower_deaf", "retry_in": delay, "reason": first_line(error)},
                )
                self._stopping.wait(delay)

    def _listen(self) -> None:
        client = self._app.redis()
        # A connection that comes back silently would have missed published events.
        client.connection_pool.connection_kwargs["retry"] = Retry(NoBackoff(), 0)
        with client, client.pubsub() as pubsub:  # type: ignore[no-untyped-call]  # redis-py's gap
            self._follow_history()
            ours = self._app.streams.channel("").encode()
            pubsub.psubscribe(every_channel(self._app.settings.prefix))
            while (message := pubsub.get_message(timeout=5.0)) is None:
                if self._stopping.is_set():
                    return
            # Only now, or events published in between would be missed.
            self._catch_up()
            self._failures = 0
            looked = monotonic()
            while not self._stopping.is_set():
                if monotonic() - looked >= self._look_s:
                    if self._follow_history():
                        return  # its channels have other names
                    looked = monotonic()
                message = pubsub.get_message(ignore_subscribe_messages=True, timeout=self._look_s)
                if message is None:
                    pubsub.ping()  # a connection that is dead would be silent as well
                elif message["type"] == "pmessage" and message["channel"].startswith(ours):
                    for text in parse(message["data"], run_of(message["channel"].decode())):
                        self._hear(text.event())

    def _follow_history(self) -> bool:
        """Whether the database has another history than at the last look, whose events are new."""
        before, self._epoch = self._epoch, self._app.client.epoch()
        changed = before not in ("", self._epoch)
        if changed:
            logger.warning(
                "the database has another history: its newest runs are read again",
                extra={"action": "flower_history_changed", "epoch": self._epoch},
            )
            self._seqs.clear()
        return changed

    def _hear(self, event: Event) -> None:
        before = self._seqs.get(event.run_id, 0)
        if event.seq == before + 1:
            self._pass_on(event)
        elif event.seq > before:
            self._read(event.run_id, before)

    def _pass_on(self, event: Event) -> None:
        self._seqs[event.run_id] = event.seq
        self._seqs.move_to_end(event.run_id)
        if len(self._seqs) > KNOWN:
            self._seqs.popitem(last=False)
        self._tell(event)

    def _read(self, run_id: str, after: int) -> None:
        try:
            with self._app.engine.connect() as connection:
                events = self._app.journal.read(connection, run_id, after=after)
        except (EventsPruned, RunNotFound):
            return
        for event in events:
            self._pass_on(event)

    def _catch_up(self) -> None:
        """Read the newest runs, and those whose end was not heard."""
        with self._app.engine.connect() as connection:
            rows = execute(connection, self._sql["newest"], {"limit": HISTORY})
        for run_id, last_seq in reversed(rows):
            if last_seq > (before := self._seqs.get(run_id, 0)):
                self._read(run_id, before)


class TaskPage(TaskView):  # type: ignore[misc]  # Flower has no types
    """Flower's page of a task, whose root is a link to the run page."""

    def reverse_url(self, name: str, *args: Any) -> str:
        """An address is its own address."""
        if name == "task" and str(args[0]).startswith(("http://", "https://")):
            return str(args[0])
        return str(super().reverse_url(name, *args))

    def format_task(self, task: Any) -> Any:
        shown = super().format_task(task)
        page_url = self.application.settings["page_url"]
        if page_url is None or not shown.root_id:
            return shown
        # Not copy.copy: that goes through the pickle of a task, which has no children.
        linked = object.__new__(type(shown))
        vars(linked).update(vars(shown))
        # Flower asks for the root's address with this: see reverse_url.
        linked.root_id = f"{page_url.rstrip('/')}/#/run/{quote(shown.root_id, safe='')}"
        return linked


END_S = 5
"""Seconds from the signal to the end of a Flower whose threads do not end."""


def run_flower(app: App, chosen: FlowerOptions, ready: Callable[[str], None]) -> None:
    """Serve Flower until it is asked to stop; `ready` gets its URL once it answers.

    Its own variables FLOWER_* and its flowerconfig.py are read as well. Raises BadRequest where
    others could reach it and it requires no authentication.
    """
    for name in service_links(os.environ):
        if name.startswith("FLOWER_"):  # a Service called `flower` makes FLOWER_PORT=tcp://…
            del os.environ[name]
    apply_env_options()
    apply_options("flower", arguments(chosen))
    oauth = default_options.auth and default_options.auth_provider
    if not (default_options.basic_auth or oauth or loopback.is_host(chosen.host)):
        raise BadRequest(
            "--host",
            f"{chosen.host} can be reached by others: give --basic-auth USER:PASSWORD as well, or "
            "FLOWER_AUTH with FLOWER_AUTH_PROVIDER",
        )
    extract_settings()
    setup_logging()
    flower = Flower(
        capp=app.celery, options=default_options, page_url=chosen.page_url, **web_settings
    )
    page = url(r"/task/(.+)", TaskPage)
    if default_options.url_prefix:
        page = rewrite_handler(page, default_options.url_prefix)
    flower.add_handlers(".*", [page])
    listener = None
    if chosen.steps:
        state = FleetState(
            plans={*app.plans, canary.NAME},
            max_tasks_in_memory=default_options.max_tasks,
            max_workers_in_memory=default_options.max_workers,
        )
        flower.events.state = state
        listener = Listener(
            app,
            lambda event: flower.io_loop.add_callback(
                partial(state.journal, app.redaction.event(event))
            ),
        )
        listener.start()
    atexit.register(flower.stop)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _end(flower))
    port = flower.start_http_server()
    flower.io_loop.add_callback(ready, loopback.url(chosen.host, port))
    try:
        flower.start()
    finally:
        if listener is not None:
            listener.stop()


def _end(flower: Flower) -> None:
    """End it in order, or else after `END_S`: threads of Flower wait for a broker that is gone."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.alarm(END_S)
    flower.io_loop.add_callback_from_signal(flower.stop)


def arguments(chosen: FlowerOptions) -> Sequence[str]:
    """The options as Flower's own."""
    given = [f"--address={chosen.host}", f"--port={chosen.port}"]
    if chosen.basic_auth is not None:
        given.append(f"--basic_auth={chosen.basic_auth}")
    if chosen.read_only:
        given.append("--read_only=True")
    return given
