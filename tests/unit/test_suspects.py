"""How many bodies run beside one whose process has died: the death has one culprit at last."""

import pytest

from beatless.orchestrator import suspects
from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease, Leases
from beatless.orchestrator.suspects import (
    HOLD_MOST_S,
    HOLD_S,
    PASS_MOST_S,
    BodiesInFlight,
    most_beside,
    turn_of_others,
)


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, which only the tests move."""
    clock = [100.0]
    monkeypatch.setattr(suspects, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def bodies() -> BodiesInFlight:
    return BodiesInFlight(Heartbeat(Leases("s", seconds=3600), lambda: None))  # type: ignore[arg-type,return-value]  # opens none


def lease() -> Lease:
    return Lease(run=None, token=1, uncalled=True)  # type: ignore[arg-type]  # never looked at


def test_bodies_that_were_at_no_death_run_at_once(bodies: BodiesInFlight) -> None:
    assert all(bodies.enter(lease(), 0).may_run.done() for _ in range(1000))


@pytest.mark.parametrize("deaths", [1, 2, 3, 4, 5])
def test_with_each_death_fewer_run_at_once_and_each_has_its_turn(
    bodies: BodiesInFlight, deaths: int
) -> None:
    leases = [lease() for _ in range(200)]
    entered = [bodies.enter(each, deaths) for each in leases]

    most = most_beside(deaths)
    assert most == {1: 64, 2: 16, 3: 4}.get(deaths, 1)
    for number, each in enumerate(entered):
        assert sum(body.may_run.done() for body in entered) == min(200, number + most)
        bodies.leave(each)


def test_a_suspect_waits_for_those_that_run_and_is_not_passed_by(bodies: BodiesInFlight) -> None:
    before, suspect, after = lease(), lease(), lease()
    first = bodies.enter(before, 0)
    assert first.may_run.done()
    alone = bodies.enter(suspect, 9)
    late = bodies.enter(after, 0)

    assert not alone.may_run.done()
    bodies.leave(first)
    assert (alone.may_run.done(), late.may_run.done()) == (True, False)
    bodies.leave(alone)
    assert late.may_run.done()


def test_a_suspect_that_waits_for_a_long_body_lets_others_pass_half_of_the_time(
    bodies: BodiesInFlight, now: list[float]
) -> None:
    long, suspect = lease(), lease()
    bodies.enter(long, 0)
    alone = bodies.enter(suspect, 9)
    passed = held = 0
    for _ in range(1000):
        now[0] += HOLD_S / 8
        bodies.tick()
        other = bodies.enter(lease(), 0)
        if other.may_run.done():
            passed += 1
            bodies.leave(other)
        else:
            held += 1
    # Those that were held have passed with the next turn, and are in the way of the suspect.
    assert not alone.may_run.done()
    assert passed > 300
    assert held > 300


def test_those_that_were_held_back_pass_when_their_turn_comes(
    bodies: BodiesInFlight, now: list[float]
) -> None:
    bodies.enter(lease(), 0)
    bodies.enter(lease(), 9)
    late = bodies.enter(lease(), 0)
    assert not late.may_run.done()
    assert bodies.tick() == HOLD_S
    now[0] += HOLD_S
    bodies.tick()

    assert late.may_run.done()


def test_a_suspect_has_its_turn_after_five_times_the_longest_body(now: list[float]) -> None:
    """Others begin whenever they may: the last of them has ended within a turn of the suspect."""
    for longest in (0.5, 1, 3, 10, 100, HOLD_MOST_S):
        waited_s = 0.0
        while True:
            passes, left_s = turn_of_others(waited_s)
            waited_s += left_s
            if not passes and left_s >= longest:
                break
        assert waited_s - left_s + longest <= max(HOLD_S, 5 * longest)


def test_others_are_held_back_for_ten_minutes_at_most_however_long_a_suspect_waits() -> None:
    """A week, for bodies that take longer than that; it gets a chance each hour or so."""
    waited_s, held_s, since_hold_s = 0.0, 0.0, 0.0
    while waited_s < 7 * 86_400:
        passes, left_s = turn_of_others(waited_s)
        waited_s += left_s
        if passes:
            since_hold_s += left_s
            assert since_hold_s <= PASS_MOST_S == 3600
        else:
            held_s, since_hold_s = held_s + left_s, 0.0
            assert left_s <= HOLD_MOST_S == 600
        assert held_s <= waited_s / 2 + HOLD_MOST_S
    assert held_s < waited_s / 6


def test_a_suspect_is_not_passed_by_another_one(bodies: BodiesInFlight, now: list[float]) -> None:
    bodies.enter(lease(), 0)
    first, second = bodies.enter(lease(), 9), bodies.enter(lease(), 1)
    now[0] += HOLD_S
    bodies.tick()

    assert (first.may_run.done(), second.may_run.done()) == (False, False)


def test_a_suspect_knows_whether_it_is_alone(bodies: BodiesInFlight) -> None:
    first, second = lease(), lease()
    body = bodies.enter(first, 1)
    assert not first.alone  # another may come
    bodies.leave(body)
    bodies.enter(second, 9)
    assert second.alone


def test_a_body_is_beside_others_only_while_it_runs(bodies: BodiesInFlight) -> None:
    first, second, waits = lease(), lease(), lease()
    body = bodies.enter(first, 3)
    bodies.enter(second, 3)
    bodies.enter(waits, 9)

    assert [each.beside for each in (first, second, waits)] == [True, True, False]
    bodies.leave(body)
    assert [each.beside for each in (first, second, waits)] == [False, False, False]


def test_only_a_body_that_is_alone_may_be_what_its_process_dies_of(bodies: BodiesInFlight) -> None:
    one, other = lease(), lease()
    first = bodies.enter(one, 0)
    assert not one.uncalled
    second = bodies.enter(other, 0)
    assert (one.uncalled, other.uncalled) == (True, True)
    bodies.leave(first)
    assert (one.uncalled, other.uncalled) == (True, False)
    bodies.leave(second)
    assert other.uncalled


def test_bodies_of_one_run_are_suspects_until_one_is_left(bodies: BodiesInFlight) -> None:
    run = lease()
    first, second = bodies.enter(run, 0), bodies.enter(run, 0)
    assert (run.uncalled, run.beside) == (True, True)
    bodies.leave(first)
    assert (run.uncalled, run.beside) == (False, False)
    bodies.leave(second)
    assert run.uncalled
