"""Faults from outside: workers in odd surroundings, hostile callers, a restore, a full disk.

Those that need a program of the distribution are faults where it is installed; `ABSENT` names the
others. A guest is one more worker, which ends by SIGKILL while it has runs.
"""

import math
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import psycopg

from beatless.auth import Scope, Tokens
from beatless.errors import BadRequest, UnknownPlan, Unreachable
from beatless.http import Client
from beatless.local.child import Child
from beatless.local.errors import NotReady
from beatless.local.ports import free_port
from beatless.local.privileges import server_user
from beatless.orchestrator.errors import BadPayload, RunNotFound
from tests.faults.faults import FAULTS, Fault, fault, hold
from tests.faults.fleet import Fleet

ABSENT: dict[str, str] = {}
"""Faults that cannot happen here, and what has to be installed."""

GUEST_S = 10.0
"""A guest has taken a run within this time, or it has hit nothing."""

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def needs(package: str, *, there: bool) -> Callable[[Fault], Fault]:
    """Make it a fault if what it needs is there."""

    def add(act: Fault) -> Fault:
        if there:
            return fault(act)
        ABSENT[act.__name__] = package
        return act

    return add


# Workers


def took_runs(fleet: Fleet, pid: int) -> bool:
    with fleet.connect() as session:
        row = session.execute(
            "SELECT EXISTS (SELECT FROM runs WHERE worker LIKE %s)", [f"%:{pid}:%"]
        ).fetchone()
    return row == (True,)


def visited(fleet: Fleet, name: str, environ: Mapping[str, str]) -> bool:
    """Whether a worker with these variables took runs, until its end by SIGKILL."""
    slot = fleet.slots["threads"]
    log = fleet.directory / f"{name}.log"
    guest = Child(name, slot.arguments, environ={**slot.environ, **environ}, log=log)
    guest.start()
    try:
        with suppress(NotReady):  # what it needs is away just now
            guest.wait_ready()
            until = monotonic() + GUEST_S
            while monotonic() < until and guest.alive:
                if took_runs(fleet, guest.pid):
                    return True
                hold(0.2)
        return False
    finally:
        guest.kill()
        guest.reap(monotonic() + 10)


@needs("faketime", there=FAKETIME.exists())
def worker_with_another_clock(fleet: Fleet, chance: random.Random) -> bool:
    """Its clock is hours off; times that count are Postgres'."""
    hours = chance.choice(["-5h", "-1h", "+1h", "+30d"])
    environ = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": hours, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return visited(fleet, "another-clock", environ)


@contextmanager
def pgbouncer(fleet: Fleet) -> Iterator[int]:
    """A pooler in transaction mode before Postgres; its port."""
    port = free_port()
    folder = fleet.directory / "pgbouncer"
    folder.mkdir(exist_ok=True)
    (folder / "pgbouncer.ini").write_text(f"""
[databases]
* = host=127.0.0.1 port={fleet.postgres.port} user=postgres password={fleet.postgres.password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 10
ignore_startup_parameters = extra_float_digits,options
""")
    if (owner := server_user().owner) is not None:
        for path in (folder, folder / "pgbouncer.ini"):
            os.chown(path, *owner)
    as_whom = ["-u", "nobody"] if os.getuid() == 0 else []
    assert PGBOUNCER
    with (folder / "log").open("ab") as log:
        pooler = subprocess.Popen(
            [PGBOUNCER, *as_whom, str(folder / "pgbouncer.ini")], stdout=log, stderr=log
        )
    try:
        yield port
    finally:
        pooler.kill()
        pooler.wait()


@needs("pgbouncer", there=PGBOUNCER is not None)
def worker_behind_pgbouncer(fleet: Fleet, _: random.Random) -> bool:
    """No session is its own: each transaction may be in another one."""
    with pgbouncer(fleet) as port:
        url = fleet.postgres.url.replace(f":{fleet.postgres.port}/", f":{port}/")
        return visited(fleet, "pooled", {"BEATLESS_DATABASE_URL": url})


# Callers


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


