"""The command `beatless`. Exit status: 0 done, 1 failed, 2 bad input, 3 a server is unreachable."""

import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from beatless.cli.environment import Environment, importing

__all__ = ["cli", "main"]

COMMANDS = {
    "beatless.cli.api": {
        "serve": "Serve the HTTP API and the run page.",
        "token": "Tokens of the HTTP API.",
    },
    "beatless.cli.approvals": {
        "approve": "Decide approval NAME of RUN, by --yes or --no, or by --data if it has a form.",
        "approve-link": "Make a link by which one person decides approval NAME of RUN; prints it.",
        "revoke-link": "Let the link with this id decide nothing any more.",
    },
    "beatless.cli.completion": {
        "completion": "Print a script by which SHELL completes commands, options and plans.",
    },
    "beatless.cli.demo": {
        "demo": (
            "Run the main job on throw-away servers, kill a worker in the middle, and check "
            "everything."
        ),
    },
    "beatless.cli.dev": {
        "dev": (
            "A whole beatless in the foreground: servers, relay, workers, API, Flower; "
            "Ctrl-C ends it."
        ),
    },
    "beatless.cli.doctor": {
        "doctor": "Send a run through the whole stack, and look for known faults.",
    },
    "beatless.cli.init": {
        "init": (
            "Write a small project into DIRECTORY: a plan, its tests, a Makefile, a compose file."
        ),
    },
    "beatless.cli.migrate": {
        "migrate": "Create the tables, or bring them to this version, while everything runs.",
    },
    "beatless.cli.plans": {
        "plan": "The plans of the app.",
    },
    "beatless.cli.processes": {
        "flower": "Run Flower on the app's workers and runs.",
        "relay": "Run a relay: it publishes events and hands runs to the broker.",
        "worker": "Run a Celery worker for the app's plans.",
    },
    "beatless.cli.queues": {
        "clean": "Take away runs that ended long ago; prints how many.",
        "dead-letters": (
            "Failed runs without a retry, and dead letters: messages that could not be published."
        ),
        "drain": "Delete the runs of queue Q that no worker has, begun or not; prints how many.",
        "obliterate": "Take away queue Q with all of its runs, ended ones too; prints how many.",
        "pause": "Start no more runs of queue Q anywhere; those that run go on.",
        "queues": "Every queue with its counts, of all namespaces.",
        "remove": "Take RUN away with all of its events.",
        "resume": "Let the runs of queue Q start again.",
    },
    "beatless.cli.groups": {
        "groups": "Groups of runs of a namespace, as tenants: those of a queue take turns.",
    },
    "beatless.cli.limits": {
        "limits": "Limits of a namespace: how many runs with the same key hold a lease at once.",
    },
    "beatless.cli.runs": {
        "cancel": "Ask RUN to stop.",
        "children": "The runs that RUN has started, in the order of their numbers.",
        "events": "The events of RUN.",
        "explain": "Show the timeline of RUN: attempts, waits, leases, dispatches and publishes.",
        "retry": "Start a new run that reuses the finished steps of RUN; prints its id.",
        "runs": "Runs, newest first.",
        "show": "Everything that is stored about RUN.",
        "signal": "Send signal NAME to RUN.",
        "start": "Start a run of PLAN; prints its id.",
        "verify": "Check the guarantees on the stored data of RUN…: one line for each violation.",
        "waits": "The open waits of RUN; without RUN, of the runs that wait, newest first.",
    },
    "beatless.cli.tail": {
        "tail": "The events of all runs, as they come; Ctrl-C ends it.",
    },
    "beatless.cli.top": {
        "top": "Queues, workers, relays, plans and failures, live; q or Ctrl-C ends it.",
    },
    "beatless.cli.schedules": {
        "schedules": "Schedules: each starts a run at the ticks of a cron expression or interval.",
    },
}
"""By module, each with the help that the list of commands shows: that list imports none of them."""


