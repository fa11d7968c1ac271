"""The processes that the load runs on, and a keeper that starts again whatever has ended."""

import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic, time
from typing import Self

import psycopg
import redis

from beatless import App, Settings
from beatless.auth import Scope, Tokens
from beatless.local.child import Child
from beatless.local.errors import NotReady
from beatless.local.ports import free_port
from beatless.local.postgres import EmbeddedPostgres
from beatless.local.processes import children_of
from beatless.local.valkey import EmbeddedValkey
from beatless.migrations import migrate
from beatless.settings import libpq_url
from tests.faults.disk import small_disk
from tests.faults.plans import LEDGER, PLANS
from tests.proxy import Proxy, proxy

LEASE_S = 3.0
FAR_S = 0.03
"""Requests of the API and of viewers beside it reach Redis so much later, as from far away."""
REDISPATCH_S = 2.0
GRACE_S = 5.0
SHARED = "shared"
"""The queue whose runs have groups: in the others workers claim further runs by themselves."""

QUEUES = ("default", "calm", SHARED)
PATIENCE_S = 120.0
UNATTENDED = "nobody"
"""A queue that no worker consumes."""

LOG = f"""
CREATE TABLE chaos_pulse AS SELECT 0 AS beats;
CREATE TABLE chaos_rows (run_id text NOT NULL, step text NOT NULL);
CREATE TABLE chaos_log (id bigserial PRIMARY KEY, txid bigint NOT NULL DEFAULT txid_current(),
                        run_id text NOT NULL, claim jsonb, event jsonb, lease jsonb);
CREATE TABLE chaos_looks (txid bigint NOT NULL, statement_at float8 NOT NULL,
                          locked boolean NOT NULL);
CREATE FUNCTION chaos_look() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$ DECLARE
  locked boolean := pg_current_xact_id_if_assigned() IS NOT NULL;  -- before this one writes
BEGIN
  INSERT INTO chaos_looks
  VALUES (txid_current(), extract(epoch FROM statement_timestamp()), locked);
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_look BEFORE DELETE ON signals FOR EACH STATEMENT
  EXECUTE FUNCTION chaos_look();
CREATE FUNCTION chaos_claim() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$ BEGIN
  INSERT INTO chaos_log (run_id, claim) VALUES (NEW.run_id, jsonb_build_object(
    'token', NEW.lease_token, 'worker', NEW.worker, 'was_running', OLD.state = 'running',
    'lease_until', extract(epoch FROM OLD.lease_expires_at),
    'at', extract(epoch FROM clock_timestamp()),
    'statement_at', extract(epoch FROM statement_timestamp()), 'queue', NEW.queue,
    'slots', (SELECT count(*) FROM limit_slots s WHERE s.run_id = NEW.run_id)));
  RETURN NULL;
END $$;
CREATE FUNCTION chaos_lease() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$ BEGIN
  INSERT INTO chaos_log (run_id, lease) VALUES (NEW.run_id, jsonb_build_object(
    'worker', NEW.worker, 'until', extract(epoch FROM NEW.lease_expires_at),
    'at', extract(epoch FROM clock_timestamp()),
    'statement_at', extract(epoch FROM statement_timestamp()), 'seconds', {LEASE_S}));
  RETURN NULL;
END $$;
CREATE FUNCTION chaos_event() RETURNS trigger LANGUAGE plpgsql
SET search_path FROM CURRENT AS $$ BEGIN
  INSERT INTO chaos_log (run_id, event) VALUES (NEW.run_id, jsonb_build_object(
    'type', NEW.type, 'seq', NEW.seq, 'step', NEW.step, 'attempt', NEW.attempt,
    'statement_at', extract(epoch FROM statement_timestamp()),
    'source', CASE WHEN NEW.data #>> '{{error,type}}' IN ('StepCrashed', 'LeaseRanOut')
                   THEN 'takeover'
                   ELSE NEW.source END));
  RETURN NULL;
END $$;
CREATE TRIGGER chaos_claim AFTER UPDATE ON runs FOR EACH ROW
  WHEN (NEW.attempt > OLD.attempt) EXECUTE FUNCTION chaos_claim();
CREATE TRIGGER chaos_lease AFTER UPDATE ON runs FOR EACH ROW
  WHEN (NEW.attempt = OLD.attempt AND NEW.state = 'running' AND OLD.state = 'running'
        AND NEW.lease_expires_at IS DISTINCT FROM OLD.lease_expires_at)
  EXECUTE FUNCTION chaos_lease();
CREATE TRIGGER chaos_event AFTER INSERT ON run_events FOR EACH ROW EXECUTE FUNCTION chaos_event();
"""
"""Writes down each claim, event, and change of a lease, in the order of the locks on the rows; and
when an inbox was read."""


