"""Claims of many runs at once: those whose messages have come together are one statement."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from beatless.orchestrator.lease import Claim, Lease

logger = logging.getLogger("beatless.orchestrator.executor")

MAX_RUNS = 100
"""Claims of one statement."""


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """A run that is to be claimed."""

    claim: Claim
    answer: Future[Lease | None] = field(default_factory=Future)


class SharedClaims:
    """The runs that are to be claimed. Of one thread; the statement is made in another.

    While one is under way the next ones gather.
    """

    def __init__(
        self,
        claim: Callable[[Sequence[Claim]], Sequence[Lease]],
        soon: Callable[[Callable[[], Any]], None],
    ) -> None:
        """`claim` is called in a thread of its own. `soon` has something done in this thread."""
        self._claim = claim
        self._soon = soon
        self._asked: list[Asked] = []
        self._under_way = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beatless-claims")

    def put(self, claim: Claim) -> Future[Lease | None]:
        """The lease of a run; None if it is to be claimed by itself, or not at all."""
        asked = Asked(claim=claim)
        self._asked.append(asked)
        return asked.answer

    def flush(self) -> None:
        """Have those claimed that were asked for."""
        if self._under_way or not self._asked:
            return
        batch = self._next()
        self._under_way = True
        try:
            claimed = self._pool.submit(self._claim, [each.claim for each in batch])
        except RuntimeError as error:  # its thread cannot be started
            claimed = Future()
            claimed.set_exception(error)
        claimed.add_done_callback(lambda done: self._soon(partial(self._answer, batch, done)))

    def stop(self) -> None:
        """Claim no more."""
        self._pool.shutdown(wait=False)

    def _next(self) -> list[Asked]:
        """Those of the next statement: one of a run, which may have several messages."""
        by_run: dict[str, Asked] = {}
        for each in self._asked:
            by_run.setdefault(each.claim.run_id, each)
            if len(by_run) == MAX_RUNS:
                break
        batch = list(by_run.values())
        taken = set(map(id, batch))
        self._asked = [each for each in self._asked if id(each) not in taken]
        return batch

    def _answer(self, batch: Sequence[Asked], claimed: Future[Sequence[Lease]]) -> None:
        self._under_way = False
        leases: dict[str, Lease] = {}
        if (error := claimed.exception()) is None:
            leases = {lease.run.run_id: lease for lease in claimed.result()}
        else:
            logger.warning(
                "a claim of several runs failed, each is claimed by itself",
                extra={"action": "claims_failed", "runs": len(batch), "reason": str(error)},
            )
        for each in batch:
            each.answer.set_result(leases.get(each.claim.run_id))
