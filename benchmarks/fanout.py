"""Viewers of live runs over one API process: `python -m benchmarks.fanout [viewers [runs]]`.

Events are appended by a process of their own, one at a time and in bursts, and published by a
relay. The viewers are one process that waits with epoll and looks at the bytes: so the processor
time is the server's. Each viewer must see its run's events in order, each once. Keys are
`fanout.<name>`; `_cpu` rates are deliveries per second of the API process' processor time.
"""

import os
import re
import resource
import selectors
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from beatless import App, Plan, RunRequest, Settings, step
from beatless.api.stream_limits import MAX_STREAMS
from beatless.local.child import Child
from beatless.local.ports import free_port
from beatless.orchestrator.events import EventType, NewEvent
from beatless.orchestrator.settlement import Boundary, Settlement
from beatless.orchestrator.state import RunState
from benchmarks.measure import SPAWN, Bench, record, services

VIEWERS, RUNS = 2000, 200

ROUNDS = 20
"""Events that each run gets one at a time."""

BURST = 20
"""Events that each run gets in one commit, after those."""

JOINING = 64
"""Viewers that ask for their stream at once."""

WAIT_S = 120.0
"""Seconds until what is awaited has failed."""

FRAME = re.compile(rb"\nid: [^\n]*\.(\d+)\nevent: ")

DATA = '{"name":"note","value":"' + "x" * 90 + '"}'


def plan() -> Plan:
    """Its one step is never executed: its events are appended."""
    return Plan("fanout", [step(name="only")(lambda _: None)])


def produce(settings: Settings, run_ids: Sequence[str], pipe: Pipe) -> None:
    """Claims the runs; appends so many events to each at every word, and ends them at the last."""
    app = App(settings, [plan()])
    with app.executors.connect() as connection:
        leases = [
            app.leases.claim(
                connection, run_id, plan="fanout", worker="w", first_step="only", dispatch=1
            )
            for run_id in run_ids
        ]
        pipe.send("claimed")
        event = NewEvent(type=EventType.DEBUG_TRACE, step="only", attempt=1, data=DATA)
        while count := pipe.recv():
            for lease in leases:
                assert lease is not None
                assert app.journal.append(
                    connection, lease.run.run_id, lease.token, [event] * count
                )
            pipe.send("appended")
        finished = NewEvent(type=EventType.RUN_FINISHED, data='{"outcome":"completed"}')
        end = Boundary(events=[finished], state=RunState.COMPLETED, result="null")
        for lease in leases:
            assert lease is not None
            app.journal.settle(
                connection, lease.run.run_id, lease.token, Settlement.ignoring_cancel(end)
            )
    app.close()


class Viewer:
    """One viewer: a socket, and the last seq that it has seen."""

    def __init__(self, port: int, run_id: str) -> None:
        self.seq = 0
        self.exact = True
        self.open = True
        self._tail = b""
        self.socket = socket.create_connection(("127.0.0.1", port))
        request = f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        self.socket.sendall(request.encode())
        self.socket.setblocking(False)

    def read(self) -> None:
        """Receive what has come."""
        data = self.socket.recv(1 << 18)
        self.open = bool(data)
        self.look(data)

    def look(self, data: bytes) -> None:
        """Look at the next bytes of the stream."""
        text, end = self._tail + data, 0
        for found in FRAME.finditer(text):
            end = found.end()
            seq = int(found[1])
            self.exact &= seq == self.seq + 1
            self.seq = seq
        self._tail = text[max(end, len(text) - 200) :]


def watch(port: int, run_ids: Sequence[str], pipe: Pipe) -> None:
    """A process of viewers: waits for the seqs that it is told; then how many are exact."""
    viewers: list[Viewer] = []
    with selectors.DefaultSelector() as selector:

        def until(some: Sequence[Viewer], seq: int) -> None:
            behind = {viewer for viewer in some if viewer.seq < seq}
            deadline = monotonic() + WAIT_S
            while behind:
                if monotonic() > deadline:
                    raise TimeoutError(f"{len(behind)} viewers have not seen event {seq}")
                for key, _ in selector.select(1.0):
                    viewer = key.data
                    viewer.read()
                    if viewer.seq >= seq:
                        behind.discard(viewer)
                    if not viewer.open:
                        selector.unregister(viewer.socket)

        for start in range(0, len(run_ids), JOINING):
            some = [Viewer(port, run_id) for run_id in run_ids[start : start + JOINING]]
            for viewer in some:
                selector.register(viewer.socket, selectors.EVENT_READ, viewer)
            until(some, 1)
            viewers += some
        pipe.send("joined")
        while seq := pipe.recv():
            until(viewers, seq)
            pipe.send("seen")
        pipe.send(sum(viewer.exact for viewer in viewers))


