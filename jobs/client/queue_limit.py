"""In how many queues the unfinished runs of a namespace may be: each takes a relay some time."""

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from beatless.errors import BadRequest
from beatless.namespaces import id_prefix
from beatless.outbox.clock import monotonic
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements

KNOWN_FOR_S = 60.0
"""Seconds until the queues of a namespace are read again."""

FULL_FOR_S = 5.0
"""Seconds until they are read again for a queue that was one too many."""


@dataclass(slots=True)
class _Known:
    read_at: float
    queues: set[str] = field(default_factory=set)


class QueueLimit:
    """Refuses the queue that would be one too many. Threads may share it.

    The queues that the plans name are never refused. Queues in use are read from the unfinished
    runs once in `KNOWN_FOR_S`, and only for a start that names a queue of its own.
    """

    def __init__(self, schema: str, *, most: int, plans: Collection[str]) -> None:
        """`plans` are the queues that the plans name."""
        self._most = most
        self._plans = frozenset(plans)
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._sql = statements(__file__, schema)

    def check(self, caller: Caller, namespace: str, queues: Collection[str]) -> None:
        """Raises BadRequest if one of these queues is beyond the limit of the namespace."""
        named = {*queues} - self._plans
        if not named:
            return
        with self._lock:
            now = monotonic()
            known = self._known.get(namespace)
            age = now - known.read_at if known else KNOWN_FOR_S
            added = named - known.queues if known else named
            full = known is not None and len(known.queues | added) > self._most
            if known is None or age >= (FULL_FOR_S if full else KNOWN_FOR_S):
                known = self._known[namespace] = _Known(now, self._read(caller, namespace))
                added = named - known.queues
            if added and len(known.queues | added) > self._most:
                raise BadRequest(
                    "queue",
                    f"would be one of more than {self._most} in which namespace {namespace} has "
                    "unfinished runs: use few queues and priorities, or raise BEATLESS_MAX_QUEUES",
                )
            known.queues |= added

    def _read(self, caller: Caller, namespace: str) -> set[str]:
        prefix = id_prefix(namespace)
        statement = self._sql["of_namespace"] if prefix else self._sql["of_default"]
        parameters = {"prefix": prefix, "end": prefix.replace("~", "\x7f")}
        return {queue for (queue,) in execute(caller, statement, parameters)} - self._plans
