"""What a claim of a run that has waited reads with it, in the same round trip and commit.

Such a run goes on with its signals and its journal. Both are asked for behind the claim, and there
is an answer only if that has taken the lease.
"""

from collections.abc import Callable, Sequence
from typing import Any

import psycopg

from beatless.orchestrator.inbox import Inbox
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.plan import Plan
from beatless.orchestrator.progress import FOLDED, SNOOZED
from beatless.orchestrator.waits import Wait


class ReadAhead:
    """The statements of one schema by which a claim asks for what its execution reads first."""

    def __init__(self, journal: Journal, inbox: Inbox) -> None:
        self._journal = journal
        self._inbox = inbox

    def send(
        self, connection: psycopg.Connection[Any], run_id: str, token: int
    ) -> Callable[[], Sequence[Any]]:
        """Take in the signals of a run, and read the first page of its journal, under this token.

        In the pipeline and the transaction of the claim; asks for the rows once these have ended.
        """
        self._inbox.send_take_in(connection, run_id, token)
        parameters = {
            "run_id": run_id,
            "token": token,
            "names": list(FOLDED),
            "rest": SNOOZED,
            "after": 0,
            "restarted": None,
        }
        return connection.execute(self._journal.sql["checkpoint_page"], parameters).fetchall


def has_waits(plan: Plan) -> bool:
    """Whether its runs may wait, as far as the plan shows: those of a function always may."""
    return plan.first is None or any(isinstance(each, Wait) for each in plan.elements)
