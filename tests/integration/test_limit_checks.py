"""What `doctor`, the metrics and `explain` say of limits and groups."""

from collections.abc import Callable

import psycopg
import pytest

from beatless import App, Limit, Plan, StepContext, step
from beatless.doctor import Doctor, Finding, Status, limits
from beatless.observe import gauges
from beatless.observe.families import (
    LIMIT_OLDEST,
    LIMIT_RUNS,
    QUEUE_GROUPS,
    QUEUE_LARGEST_GROUP,
    RUNS_ACTIVE,
)
from beatless.orchestrator import records
from beatless.testing import Kit

Read = Callable[[str], dict[tuple[str, ...], float]]


@step
def charge(ctx: StepContext) -> None: ...


STRIPE = Limit("stripe", key=lambda order: order["account"], at_once=1)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("charge", [charge], limits=[STRIPE]),
        Plan("complete", [charge], limits=[Limit("llm", rate="2/h")]),
        Plan("free", [charge]),
    ]


def examine(app: App) -> list[Finding]:
    return [each for each in Doctor(app).examine(["limits"]) if each.check == "limits"]


@pytest.fixture
def read(beatless_app: App) -> Read:
    """Reads a family of Postgres, by its labels."""
    postgres = beatless_app.metrics.postgres
    postgres.wanted = lambda: True

    def now(name: str) -> dict[tuple[str, ...], float]:
        postgres.forget()
        return {
            tuple(sample.labels.values()): sample.value
            for metric in postgres.collect()
            for sample in metric.samples
            if sample.name == name
        }

    return now


def explain(kit: Kit, run_id: str) -> str:
    return " ".join(moment.text for moment in kit.client.explain(run_id))


# The doctor


def test_what_is_set_without_effect_is_named(beatless: Kit, beatless_app: App) -> None:
    """As by another app, whose plans have limits of these names."""
    other = App(beatless_app.settings, [])
    [fine] = examine(beatless_app)
    assert (fine.status, fine.text[:20]) == (Status.OK, "2 limits of this app")
    beatless.client.set_limit("stripe", 3)
    beatless_app.client_for("team").set_limit("llm", rate="5/min")
    [fine] = examine(beatless_app)
    assert fine.status is Status.OK
    other.client.set_limit("stripe", rate="5/min")
    other.client.set_limit("llm", 7, force=True)
    other.close()
    beatless_app.client_for("team").set_limit("former", 7, force=True)
    [useless] = examine(beatless_app)
    assert useless.status is Status.WARNING
    assert useless.text.endswith(
        "former (no plan has it), llm (plans have it with a rate), "
        "stripe (plans have it with at_once)"
    )
    assert "beatless limits release" in useless.advice


