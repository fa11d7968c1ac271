"""2,000 viewers of 200 live runs over two API processes: `python -m benchmarks.fanout [viewers]`.

Every viewer must see exactly the journal of its run. Keys are `fanout.<name>`. Servers, viewers and
the worker share the machine.
"""

import asyncio
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from urllib.parse import urlsplit

from beatless import App, Event, Plan, RunRequest, StepContext, step
from beatless.http import AsyncClient
from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.testing import Kit
from benchmarks.measure import SPAWN, Bench, record, services

RUNS = 200
STEPS = 10
PROCESSES = 2


def plan() -> Plan:
    """Each step gives two events."""

    def work(ctx: StepContext) -> dict[str, str]:
        return {"note": "x" * 90, "step": ctx.step}

    return Plan("fanout", [step(name=f"s{number}")(work) for number in range(STEPS)])


def watch(url: str, run_ids: Sequence[str], pipe: Pipe) -> None:
    """A process of viewers: tells when all have seen the first event, then what all have seen."""

    async def follow(client: AsyncClient, run_id: str, ready: asyncio.Queue[None]) -> list[Event]:
        seen = []
        async for event in client.astream_run(run_id):
            seen.append(event)
            if event.seq == 1:
                ready.put_nowait(None)
        return seen

    async def main() -> list[list[int]]:
        ready: asyncio.Queue[None] = asyncio.Queue()
        async with AsyncExitStack() as stack:
            tasks = []
            # Each client a hundred: the pool of one looks through all of its connections.
            for start in range(0, len(run_ids), 100):
                some = run_ids[start : start + 100]
                client = await stack.enter_async_context(AsyncClient(url, timeout=120))
                tasks += [asyncio.create_task(follow(client, run_id, ready)) for run_id in some]
                for _ in some:
                    await ready.get()
            pipe.send("ready")
            seen = await asyncio.gather(*tasks)
        return [[event.seq for event in events] for events in seen]

    pipe.send(asyncio.run(main()))


def resident(pid: int) -> int:
    """KiB of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def connections(pid: int, port: int) -> int:
    """How many TCP connections a process has to a port of this machine."""
    inodes = set()
    for name in Path(f"/proc/{pid}/fd").iterdir():
        target = str(name.readlink()) if name.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    wanted = f":{port:04X}"
    return sum(row[2].endswith(wanted) and row[3] == "01" and row[9] in inodes for row in rows)


def servers(stack: ExitStack, bench: Bench, port: int, directory: Path) -> Iterator[Child]:
    """API processes that share one address."""
    for number in range(PROCESSES):
        child = Child(
            f"api-{number}",
            ["serve", "--port", str(port), "--reuse-port"],
            environ=os.environ | bench.settings.to_env(),
            log=directory / f"api-{number}.log",
        )
        child.start()
        stack.callback(child.kill)
        child.wait_ready()
        yield child


def main(viewers: int) -> None:
    with ExitStack() as stack:
        bench = stack.enter_context(services())
        app = App(bench.settings, [plan()])
        kit = Kit(app)
        stack.callback(kit.close)
        port = free_port()
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="beatless-bench-")))
        apis = list(servers(stack, bench, port, directory))
        runs = kit.client.start_runs([RunRequest(plan="fanout") for _ in range(RUNS)])
        wanted = [runs[number % RUNS].run_id for number in range(viewers)]
        databases = [urlsplit(bench.settings.database_url).port or 0]
        redis = urlsplit(bench.settings.redis_url).port or 0
        # A few viewers first: what a process needs for any is not what each needs.
        here, there = SPAWN.Pipe()
        url = f"http://127.0.0.1:{port}"
        warm = SPAWN.Process(target=watch, args=(url, wanted[:20], there), daemon=True)
        warm.start()
        here.recv()
        before = [resident(api.pid) for api in apis]
        begin = monotonic()
        ours, theirs = SPAWN.Pipe()
        watching = SPAWN.Process(target=watch, args=(url, wanted, theirs), daemon=True)
        watching.start()
        ours.recv()
        joined = monotonic() - begin
        after = [resident(api.pid) for api in apis]
        most_postgres = most_redis = 0
        begin = monotonic()
        for _ in range(STEPS):
            for run in runs:
                kit.step(run.run_id)
            kit.drain_outbox_once()
            for api in apis:
                most_postgres = max(most_postgres, connections(api.pid, databases[0]))
                most_redis = max(most_redis, connections(api.pid, redis))
        kit.work_until_idle()
        seen = ours.recv()
        took = monotonic() - begin
        here.recv()
        expected = list(range(1, 2 * STEPS + 3))
        exact = sum(seqs == expected for seqs in seen)
        each = (sum(after) - sum(before)) / viewers
        what = f"{viewers} viewers of {RUNS} runs, {PROCESSES} processes"
        record("fanout.exact", [exact / viewers], unit="share", what=f"exact: {what}")
        record("fanout.memory", [each], unit="KiB", what="server memory of one idle viewer")
        record("fanout.redis", [most_redis], unit="count", what="Redis connections of a process")
        record("fanout.postgres", [most_postgres], unit="count", what="Postgres connections of one")
        record("fanout.join", [viewers / joined], unit="1/s", what="viewers that join")
        record(
            "fanout.rate", [sum(map(len, seen)) / took], unit="1/s", what="events that viewers got"
        )
        if exact != viewers:
            sys.exit(f"{viewers - exact} viewers did not see the journal")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
