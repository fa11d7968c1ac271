"""The faults, by name. Each hits something that lives, or says that there was nothing to hit."""

import contextlib
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic

import psycopg
import redis
from sqlalchemy.exc import DBAPIError

from beatless.local.valkey import EmbeddedValkey
from beatless.outbox.queries import channel_of
from tests.faults.fleet import LEASE_S, Fleet, Slot

Fault = Callable[[Fleet, random.Random], bool]
"""Injects it, and returns whether it hit."""

FAULTS: dict[str, Fault] = {}
"""Every fault of the general load."""

GROUP_WITHIN_S = 4.0
"""Seconds within which a child is expected to have several runs at once."""

WORKERS = ("prefork", "threads", "far", "async")
RELAYS = ("relay-1", "relay-2")


def fault(act: Fault) -> Fault:
    """Add a fault under the name of its function."""
    FAULTS[act.__name__] = act
    return act


def hold(seconds: float) -> None:
    """The fault lasts."""
    threading.Event().wait(seconds)


def chosen(fleet: Fleet, chance: random.Random, *names: str) -> Slot | None:
    """One of the processes that are there."""
    ready = [fleet.slots[name] for name in names if fleet.slots[name].ready]
    return chance.choice(ready) if ready else None


def busiest(fleet: Fleet, pids: list[int]) -> int | None:
    """The process among these that holds the most leases, if one holds any."""
    with fleet.connect() as session:
        rows = session.execute(
            "SELECT split_part(worker, ':', 2)::int FROM runs WHERE state = 'running'"
        ).fetchall()
    found = Counter(pid for (pid,) in rows if pid in pids)
    return found.most_common(1)[0][0] if found else None


def leased(fleet: Fleet) -> int:
    """How many runs are under a lease."""
    with fleet.connect() as session:
        row = session.execute("SELECT count(*) FROM runs WHERE state = 'running'").fetchone()
    return row[0] if row else 0


# Workers


def signalled(names: tuple[str, ...], number: signal.Signals) -> Fault:
    """A signal to one of these processes; what a worker must hold then is a lease."""

    def act(fleet: Fleet, chance: random.Random) -> bool:
        slot = chosen(fleet, chance, *names)
        hit = slot is not None and (names == RELAYS or names == ("api",) or leased(fleet) > 0)
        if slot is not None and number == signal.SIGTERM:
            fleet.ask_to_stop(slot)
        elif slot is not None:
            os.kill(slot.pid, number)
        return hit

    return act


def frozen(names: tuple[str, ...], least: float, most: float, *, child: bool = False) -> Fault:
    """SIGSTOP, and SIGCONT after a time; of one of its children instead, if wanted.

    Of workers, the one with the most leases is hit, as soon as there is one.
    """

    def act(fleet: Fleet, chance: random.Random) -> bool:
        ready = [fleet.slots[name] for name in names if fleet.slots[name].ready]
        pids = [pid for slot in ready for pid in (slot.children if child else [slot.pid])]
        if not pids:
            return False
        pid, hit = chance.choice(pids), True
        if names != RELAYS:
            holder = busiest(fleet, pids)
            pid, hit = holder or pid, holder is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            hold(chance.uniform(least, most))
            os.kill(pid, signal.SIGCONT)
        return hit

    return act


GROUPS = """
SELECT split_part(worker, ':', 2)::int FROM runs WHERE state = 'running'
 GROUP BY worker HAVING count(*) > 1
"""
HELD = """
SELECT run_id, lease_token FROM runs
 WHERE state = 'running' AND split_part(worker, ':', 2)::int = %s
"""
TAKEN_OVER = """
SELECT FROM unnest(%s::text[], %s::bigint[]) AS held(run_id, token) JOIN runs r USING (run_id)
 WHERE r.state = 'running' AND r.lease_token <> held.token
"""


