"""Commands about schedules."""

from dataclasses import asdict
from datetime import datetime

import click
from rich.markup import escape

from beatless.cli.environment import Environment, moment
from beatless.cli.options import NAMESPACE
from beatless.cli.render import age, brief, table
from beatless.orchestrator.schedule import ScheduleState, StoredSchedule

STYLES = {
    ScheduleState.ACTIVE: "green",
    ScheduleState.PAUSED: "yellow",
    ScheduleState.UNDECLARED: "yellow",
    ScheduleState.STOPPED: "red",
}

PAGE = 500


@click.group(invoke_without_command=True)
@click.pass_context
def schedules(context: click.Context) -> None:
    """Schedules: each starts a run at the ticks of a cron expression or interval."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@schedules.command()
@NAMESPACE
@click.pass_obj
def ls(env: Environment) -> None:
    """All schedules by name."""
    rows, after = [], ""
    while page := env.client.schedules(after=after, limit=PAGE):
        after = page[-1].name
        for stored in page:
            if env.as_json:
                env.document(stored.to_dict())
            else:
                rows.append(_row(stored))
    if not env.as_json:
        header = ("schedule", "plan", "at", "state", "next tick", "last", "late", "last run")
        for line in table(header, rows, numbers=("late",)):
            env.out.print(line)


def _row(stored: StoredSchedule) -> tuple[str, ...]:
    return (
        escape(stored.name),
        escape(stored.plan),
        escape(times(stored)),
        f"[{STYLES.get(stored.state, 'red')}]{escape(stored.state.value)}[/]",
        local(stored, stored.next_tick),
        f"{age(stored.last_fired_at)} ago" if stored.last_fired_at else "",
        f"{stored.last_late_s:.3f}s" if stored.last_late_s is not None else "",
        stored.last_run_id or "",
    )


def times(stored: StoredSchedule) -> str:
    """Its cron expression or interval, in words of the declaration."""
    if stored.cron is None:
        return f"every {stored.every} s" if stored.every is not None else "by another rule"
    return stored.cron if stored.tz == "UTC" else f"{stored.cron} {stored.tz}"


def local(stored: StoredSchedule, tick: datetime | None) -> str:
    """A tick in the time zone of its schedule."""
    return stored.local(tick).isoformat(sep=" ", timespec="seconds") if tick else ""


@schedules.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def show(env: Environment, name: str) -> None:
    """Everything about NAME: its definition, its next ticks, its last run."""
    stored = env.client.schedule(name)
    if env.as_json:
        env.document(stored.to_dict())
        return
    owner = f"the app {stored.app}" if stored.declared else f"run time, of the app {stored.app}"
    facts = {
        "schedule": stored.name,
        "plan": stored.plan,
        "input": brief(stored.input),
        "at": times(stored),
        "declared by": owner,
        "catch_up": stored.catch_up.value,
        "overlap": stored.overlap.value,
        "jitter": f"{stored.jitter:g} s",
        "state": stored.state.value + (f": {stored.reason}" if stored.reason else ""),
        "next ticks": "\n".join(local(stored, tick) for tick in stored.next_ticks()),
        "last tick": local(stored, stored.last_tick),
        "last run": stored.last_run_id or "",
        "fired": f"{age(stored.last_fired_at)} ago" if stored.last_fired_at else "",
        "late": f"{stored.last_late_s:.3f} s" if stored.last_late_s is not None else "",
        "failures": str(stored.failures),
    }
    for label, text in facts.items():
        for place, line in enumerate(text.split("\n")):
            click.echo(f"{label if place == 0 else '':<12}  {line}".rstrip())


@schedules.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def pause(env: Environment, name: str) -> None:
    """Fire no tick of NAME until it is resumed; ticks of that time are passed over."""
    _note(env, env.client.pause_schedule(name), "is paused")


@schedules.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def resume(env: Environment, name: str) -> None:
    """Fire NAME from its next tick on."""
    stored = env.client.resume_schedule(name)
    _note(env, stored, f"goes on: next tick {local(stored, stored.next_tick) or 'none'}")


def _note(env: Environment, stored: StoredSchedule, text: str) -> None:
    if env.as_json:
        env.document(stored.to_dict())
    env.note(f"schedule {stored.name} {text}")


@schedules.command("run-now")
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def run_now(env: Environment, name: str) -> None:
    """Start a run of NAME out of turn; prints its id."""
    run = env.client.run_schedule_now(name)
    env.document(run.to_dict()) if env.as_json else click.echo(run.run_id)


@schedules.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.argument("start", metavar="FROM")
@click.argument("end", metavar="TO")
@click.pass_obj
def backfill(env: Environment, name: str, start: str, end: str) -> None:
    """Start a run of NAME for each tick from FROM on and before TO that has none; prints an ID.

    Times without a zone are in UTC.
    """
    filled = env.client.backfill_schedule(name, moment(start), moment(end))
    env.document(asdict(filled)) if env.as_json else click.echo(filled.id)
    env.note(f"{filled.runs} runs started, with the tag backfill={filled.id}")


@schedules.command("cancel-backfill")
@NAMESPACE
@click.argument("backfill", metavar="ID")
@click.option("--reason", help="Stored with the cancel.")
@click.pass_obj
def cancel_backfill(env: Environment, backfill: str, reason: str | None) -> None:
    """Cancel the runs of the backfill ID that have not ended; prints how many."""
    cancelled = env.client.cancel_backfill(backfill, reason=reason)
    env.document({"cancelled": cancelled}) if env.as_json else click.echo(cancelled)


@schedules.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def delete(env: Environment, name: str) -> None:
    """Take NAME away, which was made at run time or is declared no more; its runs stay."""
    env.client.delete_schedule(name)
    env.note(f"schedule {name} is deleted")


@schedules.command("from-beat")
@click.argument("celery_app", metavar="MODULE:APP")
@click.pass_obj
def from_beat(env: Environment, celery_app: str) -> None:
    """Print the `beat_schedule` of a Celery app as `Schedule(…)` lines; nothing is stored."""
    from beatless.cli.beat import celery_app_of, lines_of  # Celery is half of the time to start

    env.needs_servers = False
    env.find_settings()
    for line in lines_of(celery_app_of(celery_app)):
        click.echo(line)
