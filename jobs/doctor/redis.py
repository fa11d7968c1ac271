"""Checks of the Redis that carries live events, and often the broker: version, memory, buffers."""

import re
import time

import redis

from beatless.doctor import versions
from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, ok, problem, skipped, warn
from beatless.doctor.probe import Need, Probe
from beatless.redis_connections import is_replica

MAX_MEMORY_USED = 0.8
MIN_PUBSUB_LIMIT_BYTES = 8_000_000

SIZE_LIMITS = ("proto-max-bulk-len", "client-query-buffer-limit")
"""Settings of Redis by which it closes the connection of a client that sends more."""

EVENT_MARGIN_BYTES = 65_536
"""The most that is sent with the content of an event: its names, its channel, the command."""


@check("redis", needs={Need.REDIS})
def version(probe: Probe) -> Verdict:
    """The server's version, and the time to it."""
    began = time.perf_counter()
    probe.redis.ping()
    took_ms = (time.perf_counter() - began) * 1000
    if is_replica(probe.redis):
        return warn(
            "the Redis URL reaches a replica: events that are published there reach "
            "nobody who listens at the master",
            "set BEATLESS_REDIS_URL to the master, or to its Sentinels",
        )
    facts = probe.redis.info("server")
    valkey = "valkey_version" in facts
    found = str(facts["valkey_version" if valkey else "redis_version"])
    text = f"{'Valkey' if valkey else 'Redis'} {found}, {took_ms:.1f} ms away"
    newer = versions.older_than(versions.VALKEY if valkey else versions.REDIS, found)
    if newer is None:
        return ok(text)
    return warn(
        f"{text}, older than {newer[0]}, which closes {newer[1]} and others",
        f"update to {newer[0]} or newer, {versions.BACKPORTS}",
    )


@check("eviction", needs={Need.REDIS})
def eviction(probe: Probe) -> Verdict:
    """Whether a Redis that is short of memory throws queues away."""
    memory = probe.redis.info("memory")
    policy = memory.get("maxmemory_policy") or config(probe, "maxmemory-policy")
    used, limit = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
    if policy is None:
        return skipped("this server does not tell its policy")
    if probe.is_broker_redis and str(policy).startswith("allkeys"):
        return problem(
            f"maxmemory-policy is {policy}: when memory is short, Redis throws queues "
            "away; every run in them waits for its redispatch",
            "CONFIG SET maxmemory-policy noeviction, or a Redis for the broker alone",
        )
    if limit and used > MAX_MEMORY_USED * limit:
        return warn(
            f"{used / limit:.0%} of maxmemory is used",
            "raise maxmemory, or find what else lives on this Redis",
        )
    return ok(f"policy {policy}")


@check("output buffers", needs={Need.REDIS})
def output_buffers(probe: Probe) -> Verdict:
    """The buffer limit of a slow subscriber."""
    limits = config(probe, "client-output-buffer-limit")
    found = re.search(r"pubsub (\d+) (\d+) (\d+)", limits or "")
    if found is None:
        return skipped("this server does not tell its client-output-buffer-limit")
    hard, soft, seconds = map(int, found.groups())
    advice = "CONFIG SET client-output-buffer-limit 'pubsub 32mb 8mb 60'"
    if hard == 0 and soft == 0:
        return warn(
            "a subscriber's buffer has no limit: one that is stuck fills Redis' memory", advice
        )
    if 0 < hard < MIN_PUBSUB_LIMIT_BYTES:
        return warn(
            f"a subscriber is cut off after {hard / 1e6:.1f} MB: bursts end streams, "
            "which then read Postgres",
            advice,
        )
    return ok(f"pubsub {hard / 1e6:.0f} MB, or {soft / 1e6:.0f} MB for {seconds} s")


@check("message size", needs={Need.REDIS})
def message_size(probe: Probe) -> Verdict:
    """Whether Redis takes the largest event."""
    limits = {name: config(probe, name) for name in SIZE_LIMITS}
    known = {name: int(limit) for name, limit in limits.items() if limit}
    if not known:
        return skipped("this server does not tell its limits")
    name, limit = min(known.items(), key=lambda each: each[1])
    largest = probe.app.settings.max_event_bytes
    if limit < largest + EVENT_MARGIN_BYTES:
        return problem(
            f"{name} is {limit:,} bytes, and an event may have {largest:,}: Redis closes the "
            "connection over it, and it becomes a dead letter",
            f"CONFIG SET {name} {2 * largest}, or lower BEATLESS_MAX_EVENT_BYTES",
        )
    return ok(f"up to {limit:,} bytes")


def config(probe: Probe, name: str) -> str | None:
    """One of Redis' own settings; None where the server or its rights keep it."""
    try:
        found: str | None = probe.redis.config_get(name).get(name)
    except redis.ResponseError:
        return None
    return found
