"""What several steps of one run emit at the same time: each piece once, whatever is lost."""

import threading
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from beatless import Plan, RunContext, RunState, StepContext, plan, step
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.output_thread import OutputThread
from beatless.orchestrator.records import Appended
from beatless.orchestrator.step_output import Portion, StepOutput
from beatless.testing import Kit

WIDTH, TURNS, WAIT_S = 3, 4, 60


class ByHand(OutputThread):
    """Writes when it is told to, in no thread of its own."""

    def announce(self, output: StepOutput, full: bool) -> None:
        self._outputs[output] = None


class Loses(GroupCommit):
    """The answer to the first statement is lost, which has been committed or not."""

    def __init__(self, schema: str, committed: bool | None) -> None:
        super().__init__(schema)
        self.committed = committed

    def append(self, connection: Any, portions: Sequence[Portion]) -> dict[int, Appended]:
        committed, self.committed = self.committed, None
        if committed is False:
            raise psycopg.OperationalError("the answer is lost")
        written = super().append(connection, portions)
        if committed:
            raise psycopg.OperationalError("the answer is lost")
        return written


@pytest.fixture
def together() -> threading.Barrier:
    return threading.Barrier(WIDTH)


@pytest.fixture
def written() -> list[OutputThread]:
    """The test puts in what writes the output."""
    return []


@pytest.fixture
def beatless_plans(together: threading.Barrier, written: list[OutputThread]) -> list[Plan]:
    @step
    def tells(ctx: StepContext, number: int) -> None:
        for turn in range(TURNS):
            ctx.emit(f"{number} in turn {turn}")
            if together.wait(WAIT_S) == 0:
                written[0].once()
            together.wait(WAIT_S)

    @plan("tells")
    def tell(run: RunContext) -> None:
        run.parallel([lambda number=number: run.step(tells, number) for number in range(WIDTH)])

    return [tell]


@pytest.mark.parametrize("committed", [None, True, False])
def test_each_piece_of_steps_that_emit_at_once_is_stored_once(
    beatless: Kit, written: list[OutputThread], committed: bool | None
) -> None:
    outputs = ByHand(Loses(beatless.app.settings.schema, committed))
    written.append(outputs)
    beatless.executor().outputs = outputs
    run = beatless.start_run("tells")
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).state is RunState.COMPLETED
    told: dict[str, list[Any]] = {}
    for event in beatless.client.events(run.run_id):
        if event.type == "StepOutput":
            told.setdefault(str(event.step), []).extend(event.data["pieces"])
    assert told == {
        f"tells#{number + 1}:1": [f"{number} in turn {turn}" for turn in range(TURNS)]
        for number in range(WIDTH)
    }
    beatless.verify()