@fault
def group_frozen_until_a_run_of_it_is_taken_over(fleet: Fleet, _: random.Random) -> bool:
    """It goes on while another is within this run: what it writes then is of a lost lease.

    A child that has one body at a time and several leases commits their boundaries together.
    """
    pause, child, hit = threading.Event(), None, False
    deadline = monotonic() + GROUP_WITHIN_S
    prefork = fleet.slots["prefork"]
    with fleet.connect() as session:
        while child is None and monotonic() < deadline:
            pause.wait(0.002)
            several = [pid for (pid,) in session.execute(GROUPS)]
            children = prefork.children if several and prefork.ready else []
            child = next((pid for pid in several if pid in children), None)
        if child is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGSTOP)
            try:
                held = session.execute(HELD, (child,)).fetchall()
                names, tokens = [run_id for run_id, _ in held], [token for _, token in held]
                deadline = monotonic() + LEASE_S + 3
                while not hit and held and monotonic() < deadline:
                    pause.wait(0.002)
                    hit = session.execute(TAKEN_OVER, (names, tokens)).fetchone() is not None
            finally:
                os.kill(child, signal.SIGCONT)
    return hit


FAULTS["worker_killed"] = signalled(WORKERS, signal.SIGKILL)
FAULTS["worker_stopped_warmly"] = signalled(WORKERS, signal.SIGTERM)
FAULTS["worker_frozen_past_its_lease"] = frozen(
    ("threads", "far", "async"), LEASE_S + 0.5, LEASE_S + 2
)
FAULTS["worker_frozen_for_a_moment"] = frozen(WORKERS, 0.1, 1.0)
FAULTS["child_frozen_past_its_lease"] = frozen(("prefork",), LEASE_S + 0.5, LEASE_S + 2, child=True)
FAULTS["relay_killed"] = signalled(RELAYS, signal.SIGKILL)
FAULTS["relay_stopped"] = signalled(RELAYS, signal.SIGTERM)
FAULTS["relay_frozen"] = frozen(RELAYS, 0.5, 4.0)
FAULTS["api_killed"] = signalled(("api",), signal.SIGKILL)
FAULTS["api_stopped"] = signalled(("api",), signal.SIGTERM)


@fault
def child_killed(fleet: Fleet, chance: random.Random) -> bool:
    slot = chosen(fleet, chance, "prefork")
    children = slot.children if slot else []
    holder = busiest(fleet, children) if children else None
    if children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder or chance.choice(children), signal.SIGKILL)
    return holder is not None