@dataclass
class Slot:
    """One process of the fleet, which is started again when it has ended."""

    name: str
    arguments: list[str]
    environ: Mapping[str, str]
    directory: Path
    crash: tuple[str, str] | None = None
    """The name of a fault and its crash point, for the next process."""
    armed: str = ""
    """The fault by which the process that runs will end itself."""
    child: Child | None = None
    awaits: threading.Thread | None = None
    """Waits until the process is ready."""
    starts: int = 0
    born: float = 0.0
    kept: bool = True
    """Whether the keeper starts it again."""

    @property
    def ready(self) -> bool:
        return self.born > 0 and self.child is not None and self.child.alive

    @property
    def pid(self) -> int:
        """Raises ProcessLookupError if it has just ended."""
        assert self.child is not None
        try:
            return self.child.pid
        except RuntimeError as error:
            raise ProcessLookupError(self.name) from error

    @property
    def children(self) -> list[int]:
        return children_of(self.pid)

    def arm(self, name: str, point: str) -> None:
        """The next process ends itself there, by the fault of this name."""
        self.crash = name, point

    def start(self) -> None:
        self.starts += 1
        self.armed, point = self.crash or ("", "")
        self.crash = None
        environ = dict(self.environ) | ({"BEATLESS_FAULT": point} if point else {})
        log = self.directory / f"{self.name}.log"
        self.child = Child(self.name, self.arguments, environ=environ, log=log)
        self.child.start()
        self.awaits = threading.Thread(target=self._await, args=(self.child,), daemon=True)
        self.awaits.start()

    def reap(self) -> None:
        """Take leave of the process that has ended."""
        assert self.child is not None
        assert self.awaits is not None
        self.awaits.join(5)  # its end is told by the pipe that this thread reads
        self.child.reap(monotonic())

    def _await(self, child: Child) -> None:
        """Beside the keeper, which starts other processes meanwhile."""
        # If it was killed, or what it needs is away, the keeper tries again.
        with suppress(OSError, RuntimeError):
            while self.child is child:
                with suppress(NotReady):  # a slow machine takes longer than its time for it
                    child.wait_ready()
                    if self.child is child:
                        self.born = monotonic()
                    return
                if not child.alive:
                    return


