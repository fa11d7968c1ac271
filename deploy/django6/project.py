"""Tests of beatless.django.tasks in a copy of examples/django_shop, by test_django_tasks.py."""

import asyncio
from datetime import timedelta

import pytest
from django.core import checks
from django.db import connection, transaction
from django.tasks import TaskResultStatus, signals, task, task_backends
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.test import override_settings
from django.utils import timezone
from shop import tasks
from shop.orders import place_order

from beatless import RunState, retry
from beatless.django import app, client
from beatless.django.task_plans import plan_of
from beatless.django.tasks import class_path

BACKEND = "beatless.django.tasks.BeatlessBackend"


@pytest.fixture(autouse=True)
def no_calls():
    tasks.calls.clear()


async def at_once(result):
    return read(result)


def read(result):
    return task_backends[result.backend].get_result(result.id)


def test_a_task_is_stored_with_the_block_or_not_at_all(beatless, db):
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        tasks.note.enqueue("lost")
        1 / 0
    with transaction.atomic():
        result = tasks.note.enqueue("kept")
        assert read(result) == result
        assert beatless.client.list_runs() == []
    connection.close()
    alone = tasks.note.enqueue("alone")
    assert connection.connection is None
    beatless.work_until_idle()
    assert sorted(tasks.calls) == ["alone", "kept"]
    assert {read(each).status for each in (result, alone)} == {TaskResultStatus.SUCCESSFUL}


def test_a_task_is_a_plan_by_its_path_with_its_queue_and_priority(beatless, db):
    result = asyncio.run(tasks.send.using(priority=-100).aenqueue(to="ann"))
    (run,) = beatless.client.list_runs(plan="shop.tasks.send", queue="mail")
    assert (run.run_id, run.priority, run.state) == (result.id, 0, RunState.QUEUED)
    assert result.task.priority == read(result).task.priority == -100
    beatless.work_until_idle()
    result = asyncio.run(tasks.send.aget_result(result.id))
    assert asyncio.run(at_once(result)) == result
    assert (result.return_value, result.kwargs) == ("sent to ann", {"to": "ann"})
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert {app.plans["shop.tasks.send"].queue, app.plans["shop.tasks.note"].queue} == {
        "mail",
        "default",
    }


@pytest.mark.parametrize(
    ("given", "stored"), [(-100, 0), (-1, 4), (0, 5), (19, 5), (20, 6), (100, 9)]
)
def test_priorities_keep_their_order(given, stored, beatless, db):
    tasks.note.using(priority=given).enqueue("x")
    assert [run.priority for run in beatless.client.list_runs()] == [stored]


def test_a_task_is_tried_again_and_its_errors_are_kept(beatless, db):
    result = tasks.charge.enqueue(2)
    assert (result.attempts, result.errors, result.last_attempted_at) == (0, [], None)
    for attempts in (1, 2):
        beatless.work_until_idle()
        result.refresh()
        assert (result.status, result.attempts) == (TaskResultStatus.READY, attempts)
        assert [each.traceback.splitlines()[-1] for each in result.errors] == [
            f"shop.tasks.Card.Declined: no {number}" for number in range(1, attempts + 1)
        ]
        beatless.advance(3600)
    beatless.work_until_idle()
    result.refresh()
    assert result.return_value == {"id": result.id, "status": "RUNNING"}
    assert tasks.calls == ["attempt 1", "attempt 2", "attempt 3"]
    assert (result.attempts, result.worker_ids[:2]) == (3, ["unknown", "unknown"])
    assert result.errors[0].exception_class_path == "shop.tasks.Card.Declined"
    assert result.started_at < result.last_attempted_at < result.finished_at


def test_options_of_the_backend_are_for_tasks_that_say_nothing():
    options = {"RETRY": retry(max_attempts=2), "TIMEOUT": 5}
    (silent,) = plan_of(tasks.note, options).steps
    (own,) = plan_of(tasks.pack, options).steps
    assert (silent.retry.max_attempts, silent.timeout) == (2, 5)
    assert (own.retry.max_attempts, own.timeout) == (5, 30)


def test_a_task_whose_attempts_are_used_up_has_failed(beatless, db):
    result = tasks.charge.enqueue(9)
    for _ in range(3):
        beatless.work_until_idle()
        beatless.advance(3600)
    result.refresh()
    assert (result.status, len(result.errors)) == (TaskResultStatus.FAILED, 3)
    with pytest.raises(ValueError, match="Task failed"):
        result.return_value


@pytest.mark.parametrize(
    ("enqueued", "raised"), [(tasks.unreadable, TypeError), (tasks.leave, SystemExit)]
)
def test_a_task_without_a_policy_has_one_attempt(enqueued, raised, beatless, db):
    result = enqueued.enqueue()
    beatless.work_until_idle()
    result.refresh()
    (error,) = result.errors
    assert (result.status, error.exception_class) == (TaskResultStatus.FAILED, raised)


def test_a_cancelled_run_is_a_failed_task(beatless, db):
    result = tasks.note.enqueue("never")
    client().cancel_run(result.id, reason="by hand")
    result.refresh()
    (error,) = result.errors
    assert (result.status, result.attempts) == (TaskResultStatus.FAILED, 0)
    assert (error.exception_class.__name__, error.traceback) == (
        "RunCancelled",
        "RunCancelled: by hand\n",
    )