def test_a_limit_whose_runs_wait_for_long_is_named(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        beatless.start_run("charge", {"account": "acct_7"})
    [fine] = examine(beatless_app)
    assert fine.status is Status.OK
    monkeypatch.setattr(limits, "MAX_WAIT_S", 0.0)
    [late] = examine(beatless_app)
    assert late.status is Status.WARNING
    assert late.text.startswith("2 runs wait for the limit stripe (key acct_7), the oldest for ")
    assert "beatless limits set" in late.advice


def test_slots_of_a_run_that_no_worker_has_are_named(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("free")
    held = [(1, run.run_id), (2, "gone")]
    for place, run_id in held:
        postgres.execute(
            "INSERT INTO limit_slots (limit_id, n, run_id) VALUES ('stripe:a', %s, %s)",
            (place, run_id),
        )
    [left] = examine(beatless_app)
    assert left.status is Status.PROBLEM
    assert left.text.endswith(f": {run.run_id} (stripe:a), gone (stripe:a)")
    postgres.execute("DELETE FROM limit_slots")


# Metrics


def test_metrics_count_the_runs_of_a_limit_over_its_keys_and_namespaces(
    beatless: Kit, beatless_app: App, read: Read
) -> None:
    assert read(LIMIT_RUNS.name) == dict.fromkeys(
        [(name, state) for name in ("stripe", "llm") for state in ("running", "waiting")], 0.0
    )
    assert read(LIMIT_OLDEST.name) == {("stripe",): 0.0, ("llm",): 0.0}
    for account in ("a", "b~:", "a", "b~:"):
        beatless.start_run("charge", {"account": account})
    for _ in range(2):
        beatless_app.client_for("team").start_run("charge", {"account": "a"})
    with beatless.crash("step.effect_done"):
        beatless.work_until_idle()
    found = read(LIMIT_RUNS.name)
    assert (found["stripe", "running"], found["stripe", "waiting"]) == (1, 3)
    assert (found["llm", "running"], found["llm", "waiting"]) == (0, 0)
    assert read(LIMIT_OLDEST.name)["stripe",] > 0


def test_limits_beyond_the_series_of_their_own_share_one(
    beatless: Kit, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "MAX_LIMIT_SERIES", 1)
    for _ in range(3):
        beatless.start_run("charge", {"account": "a"})
        beatless.start_run("complete")
    found = read(LIMIT_RUNS.name)
    assert {name for name, _ in found} == {"stripe", "other"}
    assert (found["stripe", "waiting"], found["other", "waiting"]) == (2, 1)
    assert set(read(LIMIT_OLDEST.name)) == {("stripe",), ("other",)}


def test_metrics_count_the_groups_of_a_queue_and_name_none(beatless: Kit, read: Read) -> None:
    beatless.start_run("free", queue="plain")
    assert read(QUEUE_GROUPS.name) == {}
    for group in ("a", "a", "a", "b"):
        beatless.start_run("free", queue="shared", group=group)
    beatless.start_run("free", queue="shared")
    beatless.start_run("free", queue="shared", group="later", delay=3600)
    assert read(QUEUE_GROUPS.name) == {("shared",): 2}
    assert read(QUEUE_LARGEST_GROUP.name) == {("shared",): 3}
    assert read(RUNS_ACTIVE.name) == {
        ("plain", "queued"): 1,
        ("shared", "queued"): 5,
        ("shared", "delayed"): 1,
    }


# Explain


def test_explain_counts_the_runs_that_a_limit_lets_in_before_one(
    beatless: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [beatless.start_run("charge", {"account": "a"}).run_id for _ in range(4)]
    first = beatless.start_run("charge", {"account": "a"}, priority=5).run_id
    beatless.start_run("charge", {"account": "b"})
    beatless.start_run("charge", {"account": "b"}, priority=9)
    assert "waits for the limit stripe (key a): 0 of 1 in use; 3 runs before it" in explain(
        beatless, runs[3]
    )
    assert "in use; 1 run before it" in explain(beatless, runs[1])
    assert "in use; 0 runs before it" in explain(beatless, first)
    for _ in range(3):
        rated = beatless.start_run("complete").run_id
    assert "waits for the limit llm: 2/h begin; 0 runs before it" in explain(beatless, rated)


def test_explain_counts_the_runs_of_the_group_that_are_sent_before_one(beatless: Kit) -> None:
    beatless.client.set_group_weight("ada", 3)
    runs = [beatless.start_run("free", group="ada").run_id for _ in range(3)]
    first = beatless.start_run("free", group="ada", priority=5).run_id
    beatless.start_run("free", group="ada", queue="other", priority=9)
    other = beatless.start_run("free", group="bob").run_id
    alone = beatless.start_run("free").run_id
    told = "waits to be dispatched: its group ada, of the weight 3, has {} before it in the queue"
    assert told.format("3 runs") in explain(beatless, runs[2])
    assert told.format("0 runs") in explain(beatless, first)
    assert "its group bob, of the weight 1, has 0 runs before it" in explain(beatless, other)
    assert "its group" not in explain(beatless, alone)


def test_explain_says_what_comes_before_a_run_that_has_waited_for_long(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    beatless.client.set_age_after("default", 600)
    lower, old, new, higher = (
        beatless.start_run("free", priority=priority).run_id for priority in (1, 5, 5, 9)
    )
    postgres.execute(
        "UPDATE dispatches SET due_at = due_at - interval '1 hour' WHERE run_id = ANY(%s)",
        ([lower, old],),
    )
    aged = "before it in the queue default; it waits for longer than 10.0 minutes, and so"
    assert f"1 run {aged}" in explain(beatless, old)
    assert f"0 runs {aged}" in explain(beatless, lower)
    told = "before it in the queue default; after 10.0 minutes it comes before higher priorities"
    assert f"2 runs {told}" in explain(beatless, higher)
    assert f"3 runs {told}" in explain(beatless, new)


def test_many_runs_are_not_counted_to_the_end() -> None:
    assert records.runs_before(999) == "999 runs"
    assert records.runs_before(records.MOST_COUNTED) == "1,000 runs or more"
