"""The ticks of cron expressions and intervals. The table was written by hand."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beatless.orchestrator.ticks import (
    Ticks,
    jitter_s,
    problem_with_cron,
    problem_with_every,
    problem_with_zone,
    tick_key,
)

BRUSSELS, NEW_YORK, LORD_HOWE = "Europe/Brussels", "America/New_York", "Australia/Lord_Howe"
"""The third puts its clocks forward and back by half an hour."""

TABLE = [
    # Brussels, 29 March 2026: at 01:00Z the clock goes from 02:00 to 03:00.
    (BRUSSELS, "30 2 * * *", "2026-03-28T00:00", "03-28T01:30 03-29T01:00 03-30T00:30"),
    (BRUSSELS, "0 3 * * *", "2026-03-28T00:00", "03-28T02:00 03-29T01:00 03-30T01:00"),
    (BRUSSELS, "15 * * * *", "2026-03-28T23:30", "03-29T00:15 03-29T01:15 03-29T02:15"),
    (BRUSSELS, "*/30 * * * *", "2026-03-29T00:15", "03-29T00:30 03-29T01:00 03-29T01:30"),
    (BRUSSELS, "0 */2 * * *", "2026-03-28T22:30", "03-28T23:00 03-29T02:00 03-29T04:00"),
    # Brussels, 25 October 2026: at 01:00Z the clock goes from 03:00 back to 02:00.
    (BRUSSELS, "30 2 * * *", "2026-10-24T00:00", "10-24T00:30 10-25T00:30 10-26T01:30"),
    (BRUSSELS, "15 * * * *", "2026-10-25T00:00", "10-25T00:15 10-25T01:15 10-25T02:15"),
    (BRUSSELS, "*/30 * * * *", "2026-10-25T00:15", "10-25T00:30 10-25T01:00 10-25T01:30"),
    (BRUSSELS, "0 4 * * *", "2026-10-24T00:00", "10-24T02:00 10-25T03:00 10-26T03:00"),
    # New York, 8 March 2026: at 07:00Z the clock goes from 02:00 to 03:00.
    (NEW_YORK, "0 2 * * *", "2026-03-07T00:00", "03-07T07:00 03-08T07:00 03-09T06:00"),
    (NEW_YORK, "59 2 * * *", "2026-03-07T00:00", "03-07T07:59 03-08T07:00 03-09T06:59"),
    (NEW_YORK, "0 * * * *", "2026-03-08T05:30", "03-08T06:00 03-08T07:00 03-08T08:00"),
    # New York, 1 November 2026: at 06:00Z the clock goes from 02:00 back to 01:00.
    (NEW_YORK, "30 1 * * *", "2026-10-31T00:00", "10-31T05:30 11-01T05:30 11-02T06:30"),
    (NEW_YORK, "0 * * * *", "2026-11-01T04:30", "11-01T05:00 11-01T06:00 11-01T07:00"),
    (NEW_YORK, "*/15 1 * * *", "2026-11-01T05:20", "11-01T05:30 11-01T05:45 11-01T06:00"),
    # Lord Howe, 4 October 2026: at 15:30Z of the day before, the clock goes from 02:00 to 02:30.
    (LORD_HOWE, "15 2 * * *", "2026-10-02T00:00", "10-02T15:45 10-03T15:30 10-04T15:15"),
    # Lord Howe, 5 April 2026: at 15:00Z of the day before, the clock goes from 02:00 to 01:30.
    (LORD_HOWE, "45 1 * * *", "2026-04-03T00:00", "04-03T14:45 04-04T14:45 04-05T15:15"),
    # Brussels, 25 October 2026: within the hour that comes again, its first ticks are over.
    (BRUSSELS, "30 2 * * *", "2026-10-25T01:10", "10-26T01:30 10-27T01:30"),
    # Havana, 1 November 2026: at 05:00Z the clock goes from 01:00 to 00:00.
    ("America/Havana", "0,30 0-4 * * *", "2026-11-01T05:21", "11-01T06:00 11-01T06:30"),
    # Without a change of clocks, and where there is none.
    (BRUSSELS, "0 2 29 2 *", "2026-01-01T00:00", "2028-02-29T01:00 2032-02-29T01:00"),
    ("UTC", "30 2 * * 7", "2026-03-27T00:00", "03-29T02:30 04-05T02:30"),
    ("UTC", "0 0 1 1 *", "2026-03-27T00:00", "2027-01-01T00:00 2028-01-01T00:00"),
]


def at(text: str) -> datetime:
    year = "" if text.count("-") == 2 else "2026-"
    return datetime.fromisoformat(f"{year}{text}").replace(tzinfo=UTC)


def cron(expression: str, tz: str = "UTC") -> Ticks:
    return Ticks(cron=expression, every_s=None, tz=tz)


def every(seconds: int) -> Ticks:
    return Ticks(cron=None, every_s=seconds, tz="UTC")


@pytest.mark.parametrize(("zone", "expression", "after", "expected"), TABLE)
def test_ticks_come_as_in_debians_cron_where_clocks_change(
    zone: str, expression: str, after: str, expected: str
) -> None:
    ticks, found, moment = cron(expression, zone), [], at(after)
    for _ in expected.split():
        tick = ticks.after(moment)
        assert tick is not None
        found.append(tick)
        moment = tick
    assert found == [at(text) for text in expected.split()]
    assert {tick.tzinfo for tick in found} == {UTC}


def test_intervals_are_counted_from_the_epoch_and_know_no_change_of_clocks() -> None:
    assert every(60).after(at("03-29T00:59")) == at("03-29T01:00")
    assert every(60).after(at("03-29T01:00")) == at("03-29T01:01")
    assert every(7).after(datetime(1970, 1, 1, tzinfo=UTC)).timestamp() == 7
    assert every(86_400).after(at("03-29T12:00")) == at("03-30T00:00")


CRONS = ["0 2 * * *", "30 2 * * *", "*/15 * * * *", "0 */3 * * *", "17 1-4 * * 1-5", "0 0 1 * *"]
MOMENTS = st.integers(0, 700 * 86_400).map(lambda s: at("01-01T00:00") + timedelta(seconds=s))
ZONES = st.sampled_from([BRUSSELS, NEW_YORK, LORD_HOWE, "UTC", "Asia/Kathmandu"])
SOME_TICKS = st.builds(cron, st.sampled_from(CRONS), ZONES) | st.builds(
    every, st.integers(1, 100_000)
)


@settings(max_examples=60, deadline=None)
@given(SOME_TICKS, MOMENTS, st.integers(0, 40 * 86_400))
def test_the_last_tick_is_the_one_that_counting_forward_ends_with(
    ticks: Ticks, since: datetime, seconds: int
) -> None:
    first = ticks.after(since)
    assert first is not None
    until = first + timedelta(seconds=min(seconds, 3000 * (ticks.every_s or 900)))
    counted = list(ticks.between(first, until + timedelta(microseconds=1)))
    assert ticks.last(until, since=first) == counted[-1]
    assert counted[0] == first
    assert all(earlier < later for earlier, later in itertools.pairwise(counted))


@settings(max_examples=60, deadline=None)
@given(SOME_TICKS, MOMENTS)
def test_ticks_are_later_than_the_moment_and_leave_none_out(ticks: Ticks, moment: datetime) -> None:
    tick = ticks.after(moment)
    assert tick is not None
    assert tick > moment
    assert ticks.after(tick - timedelta(seconds=1)) == tick


def test_the_last_of_a_year_of_minutes_is_found_without_counting_them() -> None:
    calls = 0

    class Counted(Ticks):
        __slots__ = ()

        def _from(self, moment: datetime):
            nonlocal calls
            for tick in super()._from(moment):
                calls += 1
                yield tick

    ticks = Counted(cron="* * * * *", every_s=None, tz=BRUSSELS)
    assert ticks.last(at("11-28T02:30"), since=at("2025-11-28T02:30")) == at("11-28T02:30")
    assert calls < 100


@pytest.mark.parametrize(
    "bad", ["", "daily", "@daily", "* * * *", "* * * * * *", "61 * * * *", "0 0 31 2 *", None, 5]
)
def test_a_bad_cron_expression_is_told_with_a_good_one(bad: object) -> None:
    assert "is " in problem_with_cron(bad)


@pytest.mark.parametrize("bad", [0, -1, 0.5, 1.5, True, "60", 10**9, float("nan"), float("inf")])
def test_an_interval_is_a_whole_number_of_seconds(bad: object) -> None:
    assert "whole number of seconds" in problem_with_every(bad)


@pytest.mark.parametrize("bad", ["Mars/Olympus", "../etc/passwd", "", "/etc/localtime", 5, "A\0"])
def test_a_bad_time_zone_is_told_with_a_good_one(bad: object) -> None:
    assert "Europe/Brussels" in problem_with_zone(bad)


def test_good_ones_have_no_problem() -> None:
    assert problem_with_cron("*/5 8-18 * * MON-FRI") == ""
    assert problem_with_every(3600.0) == ""
    assert problem_with_zone("Europe/Brussels") == ""


def test_the_jitter_of_a_tick_is_the_same_for_all_who_compute_it_and_spread_evenly() -> None:
    found = [jitter_s("nightly", at("11-28T02:00") + timedelta(days=n), 60) for n in range(400)]
    assert found[0] == jitter_s("nightly", at("11-28T02:00"), 60)
    assert jitter_s("nightly", at("11-28T02:00"), 0) == 0
    assert all(0 <= each < 60 for each in found)
    assert 25 < sum(found) / len(found) < 35


def test_the_key_of_a_tick_names_the_schedule_and_the_minute() -> None:
    assert tick_key("nightly", at("11-28T02:00")) == "schedule/nightly/2026-11-28T02:00Z"
    assert tick_key("ping", at("11-28T02:00:07")) == "schedule/ping/2026-11-28T02:00:07Z"
