"""Checks of the broker that carries task messages."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from beatless.app import REDIS_TIMEOUTS
from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, ok, problem, unreachable, warn
from beatless.doctor.probe import Need, Probe
from beatless.redis_connections import is_replica

MAX_PEEKED_MESSAGES = 50
"""Of each queue."""


@check("broker")
def broker(probe: Probe) -> Verdict:
    """Whether it can be reached, and written to."""
    if probe.broker_error is not None:
        return unreachable("the broker", probe.broker_error, setting="BEATLESS_BROKER_URL")
    if probe.settings.redis_broker is not None:
        with probe.settings.redis_broker.client(**REDIS_TIMEOUTS) as client:
            if is_replica(client):
                return problem(
                    "the broker URL reaches a replica: nothing can be sent to a worker",
                    "set BEATLESS_BROKER_URL, or BEATLESS_REDIS_URL without it, to the "
                    "master, or to its Sentinels",
                )
    name, took_s = probe.broker_connected
    return ok(f"{name}, connected in {took_s * 1000:.1f} ms")


@check("shared broker", needs={Need.SCHEMA})
def shared_broker(probe: Probe) -> Iterator[Verdict]:
    """Whether another database has the same prefix there: each takes the other's messages."""
    redis_broker = probe.settings.redis_broker
    if redis_broker is None or probe.broker_error is not None:
        return
    prefix = probe.settings.prefix
    queues = {queue.name for queue in probe.app.client.queues()} | {"default"}
    waiting: set[str] = set()
    with redis_broker.client(**REDIS_TIMEOUTS) as found:
        client: Any = found  # redis-py's answers are typed for both of its worlds
        for name in queues:
            for message in client.lrange(f"{prefix}:{prefix}.{name}", -MAX_PEEKED_MESSAGES, -1):
                with suppress(ValueError, KeyError, TypeError):
                    waiting.add(str(json.loads(message)["headers"]["id"]).rpartition(".")[0])
    sql = probe.sql(__file__)
    known = {run_id for (run_id,) in probe.rows(sql["known_runs"], {"ids": list(waiting)})}
    strange = sorted(waiting - known)
    if strange:
        yield warn(
            f"{len(strange)} of {len(waiting)} waiting messages are of runs that this "
            f"database does not have, as {strange[0]}: another database seems to use this "
            f"broker with the prefix {prefix}, and each takes the other's messages",
            "give each its own BEATLESS_PREFIX, or its own database number of the Redis",
        )
    else:
        yield ok(f"{len(waiting)} messages were looked at, all of this database's runs")
