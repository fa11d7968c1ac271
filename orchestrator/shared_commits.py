"""Boundaries of many runs at once: those that are ready together are one statement."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from beatless.orchestrator.group_commit import MAX_RUNS, GroupCommit
from beatless.orchestrator.lease import Connection
from beatless.orchestrator.settlement import Proposal
from beatless.orchestrator.sure_writer import may_be_committed
from beatless.orchestrator.turns import IN_DOUBT, Answer
from beatless.outbox.clock import monotonic

logger = logging.getLogger("beatless.orchestrator.executor")

LEFT_OUT_INTERVAL_S = 0.05
"""Seconds until a boundary is tried again that the statement has left out."""

LEFT_OUT_S = 1.0
"""Seconds after which it is written alone: its lease is gone, or its row held for long."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ready:
    """A boundary that is to be committed."""

    proposal: Proposal
    answer: Future[Answer] = field(default_factory=Future)
    since: float = field(default_factory=monotonic)
    left_out: bool = False


class SharedCommits:
    """The boundaries that are ready. Of one thread, that of `connection`."""

    def __init__(self, statement: GroupCommit, connection: Callable[[], Connection]) -> None:
        self._statement = statement
        self._connection = connection
        self._ready: list[Ready] = []

    def put(self, proposal: Proposal) -> Future[Answer]:
        """The answer to a boundary, as `Turns` has it: None if it is to be written alone."""
        ready = Ready(proposal=proposal)
        self._ready.append(ready)
        return ready.answer

    def flush(self) -> float | None:
        """Commit those that are ready; the seconds until another try is worth while, if any is."""
        while any(not each.left_out for each in self._ready):
            self._commit(self._next())
        if not self._ready:
            return None
        for each in self._ready:
            each.left_out = False
        return LEFT_OUT_INTERVAL_S

    def _next(self) -> list[Ready]:
        """The boundaries of the next statement: one of a run, for its answers are by run.

        A run has two where this process has claimed it again, and an earlier body of it returns.
        """
        by_run: dict[str, Ready] = {}
        for each in sorted(self._ready, key=lambda each: each.left_out):
            by_run.setdefault(each.proposal.run_id, each)
            if len(by_run) == MAX_RUNS:
                break
        return list(by_run.values())

    def _commit(self, batch: list[Ready]) -> None:
        for each in batch:
            self._ready.remove(each)
        try:
            written = self._statement.settle(self._connection(), [each.proposal for each in batch])
        except Exception as error:  # of any kind: a run that got no answer would wait for ever
            lost = may_be_committed(error)
            logger.warning(
                "a commit of several runs failed, each is written alone",
                extra={
                    "action": "group_failed",
                    "runs": len(batch),
                    "in_doubt": lost,
                    "reason": str(error),
                },
            )
            for each in batch:
                each.answer.set_result(IN_DOUBT if lost else None)
            return
        for each in batch:
            run_id = each.proposal.run_id
            if run_id in written:
                each.answer.set_result(written[run_id])
            elif monotonic() - each.since >= LEFT_OUT_S:
                each.answer.set_result(None)
            else:
                each.left_out = True
                self._ready.append(each)