@fault
def worker_killed_with_its_keeper(fleet: Fleet, chance: random.Random) -> bool:
    """As the end of a container."""
    slot = chosen(fleet, chance, *WORKERS)
    hit = slot is not None and leased(fleet) > 0
    for pid in [] if slot is None else [*slot.children, slot.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return hit


@fault
def every_worker_killed(fleet: Fleet, chance: random.Random) -> bool:
    hit = leased(fleet) > 0
    for name in WORKERS:
        if fleet.slots[name].ready:
            os.kill(fleet.slots[name].pid, signal.SIGKILL)
    return hit


def crash_point(name: str, point: str, names: tuple[str, ...], passes: int) -> Fault:
    """The next process ends itself at the point; this one is stopped for it.

    It hits when that process has ended: the keeper of the fleet counts it then.
    """

    def act(fleet: Fleet, chance: random.Random) -> bool:
        slot = chosen(fleet, chance, *names)
        if slot is not None and not slot.armed:
            slot.arm(name, f"{point}@{chance.randint(1, passes)}:kill")
            fleet.ask_to_stop(slot)
        return False

    return act


for point in (
    "claim.committed",
    "step.before",
    "step.effect_done",
    "step.committed",
    "task.before_ack",
):
    name = f"worker_dies_at_{point}"
    FAULTS[name] = crash_point(name, point, ("threads", "far", "async"), 12)
for point in ("relay.after_claim", "relay.after_publish", "schedule.before", "schedule.fired"):
    name = f"relay_dies_at_{point}"
    FAULTS[name] = crash_point(name, point, RELAYS, 5)


# The bus and the broker


def emptied(server: str) -> Fault:
    def act(fleet: Fleet, _: random.Random) -> bool:
        with fleet.redis(getattr(fleet, server)) as client:
            full = bool(client.dbsize())
            client.flushall()
        return full or server == "bus"

    return act


def restarted(server: str) -> Fault:
    def act(fleet: Fleet, chance: random.Random) -> bool:
        valkey: EmbeddedValkey = getattr(fleet, server)
        valkey.crash()
        hold(chance.uniform(0, 1))
        valkey.start()
        return True

    return act


def stalled(server: str) -> Fault:
    def act(fleet: Fleet, chance: random.Random) -> bool:
        valkey: EmbeddedValkey = getattr(fleet, server)
        os.kill(valkey.pid, signal.SIGSTOP)
        hold(chance.uniform(0.3, 4))
        os.kill(valkey.pid, signal.SIGCONT)
        return True

    return act


for server in ("bus", "broker"):
    FAULTS[f"{server}_emptied"] = emptied(server)
    FAULTS[f"{server}_restarted_empty"] = restarted(server)
    FAULTS[f"{server}_stalled"] = stalled(server)


@fault
def bus_refuses_writes(fleet: Fleet, chance: random.Random) -> bool:
    with fleet.redis(fleet.bus) as client:
        client.execute_command("CLIENT", "PAUSE", chance.randint(200, 2000), "WRITE")
    return True


@fault
def bus_forbids_publishing(fleet: Fleet, chance: random.Random) -> bool:
    """The rights of relays are taken away, and given back."""
    with fleet.redis(fleet.bus) as client:
        client.execute_command("ACL", "SETUSER", "default", "-publish")
        hold(chance.uniform(0.2, 1))
        client.execute_command("ACL", "SETUSER", "default", "+publish")
    return True


@fault
def messages_to_viewers_lost(fleet: Fleet, chance: random.Random) -> bool:
    """Some of what Redis publishes, on connections that stay, as between nodes of a cluster.

    Until all is healed.
    """
    some, lost = random.Random(chance.random()), threading.Event()

    def loses() -> bool:
        if some.random() < 0.8:
            return False
        lost.set()
        return True

    fleet.far_to_bus.loses = loses
    return lost.wait(chance.uniform(0.2, 1))


@fault
def subscribers_disconnected(fleet: Fleet, _: random.Random) -> bool:
    with fleet.redis(fleet.bus) as client:
        return bool(client.client_kill_filter(_type="pubsub"))


@fault
def bus_clients_disconnected(fleet: Fleet, _: random.Random) -> bool:
    with fleet.redis(fleet.bus) as client:
        return bool(client.client_kill_filter(_type="normal", skipme=True))


@fault
def broker_clients_disconnected(fleet: Fleet, _: random.Random) -> bool:
    with fleet.redis(fleet.broker) as client:
        return bool(client.client_kill_filter(_type="normal", skipme=True))


@fault
def messages_delivered_twice(fleet: Fleet, _: random.Random) -> bool:
    doubled = 0
    with fleet.redis(fleet.broker) as client:
        for key in client.scan_iter(f"{fleet.settings.prefix}*"):
            if client.type(key) == b"list":
                for message in client.lrange(key, 0, 20):
                    client.rpush(key, message)
                    doubled += 1
    return doubled > 0


@fault
def message_that_is_not_ours(fleet: Fleet, chance: random.Random) -> bool:
    deep = b"[" * 10_000 + b"]" * 10_000
    garbage = chance.choice([b"", b"{", b'{"body": 1}', b"\xff\xfe", b"[]", deep])
    with fleet.redis(fleet.broker) as client:
        lists = [k for k in client.scan_iter("*") if client.type(k) == b"list"]
        for key in lists:
            client.lpush(key, garbage)
    return bool(lists)


@fault
def event_that_is_not_ours(fleet: Fleet, _: random.Random) -> bool:
    """On the channel of every run that somebody watches: events of another run."""
    hit = False
    with fleet.redis(fleet.bus) as client:
        for _ in range(5):
            channels = client.pubsub_channels(f"{fleet.settings.prefix}:events:*")
            hit = hit or bool(channels)
            for seq in range(2, 30):
                forged = {"run_id": "forged", "seq": seq, "ts": 1, "type": "DebugTrace", "v": 1}
                for channel in channels:
                    client.publish(channel, json.dumps(forged | {"source": "worker"}))
            hold(0.1)
    return hit


# Connections


def cut(*ways: str) -> Fault:
    def act(fleet: Fleet, _: random.Random) -> bool:
        return sum(getattr(fleet, way).cut() for way in ways) > 0

    return act


def held(*ways: str) -> Fault:
    """For a moment, or for longer than a lease."""

    def act(fleet: Fleet, chance: random.Random) -> bool:
        for way in ways:
            getattr(fleet, way).hold()
        hold(chance.choice([chance.uniform(0.5, 2), chance.uniform(LEASE_S + 0.5, LEASE_S + 2)]))
        for way in ways:
            getattr(fleet, way).release()
        return True

    return act


for name, ways in (
    ("postgres", ("to_postgres",)),
    ("bus", ("to_bus", "far_to_bus")),
    ("api", ("to_api",)),
):
    FAULTS[f"connections_to_{name}_cut"] = cut(*ways)
    FAULTS[f"connections_to_{name}_held"] = held(*ways)


@fault
def viewers_cut_at_any_byte(fleet: Fleet, chance: random.Random) -> bool:
    seed = chance.random()
    bytes_of = random.Random(seed)
    fleet.to_api.cut_after = lambda: bytes_of.randint(1, 3000)
    fleet.to_api.cut()
    hold(chance.uniform(1, 3))
    fleet.to_api.cut_after = None
    return True


@fault
def answer_to_a_commit_lost(fleet: Fleet, chance: random.Random) -> bool:
    """The server settles a step, and its worker never hears of it."""
    fleet.to_postgres.lost.clear()
    fleet.to_postgres.lose_answer_to(chance.choice([b"last_seq +", b"COMMIT"]))
    return fleet.to_postgres.lost.wait(5)


# Postgres


def ended_sessions(where: str) -> Fault:
    """End all sessions, but for those of this program, that a condition finds."""

    def act(fleet: Fleet, _: random.Random) -> bool:
        with fleet.connect() as session:
            ended = session.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                f" WHERE datname = current_database() AND application_name <> 'chaos' AND {where}"
            ).fetchone()
        return bool(ended and ended[0])

    return act


