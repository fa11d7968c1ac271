"""A history with a violation is made smaller, and has the same violation still."""

import random

import pytest

from tests.faults.checker import check
from tests.faults.shrink import reduced, shrunk
from tests.unit.test_checker import change, honest


def test_what_is_left_of_a_history_says_the_same() -> None:
    records = honest()
    change({"kind": "wire", "run_id": "r", "seq": 6}, at=111.0)(records)
    (violation,) = check(records)

    least = shrunk(records, violation)

    assert violation in check(least)
    assert sorted(record["kind"] for record in least) == ["calm", "event", "run", "wire"]


def test_a_violation_of_no_run_is_kept_too() -> None:
    records = honest()
    change({"kind": "outbox"}, rows=1)(records)
    (violation,) = check(records)

    assert [record["kind"] for record in shrunk(records, violation)] == ["outbox"]


@pytest.mark.parametrize("seed", range(20))
def test_all_that_is_needed_is_left_wherever_it_stands(seed: int) -> None:
    chance = random.Random(seed)
    records = [{"kind": "fault", "name": str(number)} for number in range(100)]
    needed = {str(number) for number in chance.sample(range(100), chance.randrange(1, 6))}

    left = reduced(records, lambda found: needed <= {record["name"] for record in found})

    assert {record["name"] for record in left} == needed
