"""The rule of the chaos checker about runs that are undone: each lie is found."""

from typing import Any

import pytest

from tests.faults.checker import check

Record = dict[str, Any]


def event(seq: int, type: str, step: str | None = None, **data: Any) -> Record:
    return {
        "kind": "event",
        "run_id": "r",
        "seq": seq,
        "ts": 100.0 + seq,
        "type": type,
        "step": step,
        "attempt": 1 if step else None,
        "data": data or None,
        "source": "worker",
        "text": f"{seq}",
    }


def records(*undone: str, state: str = "failed") -> list[Record]:
    """A run that has begun a and b, both with an undo, and these undos."""
    events = [
        event(1, "RunStarted"),
        event(2, "StepStarted", "a", undo="x"),
        event(3, "StepFinished", "a"),
        event(4, "StepStarted", "b", undo="y"),
        event(5, "StepFailed", "b", final=True),
        event(6, "UndoStarted", error={}),
    ]
    for name in undone:
        events.append(event(len(events) + 1, "StepStarted", name))
        events.append(event(len(events) + 1, "StepFinished", name))
    events.append(event(len(events) + 1, "RunFinished", outcome=state))
    run = {"kind": "run", "run_id": "r", "plan": "p", "state": state, "last_seq": len(events)}
    run |= {"key": None, "created_at": 101.0, "deadline_at": None, "retry_of": None}
    return [run | {"attended": True}, *events]


def found(given: list[Record]) -> list[str]:
    return [each.message for each in check(given) if each.invariant == "undo"]


def test_a_run_that_was_undone_from_its_last_step_to_its_first_is_fine() -> None:
    assert found(records("y#undo:b", "x#undo:a")) == []


@pytest.mark.parametrize(
    ("undone", "state"),
    [
        ((), "failed"),
        (("y#undo:b",), "failed"),
        (("x#undo:a", "y#undo:b"), "failed"),
        (("y#undo:b", "x#undo:a"), "completed"),
        (("y#undo:b", "x#undo:a", "x#undo:a"), "cancelled"),
    ],
)
def test_a_step_that_is_undone_twice_or_not_or_too_early_is_found(
    undone: tuple[str, ...], state: str
) -> None:
    assert len(found(records(*undone, state=state))) == 1
