"""Commands about queues and dead letters, for the whole fleet, and about taking runs away."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import click
from rich.markup import escape

from beatless.cli.environment import Environment, pairs, seconds
from beatless.cli.options import NAMESPACE, plan_names
from beatless.cli.render import age, plain, table
from beatless.client.queues import unknown_queue
from beatless.errors import BadRequest
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.records import Run
from beatless.orchestrator.state import FINAL, RunState
from beatless.outbox.letters import DeadLetter

COUNTS = ("queued", "delayed", "waiting", "active", "completed", "failed", "cancelled")
"""The counts of a queue: each of its runs is in one of them."""


@click.group(invoke_without_command=True)
@click.pass_context
def queues(context: click.Context) -> None:
    """Every queue with its counts, of all namespaces.

    A queue is listed while it has runs, a setting, or a worker.
    """
    if context.invoked_subcommand is None:
        context.invoke(list_queues)


@queues.command("ls")
@click.pass_obj
def list_queues(env: Environment) -> None:
    """Every queue with its counts, of all namespaces."""
    found = env.client.queues()
    if env.as_json:
        for state in found:
            env.document(asdict(state))
        return
    rows = [
        (
            escape(state.name),
            "[yellow]paused[/]" if state.paused_at else "",
            "" if state.age_after is None else f"{state.age_after:g} s",
            *(str(getattr(state, name)) for name in COUNTS),
            age(state.oldest),
            str(state.per_minute),
            str(state.workers),
        )
        for state in found
    ]
    more = ("oldest", "per minute", "workers")
    numbers = ("age after", *COUNTS, *more)
    for line in table(("queue", "", *numbers), rows, numbers=numbers):
        env.out.print(line)
    if others := env.other_namespaces():
        env.note(
            f"these are the runs of all namespaces, {others[0]} too; `beatless runs` has those of "
            f"{env.namespace}"
        )


@queues.command("set")
@click.argument("queue", metavar="Q")
@click.option(
    "--age-after",
    metavar="10m",
    required=True,
    help="A run that waits for longer comes before those of a higher priority; `never`: none does.",
)
@click.pass_obj
def set_(env: Environment, queue: str, age_after: str) -> None:
    """Set after which time runs of queue Q that wait come first."""
    after = None if age_after == "never" else seconds(age_after)
    env.client.set_age_after(queue, after)
    if after is None:
        env.note(f"in queue {queue} priority alone decides which run comes first")
    else:
        env.note(f"in queue {queue} runs that wait for {after:g} s come first")
    if is_unused(env, queue):
        env.note(
            f"no plan names the queue {queue}, no worker consumes it and no run is in it: if "
            f"another was meant, `beatless queues set {queue} --age-after never`"
        )


@click.command()
@click.argument("queue", metavar="Q")
@click.pass_obj
def pause(env: Environment, queue: str) -> None:
    """Start no more runs of queue Q anywhere; those that run go on."""
    env.client.pause_queue(queue)
    env.note(f"queue {queue} is paused")
    if is_unused(env, queue):
        env.note(
            f"no plan names the queue {queue}, no worker consumes it and no run is in it: if "
            f"another was meant, `beatless resume {queue}`"
        )


def is_unused(env: Environment, queue: str) -> bool:
    """Whether nothing but its pause speaks for this queue."""
    if queue in {plan.queue for plan in env.app.plans.values()}:
        return False
    states = [state for state in env.client.queues() if state.name == queue]
    if not states:
        return False
    (state,) = states
    counts = (state.queued, state.delayed, state.waiting, state.active, state.workers)
    return not any((*counts, state.completed, state.failed, state.cancelled))


@click.command()
@click.argument("queue", metavar="Q")
@click.pass_obj
def resume(env: Environment, queue: str) -> None:
    """Let the runs of queue Q start again."""
    env.client.resume_queue(queue)
    env.note(f"queue {queue} goes on")


@click.command()
@click.argument("queue", metavar="Q")
@click.option("--yes", is_flag=True, help="Ask nothing; without a terminal nothing is asked.")
@click.option("--dry-run", is_flag=True, help="Only count the runs to delete.")
@click.pass_obj
def drain(env: Environment, queue: str, yes: bool, dry_run: bool) -> None:
    """Delete the runs of queue Q that no worker has, begun or not; prints how many."""
    if dry_run:
        runs = waiting_runs_of(env, queue)
        env.document({"runs": runs}) if env.as_json else click.echo(in_words(runs))
        return
    if not yes and sys.stdin.isatty():
        asked = f"Delete {in_words(waiting_runs_of(env, queue))} of queue {queue} and their events?"
        if not click.confirm(asked, err=True):
            env.note("nothing is removed")
            raise click.exceptions.Exit(1)
    removed = env.client.drain_queue(queue)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)
    env.note(f"runs removed from queue {queue}, with their events: {removed}")


@click.command()
@click.argument("queue", metavar="Q")
@click.option("--force", is_flag=True, help="Also while runs of it are running.")
@click.option("--yes", is_flag=True, help="Ask nothing; without a terminal nothing is asked.")
@click.option("--dry-run", is_flag=True, help="Only count the runs to take away.")
@click.pass_obj
def obliterate(env: Environment, queue: str, force: bool, yes: bool, dry_run: bool) -> None:
    """Take away queue Q with all of its runs, ended ones too; prints how many."""
    if dry_run:
        runs, running = runs_of(env, queue)
        if env.as_json:
            env.document({"runs": runs, "running": running})
        else:
            click.echo(f"{runs} runs, {running} of them running")
        if running and not force:
            env.note("while they are running it is refused without --force")
        return
    if not yes and sys.stdin.isatty():
        runs, _ = runs_of(env, queue)
        if not click.confirm(f"Take away queue {queue}, {runs} runs and their events?", err=True):
            env.note("nothing is removed")
            raise click.exceptions.Exit(1)
    removed = env.client.obliterate_queue(queue, force=force)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)
    env.note(f"queue {queue} is removed, and its runs with their events: {removed}")


def waiting_runs_of(env: Environment, queue: str) -> int:
    """The unfinished runs of a queue that no worker has. Raises BadRequest if nothing knows it."""
    states = [state for state in env.client.queues() if state.name == queue]
    if not states and queue not in {plan.queue for plan in env.app.plans.values()}:
        raise unknown_queue(queue)
    return sum(state.queued + state.delayed + state.waiting for state in states)


def in_words(runs: int) -> str:
    """A number of runs, as "1 run"."""
    return f"{runs:,} run{'' if runs == 1 else 's'}"


def runs_of(env: Environment, queue: str) -> tuple[int, int]:
    """(the runs of a queue, those that are running). Raises BadRequest if nothing knows it."""
    states = [state for state in env.client.queues() if state.name == queue]
    if not states and queue not in {plan.queue for plan in env.app.plans.values()}:
        raise unknown_queue(queue)
    runs = sum(sum(getattr(state, name) for name in COUNTS) for state in states)
    return runs, sum(state.active for state in states)


@click.command()
@click.argument("run", metavar="RUN")
@click.pass_obj
def remove(env: Environment, run: str) -> None:
    """Take RUN away with all of its events."""
    env.client_of(run).remove_run(run)
    env.note(f"run {run} is removed")


@click.command()
@NAMESPACE
@click.option("--state", type=click.Choice(sorted(state.value for state in FINAL)), required=True)
@click.option("--older-than", metavar="7d", required=True, help="Ended so long ago.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option("--dry-run", is_flag=True, help="Only count the runs to remove.")
@click.pass_obj
def clean(env: Environment, state: str, older_than: str, limit: int, dry_run: bool) -> None:
    """Take away runs that ended long ago; prints how many."""
    if older_than[-1:].isdigit():  # what is taken away does not come back
        raise BadRequest(
            "--older-than", f"is {older_than!r}, without a unit: write it like 5m or 7d"
        )
    age_s = seconds(older_than)
    if dry_run:
        runs, events = env.client.count_finished(state, age_s)
        if env.as_json:
            env.document({"runs": runs, "events": events})
        else:
            click.echo(f"{runs} runs with {events} events")
        return
    removed = env.client.clean(state, age_s, limit)
    env.document({"removed": removed}) if env.as_json else click.echo(removed)


@click.group("dead-letters", invoke_without_command=True)
@click.pass_context
def dead_letters(context: click.Context) -> None:
    """Failed runs without a retry, and dead letters: messages that could not be published."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


