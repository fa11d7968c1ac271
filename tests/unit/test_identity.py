"""Run ids, shards and names of channels: stored for ever, so they may not change."""

from datetime import UTC, datetime
from uuid import UUID

import pytest

from beatless.orchestrator.records import new_run_id
from beatless.orchestrator.state import FINAL, TRANSITIONS, RunState, allowed
from beatless.outbox.message import SHARDS, TaskMessage, channel_for, run_of, shard_of
from beatless.outbox.publishers import worker_queue
from beatless.outbox.queries import channel_of


def test_run_ids_are_uuids_of_version_7_in_the_order_of_creation():
    before = int(datetime.now(UTC).timestamp() * 1000)
    ids = [new_run_id() for _ in range(1000)]
    after = int(datetime.now(UTC).timestamp() * 1000)

    assert len(set(ids)) == 1000
    stamps = [UUID(found).int >> 80 for found in ids]
    assert stamps == sorted(stamps)
    assert before <= stamps[0]
    assert stamps[-1] <= after
    assert {UUID(found).version for found in ids} == {7}
    assert {UUID(found).variant for found in ids} == {"specified in RFC 4122"}


def test_the_shard_of_a_run_is_the_same_for_ever():
    assert [shard_of(run_id) for run_id in ("a", "b", "order:1", "ü")] == [3, 9, 9, 5]


def test_the_shards_are_used_evenly():
    used = [shard_of(f"run-{number}") for number in range(16_000)]
    assert all(800 < used.count(shard) < 1200 for shard in range(SHARDS))


def test_each_dispatch_has_a_task_id_of_its_own():
    ids = {
        TaskMessage(run_id="r", task="t", queue="q", attempt=attempt).task_id
        for attempt in (1, 2, 3)
    }
    assert len(ids) == 3


def test_everything_outside_carries_the_prefix():
    assert channel_for("mine", "0f", "r:1") == "mine:events:0f:r:1"
    assert run_of("mine:events:0f:r:1") == "r:1"
    queue = worker_queue("mine", "mail")
    assert (queue.name, queue.exchange.name, queue.routing_key) == ("mine.mail",) * 3
    assert channel_of("mine") == "beatless_mine"


def test_a_channel_name_that_listen_would_cut_is_refused():
    with pytest.raises(ValueError, match="longer than 63 bytes"):
        channel_of("x" * 60)


def test_a_run_that_has_ended_goes_nowhere():
    assert {state for state in RunState if state.final} == FINAL
    for state in FINAL:
        assert not any(allowed(state, after) for after in RunState)


def test_a_run_ends_only_from_where_it_can():
    assert allowed(RunState.QUEUED, RunState.CANCELLED)
    assert not allowed(RunState.QUEUED, RunState.COMPLETED)
    assert allowed(RunState.RUNNING, RunState.QUEUED)
    assert TRANSITIONS.keys() == set(RunState)


def test_a_state_of_a_newer_version_is_shown_and_is_not_final() -> None:
    unknown = RunState("paused")
    assert (unknown.value, str(unknown), unknown.final) == ("paused", "paused", False)
    assert unknown not in list(RunState)
