"""Redaction of the inputs, results, errors and traces that are shown, by `App(redact=…)`.

All that displays runs takes them from here: the HTTP API with its page and streams, the
command line, log lines, spans and Flower. Stored values stay, and your own code that asks
`app.client` gets it.
"""

import json
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, closing
from dataclasses import replace
from typing import Any

from beatless.approval_links import FoundLink
from beatless.client import Client
from beatless.client.pages import ApprovalPage, NumberedRunPage, RunPage, SchedulePage, line_of
from beatless.orchestrator.events import Event, EventText
from beatless.orchestrator.open_waits import OpenWait
from beatless.orchestrator.records import Run
from beatless.orchestrator.schedule import StoredSchedule
from beatless.streams.tailed import TailedEvent

logger = logging.getLogger(__name__)

Redact = Callable[[str, Any], Any]
"""Takes the kind (`input`, `result`, `error`, `trace`, `output`, `title`) and a value to show.

Returns the value that is shown. The data of a signal is of the kind `input`, the question of an
approval of the kind `title`. Of the kind `output` is the list of the pieces of one event: what is
to be hidden may be spread over pieces, and over events.
"""

FAILED = "[redact raised an error]"
"""Shown in place of a value that `redact` could not look at, or of which it made no JSON."""

MEMBERS = ("input", "result", "error")
"""Of a run. Those of its events are called the same."""


class Redaction:
    """Applies the user's `redact`; None shows everything."""

    def __init__(self, redact: Redact | None) -> None:
        self._redact = redact

    @property
    def active(self) -> bool:
        return self._redact is not None

    def value(self, what: str, value: Any) -> Any:
        """The value as it may be shown. Never raises: without a redaction nothing is shown."""
        if self._redact is None or value is None:
            return value
        try:
            # Of a copy: it may change its argument.
            shown = self._redact(what, json.loads(json.dumps(value)))
            json.dumps(shown)
        except Exception as error:
            logger.warning(
                "redact raised an error: the value is not shown",
                extra={"action": "redact_failed", "what": what, "reason": type(error).__name__},
            )
            shown = FAILED
        if what == "error" and not isinstance(shown, Mapping):
            # Displays of an error ask for these.
            return {"type": value.get("type"), "message": str(shown)}
        return shown

    def run(self, run: Run) -> Run:
        if self._redact is None:
            return run
        return replace(run, **{name: self.value(name, getattr(run, name)) for name in MEMBERS})

    def event(self, event: Event) -> Event:
        if self._redact is None or not event.data:
            return event
        data = dict(event.data)
        if event.type == "DebugTrace":
            facts = {name: value for name, value in data.items() if name != "name"}
            if facts and not str(data.get("name")).startswith("beatless."):
                shown = self.value("trace", facts)
                data = {"name": data.get("name")} | (
                    dict(shown) if isinstance(shown, Mapping) else {"shown": shown}
                )
            return replace(event, data=data)
        if event.type == "StepOutput":
            shown = self.value("output", data.get("pieces"))
            return replace(
                event, data=data | {"pieces": shown if isinstance(shown, list) else [shown]}
            )
        for name in MEMBERS:
            if name in data:
                data[name] = self.value(name, data[name])
        if event.type == "SignalReceived":
            data["data"] = self.value("input", data.get("data"))
        if "title" in data:
            data["title"] = self.title(data["title"])
        if "given" in data:
            data["given"] = self.value("input", data["given"])
        if isinstance(data.get("on_cancel"), Mapping):
            data["on_cancel"] = self.value("error", data["on_cancel"])
        reused = data.get("reused")
        if isinstance(reused, Mapping) and isinstance(reused.get("results"), Mapping):
            results = {step: self.value("result", one) for step, one in reused["results"].items()}
            errors = reused.get("errors")
            if isinstance(errors, Mapping):
                errors = {step: self.value("error", one) for step, one in errors.items()}
            data["reused"] = {
                **reused,
                "results": results,
                **({"errors": errors} if errors else {}),
            }
        return replace(event, data=data)

    def title(self, title: str | None) -> str | None:
        """The title of an approval as it may be shown; None for its name alone."""
        shown = self.value("title", title)
        return shown if shown is None else str(shown)

    def wait(self, wait: OpenWait) -> OpenWait:
        return replace(wait, title=self.title(wait.title))

    def text(self, event: EventText) -> EventText:
        """`event` for one as it travels."""
        if self._redact is None:
            return event
        shown = self.event(event.event()).to_dict()
        text = json.dumps(shown, ensure_ascii=False, separators=(",", ":"))
        return EventText.of(event.seq, event.type, text)

    def page(self, page: RunPage) -> RunPage:
        if self._redact is None:
            return page
        return replace(page, lines=[self._line(line) for line in page.lines])

    def numbered_page(self, page: NumberedRunPage) -> NumberedRunPage:
        if self._redact is None:
            return page
        return replace(page, lines=[self._line(line) for line in page.lines])

    def schedules(self, page: SchedulePage) -> SchedulePage:
        if self._redact is None:
            return page
        return replace(page, lines=[self._line(line) for line in page.lines])

    def approvals(self, page: ApprovalPage) -> ApprovalPage:
        if self._redact is None:
            return page
        shown = [json.loads(line) for line in page.lines]
        return replace(
            page, lines=[line_of(each | {"title": self.title(each["title"])}) for each in shown]
        )

    def _line(self, line: str) -> str:
        run = json.loads(line)
        run |= {name: self.value(name, run[name]) for name in MEMBERS if name in run}
        return line_of(run)


