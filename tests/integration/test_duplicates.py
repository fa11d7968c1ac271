"""Runs with a dedupe key: one is unfinished at a time, whoever starts, claims and ends it."""

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy

from beatless import (
    App,
    BadPayload,
    BadRequest,
    CannotRetry,
    Plan,
    Run,
    RunConflict,
    RunContext,
    RunRequest,
    StepContext,
    TransactionConflict,
    plan,
    step,
    wait,
)
from beatless.http import Client as HttpClient
from beatless.orchestrator.successors import NotesSuccessors, Successors
from beatless.outbox.queries import ALL_SHARDS, execute
from beatless.settings import libpq_url
from beatless.testing import Kit
from tests.integration.test_races import at_once, until
from tests.serving import serving

MEANWHILE: list[Callable[[], object]] = []
"""Acts of the next body of `sync`, in the middle of it."""

EXECUTED: list[Any] = []
"""The inputs of the bodies of `sync`."""


@step
def sync(ctx: StepContext) -> Any:
    EXECUTED.append(ctx.input)
    while MEANWHILE:
        MEANWHILE.pop(0)()
    if ctx.input == "fails":
        raise ValueError("it fails")
    return ctx.input


@dataclass
class Customer:
    """The input of `typed`."""

    number: int


@plan("typed", input=Customer)
def typed(run: RunContext[Customer]) -> int:
    return run.input.number


@pytest.fixture
def beatless_plans() -> list[Plan]:
    MEANWHILE.clear()
    EXECUTED.clear()
    return [Plan("sync", [sync]), Plan("other", [sync]), Plan("parked", [wait("go"), sync]), typed]


KEY = "customer:7"

MODES: dict[str, dict[str, Any]] = {
    "join": {"while_unfinished": "join"},
    "skip": {"while_unfinished": "skip"},
    "replace": {"while_unfinished": "replace"},
    "debounce": {"debounce": 600},
}
STARTS = {"join": "joined", "skip": "skipped", "replace": "started", "debounce": "input_replaced"}


def start(kit: Kit, input: Any, mode: str = "join", plan: str = "sync", **more: Any) -> Run:
    return kit.client.start_run(plan, input, **{"dedupe_key": KEY, **MODES[mode], **more})


def state(kit: Kit, run: Run) -> str:
    return kit.client.get_run(run.run_id).state.value


def unfinished(kit: Kit) -> list[Run]:
    return [run for run in kit.client.list_runs(dedupe_key=KEY) if not run.state.final]


@contextmanager
def open_transaction(kit: Kit) -> Iterator[psycopg.Connection[Any]]:
    connection = kit.app.executors.connect()
    connection.autocommit = False
    try:
        yield connection
    finally:
        connection.close()


