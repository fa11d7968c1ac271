"""Checks the promises of docs/guarantees.md on the stored data. Reads only."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sqlalchemy

from beatless.outbox.message import SHARDS
from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements
from beatless.unfit_rows import Violation, unfit_rows

PUBLISH_GRACE_S = 60.0
"""Seconds after the end of a run in which a relay publishes its events, if there is one."""

PAGE_RUNS = 2000
"""Runs that one statement checks, if they have few events."""

PAGE_EVENTS = 20_000
"""Events from which on a page takes no further run: the server sorts them in memory."""

SESSIONS = 2
"""Pages that are checked at once, each in a session of its own."""

LAST_ID = "\U0010ffff"
"""Above the id of any run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Runs whose ids are above `after`, up to `upto`."""

    after: str
    upto: str
    runs: int
    events: int


def verify(
    connection: Caller,
    schema: str,
    run_ids: Sequence[str] | None = None,
    *,
    patience: float = PUBLISH_GRACE_S,
) -> list[Violation]:
    """Every violation in these runs, or in all that are stored. Safe while runs are running.

    `patience` is how many seconds after its end a run's events may wait to be published.
    """
    checks = _Checks(schema, patience)
    if run_ids is not None:
        return checks.of_runs(connection, run_ids)
    found = unfit_rows(connection, schema, limit=None)
    for page in checks.pages(connection):
        found += checks.of_page(connection, page)
    return sorted(found, key=lambda each: (each.run_id, each.invariant))


def verify_all(
    engine: sqlalchemy.Engine,
    schema: str,
    *,
    progress: Callable[[int, int], None],
    patience: float = PUBLISH_GRACE_S,
) -> Iterator[Violation]:
    """Every violation in all stored runs, page by page in the order of the runs' ids.

    Each page is read at an instant of its own, and `SESSIONS` of them at once; memory is that of
    a few pages. `progress` is called with the runs and the events that were checked so far.
    """
    checks = _Checks(schema, patience)

    def check(page: Page) -> list[Violation]:
        with engine.connect() as session:
            return checks.of_page(session, page)

    with engine.connect() as connection, ThreadPoolExecutor(SESSIONS) as threads:
        yield from unfit_rows(connection, schema, limit=None)
        waiting: deque[tuple[Page, Future[list[Violation]]]] = deque()
        runs = events = 0
        pages = checks.pages(connection)
        while True:
            page = next(pages, None)
            connection.rollback()  # its snapshot would keep VACUUM from what is deleted meanwhile
            if page is not None:
                waiting.append((page, threads.submit(check, page)))
            while waiting and (page is None or len(waiting) > SESSIONS):
                done, found = waiting.popleft()
                yield from found.result()
                runs, events = runs + done.runs, events + done.events
                progress(runs, events)
            if page is None:
                return


class _Checks:
    """The statements of one schema."""

    def __init__(self, schema: str, patience: float) -> None:
        self._sql = statements(__file__, schema, last_shard=SHARDS - 1, page_runs=PAGE_RUNS)
        self._patience = patience

    def pages(self, connection: Caller) -> Iterator[Page]:
        """All stored runs; the last page goes up to `LAST_ID`."""
        after = ""
        while True:
            rows = execute(connection, self._sql["page"], {"after": after})
            runs = events = 0
            for _, kept in rows:
                runs, events = runs + 1, events + kept
                if events >= PAGE_EVENTS:
                    break
            last = runs == len(rows) < PAGE_RUNS
            upto = LAST_ID if last else rows[runs - 1][0]
            yield Page(after=after, upto=upto, runs=runs, events=events)
            if last:
                return
            after = upto

    def of_page(self, connection: Caller, page: Page) -> list[Violation]:
        """The violations of a page's runs, and of rows without a run that belong among them."""
        parameters = {"after": page.after, "upto": page.upto, "patience": self._patience}
        return _found(execute(connection, self._sql["violations_between"], parameters))

    def of_runs(self, connection: Caller, run_ids: Sequence[str]) -> list[Violation]:
        """The violations of these runs."""
        parameters = {"run_ids": list(run_ids), "patience": self._patience}
        return _found(execute(connection, self._sql["violations_of"], parameters))


def _found(rows: Iterable[Any]) -> list[Violation]:
    return [
        Violation(invariant=invariant, run_id=run_id, problem=problem)
        for invariant, run_id, problem in rows
    ]
