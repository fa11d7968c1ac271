"""Events of a run as lines, and the output of its steps as text that grows."""

import io
import re
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from beatless.cli.render import GrowingOutput, follow
from beatless.orchestrator.events import Event


def event(seq: int, type: str, **data: Any) -> Event:
    return Event(
        run_id="r", seq=seq, ts=seq, type=type, source="worker", step="ask", attempt=1, data=data
    )


EVENTS = [
    event(1, "StepStarted"),
    event(2, "StepOutput", first=0, pieces=["[b]Dear", " Ann,\nthe par"]),
    event(3, "StepOutput", first=2, pieces=["cel came late", {"tool": 7}, "\x1b[31m Best"]),
    event(4, "StepFinished", result=None),
]


def shown(*, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, color_system=None)
    assert follow(console, EVENTS) == EVENTS[-1]
    return written.getvalue()


def test_on_a_terminal_output_is_text_whose_lines_stand_between_the_events() -> None:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(terminal=True)).replace("\r", "\n")
    lines = [line.rstrip() for line in text.split("\n")]
    wanted = ["[b]Dear Ann,", 'the parcel came late{"tool": 7}', "�[31m Best"]
    places = [lines.index(each) for each in wanted]
    (end,) = [place for place, line in enumerate(lines) if "StepFinished" in line]
    assert places == sorted(places)
    assert places[-1] < end
    assert "StepOutput" not in text


def test_the_last_line_grows_below_the_others() -> None:
    progress = Progress(console=Console(file=io.StringIO(), force_terminal=True))
    output = GrowingOutput(progress, {})
    grown = []
    for each in EVENTS[1:3]:
        output.add(each)
        grown.append([(task.description, task.fields["note"]) for task in progress.tasks])
    assert grown == [[("ask", "the par")], [("ask", "�[31m Best")]]


def test_a_file_has_a_line_for_each_event() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "3", "4"]
    assert re.search(r'StepOutput +ask  "\[b\]Dear Ann,\\nthe par"', lines[1])


@pytest.mark.parametrize("data", [None, {}, {"pieces": None}])
def test_output_of_another_version_is_shown_as_far_as_it_goes(data: Any) -> None:
    odd = Event(run_id="r", seq=1, ts=1, type="StepOutput", source="worker", step="a", data=data)
    console = Console(file=io.StringIO(), force_terminal=True)
    assert follow(console, [odd]) == odd