def test_a_task_runs_after_its_time(beatless, db):
    after = timezone.now() + timedelta(hours=1)
    result = tasks.note.using(run_after=after).enqueue("later")
    beatless.work_until_idle()
    assert (tasks.calls, read(result).task.run_after) == ([], after)
    beatless.advance(3601)
    beatless.work_until_idle()
    assert tasks.calls == ["later"]


def test_without_use_tz_times_are_those_of_the_time_zone(beatless, db):
    with override_settings(USE_TZ=False, TIME_ZONE="Asia/Tokyo"):
        after = timezone.now() + timedelta(hours=1)
        result = tasks.note.using(run_after=after).enqueue("later")
        assert result.enqueued_at.tzinfo is None
        assert read(result).task.run_after == after
        (run,) = beatless.client.list_runs()
    assert run.not_before == timezone.make_aware(after, timezone.zoneinfo.ZoneInfo("Asia/Tokyo"))


@task
def elsewhere():
    """In no module `tasks`."""


def test_a_task_that_workers_would_not_find_is_refused(beatless, db):
    with pytest.raises(InvalidTask, match=r"elsewhere is in no module .* the module tasks of an"):
        elsewhere.enqueue()


def test_a_queue_that_none_of_ours_can_be_called_is_refused(beatless, db):
    tasks_in = {"default": {"BACKEND": BACKEND, "QUEUES": []}}
    with override_settings(TASKS=tasks_in), pytest.raises(InvalidTask, match="is 'a b', which"):
        tasks.note.using(queue_name="a b")


def test_only_runs_of_its_tasks_are_results_of_a_backend(beatless, db):
    result = tasks.send.enqueue("ann")
    others = [place_order("book").run_id, "no-such-run", 123, "\0"]
    others.append(client().start_run("shop.tasks.note", {"backend": "another"}).run_id)
    for each in others:
        with pytest.raises(TaskResultDoesNotExist):
            task_backends["default"].get_result(each)
    with override_settings(TASKS={"default": {"BACKEND": BACKEND, "QUEUES": ["default"]}}):
        assert task_backends["default"].get_result(result.id).task.queue_name == "mail"


def test_a_run_that_was_started_by_its_plan_is_a_result_too(beatless, db):
    run = client().start_run("shop.tasks.note", {"args": ["by hand"]})
    beatless.work_until_idle()
    assert tasks.calls == ["by hand"]
    assert tasks.note.get_result(run.run_id).args == ["by hand"]


def test_signals_tell_of_the_start_and_the_end_and_repeat_no_work(beatless, db):
    told = []

    def hear(signal, task_result, **_):
        told.append((signal, task_result.id, task_result.status))
        if signal is not signals.task_enqueued:
            raise ValueError("a receiver's own")

    for each in (signals.task_enqueued, signals.task_started, signals.task_finished):
        each.connect(hear)
    result, failed = tasks.note.enqueue("once"), tasks.leave.enqueue()
    beatless.work_until_idle()
    for each in (signals.task_enqueued, signals.task_started, signals.task_finished):
        each.disconnect(hear)
    assert tasks.calls == ["once"]
    assert read(result).status == TaskResultStatus.SUCCESSFUL
    for one, end in ((result, TaskResultStatus.SUCCESSFUL), (failed, TaskResultStatus.FAILED)):
        assert [(signal, status) for signal, about, status in told if about == one.id] == [
            (signals.task_enqueued, TaskResultStatus.READY),
            (signals.task_started, TaskResultStatus.RUNNING),
            (signals.task_finished, end),
        ]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"OPTIONS": {"RETRIES": 3}}, "OPTIONS has 'RETRIES'; there are: RETRY, TIMEOUT"),
        ({"OPTIONS": {"RETRY": 3}}, "RETRY is 3; give it a policy: retry(max_attempts=3)"),
        ({"OPTIONS": {"TIMEOUT": 0}}, "TIMEOUT is 0"),
        ({"QUEUES": ["a b"]}, "QUEUES: queue is 'a b'"),
        ({"OPTIONS": {"RETRY": retry(max_attempts=3), "TIMEOUT": 30}}, ""),
    ],
)
def test_a_check_names_what_is_wrong_with_an_entry(entry, said):
    with override_settings(TASKS={"default": {"BACKEND": BACKEND, **entry}}):
        found = [str(each.msg) for each in checks.run_checks() if each.id == "beatless.E002"]
    assert len(found) == bool(said)
    assert all(f"TASKS['default']: {said}" in each for each in found)


@pytest.mark.parametrize(
    ("kind", "message", "trace", "path"),
    [
        ("Late", "", "…\nshop.Late\n", "shop.Late"),
        ("Late", "a\nLate: b", "…\nshop.Late: a\nLate: b\n", "shop.Late"),
        ("ValueError", "x", "cut off", "builtins.ValueError"),
        ("DeadlineExceeded", "x", "", "beatless.orchestrator.errors.DeadlineExceeded"),
        ("Unknown", "x", "", "Unknown"),
    ],
)
def test_the_path_of_an_errors_class_is_read_from_its_traceback(kind, message, trace, path):
    assert class_path(kind, message, trace) == path
