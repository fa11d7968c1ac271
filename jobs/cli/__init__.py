"""The command `beatless`. Exit status: 0 done, 1 failed, 2 bad input, 3 a server is unreachable."""

import sys
from collections.abc import Sequence

import click
import psycopg
import redis
from kombu.exceptions import OperationalError as BrokerError
from sqlalchemy import exc

from jobs.cli.demo import demo
from jobs.cli.environment import Environment
from jobs.cli.processes import dev, flower, migrate, relay, worker
from jobs.cli.runs import cancel, events, runs, show, start, verify
from jobs.errors import (
    BadRequest,
    BadSetting,
    JobsError,
    UnknownPlan,
    Unreachable,
)
from orchestrator.errors import BadPayload, OrchestratorError, RunConflict, RunNotFound
from orchestrator.plan import PlanError
from outbox.errors import OutboxError, PublishFailed

__all__ = ["cli", "main"]

BAD_INPUT = (BadPayload, BadRequest, BadSetting, PlanError, RunConflict, RunNotFound, UnknownPlan)
UNREACHABLE = (
    BrokerError,
    PublishFailed,
    Unreachable,
    exc.OperationalError,
    psycopg.OperationalError,
    redis.ConnectionError,
    redis.TimeoutError,
)
OURS = (JobsError, OrchestratorError, OutboxError, exc.DBAPIError, psycopg.Error, redis.RedisError)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--app", metavar="MODULE:ATTRIBUTE", help="Your App; default: BEATLESS_APP.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout, everything else on stderr.")
@click.version_option(package_name="beatless", prog_name="beatless")
@click.pass_context
def cli(context: click.Context, app: str | None, as_json: bool) -> None:
    """Durable, transactional, live-streamed runs for Celery."""
    context.obj = Environment(app=app, as_json=as_json)


for command in (
    cancel,
    demo,
    dev,
    events,
    flower,
    migrate,
    relay,
    runs,
    show,
    start,
    verify,
    worker,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point: every expected error is one line on stderr."""
    try:
        cli.main(args=arguments, prog_name="beatless", standalone_mode=False)
    except click.exceptions.Exit as ended:
        sys.exit(ended.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does.
        sys.stderr.close()
        sys.exit(1)
    except BAD_INPUT as error:
        fail(error, 2)
    except UNREACHABLE as error:
        fail(error, 3)
    except OURS as error:
        fail(error, 1)


def fail(error: Exception, status: int) -> None:
    """Say in one line what went wrong and end the process."""
    cause = getattr(error, "orig", None) or error
    first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    click.echo(f"beatless: {first}", err=True)
    sys.exit(status)
