"""Options of several commands."""

import io
import os
from contextlib import redirect_stderr, redirect_stdout

import click
from click.shell_completion import CompletionItem

from beatless.cli.environment import Environment
from beatless.errors import BadRequest
from beatless.namespaces import DEFAULT_NAMESPACE, check_namespace
from beatless.observe.logs import Format
from beatless.observe.systemd import ServiceManager

READY_FD = click.option("--ready-fd", type=int, hidden=True, help="Write a byte here when ready.")


POOL = click.option(
    "--pool",
    type=click.Choice(["prefork", "threads", "solo", "async"]),
    help="Of a worker; default: prefork. async: many runs in one process, for async def steps.",
)


def tell(ready_fd: int | None) -> None:
    """Report readiness to the process that started this one."""
    ServiceManager().ready()
    if ready_fd is not None:
        os.write(ready_fd, b"!")


def on_port(_context: click.Context, _parameter: click.Parameter, port: int | None) -> None:
    """The app reads its settings from the environment when it is loaded, which is later."""
    if port is not None:
        os.environ["BEATLESS_METRICS_PORT"] = str(port)


def in_format(_context: click.Context, _parameter: click.Parameter, form: str | None) -> None:
    """As `on_port`."""
    if form is not None:
        os.environ["BEATLESS_LOG_FORMAT"] = form


LOG_FORMAT = click.option(
    "--log-format",
    type=click.Choice([form.value for form in Format]),
    callback=in_format,
    expose_value=False,
    help="Default: BEATLESS_LOG_FORMAT.",
)
METRICS_PORT = click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    callback=on_port,
    expose_value=False,
    help="Serve /metrics on this port; default: BEATLESS_METRICS_PORT.",
)


def of_namespace(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """Raises BadRequest for a name that cannot be one."""
    if name is not None:
        context.ensure_object(Environment).namespace = check_namespace(name)


NAMESPACE = click.option(
    "--namespace",
    metavar="NAME",
    callback=of_namespace,
    expose_value=False,
    help="Whose runs; default: those of the namespace default.",
)


def given_namespace(env: Environment) -> str:
    """The option as a command has it that is printed; nothing for the namespace default."""
    return "" if env.namespace == DEFAULT_NAMESPACE else f" --namespace {env.namespace}"


def plan_names(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Names of the app's plans, for a shell; none where the app cannot be loaded.

    Whatever its modules print and raise: the shell shows the user's line, and no place is on it.
    """
    env = context.ensure_object(Environment)
    env.named = env.named or context.find_root().params.get("app")
    env.needs_servers = False
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            plans = env.app.plans.values()
    except Exception:
        return []
    return [CompletionItem(plan.name) for plan in plans if plan.name.startswith(incomplete)]


def check_url(option: str, url: str) -> None:
    """Raises BadRequest for a URL that would be no link in a browser."""
    if not url.startswith(("http://", "https://")):
        raise BadRequest(option, f"{url} does not start with http:// or https://")
