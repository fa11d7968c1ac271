"""A tail gives the events of all chosen runs, each once and those of a run in order."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NoReturn

import pytest
import redis
from sqlalchemy import exc

from beatless import App, Event
from beatless.cursors import TailPlace, encode_tail, parse_tail_id
from beatless.orchestrator.records import Run
from beatless.outbox.message import channel_for
from beatless.streams import tail as tail_module
from beatless.streams.streams import Streams
from beatless.streams.tail import Batch, Tail
from beatless.streams.tailed import Choice
from beatless.testing import Kit
from tests.proxy import proxy

ALL = Choice(namespace="default")

Batches = Iterator[Batch]


def streams(app: App, **options: object) -> Streams:
    """Those of the app, which look into the journal only where something may have been missed."""
    parts = {
        "journal": app.journal,
        "engine": app.engine,
        "redis_client": lambda: app.settings.redis.client(client_name=app.settings.prefix),
        "aredis_client": lambda: app.settings.redis.aclient(client_name=app.settings.prefix),
        "prefix": app.settings.prefix,
        "head_check": 3600.0,
        "without_redis": 0.05,
    }
    return Streams(**{**parts, **options})


def begun(app: App, choice: Choice = ALL, **options: object) -> Batches:
    """A tail that has begun: what is published from here on comes to it."""
    tail = streams(app, **options).tail(choice).follow()
    assert next(tail) == []
    return tail


class InLoop:
    """A tail that is followed in a loop, for tests in a thread."""

    def __init__(self, tail: Tail, on_reset: Callable[[], None]) -> None:
        self._runner = asyncio.Runner()
        self._batches = tail.afollow(on_reset)

    def __iter__(self) -> "InLoop":
        return self

    def __next__(self) -> Batch:
        async def next_batch() -> Batch | None:
            return await anext(self._batches, None)

        batch = self._runner.run(next_batch())
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        self._runner.run(self._batches.aclose())
        self._runner.close()


Follow = Callable[..., Batches]


@pytest.fixture(params=["in a thread", "in a loop"])
def follow(request: pytest.FixtureRequest) -> Iterator[Follow]:
    """Follows a tail by one of the two ways to do it."""
    opened = []

    def follow(tail: Tail, on_reset: Callable[[], None] = lambda: None) -> Batches:
        in_thread = request.param == "in a thread"
        opened.append(tail.follow(on_reset) if in_thread else InLoop(tail, on_reset))
        return opened[-1]

    yield follow
    for tail in opened:
        tail.close()


def until_end_of(tail: Batches, *runs: Run) -> list[tuple[str, int]]:
    """The events that come until these runs have ended."""
    found, unfinished = [], {run.run_id for run in runs}
    while unfinished:
        for each in next(tail):
            found.append((each.event.run_id, each.event.seq))
            if each.event.final:
                unfinished.discard(each.event.run_id)
    return found


def until_caught_up(tail: Batches) -> list[tuple[str, int]]:
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


def test_events_of_all_runs_come_each_once_and_in_order(
    beatless: Kit, beatless_app: App, follow: Follow
) -> None:
    tail = follow(streams(beatless_app).tail(ALL))
    assert next(tail) == []
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


def test_a_lost_connection_loses_nothing(
    beatless: Kit, beatless_app: App, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)  # what was started before is not looked at
    silent = beatless.start_run("two_steps")
    forget_messages(beatless)
    tail = follow(streams(beatless_app).tail(ALL))
    assert next(tail) == []
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
    beatless.step(silent.run_id)
    forget_messages(beatless)
    moved = len(beatless.client.events(silent.run_id))

    found: list[tuple[str, int]] = []
    while len(found) < 16 + moved:
        found += [(each.event.run_id, each.event.seq) for each in next(tail)]

    assert found[:12] == of(new) + of(last)
    assert sorted(found[12:]) == sorted(of(known, 2) + of(silent, 2, moved))


def test_a_tail_without_redis_reads_the_journal(
    beatless: Kit,
    beatless_app: App,
    shut_port: int,
    follow: Follow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)  # what was started before is not looked at
    silent = beatless.start_run("two_steps")
    refused = {"host": "127.0.0.1", "port": shut_port}
    without = streams(
        beatless_app,
        redis_client=lambda: redis.Redis(**refused),
        aredis_client=lambda: redis.asyncio.Redis(**refused),
        without_redis=0.02,
        head_check=0.02,
    )
    tail = follow(without.tail(ALL))
    assert next(tail) == []
    run = beatless.start_run("two_steps")
    executed_unheard(beatless, run)

    assert until_end_of(tail, run) == of(run)

    executed_unheard(beatless, silent)
    assert until_end_of(tail, silent) == of(silent, 2)


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
    tail = streams(beatless_app).tail(ALL, since=runs[0].created_at).follow()
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


def test_a_tail_goes_on_in_another_history(
    beatless: Kit, beatless_app: App, follow: Follow
) -> None:
    told: list[None] = []
    following = streams(beatless_app, head_check=0.02)
    tail = follow(following.tail(ALL), lambda: told.append(None))
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


def test_a_tail_goes_on_where_another_was(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)  # what was started before is not looked at
    before = beatless.start_run("two_steps")
    silent, known = (beatless.start_run("two_steps") for _ in range(2))
    executed_unheard(beatless, before)
    first = streams(beatless_app).tail(ALL)
    batches = first.follow()
    assert next(batches) == []
    beatless.step(known.run_id)
    beatless.drain_outbox_once()
    given = [each.event.seq for each in next(batches)]
    place = first.place
    assert place is not None
    batches.close()
    new = beatless.start_run("two_steps")
    executed_unheard(beatless, new, known)
    beatless.step(silent.run_id)
    forget_messages(beatless)
    moved = len(beatless.client.events(silent.run_id))
    place = parse_tail_id(encode_tail(place), "id")

    found = until_caught_up(streams(beatless_app).tail(ALL, after=place).follow())

    wanted = [*of(new), *of(known, given[0]), *of(silent, 2, moved)]
    assert sorted(found) == sorted(wanted)
    assert [each for each in found if each[0] == known.run_id] == of(known, given[0])


def test_what_was_before_a_tail_began_does_not_come_when_it_goes_on(
    beatless: Kit, beatless_app: App
) -> None:
    """Though it looks at the minute before, for what was late."""
    unfinished, ended = (beatless.start_run("two_steps") for _ in range(2))
    beatless.step(unfinished.run_id)
    while beatless.step(ended.run_id):
        pass
    first = streams(beatless_app).tail(ALL)
    batches = first.follow()
    assert next(batches) == []
    batches.close()

    assert until_caught_up(streams(beatless_app).tail(ALL, after=first.place).follow()) == []


def test_a_place_in_another_history_is_told_and_the_present_follows(
    beatless: Kit, beatless_app: App
) -> None:
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    told: list[None] = []
    place = TailPlace(epoch="another", began=run.created_at, seen=run.created_at)
    tail = streams(beatless_app).tail(ALL, after=place)
    batches = tail.follow(lambda: told.append(None))

    assert next(batches) == []
    assert told == [None]
    assert tail.place is not None
    assert tail.place.epoch == beatless.client.epoch()
    assert tail.place.began > run.created_at


def test_another_history_is_told_though_postgres_goes_away_while_it_is_noticed(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = beatless.start_run("two_steps")
    told: list[None] = []
    place = TailPlace(epoch="another", began=run.created_at, seen=run.created_at)
    tail = streams(beatless_app).tail(ALL, after=place)
    read = tail._time

    def gone(_connection: object) -> NoReturn:
        monkeypatch.setattr(tail, "_time", read)
        raise exc.OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(tail, "_time", gone)
    assert next(tail.follow(lambda: told.append(None))) == []
    assert told == [None]


def test_a_tail_has_a_batch_in_time_and_ends_in_time(
    beatless: Kit, beatless_app: App, follow: Follow
) -> None:
    tail = follow(streams(beatless_app).tail(ALL, idle=0.01))
    assert [next(tail) for _ in range(3)] == [[], [], []]
    ending = follow(streams(beatless_app).tail(ALL, timeout=0.01))
    assert not any(ending)


def test_there_is_a_batch_in_time_while_much_is_read_of_which_nothing_is_chosen(
    beatless: Kit, beatless_app: App, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_module, "PAGE_RUNS", 1)
    run = beatless.start_run("two_steps")
    beatless.work_until_idle()
    nothing = Choice(namespace="default", events=["StepFailed"])
    tail = streams(beatless_app).tail(nothing, since=run.created_at, idle=0.0)
    batches = follow(tail)
    assert next(batches) == []
    assert not tail.caught_up
    assert tail.place is not None
    assert tail.place.seen == run.created_at
    while not tail.caught_up:
        assert next(batches) == []
    assert tail.place.seen > run.created_at


def test_a_tail_that_begins_in_the_past_ends_in_time(beatless: Kit, beatless_app: App) -> None:
    runs = [beatless.start_run("two_steps") for _ in range(2)]
    beatless.work_until_idle()
    tail = streams(beatless_app).tail(ALL, since=runs[0].created_at, timeout=3600)
    batches = tail.follow()
    assert next(batches)
    tail._deadline = 0.0  # its time is over, in the middle of what is past
    assert not any(batches)


def test_more_runs_than_a_tail_knows_come_from_the_past_each_event_once(
    beatless: Kit, beatless_app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one moved last: what is between is not older than the tail."""
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)
    monkeypatch.setattr(tail_module, "KNOWN_RUNS", 1)
    monkeypatch.setattr(tail_module, "PAGE_RUNS", 1)
    long = beatless.start_run("two_steps")
    runs = [beatless.start_run("two_steps") for _ in range(3)]
    executed_unheard(beatless, *runs)
    beatless.step(long.run_id)
    forget_messages(beatless)
    moved = len(beatless.client.events(long.run_id))
    tail = streams(beatless_app).tail(ALL, since=long.created_at).follow()

    wanted = of(long, 1, moved) + [each for run in runs for each in of(run)]
    assert until_caught_up(tail) == wanted

    beatless.work_until_idle()
    assert until_end_of(tail, long) == of(long, moved + 1)


