"""Limits of how many runs hold a lease at once: never more, and no turn is lost."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

from beatless import (
    App,
    BadPayload,
    BadRequest,
    Limit,
    Plan,
    RunContext,
    RunRequest,
    RunState,
    Snooze,
    StepContext,
    plan,
    step,
    wait,
)
from beatless.http import Client
from beatless.orchestrator.group_commit import GroupCommit
from beatless.orchestrator.lease import Lease
from beatless.orchestrator.limits import LooksAtLimits
from beatless.orchestrator.plan import PlanError
from beatless.orchestrator.settlement import Boundary, Proposal, Settlement
from beatless.outbox.queries import ALL_SHARDS
from beatless.testing import Kit
from beatless.verify import verify
from tests import column_statistics
from tests.integration.test_races import at_once, until
from tests.serving import serving

BODIES: list[str] = []


@step
def charge(ctx: StepContext) -> Any:
    BODIES.append(ctx.run_id)


@step
def again(ctx: StepContext) -> Any:
    BODIES.append(ctx.run_id)


@step
def later(ctx: StepContext) -> Any:
    if BODIES.count(ctx.run_id) < 1:
        BODIES.append(ctx.run_id)
        return Snooze(60)
    return None


@step
def fails(ctx: StepContext) -> Any:
    raise ValueError(ctx.input)


def account(order: dict[str, Any]) -> str:
    return str(order["account"])


STRIPE = Limit("stripe", key=account, at_once=2)
LLM = Limit("llm", at_once=1)


@plan("parent")
def parent(run: RunContext[Any]) -> Any:
    return len(list(run.map(CHARGE, [{"account": "a"}] * run.input)))


CHARGE = Plan("charge", [charge], limits=[STRIPE])


@pytest.fixture
def beatless_plans() -> list[Plan]:
    BODIES.clear()
    return [
        CHARGE,
        Plan("both", [charge], limits=[STRIPE, LLM]),
        Plan("pays", [charge, wait("paid"), again], limits=[STRIPE]),
        Plan("snoozes", [later], limits=[STRIPE]),
        Plan("fails", [fails], limits=[STRIPE]),
        Plan("free", [charge]),
        Plan("many", [charge], limits=[Limit("many", at_once=1000)]),
        plan("function", limits=[STRIPE])(lambda run: run.step(charge)),
        parent,
    ]


@pytest.fixture
def patient(beatless_app: App) -> Iterator[psycopg.Connection]:
    """A session of a worker."""
    with closing(beatless_app.executors.connect()) as found:
        yield found


def start(kit: Kit, plan: str = "charge", account: str = "a", **options: Any) -> str:
    return kit.start_run(plan, {"account": account}, **options).run_id


def claim(app: App, session: psycopg.Connection, run_id: str) -> Lease | None:
    """As a worker does that has got the message of this run."""
    name = app.client.get_run(run_id).plan
    return app.leases.claim(session, run_id, plan=name, worker="w", first_step="charge", dispatch=1)


def end(app: App, session: psycopg.Connection, lease: Lease) -> None:
    """Commit the end of a run."""
    done = app.journal.settle(session, lease.run.run_id, lease.token, ENDS)
    assert done is not None


ENDS = Settlement.ignoring_cancel(Boundary(state=RunState.COMPLETED))


def slots(postgres: psycopg.Connection) -> list[str]:
    """The runs that have a slot."""
    rows = postgres.execute("SELECT run_id FROM limit_slots ORDER BY run_id").fetchall()
    return [run_id for (run_id,) in rows]


def parked(postgres: psycopg.Connection) -> list[str]:
    """The runs that wait for a limit."""
    rows = postgres.execute(
        "SELECT run_id FROM dispatches WHERE state = 'delayed' AND reason = 'limit' ORDER BY run_id"
    ).fetchall()
    return [run_id for (run_id,) in rows]


def assert_idle(postgres: psycopg.Connection) -> None:
    """No slot, no note and no waiting run is left."""
    assert slots(postgres) == []
    assert parked(postgres) == []
    assert postgres.execute("SELECT count(*) FROM limit_notes").fetchone() == (0,)


def test_runs_beyond_the_limit_wait_from_the_start(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(5)]
    others = [start(beatless, account="b") for _ in range(2)]

    assert parked(postgres) == sorted(runs[2:])
    assert not set(others) & set(parked(postgres))


def test_of_many_started_at_once_as_many_go_on_as_there_are_slots(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    requests = [RunRequest(plan="charge", input={"account": "a"})] * 20
    beatless.client.start_runs(requests)

    assert len(parked(postgres)) == 18
    assert postgres.execute("SELECT count(*) FROM limit_notes").fetchone() == (1,)
    beatless.drain_outbox_once()
    assert len(parked(postgres)) == 18


@pytest.mark.parametrize("name", ["charge", "both", "many", "function", "fails"])
def test_all_runs_of_a_limit_are_executed_and_leave_nothing(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    runs = [start(beatless, name) for _ in range(7)]

    beatless.work_until_idle()

    wanted = RunState.FAILED if name == "fails" else RunState.COMPLETED
    assert {beatless.client.get_run(run_id).state for run_id in runs} == {wanted}
    assert_idle(postgres)


def test_children_have_the_limits_of_their_plan(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("parent", 5)
    beatless.work_until_idle()

    assert beatless.client.get_run(run.run_id).result == 5
    assert_idle(postgres)


def test_a_claim_beyond_the_limit_parks_the_run_and_takes_nothing(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(2)]
    late = start(beatless, delay=60)
    leases = [claim(beatless_app, patient, run_id) for run_id in runs]
    assert None not in leases
    beatless.advance(60)
    before = beatless.client.get_run(late)

    assert claim(beatless_app, patient, late) is None

    after = beatless.client.get_run(late)
    assert (after.state, after.attempt, after.last_seq) == ("queued", 0, before.last_seq)
    assert parked(postgres) == [late]
    assert slots(postgres) == sorted(runs)


def test_of_two_limits_none_is_taken_if_one_is_full(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    first, second = start(beatless, "both"), start(beatless, "both", account="b")
    postgres.execute("UPDATE dispatches SET state = 'waiting', reason = 'start', due_at = now()")
    assert claim(beatless_app, patient, first) is not None

    assert claim(beatless_app, patient, second) is None

    assert slots(postgres) == [first, first]
    assert parked(postgres) == [second]


def test_an_end_lets_in_the_run_of_the_highest_priority_that_has_waited_longest(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(2)]
    waiting = [start(beatless), start(beatless, priority=5), start(beatless, priority=5)]
    leases = [claim(beatless_app, patient, run_id) for run_id in runs]

    let_in = []
    for lease in leases:
        assert lease is not None
        end(beatless_app, patient, lease)
        (gone,) = set(waiting) - set(parked(postgres)) - set(let_in)
        let_in.append(gone)

    assert let_in == [waiting[1], waiting[2]]
    assert beatless.drain_outbox_once() > 0
    assert parked(postgres) == [waiting[0]]


@pytest.mark.slow
def test_of_two_claims_of_the_last_slot_one_has_it(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    for _ in range(5):
        runs = [start(beatless, "both", account=str(n)) for n in range(2)]
        postgres.execute("UPDATE dispatches SET state = 'sent', reason = 'start', due_at = now()")
        sessions = [beatless_app.executors.connect() for _ in runs]
        found = at_once(
            *(
                lambda run_id=run_id, session=session: claim(beatless_app, session, run_id)
                for run_id, session in zip(runs, sessions, strict=True)
            )
        )
        (lease,) = [each for each in found if each is not None]
        assert isinstance(lease, Lease)
        assert set(slots(postgres)) == {lease.run.run_id}
        assert parked(postgres) == [run for run in runs if run != lease.run.run_id]
        end(beatless_app, sessions[0], lease)
        for session in sessions:
            session.close()
        assert beatless.work_until_idle() == 1
        assert_idle(postgres)


@contextmanager
def open_transaction(session: psycopg.Connection) -> Iterator[None]:
    with session.transaction():
        yield


@pytest.mark.parametrize("first", ["claim", "end"])
def test_a_claim_and_an_end_that_do_not_see_each_other_strand_no_run(
    beatless: Kit,
    beatless_app: App,
    postgres: psycopg.Connection,
    patient: psycopg.Connection,
    first: str,
) -> None:
    """The claim parks its run before the end has freed the slot; each commits in its turn."""
    taken = [start(beatless) for _ in range(2)]
    leases = [claim(beatless_app, patient, run_id) for run_id in taken]
    lease = leases[0]
    assert lease is not None
    run_id = start(beatless)
    relay = beatless_app.relay()
    relay.drain_once()  # what its start has noted
    postgres.execute(
        "UPDATE dispatches SET state = 'sent', reason = 'start', due_at = now() WHERE run_id = %s",
        (run_id,),
    )
    with closing(beatless_app.executors.connect()) as other:
        if first == "claim":
            with patient.transaction():
                end(beatless_app, patient, lease)
                assert claim(beatless_app, other, run_id) is None
                relay.drain_once()
            assert parked(postgres) == [run_id]
        else:
            with other.transaction():
                other.execute(f"SELECT {beatless_app.settings.schema}.take_slots(%s)", (run_id,))
                end(beatless_app, patient, lease)
                relay.drain_once()
            assert parked(postgres) == [run_id]
    relay.drain_once()
    relay.stop()

    assert parked(postgres) == []
    assert beatless.work_until_idle() >= 1
    assert beatless.client.get_run(run_id).state is RunState.COMPLETED


def test_a_takeover_inherits_the_slot(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(3)]
    for run_id in runs[:2]:
        assert claim(beatless_app, patient, run_id) is not None
    before = postgres.execute("SELECT limit_id, n, run_id FROM limit_slots ORDER BY n").fetchall()
    beatless.advance(3600)

    taken_over = claim(beatless_app, patient, runs[0])

    assert taken_over is not None
    found = postgres.execute("SELECT limit_id, n, run_id FROM limit_slots ORDER BY n").fetchall()
    assert found == before
    assert parked(postgres) == [runs[2]]
    end(beatless_app, patient, taken_over)
    assert slots(postgres) == [runs[1]]


def test_the_slot_of_a_worker_that_was_killed_is_that_of_its_run_until_it_ends(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(4)]
    with beatless.crash("step.effect_done"):
        beatless.work_until_idle()
    assert len(slots(postgres)) == 1

    beatless.advance(3600)
    beatless.work_until_idle()

    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}
    assert_idle(postgres)


def test_a_claim_passes_over_no_slots_of_runs_that_have_ended(
    beatless: Kit, beatless_app: App, patient: psycopg.Connection, postgres: psycopg.Connection
) -> None:
    """They stay in the indexes for as long as somebody reads what was there before them."""
    run_ids = [run.run_id for run in beatless.client.start_runs([MANY] * 101)]
    with beatless_app.direct_connection() as reader:
        reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT 1")
        read = []
        for run_id in run_ids:
            lease = claim(beatless_app, patient, run_id)
            assert lease is not None
            end(beatless_app, patient, lease)
            if run_id in run_ids[-2:]:
                patient.execute("SELECT pg_stat_force_next_flush()")
                patient.execute("SELECT 1")
                read.append(entries_read(postgres))
        reader.execute("ROLLBACK")
    assert read[1] - read[0] < 20


MANY = RunRequest(plan="many", input={"account": "a"})


def entries_read(postgres: psycopg.Connection) -> int:
    """How many entries of the indexes of slots were read."""
    ((found,),) = postgres.execute(
        "SELECT sum(idx_tup_read)::int FROM pg_stat_user_indexes "
        "WHERE relname = 'limit_slots' AND schemaname = current_schema()"
    ).fetchall()
    return int(found)


@pytest.mark.parametrize("name", ["pays", "snoozes"])
def test_a_run_that_waits_holds_no_slot(
    beatless: Kit, postgres: psycopg.Connection, name: str
) -> None:
    runs = [start(beatless, name) for _ in range(5)]
    beatless.work_until_idle()

    assert sorted(BODIES) == sorted(runs)
    assert slots(postgres) == []
    if name == "pays":
        for run_id in runs:
            beatless.signal(run_id, "paid")
    beatless.advance(60)
    beatless.work_until_idle()
    assert {beatless.client.get_run(run_id).state for run_id in runs} == {RunState.COMPLETED}
    assert_idle(postgres)


@pytest.mark.parametrize("how", ["cancel", "remove", "deadline"])
def test_the_turn_of_a_run_that_ends_before_its_claim_is_anothers(
    beatless: Kit, postgres: psycopg.Connection, how: str
) -> None:
    first = [start(beatless, deadline=100) for _ in range(2)]
    last = start(beatless)
    for run_id in first:
        if how == "cancel":
            beatless.client.cancel_run(run_id)
        elif how == "remove":
            beatless.client.remove_run(run_id)
    if how == "deadline":
        beatless.advance(200)

    beatless.drain_outbox_once()
    assert parked(postgres) == []
    beatless.work_until_idle()
    assert beatless.client.get_run(last).state is RunState.COMPLETED
    assert_idle(postgres)


def test_a_run_that_waits_can_be_cancelled(beatless: Kit, postgres: psycopg.Connection) -> None:
    runs = [start(beatless) for _ in range(4)]
    assert beatless.client.cancel_run(runs[2]).state is RunState.CANCELLED

    beatless.work_until_idle()

    assert sorted(BODIES) == sorted(set(runs) - {runs[2]})
    assert_idle(postgres)


def test_a_group_commit_frees_the_slot_of_each_of_its_runs(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(2)]
    waiting = [start(beatless) for _ in range(3)]
    leases = [claim(beatless_app, patient, run_id) for run_id in runs]
    proposals = [
        Proposal(run_id=lease.run.run_id, token=lease.token, after=0, settlement=ENDS)
        for lease in leases
        if lease is not None
    ]

    GroupCommit(beatless_app.settings.schema).settle(patient, proposals)

    assert slots(postgres) == []
    assert parked(postgres) == waiting[2:]


def test_a_worker_that_knows_no_limits_cannot_claim_without_a_slot(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    run_id = start(beatless)

    with pytest.raises(psycopg.errors.LockNotAvailable, match=run_id):
        patient.execute(
            f"UPDATE {beatless_app.settings.schema}.runs SET state = 'running' WHERE run_id = %s",
            (run_id,),
        )

    assert beatless.client.get_run(run_id).state is RunState.QUEUED


def test_a_claim_of_further_runs_leaves_those_with_limits_to_their_messages(
    beatless: Kit, beatless_app: App, patient: psycopg.Connection
) -> None:
    limited = [start(beatless) for _ in range(2)]
    free = [start(beatless, "free") for _ in range(2)]

    leases = beatless_app.leases.claim_with_others(
        patient,
        free[0],
        plan="free",
        worker="w",
        first_steps={"free": "charge", "charge": "charge"},
        dispatch=1,
        places=5,
    )

    assert [lease.run.run_id for lease in leases] == free
    assert {beatless.client.get_run(run_id).state for run_id in limited} == {RunState.QUEUED}


def test_starts_in_a_transaction_that_stays_open_hold_up_nobody(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    with patient.transaction():
        for _ in range(4):
            beatless.client.start_run("charge", {"account": "a"}, connection=patient)
        others = [start(beatless) for _ in range(4)]
        beatless.work_until_idle()
        assert sorted(BODIES) == sorted(others)

    beatless.work_until_idle()
    assert len(BODIES) == 8
    assert_idle(postgres)


async def awaited(charged: Any) -> str:
    return str(charged)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Limit("a b", at_once=1), "limit name 'a b' must match"),
        (
            lambda: Limit("a", at_once=0),
            "limit a: at_once is 0; give a number of runs",
        ),
        (lambda: Limit("a", at_once=True), "at_once is True"),
        (lambda: Limit("a", at_once=1, key=[]), "limit a: key is []; give a function"),
        (
            lambda: Limit("a", at_once=1, key=awaited),
            "limit a: key is a function that gives a coroutine",
        ),
        (lambda: Plan("p", [charge], limits=LLM), "limits is Limit('llm', at_once=1); give"),
        (lambda: Plan("p", [charge], limits=["x"]), "plan p: 'x' is no limit"),
        (lambda: Plan("p", [charge], limits=[LLM, LLM]), "plan p has two limits of one name"),
    ],
)
def test_a_limit_that_cannot_work_is_refused(make: Callable[[], object], told: str) -> None:
    with pytest.raises(PlanError) as refused:
        make()
    assert told in str(refused.value)


def test_limits_of_one_name_and_two_kinds_are_refused(beatless_app: App) -> None:
    rated = Plan("rated", [charge], limits=[Limit("llm", rate="5/min")])
    told = "limit llm has at_once in plan slow, and a rate in plan rated: limits of one name"
    with pytest.raises(PlanError, match=told):
        App(beatless_app.settings, [Plan("slow", [charge], limits=[LLM]), rated])


@pytest.mark.parametrize(
    ("input", "told"),
    [
        ({}, "the key of limit stripe cannot be computed of this input: KeyError: 'account'"),
        ({"account": "x" * 300}, "the key of limit stripe is 'xxx"),
    ],
)
def test_an_input_without_a_key_is_refused_at_the_start(
    beatless: Kit, input: Any, told: str
) -> None:
    with pytest.raises(BadPayload) as refused:
        beatless.start_run("charge", input)
    assert told in str(refused.value)


def test_the_limits_of_a_fleet_are_changed_over_http(beatless: Kit, beatless_app: App) -> None:
    with (
        serving(beatless_app, is_open=True) as api,
        Client(f"http://127.0.0.1:{api.port}") as client,
    ):
        runs = [start(beatless) for _ in range(4)]
        client.set_limit("stripe", 3)
        beatless.drain_outbox_once()
        (state,) = client.limits()
        assert (state.name, state.key, state.at_once, state.is_set) == ("stripe", "a", 3, True)
        assert (state.running, state.waiting) == (0, 1)
        assert state.oldest == beatless.client.get_run(runs[3]).created_at
        assert client.release_limit("stripe") is True
        assert client.release_limit("stripe") is False
        with pytest.raises(BadRequest, match="at_once"):
            client.set_limit("stripe", 0)
        with pytest.raises(BadRequest, match=r"name is 'strpe', .* known are llm, many, stripe"):
            client.set_limit("strpe", 3)
        client.set_limit("strpe", 3, force=True)
        client.set_limit("strpe", 4)  # it is known by now
        assert client.release_limit("strpe") is True


def test_each_namespace_has_limits_of_its_own(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    team = beatless_app.client_for("team")
    mine = [start(beatless) for _ in range(3)]
    theirs = [team.start_run("charge", {"account": "a"}).run_id for _ in range(3)]
    assert parked(postgres) == sorted([mine[2], theirs[2]])

    team.set_limit("stripe", 3)
    beatless.drain_outbox_once()

    assert parked(postgres) == [mine[2]]
    assert [(each.name, each.at_once) for each in team.limits()] == [("stripe", 3)]
    assert [each.at_once for each in beatless.client.limits()] == [2]


def test_a_limit_that_was_lowered_lets_nobody_in_until_enough_have_ended(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    beatless.client.set_limit("stripe", 4)
    runs = [start(beatless) for _ in range(8)]
    leases = [claim(beatless_app, patient, run_id) for run_id in runs[:4]]
    beatless.client.set_limit("stripe", 2)
    waiting = []
    for lease in leases:
        assert lease is not None
        end(beatless_app, patient, lease)
        beatless.drain_outbox_once()
        waiting.append(len(parked(postgres)))

    assert waiting == [4, 4, 3, 2]
    beatless.work_until_idle()
    assert_idle(postgres)


def test_a_run_that_nobody_claims_keeps_its_turn_for_a_minute(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    away = [start(beatless, queue="away") for _ in range(2)]
    here = start(beatless)
    beatless.drain_outbox_once()
    looks = LooksAtLimits(beatless_app.settings.schema)

    looks.step(patient)
    beatless.drain_outbox_once()
    assert parked(postgres) == [here]

    beatless.advance(61)
    looks.step(patient)
    beatless.drain_outbox_once()

    assert parked(postgres) == []
    assert not set(away) & set(slots(postgres))


def rows_read(session: psycopg.Connection) -> int:
    """Rows of runs, dispatches, slots and notes that the transaction has read."""
    row = session.execute(
        "SELECT sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::int "
        "FROM pg_stat_xact_user_tables "
        "WHERE schemaname = current_schema() "
        "AND relname IN ('runs', 'dispatches', 'limit_slots', 'limit_notes')"
    ).fetchone()
    assert row is not None
    found: int = row[0]
    return found


@pytest.mark.parametrize("analyzed", [None, "runs", "dispatches", "limit_slots", "limit_notes"])
def test_a_start_does_not_read_the_runs_that_wait_for_other_keys(
    beatless: Kit, beatless_app: App, analyzed: str | None
) -> None:
    """Nor if a table was empty when its statistics were taken."""
    with closing(beatless_app.executors.connect()) as caller, caller.transaction():
        caller.execute(f"SET LOCAL search_path TO {beatless_app.settings.schema}")
        column_statistics.forget(caller)
        if analyzed:
            caller.execute(f"ANALYZE {analyzed}".encode())
        requests = [RunRequest(plan="charge", input={"account": n}) for n in range(100)] * 3
        beatless.client.start_runs(requests, connection=caller)
        assert len(parked(caller)) == 100
        assert rows_read(caller) < 10 * len(requests)


def test_a_start_reads_no_runs_when_all_others_wait_for_one_limit(
    beatless: Kit, beatless_app: App
) -> None:
    with closing(beatless_app.executors.connect()) as caller, caller.transaction():
        caller.execute(f"SET LOCAL search_path TO {beatless_app.settings.schema}")
        column_statistics.forget(caller)
        requests = [RunRequest(plan="charge", input={"account": "a"})] * 1000
        beatless.client.start_runs(requests, connection=caller)
        caller.execute("ANALYZE dispatches")
        before = rows_read(caller)
        start(beatless, account="b", connection=caller)
        assert rows_read(caller) - before < 10


@pytest.mark.slow
def test_one_look_lets_in_a_thousand_runs_and_the_next_one_the_rest(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """A statement of a relay has ten seconds, and there may be a million runs and as much room."""
    beatless.client.start_runs([RunRequest(plan="charge", input={"account": "a"})] * 1050)
    assert len(parked(postgres)) == 1048
    beatless.client.set_limit("stripe", 5000)
    look = "SELECT looked_at > kept, kept FROM look_at_limits(%s, 200)"
    shards = [list(ALL_SHARDS)]
    assert postgres.execute(look, shards).fetchone() == (True, 0)
    assert len(parked(postgres)) == 48
    assert postgres.execute(look, shards).fetchone() == (True, 0)
    assert parked(postgres) == []


def test_a_limit_whose_runs_are_held_does_not_keep_others_from_their_turn(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    """Each end of a run may note it once more, for as long as the transaction is open."""
    held, other = start(beatless, account="a"), start(beatless, account="b")
    postgres.execute(
        "UPDATE dispatches SET state = 'delayed', reason = 'limit', limit_since = now(), "
        "due_at = '9999-01-01Z'"
    )
    relay = beatless_app.relay()
    with closing(beatless_app.executors.connect()) as caller:
        with caller.transaction():
            beatless.client.cancel_run(held, connection=caller)
            postgres.execute(
                "INSERT INTO limit_notes (shard, limit_id) SELECT 0, 'stripe:' || key "
                "FROM unnest(array_fill('a'::text, '{500}') || '{b}') key"
            )
            relay.drain_once()
            assert parked(postgres) == [held]
        assert other not in parked(postgres)
    relay.drain_once()
    relay.stop()
    beatless.work_until_idle()
    assert [other] == BODIES
    assert_idle(postgres)


def test_verify_tells_of_slots_and_leases_that_do_not_agree(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(3)]
    lease = claim(beatless_app, patient, runs[0])
    beatless.verify()
    schema = beatless_app.settings.schema
    assert lease is not None

    postgres.execute("DELETE FROM limit_slots")
    (found,) = verify(patient, schema)
    assert (found.invariant, found.run_id) == ("I14", runs[0])
    assert found.problem == "it is running and has 0 slots of 1 limits"

    postgres.execute("INSERT INTO limit_slots (limit_id, n, run_id) VALUES ('x', 1, %s)", runs[1:2])
    assert [each.run_id for each in verify(patient, schema)] == sorted(runs[:2])

    postgres.execute("TRUNCATE limit_slots, limit_notes")
    postgres.execute(
        "UPDATE dispatches SET state = 'delayed', reason = 'wait' WHERE reason <> 'limit'"
    )
    (stranded,) = (each for each in verify(patient, schema) if each.run_id == runs[2])
    assert stranded.invariant == "I7"
    assert "it waits for the limit stripe:a, of which slots are free" in stranded.problem


def test_a_debounced_run_has_the_limit_of_its_last_input(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    for name in "ab":
        start(beatless, account=name, dedupe_key="one", debounce=60)
    runs = [start(beatless, account="b") for _ in range(2)]

    beatless.advance(60)
    found = postgres.execute("SELECT limits -> 0 ->> 'id' FROM runs WHERE dedupe_key IS NOT NULL")
    assert found.fetchall() == [("stripe:b",)]
    beatless.work_until_idle()
    assert len(BODIES) == len(runs) + 1
    assert_idle(postgres)


def test_a_claim_of_a_run_whose_time_has_just_moved_takes_no_slot(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, patient: psycopg.Connection
) -> None:
    """It waits for the row of a run that is due, and finds one that is not."""
    moved = {"dedupe_key": "one", "debounce": 60}
    run_id = start(beatless, **moved)
    beatless.advance(60)
    with closing(beatless_app.executors.connect()) as caller:
        with ThreadPoolExecutor(1) as pool, caller.transaction():
            assert start(beatless, **moved, connection=caller) == run_id
            claimed = pool.submit(claim, beatless_app, patient, run_id)
            until(postgres, blocked_by=caller.info.backend_pid)
        assert claimed.result() is None
    assert slots(postgres) == []
    assert parked(postgres) == []


def test_a_successor_with_a_limit_waits_for_both(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    runs = [start(beatless) for _ in range(2)]
    first = start(beatless, dedupe_key="one", while_unfinished="replace")
    assert parked(postgres) == [first]
    beatless.work_until_idle()
    second = start(beatless, dedupe_key="one", while_unfinished="replace")
    beatless.work_until_idle()

    assert sorted(BODIES) == sorted([*runs, first, second])
    assert_idle(postgres)
