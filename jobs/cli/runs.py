"""Commands about runs."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from beatless.cli import render
from beatless.cli.environment import Environment, json_input, moment, pairs, seconds
from beatless.client.requests import PRIORITIES
from beatless.errors import BadRequest
from beatless.observe.export import export
from beatless.orchestrator.events import Event
from beatless.orchestrator.state import RunState
from beatless.verify import verify as find_violations

Command = Callable[..., None]

TIMEOUT = click.option("--timeout", metavar="30s", help="Follow no longer; exit status 1 then.")


@dataclass(frozen=True)
class RunOption:
    """An option of `beatless start`, and how its text becomes a member of RunRequest."""

    declare: Callable[[Command], Command]
    read: Callable[[Any], Any] = field(default=lambda value: value)


RUN_OPTIONS = {
    "run_id": RunOption(click.option("--run-id", metavar="ID", help="Your own id for the run.")),
    "key": RunOption(
        click.option("--key", help="Start it once: the same key gives back the same run.")
    ),
    "queue": RunOption(click.option("--queue", metavar="Q")),
    "delay": RunOption(
        click.option("--delay", metavar="30s", help="Start it so much later."), seconds
    ),
    "not_before": RunOption(
        click.option(
            "--at",
            "not_before",
            metavar="TIME",
            help="Start it then, e.g. 2026-12-24T18:00:00+01:00.",
        ),
        moment,
    ),
    "deadline": RunOption(
        click.option("--deadline", metavar="1h", help="Fail if it has not ended so much later."),
        seconds,
    ),
    "priority": RunOption(
        click.option(
            "--priority",
            type=click.IntRange(PRIORITIES[0], PRIORITIES[-1]),
            default=0,
            help="Higher goes first.",
        )
    ),
    "tags": RunOption(click.option("--tag", "tags", metavar="K=V", multiple=True), pairs),
}
"""By the member that each gives. A test compares them with RunRequest."""


def run_options(command: Command) -> Command:
    """Declare all of them, in this order."""
    for option in reversed(RUN_OPTIONS.values()):
        command = option.declare(command)
    return command


def read_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `start_run`. Raises BadRequest."""
    return {
        name: None if given[name] is None else option.read(given[name])
        for name, option in RUN_OPTIONS.items()
    }


@click.command()
@click.argument("plan")
@click.option("--input", "input_", metavar="JSON|@FILE|-", help="The run's input.")
@run_options
@click.option("--follow", is_flag=True, help="Show its events until RunFinished.")
@TIMEOUT
@click.pass_obj
def start(
    env: Environment,
    /,
    plan: str,
    input_: str | None,
    follow: bool,
    timeout: str | None,
    **given: Any,
) -> None:
    """Start a run of PLAN; prints its id."""
    limit = None if timeout is None else seconds(timeout)
    export("beatless", os.environ)
    run = env.client.start_run(plan, json_input(input_), **read_options(given))
    if not follow:
        env.document(run.to_dict()) if env.as_json else click.echo(run.run_id)
        return
    if env.as_json:
        click.echo(run.run_id, err=True)
    else:
        click.echo(run.run_id)
    follow_to_end(env, run.run_id, env.client.stream_run(run.run_id, timeout=limit))


@click.command()
@click.argument("run")
@click.option("--from-seq", type=click.IntRange(0), default=0, help="Only events after this one.")
@click.option("--follow", is_flag=True, help="Go on until RunFinished.")
@TIMEOUT
@click.pass_obj
def events(env: Environment, run: str, from_seq: int, follow: bool, timeout: str | None) -> None:
    """The events of RUN."""
    client = env.client
    if follow:
        limit = None if timeout is None else seconds(timeout)
        follow_to_end(env, run, client.stream_run(run, from_seq, timeout=limit))
        return
    stored = client.events(run, from_seq)
    if env.as_json:
        for event in stored:
            env.document(event.to_dict())
    else:
        began = beginning(env, run)
        for event in stored:
            env.out.print(render.line(event, began))


def beginning(env: Environment, run_id: str) -> int:
    """The time at which the run was accepted, in milliseconds."""
    return round(env.client.get_run(run_id).created_at.timestamp() * 1000)


