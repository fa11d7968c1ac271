"""Turns of the groups of a queue, in the order in which messages leave for the broker."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby
from math import inf

import psycopg
import pytest

from beatless import App, BadRequest, Limit, Plan, StepContext, step
from beatless.client import RunRequest
from beatless.client.client import Client
from beatless.http import Client as HttpClient
from beatless.outbox.drain import Drain
from beatless.outbox.message import shard_of
from beatless.outbox.queries import ALL_SHARDS, Queries
from beatless.outbox.sessions import prepare_to_drain
from beatless.testing import Kit
from tests import column_statistics
from tests.integration.test_relay import Door, doors, recording
from tests.integration.test_windows import settle, start
from tests.serving import serving

__all__ = ["doors"]

WINDOW = 64


@step
def only(ctx: StepContext) -> int:
    return 1


@pytest.fixture
def beatless_plans() -> list[Plan]:
    return [
        Plan("known", [only]),
        Plan("doubted", [only]),
        Plan("limited", [only], limits=[Limit("one", at_once=1)]),
    ]


class Line:
    """The relays of a fleet whose workers claim the messages in the order of their sending."""

    def __init__(self, app: App, doors: tuple[Door, Door], postgres: psycopg.Connection) -> None:
        self.door = doors[1]
        self._app = app
        self._doors = doors
        self._postgres = postgres
        self._claimed = 0
        self.relays: list[tuple[Drain, Sequence[int]]] = []
        self._made = []
        self.hire(1)

    def hire(self, relays: int) -> None:
        """Replace the relays by so many new ones, each with its part of the shards."""
        self.dismiss()
        for place in range(relays):
            # However slow the machine: messages that are not claimed yet are no lost ones.
            relay = recording(self._app, self._doors, redispatch=3600.0)
            relay.drain_once("no such run")
            self._made.append(relay)
            self.relays.append((relay._once[1], ALL_SHARDS[place::relays]))

    def dismiss(self) -> None:
        """Stop the relays."""
        for relay in self._made:
            relay.stop()
        self._made.clear()
        self.relays.clear()

    def fill(self) -> None:
        """Send what there are places for."""
        for drain, shards in self.relays:
            settle(drain, shards)

    def claim(self, count: int) -> None:
        """Claim the messages that were sent first, and end their runs."""
        first = self.door.messages[self._claimed :][:count]
        self._claimed += len(first)
        self._postgres.execute(
            "DELETE FROM dispatches WHERE run_id = ANY(%s)", ([each.run_id for each in first],)
        )

    def serve(self, at_once: int, most: float = inf) -> None:
        """Claim so many and send others, until nothing waits, or that many were claimed."""
        self.fill()
        while self._claimed < min(most, len(self.door.messages)):
            self.claim(at_once)
            self.fill()

    def groups(self, postgres: psycopg.Connection) -> list[str | None]:
        """The groups of the messages, in the order in which they were sent."""
        found = dict(postgres.execute('SELECT run_id, "group" FROM runs').fetchall())
        return [found[message.run_id] for message in self.door.messages]


@pytest.fixture
def line(
    beatless_app: App, doors: tuple[Door, Door], postgres: psycopg.Connection
) -> Iterator[Line]:
    line = Line(beatless_app, doors, postgres)
    yield line
    line.dismiss()
    postgres.execute("DELETE FROM dispatches")


def start_evenly(kit: Kit, count: int, *, group: str, relays: int) -> None:
    """Start runs of which each relay has as many: it gives turns among the runs of its shards."""
    requests = []
    for place in range(count):
        names = (f"{group}-{place}-{number}" for number in itertools.count())
        run_id = next(name for name in names if shard_of(name) % relays == place % relays)
        requests.append(RunRequest(plan="known", run_id=run_id, group=group))
    kit.client.start_runs(requests)


def turns_of(sent: list[str | None], group: str | None) -> list[int]:
    return [place for place, each in enumerate(sent) if each == group]


@pytest.mark.parametrize("relays", [1, 2])
@pytest.mark.parametrize(
    ("at_once", "large", "tenants", "each"),
    [
        (7, 250, 5, 8),
        (WINDOW, 250, 5, 8),
        pytest.param(16, 20_000, 50, 10, marks=pytest.mark.long),
    ],
)
def test_small_tenants_are_done_within_twice_their_time_alone(
    beatless: Kit,
    line: Line,
    postgres: psycopg.Connection,
    relays: int,
    at_once: int,
    large: int,
    tenants: int,
    each: int,
) -> None:
    """Beside one whose runs were all started before."""
    line.hire(relays)
    start_evenly(beatless, large, group="big", relays=relays)
    line.fill()
    small = [f"small-{n}" for n in range(tenants)]
    for group in small:
        start_evenly(beatless, each, group=group, relays=relays)
    line.serve(at_once, most=3 * tenants * each + WINDOW)

    sent = line.groups(postgres)
    counts = Counter(sent)
    assert {group: counts[group] for group in small} == dict.fromkeys(small, each)
    last = max(place for place, group in enumerate(sent) if group in small)
    assert last - WINDOW < 2 * each * tenants


@pytest.mark.slow
def test_a_new_group_waits_for_the_messages_that_are_in_the_broker(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    for n in range(20):
        start(beatless, 40, group=f"old-{n}")
    line.fill()
    for n in range(30):
        line.claim(1)
        line.fill()
        start(beatless, 2, group=f"new-{n}")
    line.fill()
    line.claim(1)
    line.fill()

    sent = line.groups(postgres)
    for n in range(29):
        # All places were taken when it came: its run is the next that is sent.
        assert sent[WINDOW + 1 + n] == f"new-{n}"


@pytest.mark.slow
def test_turns_are_by_weight(beatless: Kit, line: Line, postgres: psycopg.Connection) -> None:
    beatless.client.set_group_weight("heavy", 3)
    start(beatless, 300, group="heavy")
    start(beatless, 300, group="light")
    line.serve(5)

    sent = line.groups(postgres)
    for many in (WINDOW, 100, 300):
        shares = Counter(sent[:many])
        assert 2.7 <= shares["heavy"] / shares["light"] <= 3.3


def test_a_weight_holds_from_the_next_turn_on(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    for group in ("a", "b"):
        start(beatless, 200, group=group)
    line.fill()
    beatless.client.set_group_weight("a", 4)
    for _ in range(20):
        line.claim(5)
        line.fill()

    shares = Counter(line.groups(postgres)[WINDOW:])
    assert shares == {"a": 80, "b": 20}


def test_runs_without_a_group_are_one_group(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    start(beatless, 200)
    for group in ("a", "b"):
        start(beatless, 50, group=group)
    line.serve(9)

    first = Counter(line.groups(postgres)[:120])
    assert first == {None: 40, "a": 40, "b": 40}


def test_priority_orders_the_runs_of_a_group_and_no_others(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    low = start(beatless, 3, group="a", priority=1)
    high = start(beatless, 2, group="a", priority=9)
    other = start(beatless, 4, group="b")
    line.fill()

    sent = [message.run_id for message in line.door.messages]
    assert [each for each in sent if each in low + high] == [*high, *low]
    assert [each in other for each in sent[:8]] == [False, True] * 4


def age(postgres: psycopg.Connection, runs: list[str], hours: int) -> list[str]:
    postgres.execute(
        "UPDATE dispatches SET due_at = due_at - %s * interval '1 hour' WHERE run_id = ANY(%s)",
        (hours, runs),
    )
    return runs


@pytest.mark.parametrize("group", [None, "a"])
def test_runs_that_have_waited_for_long_come_before_those_of_a_higher_priority(
    beatless: Kit, line: Line, postgres: psycopg.Connection, group: str | None
) -> None:
    """However many of those there are: more than a look sends."""
    beatless.client.set_age_after("default", 1800)
    high = start(beatless, 100, group=group, priority=9)
    old = age(postgres, start(beatless, 3, group=group), 1)
    older = age(postgres, start(beatless, 2, group=group, priority=5), 2)
    start(beatless, 2, group=group)
    line.fill()

    assert [message.run_id for message in line.door.messages] == [*older, *old, *high[:59]]


def test_a_run_that_has_waited_for_long_waits_for_the_turn_of_its_group(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    beatless.client.set_age_after("default", 1800)
    old = age(postgres, start(beatless, 3, group="a"), 1)
    new = start(beatless, 3, group="b", priority=9)
    more = start(beatless, 1, group="a", priority=9)
    line.fill()

    sent = [message.run_id for message in line.door.messages]
    assert [each for each in sent if each not in new] == [*old, *more]
    assert sorted(each in new for each in sent[:6]) == [False] * 3 + [True] * 3


def test_of_a_queue_without_the_setting_priority_alone_decides(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    beatless.client.set_age_after("other", 1)
    beatless.client.set_age_after("default", 1)
    beatless.client.set_age_after("default", None)
    old = age(postgres, start(beatless, 1), 100)
    high = start(beatless, 2, priority=1)
    line.fill()

    assert [message.run_id for message in line.door.messages] == [*high, *old]
    assert postgres.execute("SELECT name FROM queues").fetchall() == [("other",)]


@pytest.mark.parametrize("seconds", ["-1", "NaN", "Infinity", "-Infinity", "1e300"])
def test_no_age_that_a_row_holds_stops_the_relay(
    beatless: Kit, line: Line, postgres: psycopg.Connection, seconds: str
) -> None:
    postgres.execute("INSERT INTO queues (name, age_after_s) VALUES ('default', %s)", (seconds,))
    start(beatless, 3)
    line.fill()

    assert len(line.door.messages) == 3


def test_a_pause_and_its_end_leave_the_setting(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    """Also an end by an older process, which deletes the row of the queue."""
    client = beatless.client

    def found(reader: Client | HttpClient = client) -> list[tuple[bool, float | None]]:
        return [(each.paused_at is not None, each.age_after) for each in reader.queues()]

    client.set_age_after("default", timedelta(minutes=10))
    for resume in ("resume", "older"):
        client.pause_queue("default")
        assert found() == [(True, 600.0)]
        if resume == "older":
            postgres.execute("DELETE FROM queues WHERE name = 'default'")
        else:
            client.resume_queue("default")
        assert found() == [(False, 600.0)]
    client.pause_queue("default")
    client.set_age_after("default", None)
    assert found() == [(True, None)]
    with serving(beatless_app) as api, HttpClient(api.url) as far:
        far.set_age_after("default", timedelta(hours=1))
        assert found(far) == [(True, 3600.0)]
        with pytest.raises(BadRequest, match="age_after"):
            far.set_age_after("default", 0)
        far.obliterate_queue("default")
        assert found(far) == []


def test_an_age_that_is_none_is_refused(beatless: Kit, subtests: pytest.Subtests) -> None:
    for age_after in (0, -1, 1e12, True, "10m", float("nan")):
        with subtests.test(repr(age_after)), pytest.raises(BadRequest, match="age_after"):
            beatless.client.set_age_after("default", age_after)


def test_a_group_without_runs_saves_up_nothing(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    for group in ("a", "b"):
        start(beatless, 1, group=group)
    line.serve(WINDOW)
    start(beatless, 150, group="a")
    line.serve(WINDOW)
    start(beatless, 60, group="b")
    start(beatless, 60, group="a")
    line.serve(WINDOW)

    last = line.groups(postgres)[-120:]
    assert [len(list(run)) for _, run in groupby(last)] == [1] * 120


def test_turns_outlive_their_relay(beatless: Kit, line: Line, postgres: psycopg.Connection) -> None:
    groups = [f"g{n}" for n in range(100)]
    for group in groups:
        start(beatless, 3, group=group)
    line.fill()
    line.hire(1)
    line.claim(WINDOW)
    line.fill()

    sent = line.groups(postgres)
    assert len(set(sent[:100])) == 100


def test_turns_wait_for_no_relay_that_has_been_given_the_shard(
    beatless: Kit, beatless_app: App, line: Line, postgres: psycopg.Connection
) -> None:
    """One that is frozen in the middle of its transaction, say."""
    start(beatless, 1, group="a")
    line.fill()
    turn = {"turns": [1.0], "finishes": [2.0], "cursors": [None]}
    with psycopg.connect(postgres.info.dsn, password=postgres.info.password) as other:
        # Ends who waits for it, so that the test does.
        other.execute("SET idle_in_transaction_session_timeout = '20s'")
        other.execute(
            beatless_app.queries.count_turns_sql.encode(),
            {"lead": 0, "queues": ["default"], "groups": ["default/a"], **turn},
        )
        start(beatless, 1, group="b")
        line.fill()
        assert line.groups(postgres) == ["a", "b"]
        other.execute("SELECT")


@pytest.mark.slow
def test_of_many_groups_each_has_its_turn(
    beatless: Kit,
    beatless_app: App,
    line: Line,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than one look looks at."""
    few = Queries(beatless_app.settings.schema, window=2, groups_looked_at=4)
    monkeypatch.setattr(beatless_app, "queries", few)
    line.hire(1)
    groups = [f"g{n:02}" for n in range(30)]
    for group in groups:
        start(beatless, 12, group=group)
    line.serve(2)

    sent = line.groups(postgres)
    assert Counter(sent) == dict.fromkeys(groups, 12)
    for turns in range(1, 12):
        shares = Counter(sent[: 30 * turns])
        assert max(shares.values()) - min(shares[group] for group in groups) <= 4


