"""Workers of two versions of a plan at once, and runs everywhere in it: each does what it may."""

from pathlib import Path
from time import monotonic

import psycopg
import pytest

from beatless import Plan, RunState, step
from beatless.testing import Kit
from tests.child_logs import await_line
from tests.valkeys import until

VERSION = """
import threading
from pathlib import Path

from beatless import App, Plan, Settings, Snooze, retry, step

VERSION, NAMES, RENAMED = {version!r}, {names!r}, {renamed!r}


def make(name):
    @step(name=name, retry=retry(max_attempts=3, initial=1000, jitter=0))
    def body(ctx):
        ledger = Path(ctx.input["ledger"]) / ctx.run_id
        before = ledger.read_text() if ledger.exists() else ""
        with ledger.open("a") as lines:
            lines.write(f"{{VERSION}} {{name}} {{ctx.key.partition(':')[2]}} {{ctx.attempt}}\\n")
        first = VERSION == "old" and f" {{name}} " not in before
        match ctx.input.get(name) if first else None:
            case "hangs":
                threading.Event().wait()
            case "fails":
                raise ValueError("away")
            case "snoozes":
                return Snooze(1000)
            case "waits":
                go = Path(ctx.input["ledger"]) / "go"
                while not go.exists():
                    threading.Event().wait(0.02)
        return name

    return body


app = App(Settings.from_env(), [Plan("order", [make(n) for n in NAMES.split()], renamed=RENAMED)])
"""

HOW = {
    "killed": {"charge": "hangs"},
    "failed": {"charge": "fails"},
    "snoozed": {"charge": "snoozes"},
    "mail begun": {"mail": "hangs"},
    "finished": {"charge": "waits"},
}
OLD = ["one", "charge", "mail"]


@pytest.fixture
def beatless_plans() -> list[Plan]:
    """For starts; the workers have their own."""
    return [Plan("order", [step(name=name)(lambda ctx: None) for name in OLD])]


@pytest.fixture
def beatless_settings() -> dict[str, float]:
    """Leases and a grace that end when the test says so; no run is handed on between two steps, as
    a busy machine does with those of a group."""
    return {
        "lease_seconds": 300,
        "redispatch_seconds": 1,
        "grace_seconds": 300,
        "worker_group_runs": 1,
    }


def allowed(names: str, renamed: bool, where: str) -> list[list[str]]:
    """What may be executed of a run after the deploy, by a worker of either version."""
    attempt = {"killed": 2, "failed": 2, "snoozed": 1}.get(where)
    if where == "not begun":
        return [
            [f"old {name} {name} 1" for name in OLD],
            [f"new {name} {name} 1" for name in names.split()],
        ]
    if attempt is None:
        rest = f"mail mail {2 if where == 'mail begun' else 1}"
        return [[f"old {rest}"], [f"new {rest}"]]
    ways = [[f"old charge charge {attempt}", "old mail mail 1"]]
    if renamed or "charge" in names.split():
        name = "pay" if renamed else "charge"
        ways.append([f"new {name} charge {attempt}", "new mail mail 1"])
    return ways


@pytest.mark.long  # in one process: tests/integration/test_changed_plans.py
@pytest.mark.parametrize(
    ("names", "renamed", "each"),
    [
        ("one pack pay mail", False, 1),
        ("one pack pay mail", True, 4),
        ("one pack charge mail", False, 4),
        ("one mail", False, 4),
    ],
)
def test_each_run_is_finished_by_a_worker_that_knows_where_it_is(
    beatless: Kit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    postgres: psycopg.Connection,
    names: str,
    renamed: bool,
    each: int,
) -> None:
    for version, steps in (("old", " ".join(OLD)), ("new", names)):
        text = VERSION.format(
            version=version,
            names=steps,
            renamed={"charge": "pay"} if renamed and version == "new" else None,
        )
        (tmp_path / f"version_{version}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir()
    beatless.relay_process("tests.plans:app")
    old = beatless.worker_process("version_old:app", concurrency=2)
    doomed = beatless.worker_process(
        "version_old:app",
        concurrency=2 * each,
        arguments=["--queues", "doomed", "--", "--pool", "threads"],
    )

    def done(run_id: str) -> list[str]:
        ledger = ledgers / run_id
        return ledger.read_text().splitlines() if ledger.exists() else []

    runs: dict[str, str] = {}
    for where, how in HOW.items():
        for _ in range(each if where != "finished" else 2):
            queue = "doomed" if "hangs" in how.values() else "default"
            run_id = beatless.start_run(
                "order", {"ledger": str(ledgers), **how}, queue=queue
            ).run_id
            runs[run_id] = where
            last = "mail" if where == "mail begun" else "charge"
            until(lambda run_id=run_id, last=last: f"old {last} {last} 1" in done(run_id), 60)
            if where in ("failed", "snoozed"):
                kind = "StepFailed" if where == "failed" else "DebugTrace"
                beatless.wait_for_event(run_id, kind)
    for _ in range(each):
        later = beatless.start_run("order", {"ledger": str(ledgers)}, delay=900)
        runs[later.run_id] = "not begun"
    old.terminate()  # gives back between two steps what is in `charge`
    await_line(old, "worker stops")
    (ledgers / "go").touch()
    old.reap(monotonic() + 60)
    doomed.kill()
    # Whoever knows of its death ends its leases: before time does, which would be no crash.
    held = "SELECT count(*) FROM runs WHERE state = 'running' AND lease_expires_at > now()"
    until(lambda: postgres.execute(held).fetchone() == (0,), 60)
    before = {run_id: len(done(run_id)) for run_id in runs}

    for app in "version_new:app", "version_old:app":
        beatless.worker_process(app, concurrency=2, arguments=["--queues", "default,doomed"])
    beatless.advance(1001)

    for run_id, where in runs.items():
        run = beatless.wait_for_run_completion(run_id)
        assert run.state is RunState.COMPLETED
        assert done(run_id)[before[run_id] :] in allowed(names, renamed, where), where
    beatless.verify()
