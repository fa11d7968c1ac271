"""`beatless demo`: the main job on throw-away servers, with a worker killed in the middle."""

import asyncio
import json
import os
import shutil
import signal
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from beatless.app import App
from beatless.cli import render
from beatless.cli.environment import Environment
from beatless.cli.stopping import stop_on_signals
from beatless.client import RunRequest
from beatless.demo import PLANS
from beatless.local.stack import Stack
from beatless.orchestrator.events import Event
from beatless.orchestrator.progress import GIVEN_BACK
from beatless.orchestrator.state import RunState
from beatless.outbox.clock import monotonic
from beatless.verify import verify

GOLDEN = [
    "RunStarted",
    "StepStarted",
    "DebugTrace",
    "StepFinished",
    *["StepStarted", "StepFinished"] * 4,
    "RunFinished",
]
"""The 13 events of `agents.run`."""


class DemoFailed(click.ClickException):
    """The demo did not show its claim."""


def without_handbacks(events: Sequence[Event]) -> list[Event]:
    """The events, without each start of a step that was given back before its body was called.

    A process hands the runs of its group back while a body of one of them lasts, as any does on a
    busy machine. Such a step then begins again, as the same attempt. Raises DemoFailed if it does
    not, or if a seq is missing, doubled or out of order.
    """
    if [event.seq for event in events] != list(range(1, len(events) + 1)):
        raise DemoFailed(f"the seqs are {[event.seq for event in events]}")
    kept: list[Event] = []
    given_back: Event | None = None
    for event in events:
        if (event.data or {}).get("name") == GIVEN_BACK and kept[-1].type == "StepStarted":
            given_back = kept.pop()
            continue
        if given_back is not None:
            if (event.type, event.step, event.attempt) != (
                "StepStarted",
                given_back.step,
                given_back.attempt,
            ):
                raise DemoFailed(f"{given_back} was given back, and {event} follows")
            given_back = None
        kept.append(event)
    return kept


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("census-report"),
    show_default=True,
    help="Where the report and the chart go.",
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The source tree to count; default: the standard library of this Python.",
)
@click.option("--runs", "count", type=click.IntRange(1, 10_000), default=100, show_default=True)
@click.pass_obj
def demo(env: Environment, out: Path, root: Path | None, count: int) -> None:
    """Run the main job on throw-away servers, kill a worker in the middle, and check everything."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with (
        stop_on_signals(interrupt),
        tempfile.TemporaryDirectory(prefix="beatless-demo-") as directory,
        # A dead worker's run goes on at once where the system tells of deaths; else after a lease,
        # which a machine at its limits must be able to keep.
        Stack(
            Path(directory) / "stack", ephemeral=True, workers=2, api_port=0, lease_seconds=15
        ) as stack,
    ):
        began = monotonic()
        env.out.print("[bold]Starting[/] Postgres, Valkey, a relay, two workers and the API")
        stack.start()
        env.out.print(f"[dim]ready after {monotonic() - began:.1f} s[/]\n")
        assert stack.settings is not None  # noqa: S101 - started above
        app = App(stack.settings, PLANS)
        try:
            proofs = [
                golden_run(env, app, stack.api_url),
                census(env, app, stack, out, root),
                many_runs(env, app, count),
                everything_holds(app),
            ]
        finally:
            app.close()
    env.out.print("[bold]Proved[/]")
    for proof in proofs:
        env.out.print(f"  [green]✓[/] {proof}")
    if env.as_json:
        env.document(
            {
                "proved": proofs,
                "report": str(out.resolve() / "census.md"),
                "chart": str(out.resolve() / "census.svg"),
                "seconds": round(monotonic() - began, 1),
            }
        )


def golden_run(env: Environment, app: App, api_url: str) -> str:
    """One agents.run, live."""
    env.out.print("[bold]agents.run[/], live: every event was committed before it was shown")
    run = app.client.start_run("agents.run", {"device": "demo-1"})
    seen: list[Event] = []

    def remember() -> Iterator[Event]:
        for event in app.client.stream_run(run.run_id, timeout=600):
            seen.append(event)
            yield event

    render.follow(env.out, remember())
    types = [event.type for event in seen]
    if types != GOLDEN or [event.seq for event in seen] != list(range(1, len(GOLDEN) + 1)):
        raise DemoFailed(f"agents.run gave {types}")
    path = f"{api_url}/v1/runs/{run.run_id}/stream"
    with urllib.request.urlopen(f"{path}?from_seq=5", timeout=60) as stream:  # noqa: S310 - ours
        data = [json.loads(line[6:]) for line in stream if line.startswith(b"data: {")]
    with urllib.request.urlopen(f"{path}?from_seq=13", timeout=60) as stream:  # noqa: S310 - ours
        ended = stream.status
    if [Event.from_dict(members) for members in data] != seen[5:] or ended != 204:
        raise DemoFailed(f"over HTTP, after seq 5, agents.run gave {data}")
    env.out.print()
    return (
        "agents.run gave exactly its 13 events, seq 1 to 13, ending with RunFinished; "
        "over HTTP from seq 5 exactly the rest, then 204"
    )


def census(env: Environment, app: App, stack: Stack, out: Path, root: Path | None) -> str:
    """One code_census, whose worker is killed in the middle of Parse."""
    env.out.print("[bold]code_census[/], live: its worker is killed with SIGKILL in the middle")
    given = {"out": str(out.resolve()), "root": str(root.resolve()) if root else None}
    run = app.client.start_run("code_census", given)
    killed: list[int] = []

    def kill_once() -> Iterator[Event]:
        for event in app.client.stream_run(run.run_id, timeout=600):
            data = event.data or {}
            if data.get("name") != "census.chunk":
                # The chunk traces are for the proof, the progress bar is for the person.
                yield event
            elif (data["index"] + 1) * 2 >= data["of"] and not killed:
                killed.append(kill_worker_of(app, stack, run.run_id))
                env.out.print(f"[red]      worker {killed[0]} killed with SIGKILL[/]")

    render.follow(env.out, kill_once())
    ended = app.client.get_run(run.run_id)
    if ended.state is not RunState.COMPLETED:
        raise DemoFailed(f"code_census is {ended.state}: {ended.error}")
    events = app.client.events(run.run_id)
    work = next(
        Path(event.data["result"]["work"])
        for event in events
        if event.step == "Discover" and event.type == "StepFinished" and event.data
    )
    begun = [json.loads(line) for line in (work / "ledger.jsonl").read_text().splitlines()]
    chunks = {entry["index"] for entry in begun}
    finished_before = {
        event.data["index"]
        for event in events
        if event.data and event.data.get("name") == "census.chunk" and event.attempt == 1
    }
    begun_after = {entry["index"] for entry in begun if entry["attempt"] > 1}
    if repeated := sorted(finished_before & begun_after):
        raise DemoFailed(f"chunks {repeated} were parsed again")
    if len(begun) > len(chunks) + 1:
        raise DemoFailed(f"{len(begun)} chunks were begun, and not {len(chunks) + 1} at most")
    shutil.rmtree(work)
    result = ended.result
    env.out.print(
        f"      {result['files']:,} files, {result['lines']:,} lines, "
        f"{result['functions']:,} functions\n"
        f"      report {escape(result['report'])}\n"
        f"      chart  {escape(result['chart'])}\n"
    )
    if ended.attempt == 1:
        return f"code_census completed: {len(chunks)} chunks, too few to kill its worker in between"
    again = len(begun) > len(chunks)
    twice = "the one in flight was begun twice" if again else "none was begun twice"
    return (
        f"code_census survived kill -9 of its worker: of {len(chunks)} chunks {twice}, "
        "no finished one was parsed again"
    )


def kill_worker_of(app: App, stack: Stack, run_id: str) -> int:
    """SIGKILL to the worker that executes this run: its main process and so its children."""
    worker = app.client.get_run(run_id).worker or ""
    child = int(worker.split(":")[1])
    stat = Path(f"/proc/{child}/stat").read_text()
    parent = int(stat.rpartition(")")[2].split()[1])
    for process in stack.workers:
        if process.pid == parent:
            os.kill(parent, signal.SIGKILL)
            return parent
    raise DemoFailed(f"worker {worker} is not one of this demo's")


def many_runs(env: Environment, app: App, count: int) -> str:
    """Many agents.run at once, and a live stream of each."""
    env.out.print(f"[bold]{count} agents.run[/] at once, each watched live")
    began = monotonic()
    requests = [RunRequest(plan="agents.run", input={"device": f"d{n}"}) for n in range(count)]
    started = app.client.start_runs(requests)
    with Progress(
        TextColumn("     "),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=env.out,
        disable=not env.out.is_terminal,
    ) as progress:
        task = progress.add_task("runs", total=count)

        async def watch(run_id: str) -> list[Event]:
            seen = [event async for event in app.client.astream_run(run_id, timeout=600)]
            progress.advance(task)
            return seen

        async def watch_all() -> list[list[Event]]:
            return await asyncio.gather(*(watch(run.run_id) for run in started))

        streams = asyncio.run(watch_all())
    took = monotonic() - began
    for run, seen in zip(started, streams, strict=True):
        if [event.type for event in without_handbacks(seen)] != GOLDEN:
            raise DemoFailed(f"run {run.run_id} gave {[(e.seq, e.type) for e in seen]}")
    env.out.print(f"      {count} runs in {took:.1f} s\n")
    return f"{count} runs at once completed, each stream its own 13 events, in order and once"


def everything_holds(app: App) -> str:
    """`verify` over everything that the demo has stored."""
    with app.engine.connect() as connection:
        found = verify(connection, app.settings.schema)
    if found:
        raise DemoFailed("; ".join(str(violation) for violation in found))
    total = len(app.client.list_runs(limit=100_000))
    return f"verify: every guarantee holds for all {total} runs"
