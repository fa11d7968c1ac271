"""Random walks: everything that can happen to runs, in any order, then the promises are checked.

A walk is a list of moves drawn from a seed. It kills workers and relays, lets time pass, cancels,
starts and drains; then the world heals. The seed is in the test's id: the same walk comes again.
"""

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from beatless import App, RunState
from beatless.outbox.faults import POINTS, SimulatedCrash
from beatless.streams.messages import parse
from beatless.testing import Kit

MOVES = {
    "start": 4,
    "work": 10,
    "work while a point is armed": 6,
    "step": 4,
    "drain": 4,
    "drain while a point is armed": 3,
    "drain one run": 2,
    "advance": 5,
    "cancel": 1,
    "deliver twice": 2,
    "lose what the broker holds": 1,
}


class Walk:
    """One walk through one app."""

    def __init__(self, beatless: Kit, table: str, directory: Path, seed: int) -> None:
        self.beatless = beatless
        self.random = Random(seed)
        self.table = table
        self.directory = directory
        self.runs: list[str] = []
        self.moves: list[str] = []
        self.crashes = 0
        self._redis = beatless.app.redis()
        self._ear = self._redis.pubsub()

    def start(self) -> None:
        plan, given = self.random.choice(
            [
                ("two_steps", None),
                ("agents.run", {"device": "d1"}),
                ("loop", {"turns": self.random.randint(1, 4)}),
                ("retries", {"failures": self.random.randint(0, 3)}),
                ("transactional", {"table": self.table}),
                ("ledger", {"ledger": str(self.directory / "ledger")}),
                ("fatally", None),
            ]
        )
        delay = self.random.choice([None, None, None, 5.0])
        run = self.beatless.start_run(plan, given, delay=delay, priority=self.random.randint(0, 9))
        self.runs.append(run.run_id)

    def listen(self, run_id: str) -> None:
        self._ear.subscribe(self.beatless.app.streams.channel(run_id))

    def move(self) -> None:
        name = self.random.choices(list(MOVES), list(MOVES.values()))[0]
        run_id = self.random.choice(self.runs)
        self.moves.append(f"{name} {run_id}")
        kit = self.beatless
        match name:
            case "start" if len(self.runs) < 6:
                self.start()
            case "work":
                kit.work_once()
            case "work while a point is armed":
                self.armed("step claim task", kit.work_once)
            case "step":
                kit.step(run_id)
            case "drain":
                kit.drain_outbox_once()
            case "drain while a point is armed":
                self.armed("relay", kit.drain_outbox_once)
            case "drain one run":
                kit.drain_outbox_once(run_id)
            case "advance":
                kit.advance(self.random.choice([1, 20, 40]))
            case "cancel":
                kit.client.cancel_run(run_id)
            case "deliver twice":
                run = kit.client.get_run(run_id)
                kit.executor().execute(kit.app.plans[run.plan], run_id, 1)
            case "lose what the broker holds":
                for key in self._redis.scan_iter(match=f"{kit.app.settings.prefix}:*"):
                    self._redis.unlink(key)

    def armed(self, kinds: str, act: Any) -> None:
        points = sorted(point for point in POINTS if point.startswith(tuple(kinds.split())))
        point, nth = self.random.choice(points), self.random.randint(1, 3)
        self.beatless.app.faults.arm(point, nth=nth)
        try:
            act()
        except SimulatedCrash:
            self.crashes += 1
            self.beatless.forget_worker()
        finally:
            self.beatless.app.faults.disarm(point)

    def heal(self) -> None:
        """Nothing more goes wrong: everything that was started must come to its end."""
        for _ in range(40):
            self.beatless.advance(100)
            self.beatless.work_until_idle()
            states = [self.beatless.client.get_run(run_id).state for run_id in self.runs]
            if all(state.final for state in states):
                return
        raise AssertionError("\n".join(self.beatless.describe(run_id) for run_id in self.runs))

    def heard(self) -> dict[str, list[int]]:
        """The seqs that were published, in order, by run."""
        self._redis.publish(f"{self.beatless.app.settings.prefix}:events:end", "")
        seqs: dict[str, list[int]] = defaultdict(list)
        while message := self._ear.get_message(timeout=60):
            if message["type"] != "pmessage":
                continue
            if message["channel"].endswith(b":end"):
                return seqs
            for text in parse(message["data"]):
                seqs[text.event().run_id].append(text.seq)
        raise AssertionError("the end was not heard")


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 20))]
)
def test_whatever_happens_every_run_ends_once_and_everybody_hears_of_it(
    beatless: Kit, beatless_app: App, postgres: psycopg.Connection, tmp_path: Path, seed: int
) -> None:
    postgres.execute("CREATE TABLE effects (key text)")
    walk = Walk(beatless, f"{beatless_app.settings.schema}.effects", tmp_path, seed)
    walk._ear.psubscribe(f"{beatless_app.settings.prefix}:events:*")
    walk.start()
    for _ in range(60):
        walk.move()
    walk.heal()
    beatless.drain_outbox_once()

    beatless.verify()
    assert postgres.execute("SELECT count(*) FROM dispatches").fetchone() == (0,)
    assert postgres.execute("SELECT count(*) FROM run_outbox").fetchone() == (0,)
    assert postgres.execute("SELECT count(*) FROM dead_letters").fetchone() == (0,)
    heard = walk.heard()
    for run_id in walk.runs:
        events = beatless.client.events(run_id)
        # Every event was published, and the first time each was in order.
        assert list(dict.fromkeys(heard[run_id])) == [event.seq for event in events]
        assert beatless.collect_stream(run_id) == events
        # A transactional effect is there exactly if its step has finished.
        finished = [e.step for e in events if e.type == "StepFinished" and e.step == "insert"]
        assert postgres.execute(
            "SELECT count(*) FROM effects WHERE key = %s", (f"{run_id}:insert",)
        ).fetchone() == (len(finished),)
        run = beatless.client.get_run(run_id)
        if run.plan == "fatally":
            assert run.state in (RunState.FAILED, RunState.CANCELLED)
    postgres.execute("DROP TABLE effects")
    walk._ear.close()
    walk._redis.close()
