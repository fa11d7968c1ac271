"""The check of the demo: every run's own events, each once."""

import pytest

from beatless.cli.demo import DemoFailed, without_handbacks
from beatless.orchestrator.events import Event
from tests.plans import TWO_STEPS

FIRST = ("StepStarted", "first", 1)
GIVEN_BACK = ("DebugTrace", "first", 1)
REST = [
    ("StepFinished", "first", 1),
    ("StepStarted", "second", 1),
    ("StepFinished", "second", 1),
    ("RunFinished", None, None),
]


def events(*told: tuple[str, str | None, int | None]) -> list[Event]:
    return [
        Event(
            run_id="r",
            seq=seq,
            ts=0,
            type=type,
            source="worker",
            step=step,
            attempt=attempt,
            data={"name": "beatless.given_back"} if type == "DebugTrace" else None,
        )
        for seq, (type, step, attempt) in enumerate([("RunStarted", None, None), *told], 1)
    ]


@pytest.mark.parametrize("handbacks", [0, 1, 2])
def test_a_start_that_was_given_back_counts_once(handbacks: int) -> None:
    found = without_handbacks(events(*[FIRST, GIVEN_BACK] * handbacks, FIRST, *REST))
    assert [event.type for event in found] == TWO_STEPS


def test_a_start_that_was_not_given_back_counts() -> None:
    found = without_handbacks(events(FIRST, FIRST, *REST))
    assert len(found) == len(TWO_STEPS) + 1


@pytest.mark.parametrize(
    "other", [("StepStarted", "first", 2), ("StepStarted", "second", 1), *REST[:1]]
)
def test_a_start_that_was_given_back_is_made_again(other: tuple[str, str, int]) -> None:
    with pytest.raises(DemoFailed, match="was given back, and"):
        without_handbacks(events(FIRST, GIVEN_BACK, other, *REST))


def test_no_seq_is_missing_or_doubled() -> None:
    told = events(FIRST, *REST)
    for wrong in (told[:2] + told[3:], [*told[:3], *told[2:]], told[::-1]):
        with pytest.raises(DemoFailed, match="the seqs are"):
            without_handbacks(wrong)
