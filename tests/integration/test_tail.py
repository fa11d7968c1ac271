"""A tail gives the events of all chosen runs, each once and those of a run in order."""

import json
from collections.abc import Iterator

import pytest
import redis

from beatless import App, Event
from beatless.orchestrator.records import Run
from beatless.outbox.message import channel_for
from beatless.streams import tail as tail_module
from beatless.streams.streams import Streams
from beatless.streams.tail import Choice, TailedEvent
from beatless.testing import Kit

ALL = Choice(namespace="default")

Tail = Iterator[list[TailedEvent]]


def streams(app: App, **options: object) -> Streams:
    """Those of the app, which look into the journal only where something may have been missed."""
    parts = {
        "journal": app.journal,
        "engine": app.engine,
        "redis_client": lambda: app.settings.redis.client(client_name=app.settings.prefix),
        "aredis_client": app.aredis,
        "prefix": app.settings.prefix,
        "head_check": 3600.0,
        "without_redis": 0.05,
    }
    return Streams(**{**parts, **options})


def begun(app: App, choice: Choice = ALL, **options: object) -> Tail:
    """A tail that has begun: what is published from here on comes to it."""
    tail = streams(app, **options).tail(choice)
    assert next(tail) == []
    return tail


def until_end_of(tail: Tail, *runs: Run) -> list[tuple[str, int]]:
    """The events that come until these runs have ended."""
    found, unfinished = [], {run.run_id for run in runs}
    while unfinished:
        for each in next(tail):
            found.append((each.event.run_id, each.event.seq))
            if each.event.final:
                unfinished.discard(each.event.run_id)
    return found


def until_caught_up(tail: Tail) -> list[tuple[str, int]]:
    """The events that come until all is given that was there."""
    found = []
    while batch := next(tail):
        found += [(each.event.run_id, each.event.seq) for each in batch]
    return found


def of(run: Run, first: int = 1, last: int = 6) -> list[tuple[str, int]]:
    return [(run.run_id, seq) for seq in range(first, last + 1)]


def executed_unheard(beatless: Kit, *runs: Run) -> None:
    """Execute runs; what they have appended is never published."""
    for run in runs:
        while beatless.step(run.run_id):
            pass
    forget_messages(beatless)


def forget_messages(beatless: Kit) -> None:
    with beatless.app.engine.begin() as connection:
        connection.exec_driver_sql(f"DELETE FROM {beatless.app.settings.schema}.run_outbox")


def published(app: App, run: Run, *bodies: str, origin: str | None = None) -> None:
    channel = app.streams.channel(run.run_id)
    if origin is not None:
        channel = channel_for(app.settings.prefix, origin, run.run_id)
    with app.redis() as client:
        for body in bodies:
            client.publish(channel, body)


def body(event: Event) -> str:
    return json.dumps(event.to_dict())


def test_events_of_all_runs_come_each_once_and_in_order(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app)
    runs = [beatless.start_run("two_steps") for _ in range(3)]
    beatless.work_until_idle()
    last = beatless.start_run("two_steps")
    beatless.work_until_idle()

    found = until_end_of(tail, *runs, last)

    for run in (*runs, last):
        assert [each for each in found if each[0] == run.run_id] == of(run)
    assert len(found) == 4 * 6


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        (Choice(namespace="default", plans=["two_steps", "nobody"]), {}),
        (Choice(namespace="default", queue="fast"), {"queue": "fast"}),
        (Choice(namespace="default", tags={"a": "1", "b": "2"}), {"tags": {"a": "1", "b": "2"}}),
    ],
)
def test_events_of_other_runs_do_not_come(
    beatless: Kit, beatless_app: App, choice: Choice, options: dict[str, object]
) -> None:
    tail = begun(beatless_app, choice)
    beatless.start_run("agents.run", tags={"a": "1"})
    beatless_app.client_for("acme").start_run("two_steps", run_id="other", **options)
    run = beatless.start_run("two_steps", **options)
    beatless.work_until_idle()
    last = beatless.start_run("two_steps", **options)
    beatless.work_until_idle()

    assert until_end_of(tail, last) == of(run) + of(last)


def test_a_tail_of_a_namespace_has_no_run_of_another(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app, Choice(namespace="acme"))
    beatless.start_run("two_steps")
    run = beatless_app.client_for("acme").start_run("two_steps")
    beatless.work_until_idle()

    assert until_end_of(tail, run) == of(run)


def test_events_before_the_tail_are_left_out(beatless: Kit, beatless_app: App) -> None:
    run = beatless.start_run("two_steps")
    beatless.step(run.run_id)
    beatless.drain_outbox_once()
    before = len(beatless.client.events(run.run_id))
    tail = begun(beatless_app)
    beatless.work_until_idle()

    assert until_end_of(tail, run) == of(run, before + 1)


