"""`beatless dev`."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from beatless.cli.environment import Environment
from beatless.cli.options import POOL
from beatless.cli.stopping import stop_on_signals
from beatless.declared import store_declared
from beatless.demo import PLANS
from beatless.errors import BadRequest
from beatless.local.ports import is_free
from beatless.local.stack import Stack
from beatless.settings import Settings


@click.command()
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), default=Path(".beatless")
)
@click.option("--port", type=click.IntRange(0, 65535), default=8400, show_default=True)
@click.option("--flower-port", type=click.IntRange(0, 65535), default=5555, show_default=True)
@click.option("--no-flower", is_flag=True, help="Leave Flower out.")
@click.option("--workers", type=click.IntRange(0, 64), default=1, show_default=True)
@POOL
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
    pool: str | None,
    ephemeral: bool,
    env_file: Path | None,
) -> None:
    """A whole beatless in the foreground: servers, relay, workers, API, Flower; Ctrl-C ends it."""
    env: Environment = context.obj
    env.check_app_exists()
    port = usable(context, "port", port)
    stack = Stack(
        data_dir,
        ephemeral=ephemeral,
        app_name=env.app_name,
        workers=workers,
        pool=pool,
        api_port=port,
        flower_port=None if no_flower else usable(context, "flower_port", flower_port),
    )

    say = env.note if env.as_json else click.echo

    def stop() -> None:
        stack.stopping = True
        stack.alarm.ring()

    with stop_on_signals(stop), stack:
        try:
            stack.start(say, load=partial(load_app, env), check=partial(apply_declared, env, stack))
        except KeyboardInterrupt:
            return
        if env_file is not None:
            write_env_file(env_file, stack.environ())
        for line in hints(env, env_file):
            say(line)
        env.document(stack.facts()) if env.as_json else click.echo("ready")
        stack.watch(env.note)
    say("stopped")


def load_app(env: Environment, settings: Settings) -> Settings:
    """Import the named app once, with the settings of the stack, before its processes do.

    Returns the settings with the schema and the prefix that the app has. Says if it names other
    servers. Raises BadSetting and AppFailed.
    """
    if not env.app_name:
        return settings
    for name in [name for name in os.environ if name.startswith("BEATLESS_")]:
        del os.environ[name]
    os.environ.update(settings.to_env())
    own = env.app.settings
    for server, setting in (("Postgres", "database_url"), ("Redis", "redis_url")):
        if (named := address(getattr(own, setting))) != address(getattr(settings, setting)):
            env.note(
                f"{env.app_name} names a {server} of its own, {named}: the one that was started "
                f"here is not used; let the App follow BEATLESS_{setting.upper()}"
            )
    return replace(settings, schema=own.schema, prefix=own.prefix)


def hints(env: Environment, env_file: Path | None) -> Iterator[str]:
    """Lines for whoever is new: the plans that can be started, and the way of others to here."""
    plans = env.app.plans if env.app_name else {plan.name: plan for plan in PLANS}
    demo = "" if env.app_name else " of the demo; yours: beatless --app MODULE:ATTRIBUTE dev"
    yield f"plans {', '.join(plans)}{demo}"
    way = "beatless dev --env-file FILE"
    if env_file:
        # Without a slash, sh and zsh would look for the file in PATH.
        path = env_file if env_file.is_absolute() else f"./{env_file}"
        way = f"set -a; . {shlex.quote(str(path))}; set +a"
    yield f"settings found by `beatless` in this directory; for other processes: {way}"


def apply_declared(env: Environment, stack: Stack) -> None:
    """Store the schedules and plans of the named app, as `beatless migrate` does.

    Unless its database is one that `dev` has not started.
    """
    started = stack.environ()["BEATLESS_DATABASE_URL"]
    if env.app_name and address(env.app.settings.database_url) == address(started):
        for change in store_declared(env.app):
            env.note(change)


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
