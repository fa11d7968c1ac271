"""Rates: no more runs of a key begin than there are tokens, and each gets its token in time."""

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from beatless import App, BadRequest, Limit, Plan, RunRequest, RunState, StepContext, retry, step
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.limits import LooksAtLimits
from beatless.orchestrator.outcomes import PlanError
from beatless.testing import Kit
from tests.integration.test_races import at_once
from tests.integration.test_run_limits import claim, parked, slots

BODIES: list[str] = []


@step
def ask(ctx: StepContext) -> None:
    BODIES.append(ctx.run_id)


@step(retry=retry(max_attempts=3, initial=0.0))
def flaky(ctx: StepContext) -> None:
    BODIES.append(ctx.run_id)
    if BODIES.count(ctx.run_id) < 3:
        raise ValueError


def user(given: Any) -> str:
    return str((given or {}).get("user", "a"))


RATE = Limit("llm", rate="3/h", key=user)


@pytest.fixture
def beatless_plans() -> list[Plan]:
    BODIES.clear()
    return [
        Plan("ask", [ask], limits=[RATE]),
        Plan("flaky", [flaky], limits=[RATE]),
        Plan("both", [ask], limits=[RATE, Limit("one", at_once=1)]),
        Plan("fast", [ask], limits=[Limit("fast", rate="1000/s")]),
        Plan("one", [ask], limits=[Limit("one", at_once=1)]),
    ]


