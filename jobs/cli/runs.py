"""Commands about runs."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Unpack, get_args, get_type_hints

import click

from beatless.cli import render
from beatless.cli.environment import Environment, json_input, moment, pairs, seconds
from beatless.cli.options import NAMESPACE, plan_names
from beatless.client.requests import OPTIONS, RunOptions, RunRequest, json_members
from beatless.errors import BadRequest
from beatless.observe.export import export
from beatless.orchestrator.child_calls import ChildrenWait
from beatless.orchestrator.errors import RunNotFound
from beatless.orchestrator.events import Event, EventType
from beatless.orchestrator.records import StartOutcome
from beatless.orchestrator.state import RunState
from beatless.orchestrator.timeline import Moment
from beatless.orchestrator.waits import WaitKind
from beatless.places import children_waited_for, difference, why_it_waits
from beatless.transactions import reaching_postgres
from beatless.unfit_rows import Violation
from beatless.verify import verify as find_violations
from beatless.verify import verify_all

TIMEOUT = click.option("--timeout", metavar="30s", help="Follow no longer; exit status 1 then.")


READERS: dict[Any, Callable[[Any], Any]] = {
    timedelta: seconds,
    datetime: moment,
    Mapping[str, str]: pairs,
}
"""How the text of an option becomes a value of its type; others are read by click."""


NOTES_OF_STARTS: dict[StartOutcome | None, str] = {
    "joined": "no run was started: this joins",
    "skipped": "no run was started: with its dedupe key is unfinished",
    "input_replaced": "no run was started: the input replaces that of",
}
"""Before the run that a start has found."""


def start_options() -> list[click.Option]:
    """The options of `beatless start`, made from their descriptions."""
    hints = get_type_hints(RunRequest)
    found = []
    for each in json_members():
        if option := OPTIONS.get(each.name):
            types = get_args(hints[each.name]) or (hints[each.name],)
            number = option.numbers and click.IntRange(option.numbers[0], option.numbers[-1])
            found.append(
                click.Option(
                    [option.flag or f"--{each.name.replace('_', '-')}", each.name],
                    metavar=option.metavar,
                    help=option.help,
                    default=each.default,
                    type=number or (int if int in types else None),
                    multiple=Mapping[str, str] in types,
                    callback=_reading(types),
                )
            )
    return found


def _reading(types: Sequence[Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    read = next((READERS[kind] for kind in types if kind in READERS), None)

    def callback(_context: click.Context, _option: click.Parameter, given: Any) -> Any:
        return given if given is None or read is None else read(given)

    return callback


def refuse_more(_context: click.Context, _option: click.Parameter, given: Sequence[str]) -> None:
    """Raises UsageError for arguments after the plan: an input is often among them."""
    if given:
        plain = " ".join(given)
        raise click.UsageError(f"unexpected argument {plain!r}: the input goes in --input JSON")


INPUT = click.Option(["--input", "input_"], metavar="JSON|@FILE|-", help="The run's input.")


@click.command(params=[INPUT, *start_options()])
@click.argument("plan", shell_complete=plan_names)
@click.argument("more", nargs=-1, expose_value=False, callback=refuse_more, metavar="")
@NAMESPACE
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
    **options: Unpack[RunOptions],
) -> None:
    """Start a run of PLAN; prints its id."""
    limit = None if timeout is None else seconds(timeout)
    export("beatless", os.environ)
    run = env.client.start_run(plan, json_input(input_), **options)
    if run.start in NOTES_OF_STARTS:
        env.note(f"{NOTES_OF_STARTS[run.start]} run {run.run_id}, which is {run.state}")
    if options["queue"] is not None:
        workers = [each.workers for each in env.client.queues() if each.name == run.queue]
        if not any(workers) and run.queue not in {each.queue for each in env.app.plans.values()}:
            env.note(f"no plan names the queue {run.queue}, and no worker consumes it now")
    if not follow or run.start == "skipped":
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
    client = env.client_of(run)
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
    return round(env.client_of(run_id).get_run(run_id).created_at.timestamp() * 1000)


def follow_to_end(env: Environment, run_id: str, stream: Iterator[Event]) -> None:
    """Show a stream; exit status 1 if the run did not complete."""
    if env.as_json:
        for event in stream:
            env.document(event.to_dict())
    else:
        render.follow(env.out, stream, beginning(env, run_id))
    if env.client_of(run_id).get_run(run_id).state is not RunState.COMPLETED:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("run")
@click.pass_obj
def show(env: Environment, run: str) -> None:
    """Everything that is stored about RUN."""
    client = env.client_of(run)
    found = client.get_run(run)
    waits = client.waits(run) if found.state is RunState.WAITING else []
    if env.as_json:
        env.document(found.to_dict() | {"waits": [wait.to_dict() for wait in waits]})
        return
    waits = [each for each in waits if each.kind is not WaitKind.CHILDREN]
    children = None
    if found.state is RunState.WAITING and not waits:
        children = children_of(env, run)
    cancel = None
    if found.cancel_requested_at is not None:
        events = client.events(run, from_seq=found.pruned_seq)
        cancel = next((each for each in events if each.type == EventType.CANCEL_REQUESTED), None)
    for line in render.run_sheet(found, cancel, waits, children):
        env.out.print(line)


def children_of(env: Environment, run: str) -> ChildrenWait | None:
    """The children for which a run waits."""
    with reaching_postgres(env.app.settings.schema, env.app.engine):
        return children_waited_for(
            env.app.engine, env.app.journal, env.client_of(run).stored_id(run)
        )


@click.command()
@click.argument("run", required=False)
@NAMESPACE
@click.option("--plan", shell_complete=plan_names, help="Only runs of this plan.")
@click.option("--queue", metavar="Q", help="Only runs of this queue.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.pass_obj
def waits(
    env: Environment, run: str | None, plan: str | None, queue: str | None, limit: int
) -> None:
    """The open waits of RUN; without RUN, of the runs that wait, newest first."""
    if run is not None:
        if plan is not None or queue is not None:
            raise click.UsageError("--plan and --queue choose runs: give them without RUN")
        ids = [run]
    else:
        found = env.client.list_runs(state=RunState.WAITING, plan=plan, queue=queue, limit=limit)
        ids = [each.run_id for each in found]
    rows = []
    for run_id in ids:
        with suppress(*[] if run is not None else [RunNotFound]):  # removed meanwhile
            client = env.client_of(run_id)
            found_waits = client.waits(run_id)
            if env.as_json:
                for wait in found_waits:
                    env.document({"run_id": run_id, **wait.to_dict()})
                continue
            told = [each for each in found_waits if each.kind is not WaitKind.CHILDREN]
            rows += [(run_id, wait.occurrence, render.open_wait(wait)) for wait in told]
            if not told and client.get_run(run_id).state is RunState.WAITING:
                children = children_of(env, run_id)
                if children is not None:
                    rows.append((run_id, children.occurrence, f"its children: {children}"))
    if not env.as_json:
        for line in render.table(("run", "wait", "waits for"), rows):
            env.out.print(line)
    if not ids:
        env.note_other_namespaces("waits")


@click.command()
@NAMESPACE
@click.option("--state", type=click.Choice([state.value for state in RunState]))
@click.option("--plan", shell_complete=plan_names)
@click.option("--queue", metavar="Q")
@click.option("--tag", "tags", metavar="K=V", multiple=True)
@click.option("--step", metavar="S", help="Unfinished runs that are in it, or go on with it.")
@click.option("--dedupe-key", metavar="K", help="Only runs that were started with it.")
@click.option("--group", metavar="G", help="Only runs that were started with it.")
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
    dedupe_key: str | None,
    group: str | None,
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
        dedupe_key=dedupe_key,
        group=group,
        limit=limit,
    )
    if env.as_json:
        for run in found:
            env.document(run.to_dict())
    else:
        for line in render.run_table(found):
            env.out.print(line)
    if not found:
        env.note_other_namespaces("runs")


@click.command()
@click.argument("run")
@click.option("--reason", help="Kept with the run.")
@click.pass_obj
def cancel(env: Environment, run: str, reason: str | None) -> None:
    """Ask RUN to stop. A run that waits ends at once, one that runs with its step."""
    found = env.client_of(run).cancel_run(run, reason=reason)
    if env.as_json:
        env.document(found.to_dict())
    elif found.cancel_requested_at is None:
        click.echo(f"{run} had ended before: it has {found.state}")
    elif found.state is RunState.CANCELLED:
        click.echo(f"{run} is cancelled")
    elif found.state is RunState.QUEUED:
        click.echo(
            f"{run} will end when it is undone: by the on_cancel step of its plan, or of its steps"
        )
    else:
        click.echo(f"{run} will end with its step: after it, or earlier if it looks for a cancel")


@click.command()
@click.argument("run")
@click.argument("name")
@click.option("--data", metavar="JSON", help="Its data; @FILE and - are read.")
@click.option("--key", help="Send it once: the same key is the same signal.")
@click.pass_obj
def signal(env: Environment, run: str, name: str, data: str | None, key: str | None) -> None:
    """Send signal NAME to RUN. The first wait for its name takes it, now or later."""
    sent = env.client_of(run).signal_run(run, name, json_input(data, "--data"), key=key)
    if env.as_json:
        env.document(asdict(sent))
        return
    click.echo(f"{name} is sent to {run}" if sent.new else f"{name} was sent before to {run}")
    if sent.new and name not in sent.waits_for:
        now = (
            f"waits for {' or '.join(sent.waits_for)}" if sent.waits_for else "waits for no signal"
        )
        env.note(f"the run {now} now: {name} is kept for a later wait")


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
    new = env.client_of(run).retry_run(run, from_step)
    if not follow:
        env.document(new.to_dict()) if env.as_json else click.echo(new.run_id)
        return
    click.echo(new.run_id, err=env.as_json)
    follow_to_end(env, new.run_id, env.client_of(new.run_id).stream_run(new.run_id, timeout=limit))


@click.command()
@click.argument("run")
@click.option("--state", type=click.Choice([state.value for state in RunState]))
@click.option("--after", type=click.IntRange(0), default=0, help="The number of the last one seen.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@click.pass_obj
def children(env: Environment, run: str, state: str | None, after: int, limit: int) -> None:
    """The runs that RUN has started, in the order of their numbers."""
    found = env.client_of(run).children(run, state=state, after=after, limit=limit)
    if env.as_json:
        for child in found:
            env.document(child.to_dict())
    else:
        for line in render.child_table(found):
            env.out.print(line)


@click.command()
@click.argument("run")
@click.pass_obj
def explain(env: Environment, run: str) -> None:
    """Show the timeline of RUN: attempts, waits, leases, dispatches and publishes."""
    client = env.client_of(run)
    found = client.explain(run)
    with reaching_postgres(env.app.settings.schema, env.app.engine):
        told = why_it_waits(env.app.engine, env.app.journal, env.app.plans, client.stored_id(run))
    if told is not None:
        text = f"with the code of this app: {difference(told)}; {told.advice}"
        found.append(Moment(at=found[-1].at, kind="difference", text=text))
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
    for run_id in run:
        env.client_of(run_id).get_run(run_id)
    violations = 0
    for violation in _violations(env, run):
        violations += 1
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
    if violations:
        raise click.exceptions.Exit(1)
    env.note(f"every guarantee holds for {'all runs' if everything else ', '.join(run)}")


def _violations(env: Environment, run_ids: Sequence[str]) -> Iterator[Violation]:
    """Those of these runs; without an id, of all that are stored, with progress for a person."""
    schema = env.app.settings.schema
    if run_ids:
        with reaching_postgres(schema, env.app.engine), env.app.engine.connect() as connection:
            yield from find_violations(connection, schema, run_ids)
        return
    with reaching_postgres(schema, env.app.engine), env.err.status("0 runs checked") as status:

        def progress(runs: int, events: int) -> None:
            status.update(f"{runs:,} runs with {events:,} events checked")

        yield from verify_all(env.app.engine, schema, progress=progress)
