"""The command `beatless`. Exit status: 0 done, 1 failed, 2 bad input, 3 a server is unreachable."""

import importlib
import itertools
import os
import sys
import traceback
from collections.abc import Sequence

import click
import psycopg
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import exc

from beatless.cli.environment import Environment
from beatless.errors import (
    BadRequest,
    BadSetting,
    JobsError,
    StatementTimeout,
    UnknownPlan,
    Unreachable,
)
from beatless.orchestrator.errors import BadPayload, OrchestratorError, RunConflict, RunNotFound
from beatless.orchestrator.plan import PlanError
from beatless.outbox.errors import OutboxError, PublishFailed

__all__ = ["cli", "main"]

BAD_INPUT = (BadPayload, BadRequest, BadSetting, PlanError, RunConflict, RunNotFound, UnknownPlan)
UNREACHABLE: tuple[type[Exception], ...] = (
    BrokerError,
    PublishFailed,
    StatementTimeout,
    Unreachable,
    exc.OperationalError,
    psycopg.OperationalError,
    redis.ConnectionError,
    redis.TimeoutError,
)
OURS = (JobsError, OrchestratorError, OutboxError, exc.DBAPIError, psycopg.Error, redis.RedisError)


MODULES = {
    "beatless.cli.api": ("serve", "token"),
    "beatless.cli.demo": ("demo",),
    "beatless.cli.dev": ("dev",),
    "beatless.cli.doctor": ("doctor",),
    "beatless.cli.init": ("init",),
    "beatless.cli.migrate": ("migrate",),
    "beatless.cli.plans": ("plan",),
    "beatless.cli.processes": ("flower", "relay", "worker"),
    "beatless.cli.queues": (
        "clean",
        "dead-letters",
        "drain",
        "obliterate",
        "pause",
        "queues",
        "remove",
        "resume",
    ),
    "beatless.cli.runs": (
        "cancel",
        "events",
        "explain",
        "retry",
        "runs",
        "show",
        "start",
        "verify",
    ),
}


class Commands(click.Group):
    """Imports only the command that is run: a relay needs no imports of `init` and `demo`.

    https://click.palletsprojects.com/en/stable/complex/#lazily-loading-subcommands
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *itertools.chain(*MODULES.values())})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for module, names in MODULES.items():
            if cmd_name in names and cmd_name not in self.commands:
                command = getattr(importlib.import_module(module), cmd_name.replace("-", "_"))
                self.add_command(with_global_options(command), cmd_name)
        return super().get_command(ctx, cmd_name)

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
    except BAD_INPUT as error:
        return fail(said(error), 2)
    except UNREACHABLE as error:
        return fail(said(error), 3)
    except OURS as error:
        return fail(said(error), 1)
    except OSError as error:
        return fail(said(error), 1)
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        kind = type(error).__name__
        return fail(f"unexpected {kind}: {said(error)} (beatless --traceback shows where)", 1)
    return status if isinstance(status, int) else 0


def said(error: BaseException) -> str:
    """The first line of an error's message; the driver's rather than SQLAlchemy's."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


def fail(text: str, status: int) -> int:
    """Print the error on one line."""
    click.echo(f"beatless: {' '.join(text.split())}", err=True)
    return status
