"""docs/reliability.md shows the stored results, and the verdicts behind it can be bad ones."""

import random

import pytest

from tests.faults.expectations import DRILLS, EXPECTATIONS
from tests.faults.faults import FAULTS
from tests.faults.guests import ABSENT
from tests.faults.reliability import PAGE, PICTURE, page, picture
from tests.faults.results import ROOT, SOAK, read
from tests.faults.scenarios import back_after, rate
from tests.faults.soak import verdict


def test_the_page_is_made_of_the_stored_results() -> None:
    assert PAGE.read_text() == page(), "run: make reliability"


def test_the_picture_is_made_of_the_stored_samples() -> None:
    assert PICTURE.read_text() == picture(read(SOAK)), "run: make reliability"


def test_the_page_tells_of_each_fault_what_happens() -> None:
    assert EXPECTATIONS.keys() == FAULTS.keys() | ABSENT.keys()
    assert all(happens for happens, _ in EXPECTATIONS.values())


def test_the_tests_that_the_page_names_are_there() -> None:
    named = [*EXPECTATIONS.values(), *DRILLS.values()]
    files = {test for _, tests in named for test in tests}
    assert [name for name in sorted(files) if not (ROOT / "tests" / name).exists()] == []


def noisy(chance: random.Random, slope: float, noise: float) -> list[float]:
    return [100 + slope * n + chance.gauss(0, noise) for n in range(150)]


@pytest.mark.parametrize("noise", [0, 1, 5, 20])
def test_a_flat_series_does_not_grow_however_noisy(noise: float) -> None:
    for seed in range(20):
        assert not verdict(noisy(random.Random(seed), 0, noise), floor=1).grows, seed


@pytest.mark.parametrize("noise", [0, 1, 5])
def test_a_series_that_grows_by_a_quarter_is_found(noise: float) -> None:
    for seed in range(20):
        assert verdict(noisy(random.Random(seed), 25 / 112, noise), floor=1).grows, seed


def test_a_sawtooth_is_flat_and_a_rising_one_is_not() -> None:
    teeth = [100 + n % 10 * 5 for n in range(150)]
    assert not verdict(teeth, floor=1).grows
    assert verdict([tooth + n / 2 for n, tooth in enumerate(teeth)], floor=1).grows


def test_what_grows_only_before_the_series_is_judged_is_flat() -> None:
    assert not verdict([*range(37), *[37] * 113], floor=1).grows


def test_too_few_samples_are_no_verdict() -> None:
    with pytest.raises(ValueError, match="too few"):
        verdict([1.0] * 12, floor=1)


def test_the_rate_counts_what_ended_between() -> None:
    ends = [n / 10 for n in range(100)]
    assert rate(ends, 2, 4) == 10
    assert rate(ends, 9, 11) == 5


def test_a_rate_is_back_when_a_whole_second_has_it() -> None:
    ends = [5 + n / 10 for n in range(100)]
    assert back_after(ends, begin=0, wanted=9) == pytest.approx(4.9)
    assert back_after(ends, begin=0, wanted=11) is None
