"""Commands about the limits of a namespace, for the whole fleet."""

from dataclasses import asdict

import click
from rich.markup import escape

from beatless.cli.environment import Environment
from beatless.cli.options import NAMESPACE, given_namespace
from beatless.cli.render import age, table
from beatless.errors import BadRequest
from beatless.orchestrator.limit import rule_of


@click.group(invoke_without_command=True)
@NAMESPACE
@click.pass_context
def limits(context: click.Context) -> None:
    """Limits of a namespace: how many runs with the same key hold a lease at once."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@limits.command()
@NAMESPACE
@click.pass_obj
def ls(env: Environment) -> None:
    """The limits that are in use, waited for or set, one line for each key."""
    found = env.client.limits()
    if env.as_json:
        for state in found:
            env.document(asdict(state))
        return
    rows = [
        (
            escape(state.name),
            escape(state.key or ""),
            escape(rule_of(state)),
            "[yellow]set[/]" if state.is_set else "",
            str(state.running),
            str(state.waiting),
            age(state.oldest),
        )
        for state in found
    ]
    numbers = ("running", "waiting", "oldest")
    header = ("limit", "key", "lets", "", "running", "waiting", "oldest")
    for line in table(header, rows, numbers=numbers):
        env.out.print(line)
    if not found:
        env.note(escape(_none_yet(env)))
        env.note_other_namespaces("limits")


@limits.command("set")
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.option("--at-once", type=int, metavar="N", help="Runs with the same key that run at once.")
@click.option("--rate", metavar="N/PERIOD", help="How many begin in a s, min, h or day: 100/min.")
@click.option("--force", is_flag=True, help="Also a NAME that no plan has, for plans to come.")
@click.pass_obj
def set_(env: Environment, name: str, at_once: int | None, rate: str | None, force: bool) -> None:
    """Set what NAME lets run at once, or begin, whatever plans say, also after a deploy."""
    env.client.set_limit(name, at_once, rate=rate, force=force)
    how = f"{rate} begin" if at_once is None else f"{at_once} run at once"
    env.note(
        f"in namespace {env.namespace} limit {name} lets {how}; "
        f"`beatless limits release {name}{given_namespace(env)}` ends that"
    )


@limits.command()
@NAMESPACE
@click.argument("name", metavar="NAME")
@click.pass_obj
def release(env: Environment, name: str) -> None:
    """Let each run of NAME bring the number of its plan again; it may have done so already."""
    was_set = env.client.release_limit(name)
    if not was_set:
        known = {*_names_of_plans(env), *(state.name for state in env.client.limits())}
        if name not in known:
            raise BadRequest(
                "name",
                f"is {name!r}, a limit that no plan of this app has, and that is not set in "
                f"namespace {env.namespace}; known are {', '.join(sorted(known)) or 'none'}",
            )
    now = "is that of its plans" if was_set else "was not set, and is that of its plans"
    env.note(f"in namespace {env.namespace} limit {name} {now}")


def _names_of_plans(env: Environment) -> list[str]:
    """Of the limits that the plans of the app have."""
    limits = {each.name for plan in env.app.plans.values() for each in plan.all_limits}
    return sorted(limits)


def _none_yet(env: Environment) -> str:
    """What a person is told who sees no limit."""
    if names := _names_of_plans(env):
        return (
            f"no limit of namespace {env.namespace} is in use, waited for or set; plans of this "
            f"app have {', '.join(names)}: each is listed while runs use it or wait for it"
        )
    return (
        f"no limit of namespace {env.namespace} is in use, waited for or set, and no plan of this "
        'app has one; declare it with the plan, as in Plan("billing", [charge], '
        'limits=[Limit("stripe", at_once=3)])'
    )
