"""`beatless tail`: the events of all runs of a namespace, as they are published."""

from contextlib import closing
from itertools import islice

import click

from beatless.cli import render
from beatless.cli.environment import Environment, pairs
from beatless.cli.options import NAMESPACE, plan_names
from beatless.namespaces import namespace_of
from beatless.orchestrator.events import EventType


@click.command()
@NAMESPACE
@click.option(
    "--plan",
    "plans",
    metavar="P",
    multiple=True,
    shell_complete=plan_names,
    help="Only runs of these plans.",
)
@click.option("--queue", metavar="Q", help="Only runs of this queue.")
@click.option("--tag", "tags", metavar="K=V", multiple=True, help="Only runs with these tags.")
@click.option(
    "--event",
    "types",
    metavar="TYPE",
    multiple=True,
    type=click.Choice([each.value for each in EventType]),
    help="Only events of these types, as RunFinished.",
)
@click.option(
    "--from",
    "begin",
    metavar="now|RUN",
    default="now",
    show_default=True,
    help="Begin now, or with the events since the start of RUN.",
)
@click.option("--limit", type=click.IntRange(1), help="End after so many events.")
@click.pass_obj
def tail(
    env: Environment,
    plans: tuple[str, ...],
    queue: str | None,
    tags: tuple[str, ...],
    types: tuple[str, ...],
    begin: str,
    limit: int | None,
) -> None:
    """The events of all runs, as they come; Ctrl-C ends it."""
    if "~" in begin:
        env.namespace = namespace_of(begin)
    since = None if begin == "now" else env.client.get_run(begin).created_at
    if missing := [plan for plan in plans if plan not in env.app.plans]:
        env.note(f"no plan of this app is called {' or '.join(missing)}")

    def told() -> None:
        env.note("the database has another history: events that were shown may be gone")

    try:
        tail = env.client.tail(
            plan=plans, queue=queue, tags=pairs(tags), event=types, since=since, on_reset=told
        )
        with closing(tail):
            env.note(f"following the runs of namespace {env.namespace}; Ctrl-C ends it")
            for each in islice(tail, limit):
                if env.as_json:
                    env.document({"plan": each.plan, **each.event.to_dict()})
                else:
                    env.out.print(render.tail_line(each.event, each.plan))
    except KeyboardInterrupt:
        return