@contextmanager
def meanwhile(act: Callable[[], Any]) -> Iterator[list[Any]]:
    """The act, in a thread; its result is in the list behind the block."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(at_once(act)))
    thread.start()
    yield found
    thread.join(60)
    assert found, "it has not come back"


# The modes


@pytest.mark.parametrize("mode", MODES)
def test_a_start_beside_a_run_that_has_not_begun_says_what_it_has_done(
    beatless: Kit, mode: str
) -> None:
    first = start(beatless, 1)
    second = start(beatless, 2, mode)
    assert (first.start, second.start) == ("started", STARTS[mode])
    assert beatless.client.get_run(second.run_id).start is None
    assert (second.run_id == first.run_id) == (mode != "replace")
    beatless.advance(600)
    beatless.work_until_idle()
    assert [1 if mode in ("join", "skip") else 2] == EXECUTED
    assert state(beatless, first) == ("cancelled" if mode == "replace" else "completed")
    third = start(beatless, 3, mode)
    assert (third.start, third.run_id in (first.run_id, second.run_id)) == ("started", False)
    beatless.verify()


@pytest.mark.parametrize("mode", MODES)
def test_a_start_beside_a_run_that_runs_says_what_it_has_done(beatless: Kit, mode: str) -> None:
    seen: list[Run] = []
    MEANWHILE.append(lambda: seen.extend([start(beatless, n, mode) for n in (2, 3)]))
    first = start(beatless, 1)
    beatless.work_until_idle()
    beatless.advance(600)
    beatless.work_until_idle()

    if mode in ("join", "skip"):
        assert [(run.start, run.run_id) for run in seen] == [(STARTS[mode], first.run_id)] * 2
        assert EXECUTED == [1]
        return
    assert [run.start for run in seen] == ["started", STARTS[mode]]
    assert EXECUTED == [1, 3]
    assert state(beatless, first) == ("cancelled" if mode == "replace" else "completed")
    assert state(beatless, seen[0]) == ("cancelled" if mode == "replace" else "completed")
    assert state(beatless, seen[1]) == "completed"
    beatless.verify()


@pytest.mark.parametrize("mode", ["replace", "debounce"])
def test_the_run_behind_one_that_runs_is_not_begun_before_its_end(
    beatless: Kit, mode: str, postgres: psycopg.Connection
) -> None:
    def look() -> None:
        behind = start(beatless, 2, mode)
        beatless.advance(600)
        beatless.drain_outbox_once()
        rows = "SELECT state, reason FROM dispatches WHERE run_id = %s"
        assert postgres.execute(rows, (behind.run_id,)).fetchone() == ("delayed", "next")
        told = beatless.client.explain(behind.run_id)
        expected = f"waits for the end of the run before it with the dedupe key {KEY}"
        assert any(moment.text.startswith(expected) for moment in told)
        beatless.verify()

    MEANWHILE.append(look)
    start(beatless, 1)
    beatless.work_until_idle()
    assert EXECUTED == [1, 2]


def test_a_debounced_run_starts_when_no_input_has_come_for_so_long(beatless: Kit) -> None:
    first = start(beatless, 1, "debounce")
    for n in (2, 3):
        beatless.advance(480)
        beatless.work_until_idle()
        assert EXECUTED == []
        replaced = start(beatless, n, "debounce")
        assert (replaced.run_id, replaced.input) == (first.run_id, n)
        assert 480 < (replaced.not_before - datetime.now(UTC)).total_seconds() <= 600
    beatless.advance(600)
    beatless.work_until_idle()
    assert EXECUTED == [3]
    begun, ended = ["StepStarted", "StepFinished"], ["RunFinished"]
    types = ["RunStarted", "InputReplaced", "InputReplaced", *begun, *ended]
    assert beatless.event_types(first.run_id) == types
    told = [moment.text for moment in beatless.client.explain(first.run_id)]
    assert told.count("another start with its dedupe key has replaced its input") == 2
    beatless.verify()


def test_max_wait_ends_the_wait_of_inputs_that_keep_coming(beatless: Kit) -> None:
    first = start(beatless, 0, "debounce", max_wait=timedelta(seconds=1500))
    for n in range(1, 4):
        beatless.advance(450)
        beatless.work_until_idle()
        start(beatless, n, "debounce", max_wait=1500)
    assert EXECUTED == []
    beatless.advance(150)
    beatless.work_until_idle()
    assert EXECUTED == [3]
    assert state(beatless, first) == "completed"


@pytest.mark.parametrize("updates", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_of_many_updates_of_one_key_one_run_has_the_last_input(beatless: Kit, updates: int) -> None:
    asked = [
        RunRequest(plan="sync", input=n, dedupe_key=KEY, debounce=3600) for n in range(updates)
    ]
    third = updates // 3
    runs = beatless.client.start_runs(asked[:third])
    many = [asked[n : n + third // 4] for n in range(third, 2 * third, third // 4)]
    for found in at_once(*(partial(beatless.client.start_runs, part) for part in many)):
        runs += found
    runs += [beatless.client.start_runs([each])[0] for each in asked[2 * third :]]
    assert {run.run_id for run in runs} == {runs[0].run_id}
    beatless.advance(3600)
    beatless.work_until_idle()
    assert [updates - 1] == EXECUTED
    replaced = beatless.event_types(runs[0].run_id).count("InputReplaced")
    assert replaced == len(runs) - 1
    beatless.verify()


def test_the_input_replaces_that_of_a_run_whose_message_is_out(beatless: Kit) -> None:
    run = start(beatless, 1)
    beatless.drain_outbox_once()
    start(beatless, 2, "debounce")
    beatless.work_until_idle()
    assert EXECUTED == []
    beatless.advance(600)
    beatless.work_until_idle()
    assert (EXECUTED, state(beatless, run)) == ([2], "completed")


def test_a_run_that_waits_for_a_signal_has_begun(beatless: Kit) -> None:
    first = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    assert behind.run_id != first.run_id
    replaced = start(beatless, 3, "debounce", plan="parked")
    assert (replaced.start, replaced.run_id) == ("input_replaced", behind.run_id)
    assert start(beatless, 4, plan="parked").run_id == behind.run_id
    ended = start(beatless, 5, "replace", plan="parked")
    assert [state(beatless, run) for run in (first, behind)] == ["cancelled"] * 2
    beatless.work_until_idle()
    beatless.signal(ended.run_id, "go")
    beatless.work_until_idle()
    assert EXECUTED == [5]


# Ends of the run before


def ends_by_itself(kit: Kit, run: Run) -> None:
    kit.signal(run.run_id, "go")
    kit.work_until_idle()


ENDS: dict[str, Callable[[Kit, Run], object]] = {
    "completed": ends_by_itself,
    "failed": ends_by_itself,
    "cancelled": lambda kit, run: kit.client.cancel_run(run.run_id),
    "overdue": lambda kit, run: kit.advance(3600),
    "removed": lambda kit, run: kit.client.remove_run(run.run_id),
}


@pytest.mark.parametrize("end", ENDS)
def test_however_a_run_ends_the_one_behind_it_begins(beatless: Kit, end: str) -> None:
    given = "fails" if end == "failed" else 1
    first = start(beatless, given, plan="parked", deadline=1800)
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    beatless.advance(600)
    beatless.work_until_idle()
    assert state(beatless, behind) == "queued"

    ENDS[end](beatless, first)
    beatless.work_until_idle()

    assert state(beatless, behind) == "waiting"
    if end not in ("overdue", "removed"):
        assert state(beatless, first) == end
    assert [run.run_id for run in unfinished(beatless)] == [behind.run_id]
    beatless.verify()


def test_the_run_behind_one_that_has_ended_waits_for_its_own_time(beatless: Kit) -> None:
    first = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked", debounce=600)
    beatless.client.cancel_run(first.run_id)
    beatless.work_until_idle()
    assert state(beatless, behind) == "queued"
    assert start(beatless, 3, "debounce", plan="parked", debounce=600).run_id == behind.run_id
    beatless.advance(600)
    beatless.work_until_idle()
    assert state(beatless, behind) == "waiting"
    assert beatless.client.get_run(behind.run_id).input == 3


def test_the_run_behind_another_can_be_cancelled(beatless: Kit) -> None:
    first = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    assert beatless.client.cancel_run(behind.run_id).state == "cancelled"
    again = start(beatless, 3, "debounce", plan="parked")
    assert again.start == "started"
    ends_by_itself(beatless, first)
    beatless.advance(600)
    beatless.work_until_idle()
    assert state(beatless, again) == "waiting"
    beatless.verify()


# Races


@pytest.mark.parametrize("mode", MODES)
def test_of_many_starts_at_once_one_run_is_to_be_executed(beatless: Kit, mode: str) -> None:
    runs = at_once(*[partial(start, beatless, n, mode) for n in range(8)])
    assert all(isinstance(run, Run) for run in runs), runs
    assert [run.start for run in runs].count("started") == (8 if mode == "replace" else 1)
    [left] = unfinished(beatless)
    beatless.advance(600)
    beatless.work_until_idle()
    assert [left.input] == EXECUTED
    beatless.verify()


@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_start_waits_for_the_transaction_of_the_first(
    beatless: Kit, postgres: psycopg.Connection, mode: str, ending: str
) -> None:
    with open_transaction(beatless) as first:
        start(beatless, 1, mode, connection=first)
        with meanwhile(partial(start, beatless, 2, mode)) as found:
            until(postgres, blocked_by=first.info.backend_pid)
            getattr(first, ending)()
        [second] = found
    assert second.start == (STARTS[mode] if ending == "commit" else "started")
    beatless.advance(600)
    beatless.work_until_idle()
    kept = ending == "commit" and mode in ("join", "skip")
    assert [1 if kept else 2] == EXECUTED
    beatless.verify()


@pytest.mark.parametrize("mode", ["join", "skip"])
def test_a_start_that_is_not_needed_waits_for_nobody(beatless: Kit, mode: str) -> None:
    run = start(beatless, 1)
    with open_transaction(beatless) as other:
        start(beatless, 2, "debounce", connection=other)
        with meanwhile(partial(start, beatless, 3, mode)) as found:
            pass
        assert (found[0].start, found[0].input) == (STARTS[mode], 1)
        other.rollback()
    beatless.work_until_idle()
    assert (EXECUTED, state(beatless, run)) == ([1], "completed")


def test_the_wait_for_another_start_ends_with_the_callers_own_time_out(beatless: Kit) -> None:
    with open_transaction(beatless) as first, open_transaction(beatless) as second:
        start(beatless, 1, connection=first)
        second.execute("SET LOCAL lock_timeout = '10ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            start(beatless, 2, connection=second)
        first.commit()


@pytest.mark.parametrize("first_to_commit", ["the end", "the start"])
def test_a_run_is_stored_behind_one_that_is_just_ending(
    beatless: Kit, first_to_commit: str
) -> None:
    before = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    with open_transaction(beatless) as ends, open_transaction(beatless) as starts:
        behind = start(beatless, 2, "debounce", plan="parked", connection=starts)
        beatless.client.cancel_run(before.run_id, connection=ends)
        for each in (ends, starts) if first_to_commit == "the end" else (starts, ends):
            beatless.work_until_idle()
            each.commit()
    beatless.advance(600)
    beatless.work_until_idle()
    assert state(beatless, behind) == "waiting"
    beatless.verify()


def test_a_run_that_ends_while_it_is_to_be_replaced_is_no_longer_there(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    before = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    with open_transaction(beatless) as ends:
        beatless.client.cancel_run(before.run_id, reason="mine", connection=ends)
        with meanwhile(partial(start, beatless, 2, "replace", plan="parked")) as found:
            until(postgres, blocked_by=ends.info.backend_pid)
            ends.commit()
    beatless.work_until_idle()
    assert state(beatless, found[0]) == "waiting"
    [cancel] = [e for e in beatless.client.events(before.run_id) if e.type == "CancelRequested"]
    assert cancel.data == {"reason": "mine"}


def test_a_claim_has_the_input_or_the_run_behind_it_has(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    """The claim comes first: it is committed while the start waits for the run's row."""
    run, schema = start(beatless, 1), beatless.app.settings.schema
    with open_transaction(beatless) as claims:
        claims.execute(
            f"UPDATE {schema}.runs SET state = 'running', attempt = 1, lease_token = 7, "
            "worker = 'w:1:x', lease_expires_at = clock_timestamp() WHERE run_id = %s",
            (run.run_id,),
        )
        claims.execute(
            f"UPDATE {schema}.dispatches SET state = 'running', reason = 'lease', "
            "due_at = clock_timestamp() WHERE run_id = %s",
            (run.run_id,),
        )
        with meanwhile(partial(start, beatless, 2, "debounce")) as found:
            until(postgres, blocked_by=claims.info.backend_pid)
            claims.commit()
    assert found[0].start == "started"
    beatless.advance(600)
    beatless.work_until_idle()
    assert EXECUTED == [1, 2]


