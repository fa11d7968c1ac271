"""The general load: callers that start, cancel, retry and pause, and viewers that come and go."""

import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, LifoQueue
from time import monotonic, time
from typing import Any

import psycopg
import redis
from sqlalchemy import create_engine

from beatless import Event, RunState, Schedule
from beatless.client import Client, RunRequest
from beatless.errors import HistoryChanged, JobsError, Unreachable, WaitTimeout
from beatless.http import Client as HttpClient
from beatless.orchestrator.errors import OrchestratorError, RunConflict
from beatless.outbox.backoff import Backoff
from beatless.outbox.message import one_line
from beatless.settings import engine_url
from tests.faults import duplicates
from tests.faults.browser import Frame, frames_of
from tests.faults.fleet import LEASE_S, SHARED, UNATTENDED, Fleet
from tests.faults.plans import WAITED
from tests.faults.recorder import Recorder, text_of
from tests.faults.senders import RolledBack, Senders

SCHEDULED_S = (1, 2)
"""Seconds between two ticks of each schedule."""

SCHEDULED_DEADLINE_S = 2.0

AT_ONCE = Backoff(initial=0.01, cap=0.3)
SHOWN_S = 300.0
"""A viewer that has got no end after this time is left behind: a violation, unless told to go."""


AGE_AFTER_S = 2.0
"""Runs with groups that wait for longer come before those of a higher priority."""


class TooLate(Exception):
    """A cancel came after the end of its run."""


