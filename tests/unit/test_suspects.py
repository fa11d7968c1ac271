"""How many bodies run beside one whose process has died: the death has one culprit at last."""

import pytest

from beatless.orchestrator.heartbeat import Heartbeat
from beatless.orchestrator.lease import Lease, Leases
from beatless.orchestrator.suspects import BodiesInFlight, most_beside


@pytest.fixture
def bodies() -> BodiesInFlight:
    return BodiesInFlight(Heartbeat(Leases("s", seconds=3600), lambda: None))  # type: ignore[arg-type,return-value]  # opens none


def lease() -> Lease:
    return Lease(run=None, token=1, uncalled=True)  # type: ignore[arg-type]  # never looked at


def test_bodies_that_were_at_no_death_run_at_once(bodies: BodiesInFlight) -> None:
    assert all(bodies.enter(lease(), 0).done() for _ in range(1000))


@pytest.mark.parametrize("deaths", [1, 2, 3, 4, 5])
def test_with_each_death_fewer_run_at_once_and_each_has_its_turn(
    bodies: BodiesInFlight, deaths: int
) -> None:
    leases = [lease() for _ in range(200)]
    entered = [bodies.enter(each, deaths) for each in leases]

    most = most_beside(deaths)
    assert most == {1: 64, 2: 16, 3: 4}.get(deaths, 1)
    for number, each in enumerate(leases):
        assert sum(may_run.done() for may_run in entered) == min(200, number + most)
        bodies.leave(each)


def test_a_suspect_waits_for_those_that_run_and_is_not_passed_by(bodies: BodiesInFlight) -> None:
    before, suspect, after = lease(), lease(), lease()
    assert bodies.enter(before, 0).done()
    alone = bodies.enter(suspect, 9)
    late = bodies.enter(after, 0)

    assert not alone.done()
    bodies.leave(before)
    assert (alone.done(), late.done()) == (True, False)
    bodies.leave(suspect)
    assert late.done()


def test_a_body_is_beside_others_only_while_it_runs(bodies: BodiesInFlight) -> None:
    first, second, waits = lease(), lease(), lease()
    bodies.enter(first, 3)
    bodies.enter(second, 3)
    bodies.enter(waits, 9)

    assert [each.beside for each in (first, second, waits)] == [True, True, False]
    bodies.leave(first)
    assert [each.beside for each in (first, second, waits)] == [False, False, False]


def test_only_a_body_that_is_alone_may_be_what_its_process_dies_of(bodies: BodiesInFlight) -> None:
    one, other = lease(), lease()
    bodies.enter(one, 0)
    assert not one.uncalled
    bodies.enter(other, 0)
    assert (one.uncalled, other.uncalled) == (True, True)
    bodies.leave(one)
    assert (one.uncalled, other.uncalled) == (True, False)
    bodies.leave(other)
    assert other.uncalled
