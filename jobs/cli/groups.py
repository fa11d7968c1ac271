"""Commands about the groups of runs of a namespace, for the whole fleet."""

from dataclasses import asdict

import click
from rich.markup import escape

from beatless.cli.environment import Environment
from beatless.cli.options import NAMESPACE
from beatless.cli.render import age, table
from beatless.orchestrator.groups import WEIGHTS


@click.group(invoke_without_command=True)
@NAMESPACE
@click.pass_context
def groups(context: click.Context) -> None:
    """Groups of runs of a namespace, as tenants: those of a queue take turns."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@groups.command()
@NAMESPACE
@click.option("--queue", metavar="Q", help="Only groups with runs in it.")
@click.pass_obj
def ls(env: Environment, queue: str | None = None) -> None:
    """The groups with unfinished runs or a weight, one line for each queue."""
    found = env.client.groups(queue=queue)
    if env.as_json:
        for state in found:
            env.document(asdict(state))
        return
    rows = [
        (
            escape(state.group),
            escape(state.queue or ""),
            str(state.weight),
            str(state.running),
            str(state.waiting),
            age(state.oldest),
        )
        for state in found
    ]
    numbers = ("weight", "running", "waiting", "oldest")
    header = ("group", "queue", "weight", "running", "waiting", "oldest")
    for line in table(header, rows, numbers=numbers):
        env.out.print(line)
    if not found:
        env.note_other_namespaces("groups")


@groups.command("set")
@NAMESPACE
@click.argument("group", metavar="GROUP")
@click.option(
    "--weight",
    type=click.IntRange(WEIGHTS[0], WEIGHTS[-1]),
    required=True,
    help="Its turns for one of a group with the weight 1, which each has at first.",
)
@click.pass_obj
def set_(env: Environment, group: str, weight: int) -> None:
    """Set the weight of GROUP, in all queues, from its next turn on."""
    env.client.set_group_weight(group, weight)
    env.note(f"in namespace {env.namespace} group {group} has the weight {weight}")
