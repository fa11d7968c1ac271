"""A new run that goes on where an ended one has failed; and what `explain` tells about runs."""

from pathlib import Path

import psycopg
import pytest

from beatless import CannotRetry, RunNotFound, RunState
from beatless.orchestrator.records import FailedRunFilter
from beatless.outbox.message import SHARDS, shard_of
from beatless.testing import Kit


def bodies(kit: Kit, run_id: str) -> list[str]:
    return [event.step for event in kit.client.events(run_id) if event.type == "StepStarted"]


def failed_after_the_first_step(kit: Kit, **options) -> str:
    run = kit.start_run("half", **options)
    kit.work_until_idle()
    assert kit.client.get_run(run.run_id).state is RunState.FAILED
    return run.run_id


def test_a_retry_reuses_what_has_finished_and_begins_where_it_failed(beatless: Kit) -> None:
    failed = failed_after_the_first_step(beatless, tags={"who": "me"}, priority=3, deadline=60)
    new = beatless.client.retry_run(failed)
    assert (new.retry_of, new.tags, new.priority) == (failed, {"who": "me"}, 3)
    assert round((new.deadline_at - new.created_at).total_seconds()) == 60
    beatless.work_until_idle()

    assert bodies(beatless, new.run_id) == ["half_second"]
    events = beatless.client.events(new.run_id)
    assert events[0].data["reused"]["results"] == {"first": "one"}
    assert events[2].data["error"]["message"] == "with one"  # ctx.results["first"] was there
    beatless.verify()


def test_a_retry_from_an_earlier_step_executes_it_again(beatless: Kit) -> None:
    failed = failed_after_the_first_step(beatless)
    new = beatless.client.retry_run(failed, from_step="first")
    beatless.work_until_idle()
    assert bodies(beatless, new.run_id) == ["first", "half_second"]
    beatless.verify()


def test_a_retry_of_a_retry_still_reuses_the_first_results(beatless: Kit) -> None:
    failed = failed_after_the_first_step(beatless)
    second = beatless.client.retry_run(failed)
    beatless.work_until_idle()
    third = beatless.client.retry_run(second.run_id)
    beatless.work_until_idle()
    assert bodies(beatless, third.run_id) == ["half_second"]
    assert beatless.client.events(third.run_id)[2].data["error"]["message"] == "with one"


def test_a_loop_is_retried_from_any_of_its_turns(beatless: Kit) -> None:
    run = beatless.start_run("loop", {"turns": 5})
    beatless.work_until_idle()

    new = beatless.client.retry_run(run.run_id, from_step="turn#3")
    beatless.work_until_idle()
    assert bodies(beatless, new.run_id) == ["turn#3", "turn#4", "turn#5", "stop"]
    assert beatless.client.get_run(new.run_id).result == "stopped after 5"

    last = beatless.client.retry_run(run.run_id, from_step="turn")
    beatless.work_until_idle()
    assert bodies(beatless, last.run_id) == ["turn#5", "stop"]
    beatless.verify()


def test_a_run_that_was_undone_begins_at_the_beginning(beatless: Kit) -> None:
    run = beatless.start_run("compensated")
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)
    beatless.work_until_idle()

    new = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    assert bodies(beatless, new.run_id) == ["first", "wavers"]