FAULTS["every_session_ended"] = ended_sessions("true")
FAULTS["relay_sessions_ended"] = ended_sessions("application_name LIKE 'beatless relay%'")


@fault
def one_session_ended(fleet: Fleet, chance: random.Random) -> bool:
    """Of those that are in a transaction just now, if there is one."""
    with fleet.connect() as session:
        pids = session.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid() AND application_name <> 'chaos'"
            " ORDER BY xact_start IS NULL, pid LIMIT 10"
        ).fetchall()
        if pids:
            session.execute("SELECT pg_terminate_backend(%s)", chance.choice(pids))
    return bool(pids)


@fault
def postgres_crashed(fleet: Fleet, chance: random.Random) -> bool:
    fleet.postgres.crash()
    hold(chance.uniform(0, 1.5))
    fleet.postgres.start()
    return True


@fault
def postgres_restarted(fleet: Fleet, _: random.Random) -> bool:
    fleet.postgres.stop()
    fleet.postgres.start()
    return True


@fault
def postgres_read_only(fleet: Fleet, chance: random.Random) -> bool:
    with fleet.connect() as session:
        session.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        session.execute("SELECT pg_reload_conf()")
        hold(chance.uniform(0.5, 3))
        session.execute("SET default_transaction_read_only = off")
        session.execute("ALTER SYSTEM RESET default_transaction_read_only")
        session.execute("SELECT pg_reload_conf()")
    return True


@fault
def disk_full(fleet: Fleet, chance: random.Random) -> bool:
    """As the writers see it: SQLSTATE 53100 from every insert of an event."""
    with fleet.connect() as session:
        session.execute("SET lock_timeout = '3s'")
        try:
            session.execute(
                "CREATE OR REPLACE FUNCTION chaos_full() RETURNS trigger LANGUAGE plpgsql AS $$"
                " BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$"
            )
            session.execute(
                "CREATE OR REPLACE TRIGGER chaos_full BEFORE INSERT ON run_events FOR EACH ROW"
                " EXECUTE FUNCTION chaos_full()"
            )
        except psycopg.errors.LockNotAvailable:
            return False
        hold(chance.uniform(0.5, 2))
        session.execute("SET lock_timeout = 0")
        session.execute("DROP TRIGGER chaos_full ON run_events")
    return True


