"""Events and runs as text for people."""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from beatless.orchestrator.child_calls import ChildrenWait
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.records import Run
from beatless.orchestrator.state import RunState
from beatless.orchestrator.timeline import Moment
from beatless.orchestrator.waits import WaitKind

STYLES = {
    EventType.RUN_STARTED: "bold",
    EventType.STEP_STARTED: "cyan",
    EventType.STEP_FINISHED: "green",
    EventType.STEP_FAILED: "red",
    EventType.DEBUG_TRACE: "dim",
    EventType.STEP_OUTPUT: "",
    EventType.CANCEL_REQUESTED: "yellow",
    EventType.WAIT_STARTED: "blue",
    EventType.SIGNAL_RECEIVED: "yellow",
    EventType.WAIT_FINISHED: "green",
    EventType.CHILDREN_STARTED: "blue",
    EventType.CHILDREN_FINISHED: "green",
    EventType.RUN_RESTARTED: "bold",
    EventType.UNDO_STARTED: "red",
    EventType.INPUT_REPLACED: "yellow",
    EventType.RUN_FINISHED: "bold",
}
NOTE_CHARS = 60
"""Of the line that grows, the end is shown."""

STATES = {
    "queued": "yellow",
    "waiting": "blue",
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "magenta",
}


def plain(text: str) -> str:
    """Text on one line, without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in text)


def brief(value: Any, width: int = 72) -> str:
    """A value on one short line."""
    text = plain(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= width else text[: width - 1] + "…"


def facts(event: Event) -> str:
    """The data of an event, in short."""
    if not isinstance(event.data, dict):  # as no version before wrote it
        return "" if event.data is None else brief(event.data)
    data = dict(event.data)
    match event.type:
        case EventType.STEP_FINISHED:
            return brief(data.get("result"))
        case EventType.STEP_FAILED:
            error = data.get("error") or {}
            again = (
                " (will be tried again)" if data.get("retry_at") and not data.get("final") else ""
            )
            return f"{error.get('type')}: {error.get('message')}{again}"
        case EventType.UNDO_STARTED:
            error = data.get("error") or {}
            return f"after {error.get('type')}: {error.get('message')}"
        case EventType.DEBUG_TRACE:
            name = data.pop("name", "")
            return f"{name} {brief(data)}" if data else str(name)
        case EventType.STEP_OUTPUT:
            return brief(output_text(event))
        case EventType.RUN_FINISHED:
            outcome = str(data.get("outcome"))
            if outcome == "completed":
                return f"{outcome} {brief(data.get('result'))}"
            return f"{outcome}: {(data.get('error') or {}).get('message')}"
    return brief(data) if data else ""


def line(event: Event, since: int) -> str:
    """One event as one line: seq, seconds since the start, type, step, facts."""
    elapsed = (event.ts - since) / 1000
    return f"[dim]{event.seq:>4}  {elapsed:>8.3f}s[/]  {what(event)}".rstrip()


def tail_line(event: Event, plan: str) -> str:
    """One event of many runs as one line: local time, run, plan, type, step, facts."""
    at = datetime.fromtimestamp(event.ts / 1000).astimezone()
    time = f"{at:%H:%M:%S}.{event.ts % 1000:03}"
    return f"[dim]{time}[/]  {escape(event.run_id)}  [dim]{escape(plan)}[/]  {what(event)}".rstrip()


def what(event: Event) -> str:
    """The type of an event, its step and its facts."""
    attempt = f" (attempt {event.attempt})" if (event.attempt or 1) > 1 else ""
    style = STYLES.get(EventType(event.type), "") if event.type in list(EventType) else ""
    kind = f"[{style}]{event.type:<15}[/]" if style else f"{event.type:<15}"
    text = escape(plain(f"{event.step or ''}{attempt}  {facts(event)}".strip()))
    return f"{kind}  {text}"


def moment(found: Moment, since: int) -> str:
    """One line of a timeline: seconds since the start, how long it took, what, and in words."""
    elapsed = (found.at - since) / 1000
    took = "" if found.seconds is None else f"{found.seconds:.3f}s"
    what = found.kind
    if found.step is not None:
        what = found.step if found.attempt is None else f"{found.step} attempt {found.attempt}"
    text = escape(f"{what:<24}  {plain(found.text)}")
    return f"[dim]{elapsed:>9.3f}s  {took:>9}[/]  {text}"


def output_text(event: Event) -> str:
    """The pieces of a StepOutput as one text: those that are no text as JSON, a line each."""
    pieces = (event.data or {}).get("pieces") or []
    return "".join(
        piece if isinstance(piece, str) else f"{json.dumps(piece, ensure_ascii=False)}\n"
        for piece in pieces
    )


def is_progress(event: Event) -> bool:
    """Whether the event only moves a progress bar."""
    return event.type == EventType.DEBUG_TRACE and (event.data or {}).get("name") == "progress"


def follow(console: Console, events: Iterable[Event], since: int = 0) -> Event | None:
    """Show events as they come, and a bar for a step that reports its progress; the last event.

    On a terminal, the output of a step is shown as text that grows.

    `since` is when the run began, in milliseconds; default: the time of the first event.
    """
    last: Event | None = None
    with bars(console) as (progress, tasks):
        output = GrowingOutput(progress, tasks)
        for event in events:
            since = since or event.ts
            if is_progress(event) and console.is_terminal:
                _advance(progress, tasks, event)
            elif event.type == EventType.STEP_OUTPUT and console.is_terminal:
                output.add(event)
            else:
                output.end(event.step)
                progress.console.print(line(event, since))
            if event.type in (EventType.STEP_FINISHED, EventType.STEP_FAILED):
                task = tasks.pop(event.step or "", None)
                if task is not None:
                    progress.remove_task(task)
            last = event
    return last


class GrowingOutput:
    """The output of steps on a terminal: its lines, and below them the last one as it grows."""

    def __init__(self, progress: Progress, tasks: dict[str, TaskID]) -> None:
        self._progress = progress
        self._tasks = tasks
        self._rests: dict[str, str] = {}

    def add(self, event: Event) -> None:
        """Show the pieces of an event."""
        step = event.step or ""
        *lines, rest = (self._rests.get(step, "") + output_text(event)).split("\n")
        for each in lines:
            self._progress.console.print(escape(plain(each)))
        self._rests[step] = rest
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=None, note="")
        self._progress.update(self._tasks[step], note=escape(plain(rest)[-NOTE_CHARS:]))

    def end(self, step: str | None) -> None:
        """Show the last line as one of the others: something else has happened to the step."""
        if rest := self._rests.pop(step or "", ""):
            self._progress.console.print(escape(plain(rest)))


def _advance(progress: Progress, tasks: dict[str, TaskID], event: Event) -> None:
    data, step = event.data or {}, event.step or ""
    if step not in tasks:
        tasks[step] = progress.add_task(step, total=100.0, note="")
    note = str(data.get("note") or "")
    progress.update(tasks[step], completed=float(data.get("pct") or 0), note=note)


@contextmanager
def bars(console: Console) -> Iterator[tuple[Progress, dict[str, TaskID]]]:
    """Progress bars below the lines; nothing but the lines when not on a terminal."""
    progress = Progress(
        TextColumn("      {task.description}"),
        BarColumn(),
        TaskProgressColumn("{task.percentage:>3.0f} %"),
        TextColumn("[dim]{task.fields[note]}[/]"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    # Elsewhere older versions of rich end a file with an empty line, also if it is disabled.
    with progress if console.is_terminal else nullcontext():
        yield progress, {}


def age(when: datetime | None) -> str:
    """The age of a time, rounded."""
    if when is None:
        return ""
    passed = (datetime.now(UTC) - when).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if passed >= size:
            return f"{passed / size:.0f}{unit}"
    return f"{max(0.0, passed):.0f}s"


def table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[str] = ()
) -> Iterator[str]:
    """Rows as lines, never shortened to a width: people pipe them into other commands.

    Columns whose title is in `numbers` stand to the right. A cell may have markup.
    """
    texts = [[Text.from_markup(cell) for cell in row] for row in rows]
    widths = [
        max(map(cell_len, column))
        for column in zip(titles, *([text.plain for text in row] for row in texts), strict=True)
    ]
    places = list(zip(titles, widths, strict=True))
    heads = [_cell(title, title, width, numbers) for title, width in places]
    yield f"[dim]{'  '.join(heads).rstrip()}[/]"
    for row in rows:
        cells = zip(row, places, strict=True)
        yield "  ".join(
            _cell(cell, title, width, numbers) for cell, (title, width) in cells
        ).rstrip()


def _cell(cell: str, title: str, width: int, numbers: Collection[str]) -> str:
    space = " " * (width - cell_len(Text.from_markup(cell).plain))
    return space + cell if title in numbers else cell + space


def run_table(found: Sequence[Run]) -> Iterator[str]:
    """Runs as a table."""
    rows = [
        (
            escape(run.run_id),
            f"[{STATES.get(run.state.value, 'bold')}]{escape(run.state.value)}[/]",
            escape(run.plan),
            escape(run.queue),
            str(run.last_seq),
            age(run.created_at),
        )
        for run in found
    ]
    yield from table(("run", "state", "plan", "queue", "events", "age"), rows)


def child_table(found: Sequence[Run]) -> Iterator[str]:
    """Children of a run as a table."""
    rows = [
        (
            str(run.child_no),
            escape(run.run_id),
            f"[{STATES.get(run.state.value, 'bold')}]{escape(run.state.value)}[/]",
            escape(run.plan),
            age(run.created_at),
            escape(plain(f"{run.error.get('type')}: {run.error.get('message')}"))
            if run.error
            else "",
        )
        for run in found
    ]
    titles = ("number", "run", "state", "plan", "age", "error")
    yield from table(titles, rows, numbers={"number"})


def open_wait(wait: OpenWait) -> str:
    """A wait and its end, in words."""
    if wait.kind is WaitKind.CHILDREN:
        return "its children"
    text = " or ".join(wait.names) if wait.names else "a time"
    if wait.kind is WaitKind.APPROVAL:
        text = f'a person: "{wait.title}"'
    elif wait.kind not in set(WaitKind):
        text = f"something of a newer version ({wait.kind})"
    if wait.until_ms is None:
        return f"{text}, without an end"
    until = datetime.fromtimestamp(wait.until_ms / 1000, UTC)
    return f"{text}, until {until.isoformat(timespec='seconds')}"


def run_sheet(
    run: Run,
    cancel: Event | None,
    waits: Sequence[OpenWait],
    children: ChildrenWait | None = None,
) -> Iterator[str]:
    """Everything about one run, a line for each member; `cancel` is the event of its cancel."""
    members = run.to_dict()
    if run.state in (RunState.QUEUED, RunState.WAITING):
        members["worker"] = None  # the one that it had before
    if waits:
        members["not_before"] = None  # the end of the first of them
        members["waits for"] = "; ".join(map(open_wait, waits))
    if children is not None:
        members["not_before"] = None
        members["waits for"] = f"its children: {children.occurrence}, {children}"
    if cancel is not None and cancel.data:
        members["cancel_reason"] = cancel.data.get("reason")
    for name, value in members.items():
        if value is None or value == {}:
            continue
        if name == "error":
            value = {member: fact for member, fact in value.items() if member != "traceback"}
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        # An attempt is a call of a step's body: this counts the workers that took the run.
        name = "claims" if name == "attempt" else name
        yield f"[dim]{name:<20}[/]{escape(plain(shown))}"
    if run.error and "traceback" in run.error:
        yield ""
        yield escape(str(run.error["traceback"]).rstrip())
