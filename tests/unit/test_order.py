"""The longest tests begin first, one on each worker."""

import pytest

from tests.order import longest_first

SHORT = list("abcdefgh")


@pytest.mark.parametrize(
    ("minutes", "workers", "order"),
    [
        ({}, 3, "abcdefgh"),
        ({"X": 3}, 1, "Xabcdefgh"),
        ({"X": 3, "Y": 5}, 1, "YXabcdefgh"),
        ({"X": 3, "Y": 5}, 2, "Yabcd Xefgh"),
        ({"X": 3, "Y": 5}, 5, "Ya Xb cd ef gh"),
        ({"X": 3, "Y": 5, "Z": 4, "W": 1}, 3, "YWab Zcde Xfgh"),
    ],
)
def test_each_worker_begins_with_one_of_the_longest(
    minutes: dict[str, float], workers: int, order: str
) -> None:
    assert longest_first([*SHORT, *minutes], minutes, workers) == [*order.replace(" ", "")]
    assert longest_first([*minutes, *SHORT], minutes, workers) == [*order.replace(" ", "")]