def test_a_run_from_before_the_tail_that_was_not_heard_is_found_with_its_next_event(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    forget_messages(beatless)
    tail = begun(beatless_app)
    beatless.step(run.run_id)
    forget_messages(beatless)
    beatless.work_until_idle()

    assert until_end_of(tail, run) == of(run, 2)


def test_a_lost_connection_loses_nothing(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app)
    known = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    assert [each.event.seq for each in next(tail)] == [1]
    with beatless_app.redis() as control:
        for client in control.client_list(_type="pubsub"):
            if client["name"] == beatless_app.settings.prefix:  # and nobody else's
                control.client_kill_filter(_id=client["id"])
    new = beatless.start_run("two_steps")
    executed_unheard(beatless, known, new)
    last = beatless.start_run("two_steps")
    executed_unheard(beatless, last)

    assert until_caught_up(tail) == of(new) + of(last) + of(known, 2)


def test_a_tail_without_redis_reads_the_journal(
    beatless: Kit, beatless_app: App, shut_port: int
) -> None:
    tail = begun(
        beatless_app,
        redis_client=lambda: redis.Redis(host="127.0.0.1", port=shut_port),
        without_redis=0.02,
    )
    run = beatless.start_run("two_steps")
    executed_unheard(beatless, run)

    assert until_end_of(tail, run) == of(run)


def test_a_lost_last_message_is_found_in_the_journal(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app, head_check=0.02)
    run = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    executed_unheard(beatless, run)

    assert until_end_of(tail, run) == of(run)


def test_doubled_reordered_and_forged_messages_are_put_right(
    beatless: Kit, beatless_app: App
) -> None:
    tail = begun(beatless_app)
    run, last = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    executed_unheard(beatless, run, last)
    bodies = [body(event) for event in beatless.client.events(run.run_id)]
    forged = {"run_id": run.run_id, "seq": 10**6, "ts": 0, "type": "x", "source": "y"}
    published(beatless_app, run, json.dumps(forged), "hello", *reversed(bodies), *bodies)
    published(beatless_app, run, json.dumps(forged | {"run_id": last.run_id, "seq": 1}))
    published(beatless_app, last, json.dumps(forged | {"seq": 1}))
    published(beatless_app, run, json.dumps(forged | {"seq": 7}), origin="another")
    published(beatless_app, last, *map(body, beatless.client.events(last.run_id)))

    assert until_end_of(tail, last) == of(run) + of(last)


def test_a_forged_message_does_not_hide_a_run_to_come(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app)
    earlier = beatless.start_run("two_steps")
    forged = {"run_id": "to-come", "seq": 1, "ts": 0, "type": "x", "source": "y"}
    with beatless_app.redis() as client:
        client.publish(beatless_app.streams.channel("to-come"), json.dumps(forged))
    beatless.work_until_idle()
    assert until_end_of(tail, earlier) == of(earlier)
    run = beatless.start_run("two_steps", run_id="to-come")
    beatless.work_until_idle()

    assert until_end_of(tail, run) == of(run)


def test_a_tail_since_a_time_begins_with_the_past(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "PAGE_RUNS", 2)
    beatless.start_run("two_steps")
    beatless.work_until_idle()
    runs = [beatless.start_run("two_steps") for _ in range(5)]
    beatless.work_until_idle()
    tail = streams(beatless_app).tail(ALL, since=runs[0].created_at)
    assert until_caught_up(tail) == [each for run in runs for each in of(run)]
    last = beatless.start_run("two_steps")
    beatless.work_until_idle()

    assert until_end_of(tail, last) == of(last)


def test_what_was_given_of_a_forgotten_run_is_not_given_again(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "KNOWN_RUNS", 1)
    tail = begun(beatless_app)
    first, second = beatless.start_run("two_steps"), beatless.start_run("two_steps")
    beatless.work_until_idle()
    until_end_of(tail, first, second)
    later = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert until_end_of(tail, later) == of(later)
    for run in (first, second):
        published(beatless_app, run, *map(body, beatless.client.events(run.run_id)))
    last = beatless.start_run("two_steps")
    beatless.work_until_idle()

    assert until_end_of(tail, last) == of(last)


def test_a_tail_goes_on_in_another_history(beatless: Kit, beatless_app: App) -> None:
    told: list[None] = []
    following = streams(beatless_app, head_check=0.02)
    tail = following.tail(ALL, on_reset=lambda: told.append(None))
    assert next(tail) == []
    before = beatless.start_run("two_steps")
    beatless.work_until_idle()
    assert until_end_of(tail, before) == of(before)
    with beatless_app.engine.begin() as connection:
        beatless_app.journal.renew(connection)
    while not told:
        assert next(tail) == []
    run = beatless.start_run("two_steps")
    executed_unheard(beatless, run)

    assert until_end_of(tail, run) == of(run)


def test_a_removed_run_does_not_end_a_tail(beatless: Kit, beatless_app: App) -> None:
    tail = begun(beatless_app, head_check=0.02)
    gone = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    while not (batch := next(tail)):
        pass
    assert [each.event.seq for each in batch] == [1]
    beatless.client.cancel_run(gone.run_id)
    forget_messages(beatless)
    beatless.client.remove_run(gone.run_id)
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()

    assert until_end_of(tail, run) == of(run)
