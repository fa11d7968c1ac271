"""`beatless dev`."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from beatless.cli.environment import Environment
from beatless.cli.migrate import tell_schedules
from beatless.cli.stopping import stop_on_signals
from beatless.errors import BadRequest
from beatless.local.ports import is_free
from beatless.local.stack import Stack


@click.command()
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), default=Path(".beatless")
)
@click.option("--port", type=click.IntRange(0, 65535), default=8400, show_default=True)
@click.option("--flower-port", type=click.IntRange(0, 65535), default=5555, show_default=True)
@click.option("--no-flower", is_flag=True, help="Leave Flower out.")
@click.option("--workers", type=click.IntRange(0, 64), default=1, show_default=True)
@click.option("--ephemeral", is_flag=True, help="Keep nothing: the data goes when it stops.")
@click.option(
    "--env-file", type=click.Path(path_type=Path, dir_okay=False), help="Write the settings here."
)
@click.pass_context
def dev(
    context: click.Context,
    data_dir: Path,
    port: int,
    flower_port: int,
    no_flower: bool,
    workers: int,
    ephemeral: bool,
    env_file: Path | None,
) -> None:
    """A whole beatless in the foreground: servers, relay, workers, API, Flower; Ctrl-C ends it."""
    env: Environment = context.obj
    port = usable(context, "port", port)
    stack = Stack(
        data_dir,
        ephemeral=ephemeral,
        app_name=env.app_name,
        workers=workers,
        api_port=port,
        flower_port=None if no_flower else usable(context, "flower_port", flower_port),
    )

    def stop() -> None:
        stack.stopping = True
        stack.alarm.ring()

    with stop_on_signals(stop), stack:
        try:
            stack.start(env.note if env.as_json else click.echo, partial(check_app, env, stack))
        except KeyboardInterrupt:
            return
        if env_file is not None:
            write_env_file(env_file, stack.environ())
        env.document(stack.facts()) if env.as_json else click.echo("ready")
        stack.watch(env.note)


def check_app(env: Environment, stack: Stack) -> None:
    """Import the named app once, with the variables of the stack, before its processes do.

    Its schedules are stored. Says if it names other servers than those. Raises BadSetting and
    AppFailed.
    """
    if not env.app_name:
        return
    for name in [name for name in os.environ if name.startswith("BEATLESS_")]:
        del os.environ[name]
    os.environ.update(stack.environ())
    own = env.app.settings.to_env()
    for name, here in (("BEATLESS_DATABASE_URL", "Postgres"), ("BEATLESS_REDIS_URL", "Redis")):
        if (named := address(own[name])) != address(os.environ[name]):
            env.note(
                f"{env.app_name} names a {here} of its own, {named}: the one that was started here "
                f"is not used; let the App follow {name}"
            )
            if here == "Postgres":
                return  # which `beatless migrate` sees to
    tell_schedules(env, env.app.client.apply_schedules(env.app.schedules))


def address(url: str) -> str:
    """The host, port and database of a URL."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path


def usable(context: click.Context, name: str, port: int) -> int:
    """The port, or 0 if it is taken and only was the default. Raises BadRequest."""
    if port == 0 or is_free(port):
        return port
    option = "--" + name.replace("_", "-")
    if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
        raise BadRequest(option, f"{port} is taken: choose another, or 0")
    context.obj.note(f"port {port} is taken: another is taken for {option}")
    return 0


def write_env_file(path: Path, environ: Mapping[str, str]) -> None:
    """Settings as lines that a shell, Docker and systemd can read. Only for the owner's eyes."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise BadRequest("--env-file", f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)  # it may have been there
        file.writelines(f"{name}={value}\n" for name, value in environ.items())
