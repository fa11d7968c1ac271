"""How long to wait before trying again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beatless import retry, step
from beatless.orchestrator.retry import Retry
from beatless.outbox.backoff import Backoff


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_delays_grow_to_the_cap_and_jitter_only_takes_away(failures, jitter):
    full = min(60.0, 1.0 * 2.0 ** min(failures - 1, 64))
    delay = Backoff(initial=1, factor=2, cap=60, jitter=jitter).delay(failures)
    assert full * (1 - jitter) <= delay <= full


def test_a_retry_gives_up_after_its_last_attempt():
    policy = retry(max_attempts=3, initial=10, backoff=2, cap=15, jitter=0)
    assert [policy.delay(failures) for failures in (1, 2, 3)] == [10, 15, None]


def test_a_step_is_tried_once_unless_told_otherwise():
    assert Retry().delay(1) is None


@pytest.mark.parametrize("name", ["max_retries", "attempts"])
def test_an_option_that_a_policy_does_not_have_is_told_its_name_here(name):
    with pytest.raises(
        TypeError, match=rf"retry has no option {name}: .* is max_attempts, .*jitter"
    ):
        retry(**{name: 3})


@pytest.mark.parametrize("name", ["retries", "max_retries", "max_attempts"])
def test_a_step_is_told_that_its_attempts_are_a_policy(name):
    told = rf"step has no option {name}: .*retry=retry\(max_attempts=3\)"
    with pytest.raises(TypeError, match=told):
        step(**{name: 3})


@pytest.mark.parametrize(
    "options",
    [
        *({"max_attempts": 0}, {"max_crashes": 0}, {"initial": -1}, {"backoff": 0.5}),
        *({"jitter": 2}, {"jitter": float("nan")}, {"backoff": float("nan")}, {"backoff": 1e9}),
        *({"initial": 3.2e8}, {"initial": float("nan")}, {"cap": float("inf")}, {"cap": "60"}),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"need initial|is not a number of 1 or more"):
        retry(**options)


def test_the_steepest_policy_reaches_its_cap_and_no_overflow():
    policy = retry(max_attempts=10_000, initial=10, backoff=1000, cap=3e8, jitter=0)
    assert [policy.delay(failures) for failures in (1, 2, 9_999)] == [10, 10_000, 3e8]
