"""Traces of the async steps of many runs: those that are asked for together are one statement."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from beatless.orchestrator.events import NewEvent
from beatless.orchestrator.group_commit import MAX_RUNS, GroupCommit
from beatless.orchestrator.journal import Journal
from beatless.orchestrator.lease import Connection
from beatless.orchestrator.records import Appended
from beatless.orchestrator.step_output import Portion
from beatless.orchestrator.sure_writer import SureWriter, may_be_committed
from beatless.orchestrator.watchdog import Attempt

logger = logging.getLogger("beatless.orchestrator.executor")


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTrace:
    """A trace of an attempt that may be written together with those of other runs."""

    writer: SureWriter
    attempt: Attempt
    event: NewEvent

    @property
    def run_id(self) -> str:
        return self.attempt.lease.run.run_id

    def begin(self) -> Portion | None:
        """As `SureWriter.begin_shared`."""
        return self.writer.begin_shared(self.attempt, self.event)

    def end(self, appended: Appended | None, *, in_doubt: bool) -> None:
        """As `SureWriter.end_shared`."""
        self.writer.end_shared(self.event, appended, in_doubt=in_doubt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A trace that is to be written."""

    trace: SharedTrace
    told: Callable[[bool], None]
    """Called once, in the thread that writes: whether it was written."""

    def tell(self, *, written: bool) -> None:
        """Call `told`."""
        try:
            self.told(written)
        except Exception:  # of one, as its process ends or has no thread for it: others are told
            logger.exception("a trace was left", extra={"action": "trace_left"})


class SharedTraces:
    """The traces that are to be written. For any thread; a thread of its own writes them.

    While a statement is under way the next ones gather. What it leaves out, for its row is held or
    its run writes just now, is to be written by itself, as is what was refused or is in doubt.
    """

    def __init__(
        self,
        journal: Journal,
        statement: GroupCommit,
        connection: Callable[[], Connection],
        disconnect: Callable[[], None],
    ) -> None:
        """`connection` gives that of the calling thread, a new one after `disconnect`."""
        self._journal = journal
        self._statement = statement
        self._connection = connection
        self._disconnect = disconnect
        self._mutex = threading.Lock()
        self._asked: list[Asked] = []
        self._works = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="beatless-traces")

    def put(self, trace: SharedTrace, told: Callable[[bool], None]) -> None:
        """Have this written; `told` is called once it is, or was not."""
        with self._mutex:
            self._asked.append(Asked(trace=trace, told=told))
            if self._works:
                return
            self._works = True
        try:
            self._pool.submit(self._work)
        except RuntimeError:  # its thread cannot be started
            with self._mutex:
                left, self._asked, self._works = self._asked, [], False
            for each in left:
                each.tell(written=False)

    def stop(self) -> None:
        """Write no more."""
        self._pool.shutdown(wait=False)

    def _work(self) -> None:
        while True:
            with self._mutex:
                batch = self._next()
                if not batch:
                    self._works = False
                    return
            self._write(batch)

    def _next(self) -> list[Asked]:
        """Those of the next statement: one of each run."""
        by_run: dict[str, Asked] = {}
        for each in self._asked:
            by_run.setdefault(each.trace.run_id, each)
            if len(by_run) == MAX_RUNS:
                break
        batch = list(by_run.values())
        taken = set(map(id, batch))
        self._asked = [each for each in self._asked if id(each) not in taken]
        return batch

    def _write(self, batch: Sequence[Asked]) -> None:
        begun: list[tuple[Asked, Portion]] = []
        written: Mapping[int, Appended] = {}
        in_doubt = True  # whatever strikes here
        try:
            for each in batch:
                portion = each.trace.begin()
                if portion is not None:
                    begun.append((each, portion))
            if begun:
                written = self._commit([portion for _, portion in begun])
            in_doubt = False
        except Exception as error:  # of any kind: who waits for a trace would wait for ever
            in_doubt = may_be_committed(error)
            self._disconnect()
            logger.warning(
                "a commit of traces of several runs failed, each is written by itself",
                extra={
                    "action": "traces_failed",
                    "runs": len(begun),
                    "in_doubt": in_doubt,
                    "reason": str(error),
                },
            )
        finally:
            for each, portion in begun:
                found = written.get(portion.token)
                each.trace.end(found, in_doubt=in_doubt and found is None)
        tokens = {id(each): portion.token for each, portion in begun}
        for each in batch:
            each.tell(written=tokens.get(id(each)) in written)

    def _commit(self, portions: Sequence[Portion]) -> Mapping[int, Appended]:
        """Those that were written, by token. Of one alone by the statement that costs less."""
        if len(portions) > 1:
            return self._statement.append(self._connection(), portions)
        [one] = portions
        appended = self._journal.append(
            self._connection(), one.run_id, one.token, one.events, one.after, if_free=True
        )
        return {} if appended is None else {one.token: appended}
