"""Commands of the HTTP API: serve it, and the tokens it asks for."""

import importlib
import logging
import os
from typing import Any

import click

from beatless import loopback
from beatless.auth import Scope, Tokens
from beatless.cli.environment import Environment, seconds
from beatless.cli.options import LOG_FORMAT, READY_FD, check_url, tell
from beatless.errors import BadRequest, ExtraMissing
from beatless.observe.export import export
from beatless.observe.logs import Format
from beatless.schema import check
from beatless.transactions import reaching_postgres

logger = logging.getLogger(__name__)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8400, show_default=True)
@click.option(
    "--reuse-port", is_flag=True, help="Share the address with other processes of this command."
)
@click.option("--flower-url", metavar="URL", help="Where Flower is, for links to it.")
@click.option("--root-path", metavar="/PATH", help="The prefix that a proxy strips from paths.")
@click.option(
    "--open",
    "is_open",
    is_flag=True,
    help="While there is no token, admit every caller.",
)
@LOG_FORMAT
@READY_FD
@click.pass_obj
def serve(
    env: Environment,
    host: str,
    port: int,
    reuse_port: bool,
    flower_url: str | None,
    root_path: str | None,
    is_open: bool,
    ready_fd: int | None,
) -> None:
    """Serve the HTTP API and the run page."""
    if flower_url is not None:
        check_url("--flower-url", flower_url)
    if root_path is not None and not root_path.startswith("/"):
        raise BadRequest("--root-path", f"is {root_path!r}, which does not begin with /")
    env.log()
    api = the_api()
    app = env.app
    export("beatless-api", os.environ)
    with reaching_postgres(app.settings.schema, app.engine):
        check(app.engine, app.settings.schema)
        guarded = Tokens(app.engine, app.settings.schema).any()
    if not guarded and not is_open and not loopback.is_host(host):
        raise BadRequest(
            "--host",
            f"{host} can be reached by others and there is no token yet: "
            "make one with `beatless token create --scope admin`, or admit all callers with --open",
        )

    def ready(url: str) -> None:
        if app.settings.log_format == Format.JSON:
            logger.info("api is served", extra={"action": "api", "url": url, "guarded": guarded})
        else:
            who = "unauthenticated and reachable" if is_open else "for this machine only"
            env.note(f"api on {url}" + ("" if guarded else f" (no token: {who})"))
        tell(ready_fd)

    api.serve(
        app,
        host=host,
        port=port,
        ready=ready,
        reuse_port=reuse_port,
        flower_url=flower_url,
        root_path=(root_path or "").rstrip("/"),
        is_open=is_open,
    )


def the_api() -> Any:
    """The package `beatless.api`, imported when it is served: its extra may not be installed.

    Raises ExtraMissing. A worker, too, starts a fifth sooner for it.
    """
    try:
        return importlib.import_module("beatless.api")
    except ModuleNotFoundError as error:
        raise ExtraMissing("the HTTP API", error.name or "fastapi", "api") from error


@click.group()
def token() -> None:
    """Tokens of the HTTP API."""


@token.command()
@click.option("--scope", "scopes", multiple=True, required=True, help=", ".join(Scope))
@click.option("--namespace", default="default", show_default=True)
@click.option("--expires", metavar="30d", help="Valid for so long; default: until revoked.")
@click.option("--note", help="The purpose of the token.")
@click.option("--unless-any", is_flag=True, help="Do nothing if there is a token already.")
@click.pass_obj
def create(
    env: Environment,
    scopes: tuple[str, ...],
    namespace: str,
    expires: str | None,
    note: str | None,
    unless_any: bool,
) -> None:
    """Make a token. Its secret is printed once and never stored."""
    schema = env.app.settings.schema
    tokens = Tokens(env.app.engine, schema)
    with reaching_postgres(schema, env.app.engine):
        if unless_any and tokens.any():
            env.note("there is a token already")
            return
        token_id, secret = tokens.create(
            scopes,
            namespace=namespace,
            seconds=None if expires is None else seconds(expires),
            note=note,
        )
    if env.as_json:
        env.document({"id": token_id, "token": secret, "scopes": scopes, "namespace": namespace})
    else:
        click.echo(secret)
        env.note(f"token {token_id}; revoke it with `beatless token revoke {token_id}`")


@token.command()
@click.pass_obj
def ls(env: Environment) -> None:
    """The tokens, without their secrets."""
    schema = env.app.settings.schema
    with reaching_postgres(schema, env.app.engine):
        tokens = Tokens(env.app.engine, schema).list()
    if not tokens:
        env.note("there is no token: callers on this machine may do everything, others nothing")
    for found in tokens:
        expires = found.expires_at.isoformat() if found.expires_at else None
        if env.as_json:
            env.document(
                {
                    "id": found.id,
                    "namespace": found.namespace,
                    "scopes": found.scopes,
                    "note": found.note,
                    "created_at": found.created_at.isoformat(),
                    "expires_at": expires,
                }
            )
        else:
            shown = f"expires {expires}" if expires else "until revoked"
            click.echo(
                f"{found.id}  {found.namespace}  {','.join(found.scopes)}  {shown}  "
                f"{found.note or ''}".rstrip()
            )


@token.command()
@click.argument("token_id", metavar="ID")
@click.pass_obj
def revoke(env: Environment, token_id: str) -> None:
    """Revoke a token, at once."""
    schema = env.app.settings.schema
    with reaching_postgres(schema, env.app.engine):
        Tokens(env.app.engine, schema).revoke(token_id)
    env.note(f"token {token_id} is revoked")