def test_groups_of_which_no_run_can_be_sent_hold_up_no_other(
    beatless: Kit,
    beatless_app: App,
    line: Line,
    postgres: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They fill whole looks: of their plan a message was lost, so that it is in doubt."""
    few = Queries(beatless_app.settings.schema, window=2, groups_looked_at=2)
    monkeypatch.setattr(beatless_app, "queries", few)
    line.hire(1)
    (lost,) = start(beatless, 1, "doubted")
    postgres.execute(
        "UPDATE dispatches SET state = 'sent', reason = 'unclaimed',"
        " due_at = now() + interval '1 day' WHERE run_id = %s",
        (lost,),
    )
    for n in range(9):
        start(beatless, 1, "doubted", group=f"a-{n}")
    (free,) = start(beatless, 1, group="b")
    for _ in range(9):
        line.fill()

    assert [message.run_id for message in line.door.messages] == [free]


@pytest.mark.parametrize("weight", [0, -3, 2**31 - 1])
def test_no_weight_that_a_row_holds_stops_the_relay(
    beatless: Kit, line: Line, postgres: psycopg.Connection, weight: int
) -> None:
    postgres.execute(
        "INSERT INTO group_weights (group_id, weight) VALUES ('default/a', %s)", (weight,)
    )
    for group in ("a", "b"):
        start(beatless, 3, group=group)
    line.fill()

    assert Counter(line.groups(postgres)) == {"a": 3, "b": 3}


def test_thousands_of_past_turns_are_forgotten_some_at_a_time(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    postgres.execute(
        "INSERT INTO group_turns (shard, queue, group_id, finish)"
        " SELECT 0, 'default', 'default/past-' || n, -1 FROM generate_series(1, 1000) n"
    )
    left = []
    for n in range(5):
        start(beatless, 1, group=f"new-{n}")
        line.fill()
        ((rows,),) = postgres.execute(
            "SELECT count(*) FROM group_turns WHERE group_id LIKE 'default/past-%'"
        ).fetchall()
        left.append(rows)

    assert left == [744, 488, 232, 0, 0]


def test_all_places_are_used_when_few_groups_have_runs_left(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    start(beatless, 200, group="big")
    for n in range(9):
        start(beatless, 1, group=f"small-{n}")
    line.fill()

    sent = line.groups(postgres)
    assert Counter(sent)["big"] == WINDOW - 9


def test_a_queue_without_groups_has_no_turns_noted(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    start(beatless, 100)
    line.serve(9)
    for table in ("queue_turns", "group_turns"):
        assert postgres.execute(f"SELECT * FROM {table}".encode()).fetchall() == []


@pytest.mark.slow
def test_turns_that_are_past_are_forgotten(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    for n in range(30):
        start(beatless, 1, group=f"gone-{n}")
    start(beatless, 90, group="stays")
    line.serve(9)
    noted = postgres.execute("SELECT group_id FROM group_turns").fetchall()
    assert noted == [("default/stays",)]


def test_a_claim_of_further_runs_passes_no_group_and_no_age_by(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection
) -> None:
    def claimed(run_id: str) -> list[str]:
        leases = beatless_app.leases.claim_with_others(
            postgres,
            run_id,
            plan="known",
            worker="w",
            first_steps={"known": "only"},
            dispatch=1,
            places=5,
        )
        return [lease.run.run_id for lease in leases]

    plain = start(beatless, 3)
    assert claimed(plain[0]) == plain
    free = start(beatless, 3)
    start(beatless, 1, group="a")
    assert claimed(free[0]) == free[:1]
    beatless.client.drain_queue("default")
    aging = start(beatless, 3)
    beatless.client.set_age_after("default", 60)
    assert claimed(aging[0]) == aging[:1]
    beatless.client.set_age_after("default", None)
    assert claimed(aging[1]) == aging[1:]


def test_a_group_is_listed_with_its_weight_by_its_namespace(
    beatless: Kit, beatless_app: App
) -> None:
    client, other = beatless.client, beatless_app.client_for("other")
    start(beatless, 2, group="ada")
    start(beatless, 1, group="ada", queue="mail", delay=60)
    start(beatless, 1)
    other.start_run("known", group="ada")
    other.set_group_weight("ada", 9)
    client.set_group_weight("bob", 2)
    beatless.drain_outbox_once()

    found = [
        (each.group, each.queue, each.weight, each.running, each.waiting)
        for each in client.groups()
    ]
    assert found == [("ada", "default", 1, 0, 2), ("ada", "mail", 1, 0, 0), ("bob", None, 2, 0, 0)]
    assert [each.queue for each in client.groups(queue="mail")] == ["mail"]
    assert [each.weight for each in other.groups()] == [9]
    client.set_group_weight("bob", 1)
    assert {each.group for each in client.groups()} == {"ada"}


def test_runs_are_listed_by_group(beatless: Kit, beatless_app: App) -> None:
    (first,), _ = start(beatless, 1, group="ada"), start(beatless, 1, group="bob")
    assert [run.run_id for run in beatless.client.list_runs(group="ada")] == [first]
    assert [run.run_id for run in beatless.client.list_runs(group="ada", state="queued")] == [first]
    with serving(beatless_app) as api, HttpClient(api.url) as client:
        assert [run.run_id for run in client.list_runs(group="ada", plan="known")] == [first]
        client.set_group_weight("ada", 3)
        assert [(each.group, each.weight) for each in client.groups(queue="default")] == [
            ("ada", 3),
            ("bob", 1),
        ]


def test_a_weight_that_is_none_is_refused(beatless: Kit, subtests: pytest.Subtests) -> None:
    for weight in (0, 101, 1.5, True, "3"):
        with subtests.test(repr(weight)), pytest.raises(BadRequest, match="whole number, 1 to 100"):
            beatless.client.set_group_weight("ada", weight)


@pytest.mark.slow
def test_a_run_with_a_group_and_a_limit_takes_its_turn_when_it_is_let_in(
    beatless: Kit, line: Line, postgres: psycopg.Connection
) -> None:
    limited = start(beatless, 20, "limited", group="ada")
    start(beatless, 5, group="bob")
    assert beatless.work_until_idle() == 25
    assert {beatless.client.get_run(run_id).state.value for run_id in limited} == {"completed"}
    beatless.verify()


def rows_read(postgres: psycopg.Connection) -> int:
    """Of dispatches and turns, in this transaction: also within functions, which EXPLAIN omits."""
    ((rows,),) = postgres.execute(
        "SELECT sum(seq_tup_read + idx_tup_fetch) FROM pg_stat_xact_user_tables"
        " WHERE relid IN ('dispatches'::regclass, 'group_turns'::regclass)"
    ).fetchall()
    return int(rows)


@pytest.fixture
def unseen(postgres: psycopg.Connection) -> Iterator[psycopg.Connection]:
    """New files for the tables of turns, whose statistics autovacuum leaves as they are."""
    for table in ("dispatches", "group_turns"):
        postgres.execute(f"TRUNCATE {table}")
        postgres.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
    column_statistics.forget(postgres)
    yield postgres
    for table in ("dispatches", "group_turns"):
        postgres.execute(f"DELETE FROM {table}")
        postgres.execute(f"ALTER TABLE {table} RESET (autovacuum_enabled)")


def fill(postgres: psycopg.Connection, first: int, last: int) -> None:
    postgres.execute(
        "INSERT INTO dispatches (run_id, shard, task, queue, priority, state, due_at, reason,"
        " group_id)"
        " SELECT 'run-' || n, n %% 16, 'task', 'default', n %% 2, 'waiting',"
        # The larger the index by groups is, the more does the planner like that by priorities.
        " now() - n * interval '1 ms', 'start',"
        " 'default/' || CASE WHEN n <= 100000 THEN repeat('big', 80) ELSE 'small-' || n END"
        " FROM generate_series(%s::int, %s::int) n",
        (first, last),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistics", "small"),
    [
        ("none", 500),
        ("of an empty table", 500),
        ("of an empty table that was full", 500),
        ("of its rows", 0),
        ("of its rows", 500),
        ("of the large group", 500),
    ],
)
def test_a_look_reads_the_head_of_each_group_however_many_runs_it_has(
    beatless_app: App, unseen: psycopg.Connection, statistics: str, small: int
) -> None:
    """With an age that all have reached, and with one that none has, as well."""
    postgres = unseen
    if statistics == "of an empty table that was full":
        fill(postgres, 1, 10_000)
        postgres.execute("DELETE FROM dispatches")
    if statistics.startswith("of an empty table"):
        postgres.execute("ANALYZE dispatches")
    fill(postgres, 1, 100_000)
    if statistics == "of the large group":
        postgres.execute("ANALYZE dispatches")
    fill(postgres, 100_001, 100_000 + small)
    postgres.execute(
        "INSERT INTO group_turns (shard, queue, group_id, finish)"
        " SELECT 0, 'default', 'default/small-' || (90000 + n), 1 FROM generate_series(1, 20000) n"
    )
    if statistics == "of its rows":
        postgres.execute("ANALYZE dispatches")
    prepare_to_drain(postgres)
    queries = Queries(beatless_app.settings.schema)
    parameters = {
        "shards": list(ALL_SHARDS),
        "run_id": None,
        "now": None,
        "aside": [],
        "held": [],
        "places": WINDOW,
    }
    for age_after in (None, 1e-6, 3600):
        beatless_app.client.set_age_after("default", age_after)
        for statement in (queries.pick_tasks_sql, queries.pick_free_tasks_sql):
            with postgres.transaction():
                before_it = rows_read(postgres)
                found = postgres.execute(statement.encode(), parameters).fetchall()
                assert len({row[0] for row in found}) == len(found) == WINDOW
                assert WINDOW <= rows_read(postgres) - before_it < 3000