class ShownClient(Client):
    """A client for displays: its results are redacted."""

    redaction = Redaction(None)

    def start_runs(self, *args: Any, **options: Any) -> list[Run]:
        return [self.redaction.run(run) for run in super().start_runs(*args, **options)]

    def get_run(self, *args: Any, **options: Any) -> Run:
        return self.redaction.run(super().get_run(*args, **options))

    def list_runs(self, *args: Any, **options: Any) -> list[Run]:
        return [self.redaction.run(run) for run in super().list_runs(*args, **options)]

    def page_of_runs(self, *args: Any, **options: Any) -> RunPage:
        return self.redaction.page(super().page_of_runs(*args, **options))

    def children(self, *args: Any, **options: Any) -> list[Run]:
        return [self.redaction.run(run) for run in super().children(*args, **options)]

    def page_of_children(self, *args: Any, **options: Any) -> NumberedRunPage:
        return self.redaction.numbered_page(super().page_of_children(*args, **options))

    def schedules(self, *args: Any, **options: Any) -> list[StoredSchedule]:
        return [self._shown(each) for each in super().schedules(*args, **options)]

    def page_of_schedules(self, **options: Any) -> SchedulePage:
        return self.redaction.schedules(super().page_of_schedules(**options))

    def schedule(self, *args: Any, **options: Any) -> StoredSchedule:
        return self._shown(super().schedule(*args, **options))

    def create_schedule(self, *args: Any, **options: Any) -> StoredSchedule:
        return self._shown(super().create_schedule(*args, **options))

    def update_schedule(self, *args: Any, **options: Any) -> StoredSchedule:
        return self._shown(super().update_schedule(*args, **options))

    def pause_schedule(self, *args: Any, **options: Any) -> StoredSchedule:
        return self._shown(super().pause_schedule(*args, **options))

    def resume_schedule(self, *args: Any, **options: Any) -> StoredSchedule:
        return self._shown(super().resume_schedule(*args, **options))

    def declared_schedules(self) -> list[StoredSchedule]:
        return [self._shown(each) for each in super().declared_schedules()]

    def run_schedule_now(self, *args: Any, **options: Any) -> Run:
        return self.redaction.run(super().run_schedule_now(*args, **options))

    def _shown(self, schedule: StoredSchedule) -> StoredSchedule:
        return replace(schedule, input=self.redaction.value("input", schedule.input))

    def events(self, *args: Any, **options: Any) -> list[Event]:
        return [self.redaction.event(event) for event in super().events(*args, **options)]

    def event_page(self, *args: Any, **options: Any) -> tuple[list[EventText], bool]:
        page, more = super().event_page(*args, **options)
        return [self.redaction.text(event) for event in page], more

    def _told(self, events: Sequence[Event]) -> Sequence[Event]:
        return [self.redaction.event(event) for event in events]

    def waits(self, *args: Any, **options: Any) -> list[OpenWait]:
        return [self.redaction.wait(wait) for wait in super().waits(*args, **options)]

    def page_of_approvals(self, **options: Any) -> ApprovalPage:
        return self.redaction.approvals(super().page_of_approvals(**options))

    def link_of(self, token: str) -> tuple[FoundLink, OpenWait | None] | None:
        found = super().link_of(token)
        if found is None or found[1] is None:
            return found
        return found[0], self.redaction.wait(found[1])

    def stream_run(self, *args: Any, **options: Any) -> Iterator[Event]:
        events = super().stream_run(*args, **options)
        return map(self.redaction.event, events)

    async def _redacted(self, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
        async for event in events:
            yield self.redaction.event(event)

    def astream_run(self, *args: Any, **options: Any) -> AsyncIterator[Event]:
        return self._redacted(super().astream_run(*args, **options))

    def tail(self, **options: Any) -> Generator[TailedEvent]:
        return self._redacted_tail(super().tail(**options))

    def _redacted_tail(self, tail: Generator[TailedEvent]) -> Generator[TailedEvent]:
        with closing(tail):
            for each in tail:
                yield self._told_of(each)

    def atail(self, **options: Any) -> AsyncGenerator[TailedEvent]:
        return self._aredacted_tail(super().atail(**options))

    async def _aredacted_tail(
        self, tail: AsyncGenerator[TailedEvent]
    ) -> AsyncGenerator[TailedEvent]:
        async with aclosing(tail):
            async for each in tail:
                yield self._told_of(each)

    def _told_of(self, tailed: TailedEvent) -> TailedEvent:
        return replace(tailed, event=self.redaction.event(tailed.event))

    def cancel_run(self, *args: Any, **options: Any) -> Run:
        return self.redaction.run(super().cancel_run(*args, **options))

    def failed_runs(self, *args: Any, **options: Any) -> list[Run]:
        return [self.redaction.run(run) for run in super().failed_runs(*args, **options)]

    def page_of_failed_runs(self, *args: Any, **options: Any) -> RunPage:
        return self.redaction.page(super().page_of_failed_runs(*args, **options))

    def retry_failed(self, *args: Any, **options: Any) -> tuple[list[Run], list[Exception]]:
        started, refused = super().retry_failed(*args, **options)
        return [self.redaction.run(run) for run in started], refused

    def retry_page(self, *args: Any, **options: Any) -> RunPage:
        return self.redaction.page(super().retry_page(*args, **options))

    def retry_run(self, *args: Any, **options: Any) -> Run:
        return self.redaction.run(super().retry_run(*args, **options))