def of_runs(command: Callable[..., None]) -> Callable[..., None]:
    """The options that choose failed runs."""
    for option in reversed(
        (
            NAMESPACE,
            click.option("--plan", shell_complete=plan_names, help="Only runs of this plan."),
            click.option("--queue", help="Only runs of this queue."),
            click.option("--tag", "tags", metavar="K=V", multiple=True, help="Only with this tag."),
            click.option("--error", metavar="TEXT", help="Only if TEXT is in the error's message."),
            click.option("--within", metavar="TIME", help="Only failures since then, as 2h."),
            click.option(
                "--limit", type=click.IntRange(1, 100_000), default=100, show_default=True
            ),
        )
    ):
        command = option(command)
    return command


KIND = click.option(
    "--message/--run",
    "is_message",
    default=None,
    help="Decides if ID is both the number of a message and the id of a run.",
)


def find(env: Environment, letter: str, is_message: bool | None) -> DeadLetter | Run:
    """The message of this number, or the failed run with this id.

    Raises BadRequest where it is both, a number of neither, or a run that is no dead letter, and
    RunNotFound.
    """
    client = env.client
    message = run = None
    if is_message is not False and letter.isascii() and letter.isdigit() and len(letter) < 19:
        with suppress(BadRequest):
            message = client.dead_letter(int(letter))
    if is_message and message is None:
        raise BadRequest("dead letter", f"{letter} does not exist")
    if not is_message:
        try:
            run = env.client_of(letter).get_run(letter)
        except RunNotFound:
            if message is None and letter.isdigit():
                problem = f"{letter} is neither the number of a message nor the id of a run"
                raise BadRequest("dead letter", problem) from None
            if message is None:
                raise
    if message is not None and run is not None:
        raise BadRequest(
            "dead letter", f"{letter} is a message and a run: choose --message or --run"
        )
    if message is not None:
        return message
    assert run is not None  # noqa: S101 - or RunNotFound was raised
    if run.state is not RunState.FAILED or run.retried_by is not None:
        was = f"retried as {run.retried_by}" if run.retried_by else run.state.value
        raise BadRequest("dead letter", f"{letter} is none: that run is {was}")
    return run


