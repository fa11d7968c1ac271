"""Claims of many runs at once: those that are asked for together are one commit."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from beatless.orchestrator.claims import Behind, Claim
from beatless.orchestrator.group_commit import MAX_RUNS
from beatless.orchestrator.lease import Lease
from beatless.outbox.threads import submitted

logger = logging.getLogger("beatless.orchestrator.executor")


@dataclass(slots=True, kw_only=True, eq=False)
class Asked:
    """A lease that is asked for: of the run of a message, or of one behind a run that has ended."""

    claim: Claim | Lease
    answer: Future[Lease | None] = field(default_factory=Future)


class SharedClaims:
    """The leases that are asked for. Of one thread; the statements are made in another.

    While a commit is under way the next claims gather.
    """

    def __init__(
        self,
        claim: Callable[[Sequence[Claim], Sequence[Behind]], Sequence[Lease]],
        soon: Callable[[Callable[[], Any]], None],
    ) -> None:
        """`claim` is called in a thread of its own. `soon` has something done in this thread."""
        self._claim = claim
        self._soon = soon
        self._asked: list[Asked] = []
        self._under_way = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beatless-claims")

    def put(self, claim: Claim | Lease) -> Future[Lease | None]:
        """The lease of the run of a message; None if it is to be claimed by itself, or not at all.

        For a lease of a run that has ended: that of one which comes next in its queue, or None.
        """
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
            claimed = submitted(self._pool, self._claim, *_parted(batch))
        except RuntimeError as error:  # its thread cannot be started
            claimed = Future()
            claimed.set_exception(error)
        claimed.add_done_callback(lambda done: self._soon(partial(self._answer, batch, done)))

    def stop(self) -> None:
        """Claim no more."""
        self._pool.shutdown(wait=False)

    def _next(self) -> list[Asked]:
        """Those of the next commit: of the messages one of a run, which may have several."""
        batch: list[Asked] = []
        left: list[Asked] = []
        runs = set[str]()
        for each in self._asked:
            run_id = each.claim.run_id if isinstance(each.claim, Claim) else None
            if len(batch) == MAX_RUNS or run_id in runs:
                left.append(each)
                continue
            batch.append(each)
            if run_id is not None:
                runs.add(run_id)
        self._asked = left
        return batch

    def _answer(self, batch: Sequence[Asked], claimed: Future[Sequence[Lease]]) -> None:
        self._under_way = False
        found: Sequence[Lease] = ()
        if (error := claimed.exception()) is None:
            found = claimed.result()
        else:
            logger.warning(
                "a claim of several runs failed, each is claimed by itself",
                extra={"action": "claims_failed", "runs": len(batch), "reason": str(error)},
            )
        by_run = {lease.run.run_id: lease for lease in found}
        answers = {
            id(each): by_run.pop(each.claim.run_id, None)
            for each in batch
            if isinstance(each.claim, Claim)
        }
        further: dict[str, deque[Lease]] = {}
        for lease in by_run.values():
            further.setdefault(lease.run.queue, deque()).append(lease)
        for each in batch:
            if isinstance(each.claim, Lease) and further.get(each.claim.run.queue):
                answers[id(each)] = further[each.claim.run.queue].popleft()
        for each in batch:
            each.answer.set_result(answers.get(id(each)))


def _parted(batch: Sequence[Asked]) -> tuple[Sequence[Claim], Sequence[Behind]]:
    """The claims of messages, and for each queue how many further ones."""
    claims = [each.claim for each in batch if isinstance(each.claim, Claim)]
    ended = [each.claim.run for each in batch if isinstance(each.claim, Lease)]
    places = Counter(run.queue for run in ended)
    last = {run.queue: run.run_id for run in ended}
    return claims, [Behind(run_id=last[queue], places=places[queue]) for queue in places]