@dataclass
class Fleet:
    """Servers, proxies before them, and the processes of the product."""

    directory: Path
    stack: ExitStack = field(default_factory=ExitStack)
    slots: dict[str, Slot] = field(default_factory=dict)
    ends: list[tuple[str, float]] = field(default_factory=list)
    """When a process has ended, and by which fault if it was a crash point."""
    stops: list[tuple[list[int], float]] = field(default_factory=list)
    """When processes, and their children, were asked to stop."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(small_disk(self.directory / "pg"))
            self.postgres = enter(
                EmbeddedPostgres(self.directory / "pg", settings={"max_connections": "120"})
            )
            self.bus = enter(EmbeddedValkey(self.directory / "bus"))
            self.broker = enter(EmbeddedValkey(self.directory / "broker"))
            self.to_postgres: Proxy = enter(proxy(self.postgres.port))
            self.to_bus: Proxy = enter(proxy(self.bus.port))
            self.far_to_bus: Proxy = enter(proxy(self.bus.port, delay_s=FAR_S))
            self.api_port = free_port()
            self.to_api: Proxy = enter(proxy(self.api_port))
            self.ledger = self.directory / "ledger"
            self.settings = Settings(
                database_url=self.postgres.url,
                redis_url=self.bus.url,
                broker_url=self.broker.url,
                lease_seconds=LEASE_S,
                redispatch_seconds=REDISPATCH_S,
                grace_seconds=GRACE_S,
            )
            far = self._through(self.bus, self.far_to_bus)
            self.app = App(replace(self.settings, redis_url=far), PLANS)
            stack.callback(self.app.close)
            migrate(self.app.engine, self.settings.schema)
            with self.connect() as session:
                session.execute(LOG)
            # A proxy's port is not the API's: without a token it serves its own address only.
            tokens = Tokens(self.app.engine, self.settings.schema)
            _, self.token = tokens.create([Scope.RUNS_READ])
            self._ending = threading.Event()
            self._hurry = threading.Event()
            self._keeper = threading.Thread(target=self._keep, name="keeper")
            self._make_slots()
            self._keeper.start()
            stack.callback(self._end)
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def connect(self) -> psycopg.Connection:
        """A session of the program's own, straight to the server."""
        url = libpq_url(self.postgres.url)
        options = f"-c search_path={self.settings.schema}"
        return psycopg.connect(url, autocommit=True, options=options, application_name="chaos")

    def connect_patiently(self) -> psycopg.Connection:
        """The same, of a server that may still recover, or part from sessions that were closed."""
        until = monotonic() + PATIENCE_S
        while True:
            try:
                return self.connect()
            except psycopg.OperationalError:
                if monotonic() > until:
                    raise
            self._ending.wait(0.1)

    def redis(self, server: EmbeddedValkey) -> redis.Redis:
        return redis.Redis.from_url(server.url, socket_timeout=10)

    def _make_slots(self) -> None:
        through = {
            "BEATLESS_DATABASE_URL": self._through(self.postgres, self.to_postgres),
            "BEATLESS_REDIS_URL": self._through(self.bus, self.to_bus),
        }
        far = through | {"BEATLESS_REDIS_URL": self._through(self.bus, self.far_to_bus)}
        environ = os.environ | self.settings.to_env()
        environ |= {
            "BEATLESS_APP": "tests.faults.plans:app",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            LEDGER: str(self.ledger),
            # As where packages are installed: the keeper starts a process every few seconds.
            "PYTHONDONTWRITEBYTECODE": "",
        }
        prefork = ["worker", "--queues", ",".join(QUEUES), "--concurrency", "2"]
        threads = ["worker", "--queues", ",".join(QUEUES), "--concurrency", "4"]
        threads += ["--", "--pool", "threads"]
        asynchronous = ["worker", "--pool", "async", "--queues", ",".join(QUEUES)]
        asynchronous += ["--concurrency", "16"]
        wanted = {
            "prefork": (prefork, {}),
            "threads": (threads, {}),
            "far": (threads, through),
            "async": (asynchronous, {}),
            "relay-1": (["relay"], {}),
            "relay-2": (["relay"], through),
            "api": (["serve", "--port", str(self.api_port)], far),
        }
        for name, (arguments, more) in wanted.items():
            self.slots[name] = Slot(name, arguments, environ | more, self.directory)

    def _through(self, server: EmbeddedPostgres | EmbeddedValkey, way: Proxy) -> str:
        return server.url.replace(f":{server.port}", f":{way.port}")

    @property
    def ways(self) -> tuple[Proxy, ...]:
        """All proxies."""
        return self.to_postgres, self.to_bus, self.far_to_bus, self.to_api

    @property
    def api_url(self) -> str:
        """Of the API behind its proxy."""
        return f"http://127.0.0.1:{self.to_api.port}"

    def _keep(self) -> None:
        """Start what has ended. Processes end with this thread, which lives as long as they."""
        while not self._ending.is_set():
            for slot in self.slots.values():
                if slot.kept and (slot.child is None or not slot.child.alive):
                    slot.born = 0.0
                    if slot.child is not None:
                        self.ends.append((slot.armed or f"{slot.name} ended", time()))
                    slot.armed = ""
                    if slot.child is not None:
                        slot.reap()
                    if not self._ending.is_set():
                        slot.start()
            self._hurry.wait(0.05)
            self._hurry.clear()
        for slot in self.slots.values():
            if slot.child is not None:
                slot.child.kill()
                slot.child.reap(monotonic() + 10)

    def _end(self) -> None:
        self._ending.set()
        self._hurry.set()
        self._keeper.join()

    def ask_to_stop(self, slot: Slot) -> None:
        """By SIGTERM: within its grace it has given its runs back, and ended."""
        pids = [slot.pid, *slot.children]
        os.kill(slot.pid, signal.SIGTERM)
        self.stops.append((pids, time()))

    def wait_ready(self, seconds: float = 600) -> None:
        """Return when all processes are there."""
        until = monotonic() + seconds
        while not all(slot.ready for slot in self.slots.values() if slot.kept):
            if monotonic() > until:
                missing = [slot.name for slot in self.slots.values() if not slot.ready]
                raise TimeoutError(f"not ready: {missing}")
            self._ending.wait(0.05)