def follow_to_end(env: Environment, run_id: str, stream: Iterator[Event]) -> None:
    """Show a stream; exit status 1 if the run did not complete."""
    if env.as_json:
        for event in stream:
            env.document(event.to_dict())
    else:
        render.follow(env.out, stream, beginning(env, run_id))
    if env.client.get_run(run_id).state is not RunState.COMPLETED:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("run")
@click.pass_obj
def show(env: Environment, run: str) -> None:
    """Everything that is stored about RUN."""
    found = env.client.get_run(run)
    if env.as_json:
        env.document(found.to_dict())
        return
    for line in render.run_sheet(found):
        env.out.print(line)


@click.command()
@click.option("--state", type=click.Choice([state.value for state in RunState]))
@click.option("--plan")
@click.option("--queue", metavar="Q")
@click.option("--tag", "tags", metavar="K=V", multiple=True)
@click.option("--step", metavar="S", help="Unfinished runs that are in it, or go on with it.")
@click.option("--retried/--not-retried", default=None, help="Whether it has a retry.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.pass_obj
def runs(
    env: Environment,
    state: str | None,
    plan: str | None,
    queue: str | None,
    tags: tuple[str, ...],
    step: str | None,
    retried: bool | None,
    limit: int,
) -> None:
    """Runs, newest first."""
    found = env.client.list_runs(
        state=state,
        plan=plan,
        queue=queue,
        tags=pairs(tags),
        retried=retried,
        step=step,
        limit=limit,
    )
    if env.as_json:
        for run in found:
            env.document(run.to_dict())
    else:
        for line in render.run_table(found):
            env.out.print(line)


@click.command()
@click.argument("run")
@click.option("--reason", help="Kept with the run.")
@click.pass_obj
def cancel(env: Environment, run: str, reason: str | None) -> None:
    """Ask RUN to stop. A run that waits ends at once, one that runs after its step."""
    found = env.client.cancel_run(run, reason=reason)
    if env.as_json:
        env.document(found.to_dict())
    elif found.cancel_requested_at is None:
        click.echo(f"{run} had ended before: it has {found.state}")
    elif found.state is RunState.CANCELLED:
        click.echo(f"{run} is cancelled")
    else:
        click.echo(f"{run} will end after its step")


@click.command()
@click.argument("run")
@click.option("--from-step", metavar="S", help="Begin there; default: where it failed.")
@click.option("--follow", is_flag=True, help="Show the new run's events until RunFinished.")
@TIMEOUT
@click.pass_obj
def retry(
    env: Environment, run: str, from_step: str | None, follow: bool, timeout: str | None
) -> None:
    """Start a new run that reuses the finished steps of RUN; prints its id."""
    limit = None if timeout is None else seconds(timeout)
    new = env.client.retry_run(run, from_step)
    if not follow:
        env.document(new.to_dict()) if env.as_json else click.echo(new.run_id)
        return
    click.echo(new.run_id, err=env.as_json)
    follow_to_end(env, new.run_id, env.client.stream_run(new.run_id, timeout=limit))


@click.command()
@click.argument("run")
@click.pass_obj
def explain(env: Environment, run: str) -> None:
    """Show the timeline of RUN: attempts, waits, leases, dispatches and publishes."""
    found = env.client.explain(run)
    if env.as_json:
        for moment in found:
            env.document(moment.to_dict())
        return
    for moment in found:
        env.out.print(render.moment(moment, found[0].at))


@click.command()
@click.argument("run", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every stored run.")
@click.pass_obj
def verify(env: Environment, run: tuple[str, ...], everything: bool) -> None:
    """Check the guarantees on the stored data of RUN…: one line for each violation."""
    if everything == bool(run):
        raise BadRequest("verify", "takes either run ids or --all")
    client = env.client
    for run_id in run:
        client.get_run(run_id)
    with env.app.engine.connect() as connection:
        found = find_violations(
            connection, env.app.settings.schema, None if everything else list(run)
        )
    for violation in found:
        if env.as_json:
            click.echo(
                json.dumps(
                    {
                        "invariant": violation.invariant,
                        "run_id": violation.run_id,
                        "problem": violation.problem,
                    }
                )
            )
        else:
            click.echo(str(violation))
    if found:
        raise click.exceptions.Exit(1)
    env.note(f"every guarantee holds for {'all runs' if everything else ', '.join(run)}")