@pytest.fixture
def patient(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session of a worker."""
    with closing(beatless_app.executors.connect()) as found:
        yield found


def start(kit: Kit, plan: str = "ask", **options: Any) -> str:
    return kit.start_run(plan, **options).run_id


def test_a_run_without_a_rate_is_claimed_and_ends_without_a_look_at_any(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """What is the same for each claim is read by functions whose statements stay parsed."""
    run_id = start(beatless, "one")
    schema = beatless_app.settings.schema
    with closing(beatless_app.executors.connect()) as other:
        other.execute("BEGIN")
        tables = f"{schema}.limit_rates, {schema}.rate_settings"
        other.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())
        assert beatless.executor().execute(beatless_app.plans["one"], run_id, 1)
        other.execute("ROLLBACK")
    assert [run_id] == BODIES
    beatless.verify()
    in_sql = postgres.execute(
        "SELECT proname FROM pg_proc JOIN pg_language l ON l.oid = prolang "
        "WHERE pronamespace = %s::regnamespace AND lanname = 'sql' "
        "AND proname IN ('limits_of', 'rates_of')",
        (schema,),
    )
    assert in_sql.fetchall() == []


def next_look_s(postgres: psycopg.Connection) -> float | None:
    """Seconds until a relay is to look at a limit for its next token."""
    row = postgres.execute(
        "SELECT extract(epoch FROM min(due_at) - clock_timestamp())::float8 FROM limit_notes"
    ).fetchone()
    assert row is not None
    found: float | None = row[0]
    return found


def test_as_many_begin_at_once_as_the_bucket_holds_and_then_one_for_each_token(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(6)]
    beatless.work_until_idle()
    assert runs[:3] == BODIES
    look_s = next_look_s(postgres)
    assert look_s is not None
    assert look_s <= 1200

    begun = []
    for _ in range(3):
        beatless.advance(1200)
        beatless.work_until_idle()
        begun.append(len(BODIES))

    assert begun == [4, 5, 6]
    assert runs == BODIES
    assert parked(postgres) == []


def test_a_bucket_is_full_again_after_its_period_and_holds_no_more(beatless: Kit) -> None:
    for _ in range(3):
        start(beatless)
    beatless.work_until_idle()
    beatless.advance(36_000)

    for _ in range(5):
        start(beatless)
    beatless.work_until_idle()

    assert len(BODIES) == 6


def test_each_key_has_a_bucket_of_its_own(beatless: Kit) -> None:
    for name in "ab":
        for _ in range(4):
            start(beatless, input={"user": name})
    beatless.work_until_idle()
    assert len(BODIES) == 6


def test_a_retry_takes_no_token(beatless: Kit) -> None:
    runs = [start(beatless, "flaky") for _ in range(3)]
    beatless.work_until_idle()
    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}
    assert len(BODIES) == 9


def test_of_many_started_at_once_those_without_a_token_do_not_reach_the_broker(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    beatless.client.start_runs([RunRequest(plan="ask")] * 50)
    assert len(parked(postgres)) == 47
    beatless.drain_outbox_once()
    assert len(parked(postgres)) == 47


def test_a_claim_without_a_slot_takes_no_token(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    first, second = start(beatless, "both"), start(beatless, "both")
    assert claim(beatless_app, patient, first) is not None
    before = postgres.execute("SELECT * FROM limit_rates").fetchall()

    assert claim(beatless_app, patient, second) is None

    assert postgres.execute("SELECT * FROM limit_rates").fetchall() == before
    assert slots(postgres) == [first]


def test_a_claim_without_a_token_takes_no_slot(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    run_id = start(beatless, "both")
    postgres.execute("INSERT INTO limit_rates VALUES ('llm:a', now() + interval '1 hour')")

    assert claim(beatless_app, patient, run_id) is None

    assert slots(postgres) == []
    assert parked(postgres) == [run_id]


def test_of_two_claims_of_the_last_token_one_has_it(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    for _ in range(5):
        runs = [start(beatless) for _ in range(2)]
        postgres.execute("DELETE FROM limit_rates")
        postgres.execute("INSERT INTO limit_rates VALUES ('llm:a', now() + interval '40 minutes')")
        sessions = [beatless_app.executors.connect() for _ in runs]
        found = at_once(
            *(
                lambda run_id=run_id, session=session: claim(beatless_app, session, run_id)
                for run_id, session in zip(runs, sessions, strict=True)
            )
        )
        assert [isinstance(each, Lease) for each in found].count(True) == 1
        for session in sessions:
            session.close()
        postgres.execute("TRUNCATE limit_rates, limit_notes")
        postgres.execute("DELETE FROM dispatches")
        postgres.execute("DELETE FROM runs")


def test_a_rate_is_changed_while_runs_wait(beatless: Kit, postgres: psycopg.Connection) -> None:
    for _ in range(6):
        start(beatless)
    beatless.work_until_idle()
    assert len(BODIES) == 3

    beatless.client.set_limit("llm", rate="6/h")
    begun = []
    for _ in range(2):
        beatless.advance(600)
        beatless.work_until_idle()
        begun.append(len(BODIES))

    assert begun == [4, 5]
    (state,) = beatless.client.limits()
    assert (state.name, state.key, state.rate, state.at_once) == ("llm", "a", "6/h", None)
    assert beatless.client.release_limit("llm") is True


def test_a_rate_of_a_limit_of_another_kind_is_refused(beatless: Kit, beatless_app: App) -> None:
    """By the plans of the App, and by the runs of plans that it does not have."""
    client, foreign = beatless.client, App(beatless_app.settings, [])
    for _ in range(4):
        start(beatless)
    for caller in (client, foreign.client):
        with pytest.raises(BadRequest) as refused:
            caller.set_limit("llm", 5)
        assert (
            "at_once changes nothing: llm is a limit of how many runs begin in a time. Give "
            in (str(refused.value))
        )
        caller.set_limit("llm", rate="3/h")
        caller.set_limit("unknown", rate="3/h", force=True)
        caller.set_limit("unknown", 3)
    foreign.close()
    assert client.release_limit("llm") is True


def test_a_cancelled_run_leaves_its_token_to_the_next(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(4)]
    beatless.client.cancel_run(runs[0])
    beatless.drain_outbox_once()
    assert parked(postgres) == []
    beatless.work_until_idle()
    assert runs[1:] == BODIES


@pytest.mark.slow
def test_high_rates_are_looked_at_twenty_times_a_second_at_most(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    postgres.execute("INSERT INTO limit_rates VALUES ('fast:', now() + interval '1 s')")
    for _ in range(50):
        start(beatless, "fast")
    beatless.work_until_idle()
    postgres.execute("UPDATE limit_rates SET full_at = now() + interval '1 s'")
    looks, seconds = postgres.execute(
        "SELECT count(*), extract(epoch FROM max(due_at) - min(due_at))::float8"
        " FROM limit_notes WHERE due_at IS NOT NULL"
    ).fetchone() or (0, 0.0)
    assert looks <= 1 + 20 * (seconds or 0.0) + 0.01


def test_buckets_that_are_full_are_forgotten(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    start(beatless)
    beatless.work_until_idle()
    looks = LooksAtLimits(beatless_app.settings.schema)
    looks.step(patient)
    assert postgres.execute("SELECT count(*) FROM limit_rates").fetchone() == (1,)

    beatless.advance(36_000)
    looks.step(patient)
    assert postgres.execute("SELECT count(*) FROM limit_rates").fetchone() == (0,)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Limit("a"), "limit a needs at_once or rate"),
        (lambda: Limit("a", at_once=1, rate="1/s"), "for both, make two limits"),
        (lambda: Limit("a", rate="0/s"), "limit a: rate is '0/s'; give starts in a second"),
        (lambda: Limit("a", rate="1/week"), "limit a: rate is '1/week'"),
        (lambda: Limit("a", rate=5), "limit a: rate is 5"),  # type: ignore[arg-type]
    ],
)
def test_a_rate_that_cannot_work_is_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(PlanError) as refused:
        make()
    assert told in str(refused.value)
