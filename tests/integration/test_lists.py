"""Lists of runs: whatever the filters, the same runs in the same order, page by page."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import psycopg
import pytest

from beatless import App
from beatless.client import Client
from beatless.orchestrator.journal import NEAR_RUNS
from beatless.orchestrator.records import Run

RUNS = 120

FILTERS: dict[str, list[Any]] = {
    "state": [None, "completed", "failed", "cancelled"],
    "plan": [None, "p1", "never"],
    "queue": [None, "q2"],
    "tags": [None, {"shop": "s1"}, {"shop": "s1", "rare": "yes"}],
    "retried": [None, True, False],
}

CHOICES = [
    {name: value for name, value in zip(FILTERS, chosen, strict=True) if value is not None}
    for chosen in product(*FILTERS.values())
]


@pytest.fixture(params=["near", "far"])
def client(
    beatless_app: App,
    postgres: psycopg.Connection,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Client]:
    """Of an app with runs of all kinds, three at each time; with few of them near, or all."""
    postgres.execute(
        f"""
INSERT INTO runs (run_id, namespace, plan, plan_version, queue, state, error, last_seq, tags,
                  retry_of, created_at, finished_at)
SELECT 'run-' || n, CASE WHEN n % 11 = 0 THEN 'other' ELSE 'default' END, 'p' || n % 2, '1',
       'q' || n % 3, CASE n % 5 WHEN 3 THEN 'failed' WHEN 4 THEN 'cancelled' ELSE 'completed' END,
       CASE WHEN n % 20 = 4 THEN '{{"type": "RunCancelled", "message": "", "step": "s"}}'::jsonb
            WHEN n % 20 = 3 THEN '{{"type": "RunCancelled", "traceback": "of a body"}}'
            WHEN n % 20 = 8 THEN '{{}}'
            WHEN n % 5 = 3 THEN '{{"type": "ValueError", "traceback": ""}}'
            WHEN n % 5 = 4 THEN '{{"type": "RunCancelled"}}' END, 2,
       CASE WHEN n % 2 = 0 THEN '{{}}'::jsonb
            WHEN n % 13 = 0 THEN jsonb_build_object('shop', 's' || n % 4, 'rare', 'yes')
            ELSE jsonb_build_object('shop', 's' || n % 4) END,
       CASE WHEN n % 7 = 0 AND n % 11 > 0 THEN 'run-' || n - 3 END,
       now() - make_interval(mins => n / 3), now()
  FROM generate_series(1, {RUNS}) n""".encode()
    )
    if request.param == "far":
        monkeypatch.setattr("beatless.orchestrator.journal.NEAR_RUNS", 10)
    app = App(beatless_app.settings, [])
    yield app.client
    app.close()


def wanted(runs: list[Run], given: dict[str, Any]) -> list[str]:
    """The ids of the runs that pass the filters."""
    retried = {run.retry_of for run in runs}
    return [
        run.run_id
        for run in runs
        if run.state == given.get("state", run.state)
        and run.plan == given.get("plan", run.plan)
        and run.queue == given.get("queue", run.queue)
        and given.get("tags", {}).items() <= run.tags.items()
        and ("retried" not in given or (run.run_id in retried) is given["retried"])
    ]


@pytest.mark.slow
def test_each_combination_of_filters_gives_its_runs_newest_first_page_by_page(
    client: Client,
) -> None:
    everything = client.list_runs(limit=NEAR_RUNS)
    assert everything == sorted(
        everything, key=lambda run: (run.created_at, run.run_id), reverse=True
    )
    assert len(everything) == RUNS - RUNS // 11
    for given in CHOICES:
        found: list[str] = []
        last = None
        while page := client.list_runs(**given, before=last, limit=7):
            found += [run.run_id for run in page]
            last = page[-1]
            if len(page) < 7:
                break
        assert found == wanted(everything, given), given