@dead_letters.command()
@of_runs
@click.pass_obj
def ls(
    env: Environment,
    /,
    limit: int = 100,
    within: str | None = None,
    tags: tuple[str, ...] = (),
    **chosen: str | None,
) -> None:
    """Failed runs, then dead letters (only without a filter); each oldest first."""
    since = None if within is None else seconds(within)
    for run in env.client.failed_runs(**chosen, tags=pairs(tags), within=since, limit=limit):
        if env.as_json:
            env.document({"kind": "run", **run.to_dict()})
        else:
            error = run.error or {}
            click.echo(
                f"{run.run_id}  run of {run.plan}  queue {run.queue}  {age(run.finished_at)} ago  "
                + plain(f"{error.get('type')}: {error.get('message')}")
            )
    if since is not None or tags or any(chosen.values()):
        return
    for letter in env.client.dead_letters(limit):
        if env.as_json:
            env.document({"kind": "message", **asdict(letter)})
        else:
            click.echo(
                f"{letter.id}  events {letter.from_seq} to {letter.to_seq} of {letter.run_id}  "
                f"{age(letter.created_at)} ago  {letter.reason}"
            )


@dead_letters.command()
@click.argument("letter", metavar="ID")
@KIND
@click.pass_obj
def show(env: Environment, letter: str, is_message: bool | None) -> None:
    """Why it was given up on: of a run, the traceback of its last attempt."""
    found = find(env, letter, is_message)
    if isinstance(found, Run):
        error = found.error or {}
        if env.as_json:
            env.document({"kind": "run", **found.to_dict()})
        else:
            click.echo(error.get("traceback") or f"{error.get('type')}: {error.get('message')}")
    elif env.as_json:
        env.document({"kind": "message", **asdict(found)})
    else:
        click.echo(found.reason)