def test_a_claim_finds_the_run_not_due_whose_input_is_just_being_replaced(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = start(beatless, 1)
    beatless.drain_outbox_once()
    with open_transaction(beatless) as replaces:
        start(beatless, 2, "debounce", connection=replaces)
        with meanwhile(beatless.work_once):
            until(postgres, blocked_by=replaces.info.backend_pid)
            replaces.commit()
    assert EXECUTED == []
    beatless.advance(600)
    beatless.work_until_idle()
    assert (EXECUTED, state(beatless, run)) == ([2], "completed")


def test_a_run_behind_another_that_is_held_is_looked_at_again(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    before = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    successors = Successors(beatless.app.settings.schema)
    with open_transaction(beatless) as holds:
        start(beatless, 3, "debounce", plan="parked", connection=holds)
        beatless.client.cancel_run(before.run_id)
        looked = successors.begin(postgres, ALL_SHARDS)
        assert (looked.done, looked.left) == (0, 2)
        holds.commit()
    looked = successors.begin(postgres, ALL_SHARDS)
    assert (looked.done, looked.left) == (2, 0)
    beatless.advance(600)
    beatless.work_until_idle()
    assert (state(beatless, behind), unfinished(beatless)[0].input) == ("waiting", 3)


def test_runs_that_are_held_do_not_keep_others_from_beginning(
    beatless: Kit, postgres: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("beatless.orchestrator.successors.BATCH", 1)
    keys = ("held", "free")
    before = [start(beatless, 1, plan="parked", dedupe_key=key) for key in keys]
    beatless.work_until_idle()
    behind = [start(beatless, 2, "debounce", plan="parked", dedupe_key=key) for key in keys]
    successors = Successors(beatless.app.settings.schema)
    with open_transaction(beatless) as holds:
        start(beatless, 3, "debounce", plan="parked", dedupe_key="held", connection=holds)
        for run in before:
            beatless.client.cancel_run(run.run_id)
        looked = successors.begin(postgres, ALL_SHARDS)
        assert (looked.done, looked.left) == (1, 1)
        waits = "SELECT run_id FROM dispatches WHERE dedupe_next"
        assert postgres.execute(waits).fetchall() == [(behind[0].run_id,)]
        holds.rollback()
    beatless.advance(600)
    beatless.work_until_idle()
    assert [state(beatless, run) for run in behind] == ["waiting"] * 2


def test_a_note_that_an_older_relay_took_away_is_made_again(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    before = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    beatless.client.cancel_run(before.run_id)
    postgres.execute("DELETE FROM wakes")
    with pytest.raises(AssertionError, match="nothing says so"):
        beatless.verify()

    assert NotesSuccessors(beatless.app.settings.schema).step(postgres) == 60
    beatless.verify()
    beatless.advance(600)
    beatless.work_until_idle()
    assert state(beatless, behind) == "waiting"


def test_a_start_of_a_process_that_knows_no_such_keys_is_as_before(beatless: Kit) -> None:
    start(beatless, 1)
    others = [beatless.client.start_run("sync", n) for n in (2, 3)]
    assert [run.dedupe_key for run in others] == [None, None]
    beatless.work_until_idle()
    assert sorted(EXECUTED) == [1, 2, 3]


# Batches, namespaces, keys


@pytest.mark.parametrize("mode", MODES)
def test_two_of_one_key_in_one_batch_are_as_two_starts(beatless: Kit, mode: str) -> None:
    asked = {"plan": "sync", "dedupe_key": KEY, **MODES[mode]}
    batch = [
        RunRequest(plan="sync", input="plain"),
        RunRequest(input=1, **asked),
        RunRequest(input=2, **asked),
        RunRequest(plan="sync", input="plain"),
    ]
    runs = beatless.client.start_runs(batch)
    assert [run.start for run in runs] == ["started", "started", STARTS[mode], "started"]
    beatless.advance(600)
    beatless.work_until_idle()
    assert sorted(EXECUTED, key=str) == [1 if mode in ("join", "skip") else 2, "plain", "plain"]


def test_two_batches_with_the_same_keys_in_another_order_do_not_deadlock(beatless: Kit) -> None:
    keys = [f"k{n}" for n in range(20)]
    batches = [
        [RunRequest(plan="sync", dedupe_key=key) for key in order]
        for order in (keys, keys[::-1], keys[7:] + keys[:7])
    ]
    found = at_once(*(partial(beatless.client.start_runs, batch) for batch in batches))
    assert {len(runs) for runs in found} == {20}
    assert len({run.run_id for runs in found for run in runs}) == 20


def test_each_plan_and_each_namespace_has_keys_of_its_own(beatless: Kit) -> None:
    clients = [beatless.client, beatless.app.client_for("acme")]
    runs = [
        client.start_run(name, dedupe_key=KEY) for client in clients for name in ("sync", "other")
    ]
    assert [run.start for run in runs] == ["started"] * 4
    beatless.work_until_idle()
    assert len(EXECUTED) == 4


def test_a_key_is_looked_for_before_a_dedupe_key(beatless: Kit) -> None:
    first = start(beatless, 1, key="k1")
    assert start(beatless, 1, key="k1").start == "found"
    assert start(beatless, 2, key="k2").start == "joined"  # k2 is not used by it
    with pytest.raises(RunConflict):
        start(beatless, 2, key="k1")
    beatless.work_until_idle()
    again = start(beatless, 1, key="k1")
    assert (again.start, again.run_id) == ("found", first.run_id)
    assert start(beatless, 2, key="k2").start == "started"


def test_a_start_whose_answer_was_lost_is_the_same_start(beatless: Kit) -> None:
    for mode in MODES:
        given = {"run_id": f"mine-{mode}", "dedupe_key": mode}
        first = start(beatless, 1, mode, **given)
        assert start(beatless, 1, mode, **given).run_id == first.run_id
        start(beatless, 2, "debounce", dedupe_key=mode)
        if mode == "debounce":  # its input is another one by now
            assert start(beatless, 1, mode, **given).start == "found"


@pytest.mark.parametrize("same", ["run_id", "key"])
def test_a_start_that_is_repeated_before_its_commit_does_not_replace_itself(
    beatless: Kit, postgres: psycopg.Connection, same: str
) -> None:
    """Its answer was lost, or is late: the first start is still in its transaction."""
    given = {same: "mine"}
    with open_transaction(beatless) as slow:
        first = start(beatless, 1, "replace", connection=slow, **given)
        with meanwhile(partial(start, beatless, 1, "replace", **given)) as found:
            until(postgres, blocked_by=slow.info.backend_pid)
            slow.commit()
    assert (found[0].run_id, found[0].start) == (first.run_id, "found")
    beatless.work_until_idle()
    assert EXECUTED == [1]


def test_a_retry_takes_over_the_dedupe_key_if_it_is_free(beatless: Kit) -> None:
    failed = start(beatless, "fails")
    beatless.work_until_idle()
    held = start(beatless, 2)
    with pytest.raises(CannotRetry, match=f"run {held.run_id} with its dedupe key {KEY} is queued"):
        beatless.client.retry_run(failed.run_id)
    started, [refused] = beatless.client.retry_failed()
    assert (started, type(refused)) == ([], CannotRetry)
    beatless.work_until_idle()
    retried = beatless.client.retry_run(failed.run_id)
    assert retried.dedupe_key == KEY
    assert start(beatless, 3).run_id == retried.run_id
    behind = start(beatless, 4, "debounce")
    assert (behind.start, behind.run_id == retried.run_id) == ("started", False)
    beatless.verify()


# Refusals


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"while_unfinished": "join"}, "while_unfinished", "needs a dedupe_key"),
    ({"debounce": 5}, "debounce", "needs a dedupe_key"),
    ({"dedupe_key": "k", "max_wait": 5}, "max_wait", "needs debounce"),
    ({"dedupe_key": "k", "debounce": 5, "max_wait": 4}, "max_wait", "is shorter"),
    ({"dedupe_key": "k", "debounce": 5, "key": "k"}, "key", "cannot both"),
    ({"dedupe_key": "k", "debounce": 5, "delay": 1}, "delay", "cannot both"),
    ({"dedupe_key": "k", "debounce": 5, "while_unfinished": "join"}, "while_unf", "cannot"),
    ({"dedupe_key": "k", "debounce": 0}, "debounce", "is 0 seconds"),
    ({"dedupe_key": "k", "debounce": "5"}, "debounce", "give seconds"),
    ({"dedupe_key": "k", "debounce": 5, "deadline": 5}, "deadline", "before the run may start"),
    ({"dedupe_key": "k", "while_unfinished": "drop"}, "while_unfinished", "choose join, skip"),
    ({"dedupe_key": "k", "while_unfinished": ["join"]}, "while_unfinished", "choose join"),
    ({"dedupe_key": ""}, "dedupe_key", "1 to 256 characters"),
    ({"dedupe_key": "a\0"}, "dedupe_key", "1 to 256 characters"),
]
"""Options, the field that is named, and the problem with it."""


def test_options_that_do_not_go_together_are_refused_by_name(
    beatless: Kit, subtests: pytest.Subtests
) -> None:
    for options, field, problem in REFUSED:
        with subtests.test(str(options)):
            with pytest.raises(BadRequest, match=problem) as refused:
                beatless.client.start_run("sync", **options)
            assert refused.value.field.startswith(field)
    assert beatless.client.list_runs() == []


def test_an_input_that_is_refused_replaces_none(beatless: Kit) -> None:
    run = start(beatless, {"number": 1}, "debounce", plan="typed")
    with pytest.raises(BadPayload):
        start(beatless, {"number": "many"}, "debounce", plan="typed")
    start(beatless, Customer(number=2), "debounce", plan="typed")
    beatless.advance(600)
    beatless.work_until_idle()
    assert beatless.client.get_run(run.run_id).result == 2


# Other ways in


def test_the_outcome_of_a_start_is_told_over_http(beatless: Kit) -> None:
    with serving(beatless.app) as api, HttpClient(api.url) as client:
        asked = {"dedupe_key": KEY}
        first = client.start_run("sync", 1, **asked)
        assert first.start == "started"
        for mode in ("join", "skip"):
            second = client.start_run("sync", 2, **asked, **MODES[mode])
            assert (second.start, second.run_id) == (STARTS[mode], first.run_id)
        replaced = client.start_run("sync", 3, **asked, debounce=timedelta(seconds=5), max_wait=9)
        assert (replaced.start, replaced.input) == ("input_replaced", 3)
        assert [run.run_id for run in client.list_runs(dedupe_key=KEY)] == [first.run_id]
        assert client.list_runs(dedupe_key="other") == []
        assert client.get_run(first.run_id).start is None
        with pytest.raises(BadRequest, match="needs a dedupe_key"):
            client.start_run("sync", debounce=5)


def test_the_run_that_a_start_joins_is_shown_as_redacted(beatless: Kit) -> None:
    shown = App(beatless.app.settings, beatless.app.plans.values(), redact=lambda what, value: "-")
    start(beatless, {"secret": 1})
    try:
        with serving(shown) as api, HttpClient(api.url) as client:
            joined = client.start_run("sync", 2, dedupe_key=KEY)
            assert (joined.start, joined.input) == ("joined", "-")
            replaced = client.start_run("sync", {"secret": 3}, dedupe_key=KEY, debounce=5)
            assert (replaced.start, replaced.input) == ("input_replaced", "-")
    finally:
        shown.close()


def test_the_examples_of_the_page_are_as_it_says(beatless: Kit) -> None:
    page = (Path(__file__).parents[2] / "docs" / "duplicates.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(block, {"app": beatless.app})
    beatless.advance(600)
    beatless.work_until_idle()
    assert EXECUTED == [{"customer": 7, "why": "has moved"}, {"customer": 8, "why": "ab"}]


# The database, and what is verified


def test_a_second_holder_of_a_key_is_refused_by_the_database(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    start(beatless, 1)
    other = beatless.client.start_run("sync", 2)
    with pytest.raises(psycopg.errors.UniqueViolation, match="dispatches_dedupe"):
        postgres.execute(
            "UPDATE dispatches SET dedupe_key = 'default/customer:7' WHERE run_id = %s",
            (other.run_id,),
        )


def test_verify_names_a_run_without_its_key_and_one_that_has_begun_too_early(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    first = start(beatless, 1, plan="parked")
    beatless.work_until_idle()
    behind = start(beatless, 2, "debounce", plan="parked")
    beatless.verify()
    postgres.execute("UPDATE runs SET attempt = 1 WHERE run_id = %s", (behind.run_id,))
    with pytest.raises(AssertionError, match=r"I13.*it has begun while"):
        beatless.verify()
    postgres.execute("UPDATE runs SET attempt = 0 WHERE run_id = %s", (behind.run_id,))
    postgres.execute("UPDATE dispatches SET dedupe_key = NULL WHERE run_id = %s", (first.run_id,))
    with pytest.raises(AssertionError, match=r"I13.*does not hold its dedupe key"):
        beatless.verify()


# Transactions that do not see what others commit meanwhile


@contextmanager
def by_psycopg(kit: Kit, isolation: str) -> Iterator[psycopg.Connection[Any]]:
    with open_transaction(kit) as connection:
        connection.isolation_level = psycopg.IsolationLevel[isolation.replace(" ", "_")]
        yield connection


@contextmanager
def by_sqlalchemy(kit: Kit, isolation: str) -> Iterator[sqlalchemy.Connection]:
    engine = kit.app.engine.execution_options(isolation_level=isolation)
    with engine.connect() as connection:
        yield connection


Lose = Callable[[Kit, Any, str], object]

LOSERS: dict[str, Lose] = {
    **{
        mode: lambda kit, given, key, mode=mode: start(
            kit, 2, mode, connection=given, dedupe_key=key
        )
        for mode in MODES
    },
    "key": lambda kit, given, key: kit.client.start_run("sync", 2, key=key, connection=given),
    "batch": lambda kit, given, key: kit.client.start_runs(
        [RunRequest(plan="sync", input=2, dedupe_key=each) for each in ("a", key)],
        connection=given,
    ),
    "batch of keys": lambda kit, given, key: kit.client.start_runs(
        [RunRequest(plan="sync", input=2, key=each) for each in ("a", key)], connection=given
    ),
}
"""Starts beside a run with this key, and dedupe key."""


@pytest.mark.parametrize("begin", [by_psycopg, by_sqlalchemy])
@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_start_that_cannot_see_the_run_that_was_first_says_that_its_transaction_is_to_be_retried(
    beatless: Kit, begin: Callable[[Kit, str], AbstractContextManager[Any]], isolation: str
) -> None:
    for how, lose in LOSERS.items():
        with begin(beatless, isolation) as connection:
            execute(connection, "SELECT count(*) FROM pg_class", {})  # it sees what is there now
            start(beatless, 1, key=how, dedupe_key=how)
            with pytest.raises(
                TransactionConflict, match="try the whole transaction again"
            ) as lost:
                lose(beatless, connection, how)
            assert lost.value.sqlstate == "40001"
            connection.rollback()
            if how in MODES:
                lose(beatless, connection, how)  # it sees the first one now
                connection.rollback()


def test_an_asynchronous_start_that_cannot_see_the_first_run_is_told_so_too(beatless: Kit) -> None:
    async def main() -> None:
        url = libpq_url(beatless.app.settings.database_url)
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            await connection.execute("SELECT count(*) FROM pg_class")
            start(beatless, 1)
            with pytest.raises(TransactionConflict):
                await beatless.client.astart_run("sync", 2, dedupe_key=KEY, connection=connection)
            await connection.rollback()

    asyncio.run(main())