def test_what_relays_do_not_publish_is_read_from_the_journal(
    beatless: Kit, beatless_app: App, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that was silent before: who comes back has its place behind these events."""
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)
    monkeypatch.setattr(tail_module, "LAG_S", 0.0)
    silent = beatless.start_run("two_steps")
    forget_messages(beatless)
    tail = follow(streams(beatless_app, head_check=0.02).tail(ALL, timeout=60))
    assert next(tail) == []
    beatless.step(silent.run_id)
    wanted, found = of(silent, 2, len(beatless.client.events(silent.run_id))), []
    while len(found) < len(wanted) and (batch := next(tail, None)) is not None:
        found += [(each.event.run_id, each.event.seq) for each in batch]

    assert found == wanted


def test_a_connection_that_has_died_without_a_word_is_replaced(
    beatless: Kit,
    beatless_app: App,
    follow: Follow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tail_module, "LATE_S", 0.0)  # what was started before is not looked at
    monkeypatch.setattr(tail_module, "ANSWER_S", 0.1)
    silent = beatless.start_run("two_steps")
    beatless.drain_outbox_once()
    with proxy(beatless_app.settings.redis.hosts[0][1]) as way:
        there = replace(beatless_app.settings.redis, hosts=(("127.0.0.1", way.port),))
        following = streams(
            beatless_app,
            redis_client=there.client,
            aredis_client=there.aclient,
            head_check=0.02,
        )
        tail = follow(following.tail(ALL))
        assert next(tail) == []
        way.hold()
        beatless.work_until_idle()

        assert until_end_of(tail, silent) == of(silent, 2)
