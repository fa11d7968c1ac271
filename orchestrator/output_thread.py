"""Writes the output of all steps of a process, so that none of them needs a timer."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from itertools import islice

import psycopg

from beatless.orchestrator.errors import LeaseLost, StepEnded
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.held_rows import RowHeld, giving_way
from beatless.orchestrator.step_output import INTERVAL_S, Portion, StepOutput
from beatless.orchestrator.sure_writer import AWAY, NEVER
from beatless.outbox.observer import Observer, ignore
from beatless.outbox.threads import LastingThread

MOST_STEPS = 50
"""Steps whose output is in one statement: of each at most 1 MiB."""

RETRY_INTERVAL_S = 0.25
"""Seconds until output is tried again that could not be written, while nobody else emits."""

Begun = dict[StepOutput, Portion]


class OutputThread:
    """A thread that stores what steps emit.

    1. sleep until a step emits
    2. wait 25 ms, or until an event is full
    3. write all that has been emitted meanwhile: of one step of each run in one statement, then of
       another one
    4. what that leaves out, for its row is held or its step writes just now, waits for the next one

    The connection is that of one of the steps, whose body is elsewhere. A step is told at its next
    call, or at its end, of what goes wrong.
    """

    def __init__(self, statement: GroupCommit, *, observer: Observer = ignore) -> None:
        self._statement = statement
        self._observer = observer
        self._outputs: dict[StepOutput, None] = {}
        self._left: dict[StepOutput, None] = {}
        """Those that are to be tried again."""
        self._full = False
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: LastingThread | None = None

    def announce(self, output: StepOutput, full: bool) -> None:
        """Write this output soon; at once if an event of it is full."""
        with self._changed:
            was_empty = not self._outputs
            self._outputs[output] = None
            self._full |= full
            if self._thread is None:
                thread = LastingThread("output", self._run, observer=self._observer)
                thread.start()
                self._thread = thread  # one that could not be started is started with the next
            elif was_empty or full:
                self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.end()

    def once(self) -> None:
        """Write what has been announced."""
        with self._changed:
            outputs = list(self._left | self._outputs)
            self._outputs, self._full = {}, False
        self._left = {}
        for some in _batches(outputs):
            self._write(some)

    def _write(self, outputs: Sequence[StepOutput]) -> None:
        begun: Begun = {}
        try:
            for output in outputs:
                self._begin(output, begun)
            if begun:
                self._write_together(begun)
        finally:
            for output in list(begun):  # else its step could write no more
                output.end_portion(None, in_doubt=True)

    def _begin(self, output: StepOutput, begun: Begun) -> None:
        try:
            portion = output.begin_portion()
        except (LeaseLost, StepEnded):
            return  # the step learns of it by itself
        if portion is not None:
            begun[output] = portion
        elif output.in_doubt:
            self._write_alone(output)
        elif output.waiting:
            self._left[output] = None

    def _write_together(self, begun: Begun) -> None:
        first = next(iter(begun.values()))
        try:
            written = self._statement.append(first.connection(), list(begun.values()))
        except psycopg.Error as error:
            away = isinstance(error, AWAY) and not isinstance(error, NEVER)
            if away:
                first.disconnect()
            for output in list(begun):
                del begun[output]
                output.end_portion(None, in_doubt=away)
                self._write_alone(output)
            return
        for output, portion in list(begun.items()):
            del begun[output]
            output.end_portion(written.get(portion.token))
            if output.waiting:
                self._left[output] = None

    def _write_alone(self, output: StepOutput) -> None:
        """Write what may have been written, or what Postgres has refused together with others."""
        try:
            copy_context().run(giving_way, output.write)
        except RowHeld:
            self._left[output] = None
        except (LeaseLost, StepEnded):
            return
        except psycopg.Error as error:
            output.refused(error)

    def _run(self, thread: LastingThread) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._outputs or self._stopping,
                    RETRY_INTERVAL_S if self._left else None,
                )
                self._changed.wait_for(lambda: self._full or self._stopping, INTERVAL_S)
                if self._stopping:
                    return
            self.once()
            thread.works()


def _batches(outputs: Sequence[StepOutput]) -> Iterator[list[StepOutput]]:
    """Each of different runs: a statement appends to a row once."""
    places: Counter[str] = Counter()
    rounds: list[list[StepOutput]] = []
    for output in outputs:
        place = places[output.run_id]
        places[output.run_id] += 1
        if place == len(rounds):
            rounds.append([])
        rounds[place].append(output)
    for each in rounds:
        rest = iter(each)
        while batch := list(islice(rest, MOST_STEPS)):
            yield batch