def test_a_cancelled_run_goes_on_where_it_was(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    beatless.client.cancel_run(run.run_id)

    new = beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    assert bodies(beatless, new.run_id) == ["second"]
    assert beatless.client.get_run(new.run_id).result == "one two"


def test_what_cannot_be_retried_is_refused_with_the_reason(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with pytest.raises(CannotRetry, match="it is queued; wait for its end or cancel it"):
        beatless.client.retry_run(run.run_id)
    beatless.work_until_idle()
    with pytest.raises(CannotRetry, match="all of its steps have finished; name the step"):
        beatless.client.retry_run(run.run_id)
    with pytest.raises(CannotRetry, match="it never began a step third"):
        beatless.client.retry_run(run.run_id, from_step="third")
    with pytest.raises(RunNotFound):
        beatless.client.retry_run("nobody")


def test_a_retry_rolls_back_with_its_transaction(beatless: Kit) -> None:
    failed = failed_after_the_first_step(beatless)
    with beatless.app.engine.connect() as connection:
        transaction = connection.begin()
        new = beatless.client.retry_run(failed, connection=connection)
        transaction.rollback()
    with pytest.raises(RunNotFound):
        beatless.client.get_run(new.run_id)


def told(kit: Kit, run_id: str) -> list[tuple[str, str | None, str]]:
    return [(moment.kind, moment.step, moment.text) for moment in kit.client.explain(run_id)]


def test_explain_tells_attempts_waits_leases_and_publishes(beatless: Kit) -> None:
    run = beatless.start_run("retries", {"failures": 1})
    beatless.work_until_idle()
    waiting = told(beatless, run.run_id)
    assert waiting[0][0] == "accepted"
    assert ("attempt", "flaky", "failed: ValueError: attempt 1 fails") in waiting
    assert any("reason: retry" in text for kind, _, text in waiting if kind == "dispatch")

    beatless.advance(10)
    beatless.work_until_idle()

    kinds = [kind for kind, _, _ in told(beatless, run.run_id)]
    assert [kind for kind in kinds if kind != "wait"] == [
        "accepted",
        "attempt",
        "attempt",
        "finished",
        "lease",
        "publish",
    ]
    assert told(beatless, run.run_id)[-1][2] == "6 of 6 events are published"


def waits(kit: Kit, run_id: str) -> list[tuple[str, int]]:
    """What a run waited for, and how many seconds."""
    found = kit.client.explain(run_id)
    return [(m.text, round(m.seconds or 0.0)) for m in found if m.kind == "wait"]


def test_explain_tells_a_back_off_from_the_wait_for_a_free_worker(
    beatless: Kit, tmp_path: Path
) -> None:
    run = beatless.start_run("two_steps")
    later = beatless.start_run("two_steps", delay=30)
    asleep = beatless.start_run("sleepy", {"wake": str(tmp_path / "wake")})
    beatless.advance(40)
    beatless.work_until_idle()
    ((text, seconds),) = waits(beatless, run.run_id)
    assert (text, 40 <= seconds < 70) == ("waited for a worker to take it", True)
    (time, (text, seconds)) = waits(beatless, later.run_id)
    assert time == ("waited for its time", 30)
    assert (text, 9 <= seconds < 40) == ("waited for a worker to take it", True)
    (tmp_path / "wake").touch()
    beatless.advance(4000)
    beatless.work_until_idle()
    (_, (snooze, _), (free, seconds)) = waits(beatless, asleep.run_id)
    assert (snooze[:17], free) == ("waited a snooze o", "waited for a worker to take it")
    assert seconds > 100

    failed = beatless.start_run("retries", {"failures": 1})
    beatless.work_until_idle()
    beatless.advance(600)
    beatless.drain_outbox_once()
    unclaimed = "none tells that it consumes the queue default"
    assert any(unclaimed in text for _, _, text in told(beatless, failed.run_id))
    beatless.work_until_idle()
    *_, (backoff, _), (free, seconds) = waits(beatless, failed.run_id)
    assert (backoff, free) == (
        "waited for the back-off of its next attempt",
        "waited for a worker to take it",
    )
    assert seconds > 500


def test_explain_tells_that_no_relay_leads_the_shard_of_a_run_that_needs_one(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run_id = beatless.start_run("two_steps").run_id
    shard = shard_of(run_id)

    def of_relays() -> list[str]:
        return [moment.text for moment in beatless.client.explain(run_id) if moment.kind == "relay"]

    (text,) = of_relays()
    assert text.startswith(f"no relay leads shard {shard}, in which the run is: it is handed to no")
    assert "`beatless doctor --check relays`" in text
    leader = "'dispatches'::regclass::oid::int4"
    postgres.execute(f"SELECT pg_advisory_lock({leader}, {(shard + 1) % SHARDS})".encode())
    assert of_relays() == [text]
    postgres.execute(f"SELECT pg_advisory_lock({leader}, {shard})".encode())
    assert of_relays() == []
    postgres.execute("SELECT pg_advisory_unlock_all()")
    assert of_relays() == [text]
    beatless.work_until_idle()
    assert of_relays() == []  # it has ended, and all of it is published


def test_explain_tells_of_an_attempt_whose_process_died(beatless: Kit) -> None:
    run = beatless.start_run("two_steps")
    with beatless.crash(at="step.effect_done"):
        beatless.work_until_idle()
    assert ("attempt", "first", "runs, or its process has died") in told(beatless, run.run_id)
    assert "is executed" in told(beatless, run.run_id)[-2][2]

    beatless.advance(60)
    beatless.work_until_idle()

    found = told(beatless, run.run_id)
    assert ("attempt", "first", "no outcome: its process or lease died") in found
    assert any(kind == "lease" and "claimed 2 times" in text for kind, _, text in found)


def test_explain_tells_of_cancels_snoozes_and_paused_queues(beatless: Kit, tmp_path: Path) -> None:
    run = beatless.start_run("sleepy", {"wake": str(tmp_path / "wake")})
    beatless.work_until_idle()
    assert ("attempt", "doze", "snoozed") in told(beatless, run.run_id)
    beatless.client.pause_queue("default")
    assert any("the queue default is paused" in text for _, _, text in told(beatless, run.run_id))

    beatless.client.cancel_run(run.run_id, reason="enough")

    found = told(beatless, run.run_id)
    assert ("cancel", None, "a cancel was accepted: enough") in found
    assert ("finished", None, "cancelled") in found
    with pytest.raises(RunNotFound):
        beatless.client.explain("nobody")


def test_a_run_whose_tags_are_older_than_their_limit_can_be_retried(
    beatless: Kit, postgres: psycopg.Connection
) -> None:
    run = beatless.start_run("fatally", tags={"a": "b"})
    beatless.work_until_idle()
    postgres.execute("UPDATE runs SET tags = jsonb_build_object('a', repeat('x', 20000))")
    assert beatless.client.retry_run(run.run_id).tags == {"a": "x" * 20_000}


def test_a_run_tells_its_newest_retry_and_lists_keep_those_with_or_without(beatless: Kit) -> None:
    failed, left = (failed_after_the_first_step(beatless) for _ in range(2))
    again = beatless.client.retry_run(failed).run_id
    newest = beatless.client.retry_run(failed).run_id
    assert beatless.client.get_run(failed).retried_by == newest
    assert beatless.client.get_run(left).retried_by is None
    listed = {run.run_id: run.retried_by for run in beatless.client.list_runs()}
    assert listed == {failed: newest, left: None, again: None, newest: None}

    def ids(**options) -> list[str]:
        return [run.run_id for run in beatless.client.list_runs(**options)]

    assert ids(retried=True) == [failed]
    assert ids(retried=False, state="failed") == [left]
    assert ids(retried=True, state="queued") == []
    assert beatless.client.start_run("half", run_id=failed).retried_by == newest
    beatless.client.remove_run(newest)
    assert beatless.client.get_run(failed).retried_by == again


def test_failed_runs_are_chosen_by_their_tags_and_counted(beatless: Kit) -> None:
    runs = [failed_after_the_first_step(beatless, tags={"n": str(n % 2), "a": "b"}) for n in (0, 1)]
    found = beatless.client.failed_runs(tags={"n": "1"})
    assert [run.run_id for run in found] == [runs[1]]
    assert len(beatless.client.failed_runs(tags={"a": "b"})) == 2
    one, both = FailedRunFilter(tags={"n": "0", "a": "b"}), FailedRunFilter(tags={"a": "b"})
    assert beatless.client.count_failed_runs(one, limit=10) == 1
    assert beatless.client.count_failed_runs(both, limit=10) == 2
    assert beatless.client.count_failed_runs(both, limit=1) == 1
    started, refused = beatless.client.retry_failed(tags={"n": "0"})
    assert ([run.retry_of for run in started], refused) == ([runs[0]], [])
    assert beatless.client.count_failed_runs(both, limit=10) == 1
