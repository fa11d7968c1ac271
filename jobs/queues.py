"""Queue control for the whole fleet: when a call returns, it is so everywhere."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import sqlalchemy

from beatless.errors import BadRequest, QueueBusy
from beatless.orchestrator.errors import RunIsActive
from beatless.orchestrator.queues import PAGE_RUNS, QueueState, QueueStatements
from beatless.orchestrator.state import FINAL
from beatless.outbox.queries import Caller
from beatless.transactions import transact

if TYPE_CHECKING:
    from kombu import Connection

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Queues:
    """Pauses, resumes and empties queues: first in Postgres, which decides, then in the broker."""

    def __init__(
        self,
        *,
        engine: sqlalchemy.Engine,
        schema: str,
        prefix: str,
        broker: Callable[[], "Connection"],
    ) -> None:
        self._engine = engine
        self._statements = QueueStatements(schema)
        self._prefix = prefix
        self._broker = broker

    def states(self) -> list[QueueState]:
        """Every queue that has runs or is paused."""
        return self._do(self._statements.states)

    def is_known(self, name: str) -> bool:
        """Whether the queue is paused, is consumed, or has runs, be it such that ended."""
        return self._do(lambda caller: self._statements.is_known(caller, name))

    def pause(self, name: str) -> None:
        """After this no run of the queue starts anywhere; those that run go on."""
        self._do(lambda caller: self._statements.pause(caller, name))
        with self._engine.begin() as connection:
            self._statements.await_claims(connection)

    def resume(self, name: str) -> None:
        """Let its runs start again."""
        self._do(lambda caller: self._statements.resume(caller, name))

    def set_age(self, name: str, age_after_s: float | None) -> None:
        """Let runs that have waited for so many seconds come first; None: none does."""
        self._do(lambda caller: self._statements.set_age(caller, name, age_after_s))

    def drain(self, name: str) -> int:
        """Take away the runs that wait and leave those that run; how many were taken away."""
        removed = self._do(lambda caller: self._statements.remove_waiting(caller, name))
        self._empty_broker(name, delete=False)
        return len(removed)

    def obliterate(self, name: str, *, force: bool) -> int:
        """Take away the queue with all of its runs; how many they were.

        Raises QueueBusy while runs of it are running, unless `force`: their workers then find that
        their lease is gone, and write nothing more. A refusal has changed nothing. Runs that have
        ended go in pages, each a transaction of its own: an interrupted call is made again.
        """

        def remove(caller: Caller) -> list[str]:
            removed, running = self._statements.remove_unfinished(caller, name, force=force)
            if running and not force:
                raise QueueBusy(name, running)
            return removed

        removed = len(self._do(remove))
        while page := self._do(lambda caller: self._statements.remove_rest(caller, name)):
            removed += len(page)
        self._do(lambda caller: self._statements.forget(caller, name))
        self._empty_broker(name, delete=True)
        return removed

    def clean(self, state: str, *, seconds: float, limit: int, namespace: str) -> int:
        """Take away runs that ended in this state so many seconds ago, in pages; how many."""
        _check_final(state)
        removed = 0
        while removed < limit:
            some = min(PAGE_RUNS, limit - removed)
            page = self._do(
                partial(
                    self._statements.remove_finished,
                    state=state,
                    seconds=seconds,
                    limit=some,
                    namespace=namespace,
                )
            )
            if not page:
                break
            removed += len(page)
        return removed

    def count_finished(self, state: str, *, seconds: float, namespace: str) -> tuple[int, int]:
        """(runs, events) that `clean` would take away without a limit."""
        _check_final(state)
        return self._do(
            lambda caller: self._statements.count_finished(
                caller, state=state, seconds=seconds, namespace=namespace
            )
        )

    def remove_run(self, run_id: str, *, namespace: str) -> None:
        """Take away one run. Raises RunIsActive while a worker has it."""
        removed = self._do(
            lambda caller: self._statements.remove_run(caller, run_id, namespace=namespace)
        )
        if not removed:
            raise RunIsActive(run_id)

    def _do(self, act: Callable[[Caller], T]) -> T:
        # Runs taken away twice would be counted once, and `clean` would go beyond its limit.
        return transact(self._engine, act, twice=False)

    def _empty_broker(self, name: str, *, delete: bool) -> None:
        """Its messages would start nothing any more, but an operator would see them."""
        # Here, because a client that only reads needs no broker: celery and kombu take a third of
        # the time to start.
        from kombu.exceptions import KombuError, OperationalError

        from beatless.outbox.publishers import worker_queue

        try:
            with self._broker() as broker:
                queue = worker_queue(self._prefix, name)(broker.default_channel)
                queue.declare()
                queue.purge()
                if delete:
                    queue.delete()
                    queue.exchange.delete()
        except (KombuError, OperationalError, OSError) as error:
            logger.warning(
                "the broker's queue could not be emptied; its messages will be dropped",
                extra={"action": "purge_failed", "queue": name, "reason": str(error)},
            )


def _check_final(state: str) -> None:
    if state not in FINAL:
        raise BadRequest("state", f"is {state!r}; choose {', '.join(sorted(FINAL))}")