HOSTILE_CALLS: tuple[dict[str, Any], ...] = (
    {"input": {"a": math.nan}},
    {"input": [math.inf]},
    {"input": "\ud800"},
    {"input": {"a\0": 1}},
    {"input": nested(10_000)},
    {"input": "x" * 10_000_000},
    {"run_id": "'; DROP TABLE runs; --"},
    {"run_id": "x\r\nid: 9\r\nevent: RunFinished\r\n\r\n"},
    {"queue": "x\0"},
    {"key": "\ud800"},
    {"tags": {"a": "\0"}},
    {"plan": "../../etc/passwd"},
    {"priority": 10**30},
    {"delay": math.nan},
)

HOSTILE_BODIES = (
    b"[" * 100_000,
    b'{"plan": "chain", "input": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    b'{"plan": "chain", "input": NaN}',
    b'{"plan": "chain", "input": "\\ud800"}',
    b'{"plan": "chain", "run_id": "a\\u0000"}',
    b'{"plan": "chain", "input": "' + b"x" * 10_000_000 + b'"}',
    b"\xff\xfe",
)


@fault
def hostile_caller(fleet: Fleet, chance: random.Random) -> bool:
    """Each call is refused with an error that is meant for it.

    Raises AssertionError if one is accepted.
    """
    _, token = Tokens(fleet.app.engine, fleet.settings.schema).create([Scope.RUNS_WRITE])
    refused = 0
    with Client(fleet.api_url, token=token, timeout=20) as far:
        for client in (fleet.app.client, far):
            for call in chance.sample(HOSTILE_CALLS, 4):
                try:
                    run = client.start_run(**({"plan": "chain"} | call))
                except (BadPayload, BadRequest, UnknownPlan):
                    refused += 1
                except Unreachable:
                    continue
                else:
                    raise AssertionError(f"{run.run_id} was started with {str(call)[:100]}")
            with suppress(RunNotFound, BadRequest, Unreachable):
                client.get_run(chance.choice(["\0", "../..", "'; --", "x" * 100_000]))
    return refused + answered(fleet, token, chance.sample(HOSTILE_BODIES, 3)) > 0


def answered(fleet: Fleet, token: str, bodies: list[bytes]) -> int:
    """How many of these bodies the API has refused. Raises AssertionError for another answer."""
    refused = 0
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    for body in bodies:
        connection = HTTPConnection(urlsplit(fleet.api_url).netloc, timeout=20)
        try:
            connection.request("POST", "/v1/runs", body, headers)
            status = connection.getresponse().status
        except (OSError, HTTPException):  # it is away, or has hung up on ten megabytes
            continue
        finally:
            connection.close()
        assert 400 <= status < 500 or status == 503, (status, body[:80])
        refused += status < 500
    return refused


# The database


@fault
def another_history_declared(fleet: Fleet, chance: random.Random) -> bool:
    """As after a restore: the epoch is another one, and all sessions have ended."""
    with fleet.connect() as session:
        session.execute("UPDATE history SET token = gen_random_uuid()::text")
    return FAULTS["every_session_ended"](fleet, chance)


# The disk


def full(fleet: Fleet) -> bool:
    """Whether Postgres refuses a write for the want of space, or has ended by it."""
    try:
        with fleet.connect() as session:
            session.execute(
                "CREATE TEMP TABLE t AS SELECT n, random() FROM generate_series(1, 50000) n"
            )
    except psycopg.OperationalError:  # of which DiskFull is one
        return True
    return False


@needs("root, who may mount", there=os.getuid() == 0)
def disk_without_space(fleet: Fleet, chance: random.Random) -> bool:
    """Nothing is left of the file system of Postgres, for a moment."""
    folder = fleet.postgres.directory
    if not folder.is_mount():
        return False
    ballast = folder / "ballast"
    hit, until = False, monotonic() + chance.uniform(0.5, 2)
    try:
        with ballast.open("wb", buffering=0) as file:
            while monotonic() < until:
                with suppress(OSError):
                    while file.write(bytes(2**20)):  # what Postgres frees meanwhile, too
                        pass
                hit = full(fleet) or hit
                hold(0.05)
    finally:
        ballast.unlink()
    try:
        fleet.connect().close()
    except psycopg.OperationalError:  # it may have given up on its recovery
        threading.Event().wait(1)
        with suppress(psycopg.OperationalError):
            fleet.connect().close()
            return hit
        fleet.postgres.crash()
        fleet.postgres.start()
    return hit