def resident(pid: int) -> int:
    """KiB of memory that a process has."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def child(bench: Bench, directory: Path, *arguments: str) -> Iterator[Child]:
    """A process of beatless, which needs no plans."""
    environ = os.environ | bench.settings.to_env()
    found = Child(arguments[0], arguments, environ=environ, log=directory / f"{arguments[0]}.log")
    found.start()
    try:
        found.wait_ready()
        yield found
    finally:
        found.kill()


def answer(pipe: Pipe, word: Any) -> Any:
    """What a process of ours says to a word."""
    pipe.send(word)
    return pipe.recv()


def main(viewers: int, runs: int) -> None:
    if viewers > MAX_STREAMS:
        sys.exit(f"one API process serves {MAX_STREAMS} streams")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with ExitStack() as stack:
        bench = stack.enter_context(services())
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="beatless-bench-")))
        port = free_port()
        api = stack.enter_context(child(bench, directory, "serve", "--port", str(port)))
        app = App(bench.settings, [plan()])
        stack.callback(app.close)
        run_ids = [run.run_id for run in app.client.start_runs([RunRequest(plan="fanout")] * runs)]
        events, theirs = SPAWN.Pipe()
        producer = bench.child(produce, run_ids, theirs)
        events.recv()
        stack.enter_context(child(bench, directory, "relay"))
        # A few viewers first: what a process needs for any is not what each needs.
        wanted = [run_ids[number % runs] for number in range(viewers)]
        groups: list[tuple[Pipe, Any]] = []
        for some in (wanted[:20], wanted):
            ours, theirs = SPAWN.Pipe()
            process = SPAWN.Process(target=watch, args=(port, some, theirs), daemon=True)
            before = resident(api.pid)
            begin = monotonic()
            process.start()
            ours.recv()
            joined = len(some) / (monotonic() - begin)
            groups.append((ours, process))
        memory = (resident(api.pid) - before) / viewers
        watching = [group[0] for group in groups]
        seq = 2  # RunStarted and StepStarted
        found: dict[str, tuple[float, float]] = {}
        for name, rounds, count in (("one", ROUNDS, 1), ("burst", 1, BURST)):
            begin, cpu = monotonic(), processor(api.pid)
            for _ in range(rounds):
                answer(events, count)
                seq += count
                for pipe in watching:  # or a relay would publish several of a run's events at once
                    answer(pipe, seq)
            delivered = rounds * count * (viewers + 20)
            found[name] = (
                delivered / (monotonic() - begin),
                delivered / (processor(api.pid) - cpu),
            )
        events.send(0)
        producer.join()
        for pipe in watching:
            answer(pipe, seq + 1)
        exact = sum(answer(pipe, 0) for pipe in watching)
        what = f"{viewers} viewers of {runs} runs, one process"
        record("fanout.exact", [exact / (viewers + 20)], unit="share", what=f"exact: {what}")
        record("fanout.memory", [memory], unit="KiB", what="server memory of one idle viewer")
        record("fanout.join", [joined], unit="1/s", what="viewers that join")
        for name, text in (("one", "one at a time"), ("burst", f"{BURST} at a time")):
            rate, share = found[name]
            record(f"fanout.{name}", [rate], unit="1/s", what=f"deliveries of events {text}")
            record(
                f"fanout.{name}_cpu",
                [share],
                unit="1/s",
                what=f"the same for each second of the API's processor time, {text}",
            )
        if exact != viewers + 20:
            sys.exit(f"{viewers + 20 - exact} viewers did not see their run exactly")


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:]]
    main(*given, *[VIEWERS, RUNS][len(given) :])
