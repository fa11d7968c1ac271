"""`beatless doctor`: the results of its checks, with advice."""

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import click
from rich.markup import escape

from beatless.cli.environment import Environment
from beatless.cli.render import plain
from beatless.doctor import Doctor, Finding, Hop, Status

MARKS = {
    Status.OK: "[green]✓[/]",
    Status.SKIPPED: "[dim]·[/]",
    Status.WARNING: "[yellow]![/]",
    Status.PROBLEM: "[red]✗[/]",
    Status.UNREACHABLE: "[red]✗[/]",
}
STYLES = {Status.SKIPPED: "dim", Status.WARNING: "yellow", Status.PROBLEM: "red"}

INDENT = 22
"""Characters before an advice."""

WIDTH = 28
"""Characters of the slowest hop's bar."""


@click.command()
@click.option("--api", "api_url", metavar="URL", help="Your API; default: BEATLESS_API_URL.")
@click.option("--flower", "flower_url", metavar="URL", help="Your Flower.")
@click.option("--check", "only", multiple=True, metavar="NAME", help="Only this one; repeatable.")
@click.option(
    "--patience",
    type=click.FloatRange(0.1, 300),
    default=10.0,
    show_default=True,
    help="Seconds that a canary run may take.",
)
@click.pass_obj
def doctor(
    env: Environment,
    api_url: str | None,
    flower_url: str | None,
    only: tuple[str, ...],
    patience: float,
) -> None:
    """Send a run through the whole stack, and look for known faults."""
    examined = Doctor(
        env.app,
        api_url=api_url or os.environ.get("BEATLESS_API_URL", ""),
        flower_url=flower_url or "",
        patience=patience,
    )
    found = []
    with env.err.status("examining …", spinner="dots"):
        for finding in examined.examine(only):
            found.append(finding)
            if not env.as_json:
                show(env, finding)
    if env.as_json:
        env.document(
            {
                "status": worst(found).value,
                "hops": [asdict(hop) for hop in examined.hops],
                "checks": [asdict(finding) for finding in found],
            }
        )
    else:
        for line in [*journey(examined.hops), "", verdict(found)]:
            env.out.print(line)
    raise click.exceptions.Exit(exit_status(found))


def worst(found: Sequence[Finding]) -> Status:
    """The worst of all; a skipped check is ok."""
    order = list(Status)
    status = max((finding.status for finding in found), key=order.index, default=Status.OK)
    return Status.OK if status is Status.SKIPPED else status


def exit_status(found: Sequence[Finding]) -> int:
    """0: nothing that must be mended; 1: something; 3: a server cannot be reached."""
    return {Status.UNREACHABLE: 3, Status.PROBLEM: 1}.get(worst(found), 0)


def show(env: Environment, finding: Finding) -> None:
    """One check as a line, with its advice below."""
    style = STYLES.get(finding.status)
    text = escape(plain(finding.text))
    told = f"[{style}]{text}[/]" if style else text
    env.out.print(f" {MARKS[finding.status]} [bold]{finding.check:<19}[/]{told}")
    if finding.advice:
        advice = [plain(finding.advice)]
        if env.out.is_terminal:  # else it is one line, for other programs
            advice = textwrap.wrap(advice[0], max(40, env.out.width - INDENT - 2))
        for place, text in enumerate(advice):
            mark = "[dim]→[/]" if place == 0 else " "
            env.out.print(f"{' ' * INDENT}{mark} {escape(text)}")


def journey(hops: Sequence[Hop]) -> Iterator[str]:
    """The canary's way, with a bar for each leg."""
    if not hops:
        return
    yield ""
    slowest = max((hop.seconds or 0.0 for hop in hops), default=0.0) or 1.0
    for hop in hops:
        bar = "█" * max(1, round((hop.seconds or 0.0) / slowest * WIDTH))
        took = f"{'-':>7}   " if hop.seconds is None else f"{hop.seconds * 1000:>7.1f} ms"
        shown = f"[cyan]{bar:<{WIDTH}}[/]" if hop.seconds is not None else " " * WIDTH
        yield f"   [bold]{hop.name:<9}[/]{took}  {shown}  [dim]{escape(plain(hop.text))}[/]"
    total = sum(hop.seconds or 0.0 for hop in hops)
    yield f"   [bold]{'total':<9}{total * 1000:>7.1f} ms[/]"


def verdict(found: Sequence[Finding]) -> str:
    """The last line."""
    problems = sum(finding.status in (Status.PROBLEM, Status.UNREACHABLE) for finding in found)
    warnings = sum(finding.status is Status.WARNING for finding in found)
    told = ", ".join(
        f"{number} {word}{'' if number == 1 else 's'}"
        for number, word in ((problems, "problem"), (warnings, "warning"))
        if number
    )
    if problems:
        return f" [bold red]{told}[/]"
    if warnings:
        return f" [bold green]works[/], with [yellow]{told}[/]"
    return " [bold green]all is well[/]"