@fault
def too_many_connections(fleet: Fleet, chance: random.Random) -> bool:
    sessions: list[psycopg.Connection] = []
    try:
        while len(sessions) < 200:
            sessions.append(fleet.connect())
    except psycopg.OperationalError:
        hold(chance.uniform(0.5, 2))
    finally:
        for session in sessions:
            session.close()
    return bool(sessions)


@fault
def rows_held_by_somebody(fleet: Fleet, chance: random.Random) -> bool:
    with fleet.connect() as session, session.transaction():
        held = session.execute(
            "SELECT run_id FROM runs WHERE state IN ('running', 'queued')"
            " ORDER BY random() LIMIT %s FOR UPDATE SKIP LOCKED",
            [chance.choice([3, 20])],
        ).fetchall()
        hold(chance.uniform(0.3, 3) if held else 0)
    return bool(held)


@fault
def outbox_rows_held_by_somebody(fleet: Fleet, chance: random.Random) -> bool:
    """Some rows, as soon as there are any: they live for milliseconds."""
    with fleet.connect() as session, session.transaction():
        for _ in range(500):
            held = session.execute(
                "SELECT id FROM run_outbox ORDER BY random() LIMIT 2 FOR UPDATE SKIP LOCKED"
            ).fetchall()
            if held:
                hold(chance.uniform(0.1, 1))
                return True
            hold(0.003)
    return False


@fault
def outbox_held_by_somebody(fleet: Fleet, chance: random.Random) -> bool:
    with fleet.connect() as session, session.transaction():
        session.execute("LOCK TABLE run_outbox IN SHARE MODE")
        hold(chance.uniform(0.2, 1.5))
    return True


@fault
def long_transaction(fleet: Fleet, chance: random.Random) -> bool:
    with fleet.connect() as session, session.transaction():
        session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        session.execute("SELECT count(*) FROM runs")
        hold(chance.uniform(1, 4))
    return True


@fault
def relays_called_by_anybody(fleet: Fleet, _: random.Random) -> bool:
    with fleet.connect() as session:
        for payload in ("{", "", "99", "x" * 500):
            session.execute(
                "SELECT pg_notify(%s, %s)", (channel_of(fleet.settings.schema), payload)
            )
    return True


@fault
def settings_made_hostile(fleet: Fleet, chance: random.Random) -> bool:
    """What an administrator may set for new sessions, for a moment, with all sessions ended."""
    name, value = chance.choice(
        [("datestyle", "German"), ("timezone", "Asia/Kathmandu"), ("lock_timeout", "1ms")]
    )
    with fleet.connect() as session:
        session.execute(f"ALTER DATABASE postgres SET {name} = '{value}'")
        FAULTS["every_session_ended"](fleet, chance)
        hold(chance.uniform(0.5, 2))
        session.execute(f"ALTER DATABASE postgres RESET {name}")
        FAULTS["every_session_ended"](fleet, chance)
    return True


BRIEF = (
    *("subscribers_disconnected", "bus_clients_disconnected", "broker_clients_disconnected"),
    *("messages_delivered_twice", "message_that_is_not_ours", "event_that_is_not_ours"),
    *("messages_to_viewers_lost", "bus_forbids_publishing", "answer_to_a_commit_lost"),
    *("rows_held_by_somebody", "outbox_rows_held_by_somebody", "one_session_ended"),
    *("relays_called_by_anybody", "viewers_cut_at_any_byte"),
)
"""Faults that take little away, or for a moment: they come beside all others."""


def lane_of(name: str) -> str:
    """Faults of one lane come one after the other: of processes, of servers, or brief ones."""
    if name in BRIEF:
        return "brief"
    hit = ("worker", "child", "every_worker", "relay_", "api", "connections")
    return "processes" if name.startswith(hit) else "servers"


def inject(name: str, fleet: Fleet, chance: random.Random) -> bool:
    """Inject one fault. What its own connections meet because of an earlier one is no hit.

    A mistake in the fault itself is raised.
    """
    try:
        return FAULTS[name](fleet, chance)
    except (psycopg.Error, DBAPIError, redis.RedisError, OSError) as error:
        away = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)
        cause = error.orig if isinstance(error, DBAPIError) else error
        if isinstance(cause, psycopg.Error) and not isinstance(cause, away):
            raise
        return False
