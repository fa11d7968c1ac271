"""Tokens that many runs emit at once, each to a viewer, beside traces."""

import resource
import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from beatless import Settings
from beatless.local.ports import free_port
from benchmarks.fanout import Viewer
from benchmarks.measure import SPAWN, interleaved, ratios
from benchmarks.waits.fleet import Chosen, Figure, Fleet, fleets, pause_until
from benchmarks.waits.plans import MARK, open_gate

RUNS = 50
TOKENS_PER_S, TRACES_PER_S = 100, 4
"""Of each run; as many traces as tokens would be more than two cores can commit."""

SECONDS = 8.0

LEAD_S = 0.5
"""Seconds until the first token, once all bodies and viewers are there."""

REST_S = 2.0
"""Seconds that the bodies wait after the last one: their ends are not counted."""

BEGUN = 2
"""The seq of a run whose step has begun."""

SERVED = ("worker", "relay", "serve", "postgres", "valkey")


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one measurement has found."""

    cpu_ms: float
    """Processor time for each, of all processes but the viewers'."""
    parts: Mapping[str, float]
    late_s: float
    exact: int
    """Viewers that saw each event once and in order, and each token."""


def measure(chosen: Chosen) -> Iterator[Figure]:
    runs, seconds = chosen.of(RUNS, least=2), max(2.0, SECONDS * min(1.0, chosen.size))
    raise_descriptors()
    found: dict[str, list[Told]] = {"emit": [], "trace": []}
    with fleets() as fleet:
        port = free_port()
        fleet.start("relay"), fleet.start("serve", "--port", str(port))
        fleet.start("worker", "--pool", "async", "--concurrency", str(2 * runs))

        def tell(how: str, rate: int) -> float:
            found[how].append(_tell(fleet, port, how, runs, rate, seconds))
            return found[how][-1].cpu_ms

        _tell(fleet, port, "emit", runs, TOKENS_PER_S, 1.0)  # the first one imports and connects
        cpu = interleaved(
            {
                "emit": lambda: tell("emit", TOKENS_PER_S),
                "trace": lambda: tell("trace", TRACES_PER_S),
            },
            chosen.repeats,
        )
    every = [*found["emit"], *found["trace"]]
    yield Figure(
        key="tokens.cpu",
        values=[1000 * each for each in cpu["emit"]],
        unit="us",
        what=f"processor time of a token: {TOKENS_PER_S}/s in {runs} runs to {runs} viewers",
        facts={"parts": dict(found["emit"][-1].parts)},
    )
    yield Figure(
        key="tokens.trace",
        values=[1000 * each for each in cpu["trace"]],
        unit="us",
        what=f"of a trace, {TRACES_PER_S}/s in {runs} runs to {runs} viewers",
        facts={"parts": dict(found["trace"][-1].parts)},
    )
    yield Figure(
        key="tokens.ratio",
        values=ratios(cpu["emit"], cpu["trace"]),
        unit="x",
        what="a token / a trace",
    )
    yield Figure(
        key="tokens.late",
        values=[each.late_s for each in found["emit"]],
        unit="s",
        what="that a body was behind its rate at its end",
    )
    yield Figure(
        key="tokens.exact",
        values=[each.exact / runs for each in every],
        unit="share",
        what="viewers that saw each event once and in order, and each token",
    )


def raise_descriptors() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _tell(fleet: Fleet, port: int, how: str, runs: int, rate: int, seconds: float) -> Told:
    count = round(rate * seconds)
    gate = fleet.folder / f"gate-{how}-{time.time()}"
    told = {"how": how, "rate": rate, "count": count, "gate": str(gate)}
    # Not all in the same moment.
    run_ids = fleet.start_runs(
        "telling", [told | {"after": number / runs / rate} for number in range(runs)]
    )
    ours, theirs = SPAWN.Pipe()
    viewers = fleet.bench.child(view, port, run_ids, theirs)
    assert ours.recv() == "joined"
    begin = time.time() + LEAD_S
    end = begin + seconds + REST_S
    open_gate(gate, begin=begin, end=end)
    pause_until(begin)
    before = fleet.processor_s()
    pause_until(end - REST_S / 2)
    after = fleet.processor_s()
    seen: list[tuple[bool, int]] = ours.recv()
    viewers.join()
    parts = {name: 1000 * (after[name] - before[name]) / (runs * count) for name in SERVED}
    return Told(
        cpu_ms=sum(parts.values()),
        parts={name: round(value, 4) for name, value in parts.items()},
        late_s=max(0.0, *fleet.results(run_ids)),
        exact=sum(exact and tokens == count for exact, tokens in seen),
    )


class TokenViewer(Viewer):
    """One that counts tokens."""

    def __init__(self, port: int, run_id: str) -> None:
        self.tokens = 0
        super().__init__(port, run_id)

    def look(self, data: bytes) -> None:
        self.tokens += data.count(MARK)
        super().look(data)


def view(_: Settings, port: int, run_ids: Sequence[str], pipe: Pipe) -> None:
    """A process of viewers, one of each run, until all streams end.

    Tells when all were there and saw the steps begin; then of each whether it is exact, and its
    tokens.
    """
    viewers = [TokenViewer(port, run_id) for run_id in run_ids]
    joined = False
    with selectors.DefaultSelector() as selector:
        for viewer in viewers:
            selector.register(viewer.socket, selectors.EVENT_READ, viewer)
        while selector.get_map():
            for key, _events in selector.select():
                viewer: Any = key.data
                viewer.read()
                if not viewer.open:
                    selector.unregister(viewer.socket)
            if not joined and all(viewer.seq >= BEGUN for viewer in viewers):
                joined = True
                pipe.send("joined")
    pipe.send([(viewer.exact, viewer.tokens) for viewer in viewers])