@dead_letters.command()
@click.argument("letter", metavar="[ID]", required=False)
@click.option("--all", "every", is_flag=True, help="All failed runs that the options choose.")
@click.option("--messages", is_flag=True, help="All messages, or those with --error TEXT.")
@KIND
@of_runs
@click.pass_obj
def requeue(
    env: Environment,
    /,
    letter: str | None,
    is_message: bool | None,
    every: bool,
    messages: bool,
    limit: int,
    within: str | None,
    tags: tuple[str, ...],
    **chosen: str | None,
) -> None:
    """Publish the message again, or retry the run; with --all, many runs. Prints the new ids.

    With --messages, many messages; prints how many.
    """
    filtered = within is not None or tags or any(chosen.values())
    if (letter is not None) + every + messages != 1 or (letter is not None and filtered):
        raise click.UsageError(
            "give one ID, or --all with options that choose failed runs, or --messages"
        )
    if messages:
        if within is not None or tags or chosen["plan"] or chosen["queue"]:
            raise click.UsageError("--messages goes with --error and --limit only")
        again = env.client.requeue_dead_letters(reason=chosen["error"] or "", limit=limit)
        env.document({"requeued": again}) if env.as_json else click.echo(again)
        return
    if letter is not None:
        found = find(env, letter, is_message)
        if isinstance(found, DeadLetter):
            env.client.requeue_dead_letter(found.id)
            env.note(f"dead letter {letter} is in the outbox again")
            return
        started, refused = [env.client_of(found.run_id).retry_run(found.run_id)], list[Exception]()
    else:
        since = None if within is None else seconds(within)
        started, refused = env.client.retry_failed(
            **chosen, tags=pairs(tags), within=since, limit=limit
        )
    for run in started:
        env.document(run.to_dict()) if env.as_json else click.echo(run.run_id)
    for reason in refused:
        env.note(str(reason))
    if refused:
        raise click.exceptions.Exit(1)
    if not started:
        note_none(env, filtered=bool(filtered), limit=limit)


def note_none(env: Environment, *, filtered: bool, limit: int) -> None:
    """Say that no run was retried, and that messages are another list."""
    if filtered:
        env.note("no failed runs that the options choose")
        return
    messages = len(env.client.dead_letters(limit))
    more = " or more" if messages == limit else ""
    also = f"; {messages}{more} message{'' if messages == 1 else 's'}: --messages"
    env.note(f"no failed runs{also if messages else ''}")


@dead_letters.command()
@click.argument("letter", metavar="ID")
@KIND
@click.pass_obj
def discard(env: Environment, letter: str, is_message: bool | None) -> None:
    """Forget the message, whose events stay in the journal; or remove the run with its events."""
    found = find(env, letter, is_message)
    if isinstance(found, DeadLetter):
        env.client.discard_dead_letter(found.id)
        env.note(f"dead letter {letter} is discarded")
    else:
        env.client_of(found.run_id).remove_run(found.run_id)
        env.note(f"run {letter} is removed")