@dataclass
class Load:
    """Threads of callers and viewers over one fleet."""

    fleet: Fleet
    recorder: Recorder
    seed: int
    runs_per_s: float = 15.0

    def __post_init__(self) -> None:
        self.started = 0
        self.viewed = 0
        self.failed: list[str] = []
        """What a thread of the load itself died of: a mistake in this program."""
        self._ending = threading.Event()
        self._hushed = threading.Event()
        self._calling = threading.Condition()
        self._calls = 0
        """How many threads are in a call."""
        self._fresh: LifoQueue[str] = LifoQueue()
        """Runs to be watched, the newest first: a stream of one that has ended shows little."""
        self._recent: list[str] = []
        self._failed_runs: list[str] = []
        self._keyed: list[dict[str, Any]] = []
        """Wishes with a key, some of which come again."""
        self.hears = threading.Event()
        """Somebody listens to what Redis publishes."""
        self._threads: list[threading.Thread] = []
        self._viewers = 0
        self._viewers_lock = threading.Lock()
        self._engine = create_engine(
            engine_url(self.fleet.postgres.url),
            connect_args={"connect_timeout": 5, "options": "-c lock_timeout=5000"},
        )
        self.senders = Senders(
            self.fleet.app,
            self._engine,
            self.recorder,
            lost=lost,
            pause=self._ending.wait,
            long_s=LEASE_S + 1,
        )

    def begin(self) -> None:
        work: list[tuple[str, Callable[[random.Random], None], float]] = [
            ("start-1", self._called(self._start), 2 / self.runs_per_s),
            ("start-2", self._called(self._start), 2 / self.runs_per_s),
            ("send-1", self._called(self.senders.send), 0.2),
            ("send-2", self._called(self.senders.send), 0.2),
            ("race", self._called(self.senders.race), 0.05),
            ("change-1", self._called(self._change), 0.4),
            ("change-2", self._called(self._change), 0.4),
            ("pause", self._called(self._pause), 2.0),
            *((f"view-{n}", self._view, 0.05) for n in range(6)),
        ]
        self.fleet.app.client.set_age_after(SHARED, AGE_AFTER_S)
        self._schedule()
        for name, act, every in work:
            chance = random.Random(f"{self.seed}/{name}")
            self._spawn(
                name, lambda act=act, chance=chance, every=every: self._repeat(act, chance, every)
            )
        self._spawn("wire", self._listen)

    def _schedule(self) -> None:
        """Schedules, whose runs no worker takes: they end at their deadline."""
        for every in SCHEDULED_S:
            schedule = Schedule(
                f"each-{every}",
                "brief",
                every=every,
                input={"failures": 0, "seconds": 0},
                catch_up="all",
                queue=UNATTENDED,
                deadline=SCHEDULED_DEADLINE_S,
            )
            first = self.fleet.app.client.create_schedule(schedule).next_tick
            assert first is not None
            self.recorder.write(
                "scheduled", name=schedule.name, every_s=every, first=first.timestamp()
            )

    def _spawn(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:
                self.failed.append(f"{name}: {error!r}")
                raise

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _repeat(
        self, act: Callable[[random.Random], None], chance: random.Random, every: float
    ) -> None:
        while not self._ending.wait(chance.expovariate(1 / every)):
            act(chance)

    def _called(self, act: Callable[[random.Random], None]) -> Callable[[random.Random], None]:
        """The act, unless nobody calls just now."""

        def called(chance: random.Random) -> None:
            with self._calling:
                if self._hushed.is_set():
                    return
                self._calls += 1
            try:
                act(chance)
            finally:
                with self._calling:
                    self._calls -= 1
                    self._calling.notify_all()

        return called

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Nobody calls in this block; viewers go on."""
        self._hushed.set()
        with self._calling:
            self._calling.wait_for(lambda: not self._calls)
        try:
            yield
        finally:
            self._hushed.clear()

    def stop(self, drain: Callable[[], None]) -> None:
        """No new calls; then drain, while viewers follow to the end of what they see."""
        self._ending.set()
        viewers = [thread for thread in self._threads if thread.name.startswith("view")]
        for thread in self._threads:
            if thread not in viewers:
                thread.join(SHOWN_S + 60)
        for every in SCHEDULED_S:
            self.fleet.app.client.pause_schedule(f"each-{every}")
        drain()
        for thread in viewers:
            thread.join(SHOWN_S + 60)
        self._engine.dispose()

    def leave(self) -> None:
        """No new calls, and nobody waits for the viewers: they end with this process."""
        self._ending.set()

    # Callers

    def _start(self, chance: random.Random) -> None:
        if chance.random() < 0.1:
            queue = chance.choice(["default", "calm"])
            self.start([self.brief(chance, queue) for _ in range(8)], chance)
        elif chance.random() < 0.03:
            self.start(duplicates.batch(chance), chance)
        elif chance.random() < 0.04:
            self.start(self._of_groups(chance), chance)
        elif chance.random() < 0.04:
            self.start(self._due_together(chance), chance)
        else:
            self.start([self.wish(chance)], chance)

    def start(
        self,
        wishes: list[dict[str, Any]],
        chance: random.Random,
        waits: Callable[[], object] | None = None,
    ) -> None:
        """Start runs in one call; in the caller's own transaction if it waits, or by chance."""
        client = self.fleet.app.client
        for wish in wishes:
            self.started += 1
            if not wish.keys() & {"key", "run_id"}:
                wish["run_id"] = f"run-{self.started}-{chance.randrange(10**12)}"
        requests = [RunRequest(**wish) for wish in wishes]
        way = chance.random()
        with ExitStack() as stack:
            records = [stack.enter_context(self._recorded_start(wish)) for wish in wishes]
            try:
                if waits is not None:
                    with self._engine.begin() as connection:
                        runs = client.start_runs(requests, connection=connection)
                        waits()
                elif way < 0.3:  # which may last or roll back
                    with self._engine.begin() as connection:
                        runs = client.start_runs(requests, connection=connection)
                        self._ending.wait(chance.choice([0, 0.02, 0.1, 0.3, 1]))
                        if way < 0.1:
                            raise RolledBack
                else:
                    runs = client.start_runs(requests)
                for record, run in zip(records, runs, strict=True):
                    record |= {"outcome": "ok", "run_id": run.run_id, "start": run.start}
            except RolledBack:
                for record in records:
                    record["outcome"] = "rolled_back"
            except RunConflict:
                for record in records:
                    record["outcome"] = "failed"
            except Unreachable:
                return  # unknown: they may have been committed
            except Exception as error:
                if not lost(error):
                    raise
                return
        for record in records:
            if record["outcome"] == "ok":
                self._recent = [*self._recent[-40:], record["run_id"]]
                self.senders.started(record["run_id"], record["plan"])
                if record["plan"] != "brief" or chance.random() < 0.1:
                    self._fresh.put(record["run_id"])

    def _recorded_start(self, wish: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        facts = {name: wish.get(name) for name in ("run_id", "plan", "key")}
        number = (wish["input"] or {}).get("number")
        return self.recorder.call("start", **facts, delay_s=wish.get("delay"), number=number)

    def brief(self, chance: random.Random, queue: str) -> dict[str, Any]:
        failures = chance.choice([0, 0, 0, 1, 2, 4])
        given = {"failures": failures, "seconds": 0.5 if chance.random() < 0.08 else 0}
        return {"plan": "brief", "queue": queue, "input": given}

    def _of_groups(self, chance: random.Random) -> list[dict[str, Any]]:
        """Runs of one queue whose groups, or none, take turns."""
        return [
            self.brief(chance, SHARED)
            | {"group": chance.choice([None, "a", "b", "c"]), "priority": chance.randrange(3)}
            for _ in range(8)
        ]

    def _due_together(self, chance: random.Random) -> list[dict[str, Any]]:
        """More runs of a limit than it lets run, which no start has kept apart."""
        delay = round(chance.uniform(0.2, 2), 2)
        given = {"seconds": chance.choice([0.02, 0.3])}
        return [{"plan": "limited", "delay": delay, "input": given} for _ in range(6)]

    def wish(self, chance: random.Random) -> dict[str, Any]:
        if self._keyed and chance.random() < 0.05:
            return chance.choice(self._keyed)
        if chance.random() < 0.2:
            return self.brief(chance, chance.choice(["default", "calm"]))
        if chance.random() < 0.15:
            return duplicates.wish(chance)
        others = ["chain", "traced", "flaky", "stored", "stored", "snoozed", "cancelled"]
        others += ["stored_async"] * 2
        others += ["piece", "piece", "family", "deadly", "bought", "bought", "limited", "limited"]
        others += ["kept", "choked"]
        others += ["split", "gathered"] * 4
        plan = chance.choice([*others, *WAITED, *WAITED])
        given: dict[str, Any] = {"seconds": chance.choice([0, 0, 0, 0.02, 0.3, 1.0])}
        if plan in WAITED:
            given["timeout"] = chance.choice([0.2, 0.5, 1.0, None, None])
            given |= {"turns": chance.choice([0, 1, 3]), "failures": chance.choice([0, 0, 1, 2])}
            given["seconds"] = min(0.3, given["seconds"])
        if plan in ("stored", "stored_async"):
            given["seconds"] = chance.choice([0, 0.02, 0.3, 1.0])
        if plan == "flaky":
            given["failures"] = chance.choice([0, 1, 2, 5])
        if plan == "traced":
            given["traces"] = chance.choice([1, 5, 40, 200, 600])
            given["pause"] = chance.choice([0, 0.01, 0.05]) if given["traces"] < 100 else 0
        if plan == "piece":
            given |= self._piece(chance)
        if plan == "family":
            given = self._family(chance, depth=chance.choice([0, 0, 1]))
        if plan == "bought":
            given["seconds"] = min(0.3, given["seconds"])
            given |= {
                "failures": chance.choice([0, 1, 2]),
                "undo_failures": chance.choice([0, 1, 3]),
            }
        if plan == "deadly":
            given["deaths"] = chance.choice([0, 0, 0, 1, 2])
        if plan == "snoozed":
            given["until"] = time() + chance.uniform(0, 2)
        wish: dict[str, Any] = {
            "plan": plan,
            "input": given,
            "queue": chance.choice(["default", "calm"]),
        }
        if chance.random() < 0.2:
            wish["priority"] = chance.randrange(10)
        if chance.random() < 0.15:
            wish["delay"] = round(chance.uniform(0.2, 3), 2)
        elif chance.random() < 0.1:
            wish["deadline"] = round(chance.uniform(1, 20), 2)
        elif chance.random() < 0.1:
            wish |= {"queue": UNATTENDED, "deadline": round(chance.uniform(0.5, 2.5), 2)}
        if chance.random() < 0.1:
            wish["key"] = f"key-{chance.randrange(10**9)}"
            self._keyed = [*self._keyed[-20:], wish]
        return wish

    def _piece(self, chance: random.Random) -> dict[str, Any]:
        """What a step emits, and when it fails."""
        return {
            "pieces": chance.choice([0, 3, 30, 150]),
            "pause": chance.choice([0, 0.001, 0.01]),
            "failures": chance.choice([0, 0, 0, 1, 2]),
        }

    def _family(self, chance: random.Random, *, depth: int) -> dict[str, Any]:
        """The children of a run."""
        pieces = [self._piece(chance) for _ in range(chance.choice([1, 3, 8, 12]))]
        return {
            "first": self._piece(chance),
            "detached": chance.random() < 0.3,
            "lasting": chance.random() < 0.5,
            "children": pieces,
            "at_once": chance.choice([None, 1, 3, 4]),
            "families": [self._family(chance, depth=depth - 1) for _ in range(2 * depth)],
        }

    def _change(self, chance: random.Random) -> None:
        """Cancel a recent run, or retry one that has failed."""
        if not self._recent:
            return
        client = self.fleet.app.client
        if not self._failed_runs or chance.random() < 0.7:
            self.cancel(chance.choice(self._recent[-8:]), chance.random(), chance)
            return
        run_id = self._failed_runs.pop()
        with self.recorder.call("retry", run_id=run_id) as record:
            record["outcome"] = self._try(
                lambda: record.update(new=client.retry_run(run_id).run_id)
            )

    def cancel(self, run_id: str, way: float, chance: random.Random) -> None:
        """Cancel a run, in one of the ways from 0 to 1, of which the last is a plain call."""
        with self.recorder.call("cancel", run_id=run_id) as record:
            try:
                record["outcome"] = self._try(lambda: self._cancel(run_id, way, chance))
            except RolledBack:
                record["outcome"] = "rolled_back"

    def _cancel(self, run_id: str, way: float, chance: random.Random) -> None:
        """Raises TooLate if the run had ended by itself."""
        client = self.fleet.app.client
        if way < 0.4:  # in the caller's own transaction, which may last or roll back
            with self._engine.begin() as connection:
                run = client.cancel_run(run_id, reason="chaos", connection=connection)
                self._ending.wait(chance.choice([0, 0.02, 0.1, 0.3]))
                if way < 0.1:
                    raise RolledBack
        else:
            run = client.cancel_run(run_id, reason="chaos")
        if run.state in (RunState.COMPLETED, RunState.FAILED):
            raise TooLate

    def _pause(self, chance: random.Random) -> None:
        """Pause the calm queue for a moment, with runs in it. It is resumed whatever happens."""
        client = self.fleet.app.client
        self.start([self.brief(chance, "calm") for _ in range(12)], chance)
        with self.recorder.call("pause", queue="calm") as record:
            record["outcome"] = self._try(lambda: client.pause_queue("calm"))
        self._ending.wait(chance.uniform(0.2, 1.5))
        outcome = ""
        while outcome != "ok":
            with self.recorder.call("resume", queue="calm") as record:
                outcome = record["outcome"] = self._try(lambda: client.resume_queue("calm"))

    def _try(self, act: Callable[[], object]) -> str:
        try:
            act()
        except Unreachable:
            self._ending.wait(0.1)
            return "unknown"
        except (JobsError, OrchestratorError, TooLate):
            return "failed"
        except Exception as error:
            if not lost(error):
                raise
            return "unknown"
        return "ok"

    # Viewers

    def _view(self, chance: random.Random) -> None:
        """Follow one run to its end, over HTTP or beside the API, from its beginning or later."""
        try:
            run_id = self._fresh.get(timeout=0.2)
        except Empty:
            return
        with self._viewers_lock:
            self._viewers += 1
            viewer = f"v{self._viewers}"
        from_seq = seen = chance.choice([0, 0, 1])
        facts = {"viewer": viewer, "run_id": run_id, "from_seq": from_seq}
        self.recorder.write("watch", at=time(), **facts)
        ended, until = False, monotonic() + SHOWN_S
        epoch: str | None = None
        while not ended and monotonic() < until:
            try:
                for told, event in self._frames(chance, run_id, seen, epoch):
                    epoch = told or epoch
                    self._saw(viewer, run_id, told, event)
                    ended = event is not None and event.final
                    if event and event.final and (event.data or {}).get("outcome") == "failed":
                        self._failed_runs = [*self._failed_runs[-20:], run_id]
                    seen = event.seq if event else 0
            except WaitTimeout:
                break
            except HistoryChanged:
                self._saw(viewer, run_id, None, None)
                seen, epoch = 0, None
            except (Unreachable, OSError):  # the API or Postgres is not there yet: go on from here
                self._ending.wait(0.2)
        self.viewed += 1
        self.recorder.write("view", ended=ended, **facts)

    def _frames(
        self, chance: random.Random, run_id: str, seen: int, epoch: str | None
    ) -> Iterable[Frame]:
        way, url, token = chance.random(), self.fleet.api_url, self.fleet.token
        if 0.25 <= way < 0.75:
            cursor = str(seen) if epoch is None else f"{epoch}.{seen}"
            return frames_of(url, token, run_id, cursor)
        if way < 0.25:
            client: Client | HttpClient = self.fleet.app.client
        else:
            client = HttpClient(url, token=token, backoff=AT_ONCE, timeout=20)
        events = client.stream_run(run_id, from_seq=seen, timeout=SHOWN_S)
        return (Frame(None, event) for event in events)

    def _saw(self, viewer: str, run_id: str, epoch: str | None, event: Event | None) -> None:
        """An event; without one, that all will come again."""
        facts: dict[str, Any] = {"run_id": run_id, "seq": 0, "type": "reset", "text": ""}
        if event is not None:
            facts = {"run_id": event.run_id, "seq": event.seq, "type": event.type}
            facts["text"] = text_of(event)
        self.recorder.write("frame", viewer=viewer, epoch=epoch, at=time(), **facts)

    def _listen(self) -> None:
        """Write down what Redis publishes, connection by connection."""
        chance = random.Random(f"{self.seed}/wire")
        connection, pattern = 0, f"{self.fleet.settings.prefix}:events:*"
        while not self._ending.is_set():
            connection += 1
            with suppress(redis.RedisError, OSError), self.fleet.redis(self.fleet.bus) as client:
                ear = client.pubsub()
                ear.psubscribe(pattern)
                # Not what redis-py reads after it has connected anew by itself.
                socket = ear.connection._sock
                while not self._ending.is_set() and ear.connection._sock is socket:
                    message = ear.get_message(timeout=0.5)
                    if message is not None and message["type"] == "psubscribe":
                        self.recorder.write("listen", connection=str(connection), at=time())
                        self.hears.set()
                    elif message is not None and ear.connection._sock is socket:
                        self._heard(str(connection), message["data"], chance)
            self.hears.clear()
            self._ending.wait(0.1)

    def _heard(self, connection: str, body: bytes, chance: random.Random) -> None:
        for line in filter(None, one_line(body).split(b"\n")):
            event = Event.from_json(line)
            facts = {"run_id": event.run_id, "seq": event.seq, "at": time()}
            self.recorder.write("wire", connection=connection, **facts)
            self.senders.heard(event, chance)


def lost(error: BaseException | None) -> bool:
    """Whether a connection to Postgres was lost, or Postgres is away or cannot write just now."""
    while error is not None:
        if isinstance(
            error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