class Commands(click.Group):
    """Imports only the command that is run: a relay needs no imports of `init` and `demo`.

    https://click.palletsprojects.com/en/stable/complex/#lazily-loading-subcommands
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *itertools.chain(*COMMANDS.values())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for module, names in COMMANDS.items():
            if cmd_name in names and cmd_name not in self.commands:
                with importing():
                    command = getattr(importlib.import_module(module), cmd_name.replace("-", "_"))
                self.add_command(with_global_options(command), cmd_name)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As Click does it, with the commands' help from the table."""
        known = dict(itertools.chain.from_iterable(map(dict.items, COMMANDS.values())))
        width = formatter.width - 6 - max(map(len, known))
        rows = [
            (name, click.Command(name, help=known[name]).get_short_help_str(width))
            for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As Click does it, with the commands' help from the table."""
        known = dict(itertools.chain.from_iterable(map(dict.items, COMMANDS.values())))
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        return [
            *(CompletionItem(name, help=known[name]) for name in names),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            for name in self.list_commands(ctx):  # for Click's suggestions
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--app", metavar="MODULE:ATTRIBUTE", help="Your App; default: BEATLESS_APP.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout, everything else on stderr.")
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show where an unexpected error came from.",
)
@click.version_option(package_name="beatless", prog_name="beatless")
@click.pass_context
def cli(context: click.Context, app: str | None, as_json: bool) -> None:
    """Durable, transactional, live-streamed runs for Celery."""
    context.obj = Environment()
    context.obj.named, context.obj.as_json = app, as_json
    context.call_on_close(context.obj.close)


def _json(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given:
        context.ensure_object(Environment).as_json = True


def _app(context: click.Context, _parameter: click.Parameter, given: str | None) -> None:
    if given is not None:
        context.ensure_object(Environment).named = given


def with_global_options(command: click.Command) -> click.Command:
    """Understands the global options after the command as well: that is where people type them."""
    for each in (command, *(command.commands.values() if isinstance(command, click.Group) else ())):
        each.params += [
            click.Option(["--app"], hidden=True, expose_value=False, callback=_app),
            click.Option(["--json"], is_flag=True, hidden=True, expose_value=False, callback=_json),
        ]
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: every error is one line on stderr."""
    try:
        sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does: nothing is left to be flushed to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(arguments: list[str]) -> int:
    """Run one command; its exit status."""
    for place, argument in enumerate(arguments, 1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            return fail(f"argument {place} is not valid UTF-8", 2)
    try:
        status = cli.main(args=arguments, prog_name="beatless", standalone_mode=False)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # which Click 8.1 does not have
            error.show()
            return error.exit_code
        command = error.ctx.command_path if error.ctx else "beatless"
        return fail(f"{error.format_message()} Try '{command} --help'.", error.exit_code)
    except click.ClickException as error:
        return fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted", 130)
    except BrokenPipeError:
        raise
    except Exception as error:
        # Imported after a failure: the errors of all libraries cost more than all of `--help`.
        from beatless.cli.exit_status import UNREACHABLE_STATUS, exit_status

        known = exit_status(error)
        if known is not None:
            return fail(said(error) + (other_stack() if known == UNREACHABLE_STATUS else ""), known)
        if "--traceback" in arguments:
            traceback.print_exc()
        kind = type(error).__name__
        return fail(f"unexpected {kind}: {said(error)} (beatless --traceback shows where)", 1)
    return status if isinstance(status, int) else 0


def said(error: BaseException) -> str:
    """The first line of an error's message; the driver's rather than SQLAlchemy's."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def other_stack() -> str:
    """A sentence, if a `beatless dev` of this directory has not the servers that were asked."""
    from beatless.local.stack_file import settings_of_ready

    named = ("BEATLESS_DATABASE_URL", "BEATLESS_REDIS_URL")
    found = settings_of_ready(Path.cwd())
    others = [n for n in named if n in found and os.environ.get(n, found[n]) != found[n]]
    if not others:
        return ""
    names, are = " and ".join(others), "are" if len(others) > 1 else "is"
    return (
        f"; {names} of your environment {are} not of the `beatless dev` that runs in this "
        "directory: read its --env-file again, or unset them"
    )


def fail(text: str, status: int) -> int:
    """Print the error on one line."""
    click.echo(f"beatless: {' '.join(text.split())}", err=True)
    return status
