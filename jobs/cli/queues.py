"""Commands about queues and dead letters, for the whole fleet, and about taking runs away."""

from dataclasses import asdict
from datetime import datetime

import click
from rich.table import Table

from jobs.cli.environment import Environment, seconds
from jobs.cli.render import age
from orchestrator.state import FINAL


@click.command()
@click.pass_obj
def queues(env: Environment) -> None:
    """Every queue with its counts."""
    found = env.app.client.queues()
    if env.as_json:
        for state in found:
            env.document(
                {
                    name: value.isoformat() if isinstance(value, datetime) else value
                    for name, value in asdict(state).items()
                }
            )
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    counts = ("waiting", "delayed", "active", "completed", "failed", "cancelled")
    for title in ("queue", "", *counts, "oldest", "per minute", "workers"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("queue", "") else "right")
    for state in found:
        table.add_row(
            state.name,
            "[yellow]paused[/]" if state.paused_at else "",
            *(str(getattr(state, name)) for name in counts),
            age(state.oldest),
            str(state.per_minute),
            str(state.workers),
        )
    env.out.print(table)


@click.command()
@click.argument("queue", metavar="Q")
@click.pass_obj
def pause(env: Environment, queue: str) -> None:
    """Start no more runs of queue Q anywhere; those that run go on."""
    env.app.client.pause_queue(queue)
    env.note(f"queue {queue} is paused")


@click.command()
@click.argument("queue", metavar="Q")
@click.pass_obj
def resume(env: Environment, queue: str) -> None:
    """Let the runs of queue Q start again."""
    env.app.client.resume_queue(queue)
    env.note(f"queue {queue} goes on")


@click.command()
@click.argument("queue", metavar="Q")
@click.pass_obj
def drain(env: Environment, queue: str) -> None:
    """Take away the runs of queue Q that wait; prints how many."""
    removed = env.app.client.drain_queue(queue)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)


@click.command()
@click.argument("queue", metavar="Q")
@click.option("--force", is_flag=True, help="Also while runs of it are running.")
@click.pass_obj
def obliterate(env: Environment, queue: str, force: bool) -> None:
    """Take away queue Q with all of its runs; prints how many."""
    removed = env.app.client.obliterate_queue(queue, force=force)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)


@click.command()
@click.argument("run", metavar="RUN")
@click.pass_obj
def remove(env: Environment, run: str) -> None:
    """Take RUN away with all of its events."""
    env.app.client.remove_run(run)
    env.note(f"run {run} is removed")


@click.command()
@click.option("--state", type=click.Choice(sorted(state.value for state in FINAL)), required=True)
@click.option("--older-than", metavar="7d", required=True, help="Ended so long ago.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--dry-run", is_flag=True, help="Only count what there is to take away.")
@click.pass_obj
def clean(env: Environment, state: str, older_than: str, limit: int, dry_run: bool) -> None:
    """Take away runs that ended long ago; prints how many."""
    if dry_run:
        runs, events = env.app.client.count_finished(state, seconds(older_than))
        if env.as_json:
            env.document({"runs": runs, "events": events})
        else:
            click.echo(f"{runs} runs with {events} events")
        return
    removed = env.app.client.clean(state, seconds(older_than), limit)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)


@click.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters(context: click.Context) -> None:
    """Event messages that could not be published; failed runs are `runs --state failed`."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@dead_letters.command()
@click.option("--limit", type=click.IntRange(1, 100_000), default=100, show_default=True)
@click.pass_obj
def ls(env: Environment, limit: int = 100) -> None:
    """The letters, oldest first."""
    for letter in env.app.client.dead_letters(limit):
        if env.as_json:
            env.document({**asdict(letter), "created_at": letter.created_at.isoformat()})
        else:
            click.echo(
                f"{letter.id}  run {letter.run_id}  events {letter.from_seq} to {letter.to_seq}  "
                f"{age(letter.created_at)} ago  {letter.reason}"
            )


@dead_letters.command()
@click.argument("letter", metavar="ID", type=int)
@click.pass_obj
def requeue(env: Environment, letter: int) -> None:
    """Publish the message again."""
    env.app.client.requeue_dead_letter(letter)
    env.note(f"dead letter {letter} is in the outbox again")


@dead_letters.command()
@click.argument("letter", metavar="ID", type=int)
@click.pass_obj
def discard(env: Environment, letter: int) -> None:
    """Forget the message; its events stay in the journal."""
    env.app.client.discard_dead_letter(letter)
    env.note(f"dead letter {letter} is discarded")
