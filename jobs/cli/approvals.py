"""Commands about approvals."""

from dataclasses import asdict

import click

from beatless.cli.environment import Environment, json_input, seconds
from beatless.client.approvals import LINK_S
from beatless.errors import BadRequest

BY = click.option("--by", required=True, metavar="WHO", help="The person, kept in the journal.")


@click.command()
@click.argument("run")
@click.argument("name")
@click.option("--data", metavar="JSON", help="The decision; @FILE and - are read.")
@click.option("--yes/--no", "approved", default=None, help="Of an approval without a form.")
@click.option("--comment", help="Beside --yes or --no.")
@BY
@click.pass_obj
def approve(
    env: Environment,
    run: str,
    name: str,
    data: str | None,
    approved: bool | None,
    comment: str | None,
    by: str,
) -> None:
    """Decide approval NAME of RUN, by --yes or --no, or by --data if it has a form."""
    if (data is None) is (approved is None) or (comment is not None and approved is None):
        raise click.UsageError("give either --yes or --no, with or without --comment, or --data")
    decision = json_input(data, "--data")
    if approved is not None:
        decision = {"approved": approved} | ({} if comment is None else {"comment": comment})
    sent = env.client_of(run).approve_run(run, name, decision, by=by)
    if env.as_json:
        env.document(asdict(sent))
    else:
        before = "" if sent.new else " before"
        click.echo(f"{sent.occurrence} of {run} was decided{before} by {sent.by}")


@click.command()
@click.argument("run")
@click.argument("name")
@BY
@click.option("--expires", metavar="7d", help="Default: in seven days.")
@click.option(
    "--base-url",
    metavar="URL",
    envvar="BEATLESS_API_URL",
    help="Where people reach the API; default: BEATLESS_API_URL.",
)
@click.pass_obj
def approve_link(
    env: Environment, run: str, name: str, by: str, expires: str | None, base_url: str | None
) -> None:
    """Make a link by which one person decides approval NAME of RUN; prints it."""
    if not base_url:
        raise BadRequest(
            "--base-url", "is missing: give it the address of the API, https://beatless.example"
        )
    good_for = LINK_S if expires is None else seconds(expires)
    link = env.client_of(run).approval_link(run, name, by=by, expires_in=good_for)
    if env.as_json:
        shown = {"id": link.id, "run_id": link.run_id, "occurrence": link.occurrence, "by": link.by}
        env.document(shown | {"url": link.url(base_url), "expires_at": link.expires_at.isoformat()})
        return
    click.echo(link.url(base_url))
    env.note(f"good until {link.expires_at.isoformat(timespec='seconds')}; its id is {link.id}")


@click.command()
@click.argument("link")
@click.pass_obj
def revoke_link(env: Environment, link: str) -> None:
    """Let the link with this id decide nothing any more."""
    env.client.revoke_approval_link(link)
    click.echo(f"{link} is revoked")
