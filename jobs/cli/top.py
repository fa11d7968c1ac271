"""`beatless top`: a screen of what a fleet does, drawn anew each second."""

import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import click
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from beatless.cli.environment import Environment
from beatless.cli.render import age, plain, table
from beatless.errors import StatementTimeout, Unreachable
from beatless.orchestrator.queues import QueueState
from beatless.outbox.clock import monotonic
from beatless.outbox.sockets import readable
from beatless.top import Activity, FailedRun, activity
from beatless.transactions import reaching_postgres

REFRESH_S = 1.0

SHARE = 10
"""A look that takes so long is followed by a pause of so many times that: it must not be a load."""

FEWEST_ROWS = 2
"""Rows of a table that are shown in the lowest window."""


ERROR_CHARS = 200
"""Of the error of a run that failed, so many are shown at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table of the screen."""

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    """Cells, which may have markup."""
    spare: tuple[str, ...] = ()
    """Columns to leave out where there is no room, in this order."""

    def lines(self) -> list[str]:
        numbers = {title for title in self.titles if title in NUMBERS}
        return list(table(self.titles, self.rows, numbers=numbers))

    def without(self, title: str) -> "Section":
        at = self.titles.index(title)
        return replace(
            self,
            titles=(*self.titles[:at], *self.titles[at + 1 :]),
            rows=[(*row[:at], *row[at + 1 :]) for row in self.rows],
        )

    def within(self, width: int) -> "Section":
        """With as many columns as fit."""
        found = self
        for title in self.spare:
            if max(Text.from_markup(line).cell_len for line in found.lines()) <= width:
                break
            found = found.without(title)
        return found


NUMBERS = {
    "queued", "delayed", "waiting", "running", "oldest", "a second", "workers", "processes",
    "shards", "completed", "failed", "cancelled", "took",
}  # fmt: skip
"""Columns that stand to the right."""


@click.command()
@click.option("--once", is_flag=True, help="Print it once, as without a terminal.")
@click.pass_obj
def top(env: Environment, once: bool) -> None:
    """Queues, workers, relays, plans and failures, live; q or Ctrl-C ends it."""
    found = look(env)
    if env.as_json:
        env.document(asdict(found))
        return
    if once or not env.out.is_terminal or env.out.is_dumb_terminal:
        for line in screen(found, width=None, height=None):
            env.out.print(line)
        return
    try:
        with keys() as keys_within, Live(console=env.out, screen=True, auto_refresh=False) as live:
            took, problem = 0.0, ""
            while True:
                live.update(drawn(found, *env.out.size, problem=problem), refresh=True)
                if "q" in keys_within(max(REFRESH_S, SHARE * took)).lower():
                    return
                began = monotonic()
                try:
                    found, problem = look(env), ""
                    took = monotonic() - began
                except (Unreachable, StatementTimeout) as error:
                    problem, took = str(error), 0.0  # an outage is when people look here
    except KeyboardInterrupt:
        return


def look(env: Environment) -> Activity:
    """Raises Unreachable and StatementTimeout."""
    with reaching_postgres(env.app.settings.schema, env.app.engine):
        return activity(env.app, env.app.engine)


def drawn(found: Activity, width: int, height: int, *, problem: str = "") -> Text:
    """The screen for a window of this size: no line of it is wrapped.

    With a problem, which its first line tells, it is what was found before.
    """
    told = [f"[red]{escape(plain(problem))}; this is from before[/]"] if problem else []
    lines = [*told, *screen(found, width=width, height=height - len(told))]
    text = Text("\n").join(Text.from_markup(line, emoji=False) for line in lines)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def rest(seconds: float) -> str:
    """As waiting for a key that is not pressed; a signal ends it."""
    readable([], seconds)
    return ""


@contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Gives what waits so many seconds for keys; an empty text if none was pressed."""
    if not sys.stdin.isatty():
        yield rest
        return
    descriptor = sys.stdin.fileno()

    def keys_within(seconds: float) -> str:
        if not readable([descriptor], seconds):
            return ""
        return os.read(descriptor, 1024).decode(errors="replace") or "q"  # its terminal is gone

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSADRAIN)  # with what was typed while the first look took
    try:
        yield keys_within
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def screen(found: Activity, *, width: int | None, height: int | None) -> list[str]:
    """The lines of the screen, with markup; None is without a bound."""
    system = found.system
    behind = f"lag {system.lag_seconds:.1f}s, {system.unpublished} unpublished"
    late = system.lag_seconds > 1
    head = (
        f"[bold]beatless[/] {system.version}  PostgreSQL {system.postgres}  "
        f"{system.redis or '[red]Redis cannot be reached[/]'}  "
        f"{'[yellow]' if late else ''}{behind}{'[/]' if late else ''}  "
        f"dead letters {system.dead_letters}"
    )
    parts = [each for each in sections(found) if each.rows]
    if width is not None:
        parts = [each.within(width) for each in parts]
    blocks = [each.lines() for each in parts]
    if height is not None:
        while 1 + sum(len(block) + 1 for block in blocks) > height:
            longest = max(blocks, key=len, default=[])
            if len(longest) <= 1 + FEWEST_ROWS:
                break
            longest.pop()
        for block, part in zip(blocks, parts, strict=True):
            if hidden := len(part.rows) + 1 - len(block):
                block[-1] = f"[dim]and {hidden + 1} more[/]"
    lines = [head, *(line for block in blocks for line in ("", *block))]
    return lines if height is None else lines[:height]


def sections(found: Activity) -> Iterator[Section]:
    """The tables, the most important first."""
    yield Section(
        titles=("queue", "", "queued", "running", "waiting", "delayed", "oldest", "a second",
                "workers"),
        rows=[
            (
                escape(plain(each.name)),
                "[yellow]paused[/]" if each.paused_at else "",
                str(each.queued),
                str(each.active),
                str(each.waiting),
                str(each.delayed),
                age(each.oldest),
                f"{each.per_minute / 60:.1f}",
                "[red]0[/]" if each.queued and not each.workers else str(each.workers),
            )
            for each in sorted(found.queues, key=is_idle)
        ],
        spare=("delayed", "waiting", "workers", "oldest"),
    )  # fmt: skip
    yield Section(
        titles=("plan", "completed", "failed", "cancelled", "a second", "took"),
        rows=[
            (
                escape(plain(each.plan)),
                str(each.completed),
                f"[red]{each.failed}[/]" if each.failed else "0",
                str(each.cancelled),
                f"{each.per_second:.1f}",
                f"{each.seconds:.2f}s",
            )
            for each in found.plans
        ],
        spare=("cancelled", "took", "completed"),
    )
    yield Section(
        titles=("worker", "processes", "queues", "since", "version", "failing"),
        rows=[
            (
                escape(plain(each.hostname)),
                str(each.processes),
                escape(plain(",".join(each.queues))),
                age(each.started_at),
                escape(plain(each.version)),
                f"[red]{escape(plain(','.join(each.failing)))}[/]" if each.failing else "",
            )
            for each in found.system.workers
        ],
        spare=("version", "since", "queues"),
    )
    yield Section(
        titles=("relay", "shards", "since", "version"),
        rows=[
            (
                escape(plain(each.process or each.address or "local")),
                str(len(each.shards)),
                age(each.since),
                escape(plain(each.version or "")),
            )
            for each in found.system.relays
        ],
        spare=("version", "since"),
    )
    yield Section(
        titles=("failed", "run", "plan", "error"),
        rows=[
            (
                f"{age(each.failed_at)} ago",
                escape(plain(each.run_id)),
                escape(plain(each.plan)),
                escape(plain(reason(each))[:ERROR_CHARS]),
            )
            for each in found.failures
        ],
    )


def is_idle(queue: QueueState) -> bool:
    """Whether nothing is in it, and nothing has ended just now: such queues are the last ones."""
    counts = (queue.queued, queue.active, queue.waiting, queue.delayed, queue.per_minute)
    return not any(counts)


def reason(run: FailedRun) -> str:
    """The type and the message of its error."""
    error = run.error or {}
    return f"{error.get('type')}: {error.get('message')}"
