"""`beatless dev` and `beatless demo` as people run them: real processes, from start to end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import pytest

from beatless.outbox.sockets import readable

SECONDS = 240.0


class Dev:
    """One `beatless dev`, started and ready."""

    def __init__(self, directory: Path, *arguments: str, app: str = "") -> None:
        self.directory = directory
        named = ["--app", app] if app else []
        self.process = subprocess.Popen(
            beatless(*named, "dev", "--port", "0", "--flower-port", "0", *arguments),
            cwd=directory,
            env=environ(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line == "ready\n":
                break
        else:
            assert self.process.stderr is not None
            raise AssertionError(self.process.stderr.read())

    def pid_of(self, name: str) -> int:
        return next(int(line.split()[-1]) for line in self.lines if line.startswith(name))

    def processes(self) -> list[int]:
        """Every process below this one."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        found, below = [], [self.process.pid]
        while below:
            below = [pid for pid, parent in parents.items() if parent in below]
            found += below
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=SECONDS)


def beatless(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "beatless", *arguments]


def environ() -> dict[str, str]:
    """What a person has who has set nothing."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BEATLESS_")}


def call(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        beatless(*arguments),
        cwd=directory,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def gone(pids: list[int]) -> None:
    """Wait for the end of processes that are not our children."""
    deadline = monotonic() + 60
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ready = readable([descriptor], deadline - monotonic())
            assert ready, f"process {pid} is left: {Path(f'/proc/{pid}/cmdline').read_bytes()!r}"
        finally:
            os.close(descriptor)


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    started: list[Dev] = []

    def start(*arguments: str, app: str = "") -> Dev:
        started.append(Dev(tmp_path, *arguments, app=app))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_dev_from_start_to_end(dev: Callable[..., Dev], tmp_path: Path) -> None:
    (tmp_path / "beatless.env").touch(0o644)
    stack = dev("--ephemeral", "--workers", "2", "--pool", "threads", "--env-file", "beatless.env")

    names = [line.split()[0] for line in stack.lines]
    parts = ["api", "flower", "worker", "worker", "relay"]
    hints = ["logs", "plans", "settings"]
    assert names == ["postgres", "redis", "names", *parts, *hints, "ready"]
    assert "schema beatless (tables), prefix beatless (queues" in stack.lines[2]
    assert stack.lines[-4] == f"logs {tmp_path / '.beatless' / 'ephemeral'}"
    assert stack.lines[-3].startswith("plans agents.run, code_census of the demo")
    assert stack.lines[-2].endswith("set -a; . ./beatless.env; set +a")
    lines = (tmp_path / "beatless.env").read_text().splitlines()
    assert all(line.startswith("BEATLESS_") and "=" in line for line in lines)
    assert (tmp_path / "beatless.env").stat().st_mode & 0o077 == 0
    for line in lines:
        if password := urlsplit(line.partition("=")[2]).password:
            assert password not in "\n".join(stack.lines)
    assert ":***@" in stack.lines[0]
    assert ":***@" in stack.lines[1]

    # Other commands find it by the directory.
    followed = call(tmp_path, "start", "agents.run", "--follow", "--json")
    assert followed.returncode == 0, followed.stderr
    events = [json.loads(line) for line in followed.stdout.splitlines()]
    assert [event["seq"] for event in events] == list(range(1, 14))
    assert followed.stderr.strip() == events[0]["run_id"]

    # A port is looked at by who wants it.
    taken = next(line.rpartition(":")[2] for line in stack.lines if line.startswith("flower"))
    second = call(tmp_path, "dev", "--no-flower", "--flower-port", taken)
    assert second.returncode == 1
    assert f"kill {stack.process.pid}" in second.stderr
    assert "--data-dir" in second.stderr

    command_line = Path(f"/proc/{stack.pid_of('worker')}/cmdline").read_bytes().split(b"\0")
    assert command_line[-3:] == [b"--pool", b"threads", b""]

    # A worker that is killed is replaced.
    os.kill(stack.pid_of("worker"), signal.SIGKILL)
    assert stack.process.stderr is not None
    assert "worker-1" in stack.process.stderr.readline()
    assert "started again" in stack.process.stderr.readline()

    everything = stack.processes()
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(SECONDS) == 0
    assert stack.process.stdout is not None
    assert stack.process.stdout.read() == "stopped\n"
    gone(everything)
    assert [path.name for path in tmp_path.iterdir()] == ["beatless.env"]


CIRCULAR = "from shop_admin import nothing\n"

ELSEWHERE = """
from beatless import App, Plan, Settings, step


@step
def only(ctx): ...


settings = Settings.from_env(database_url="postgresql://shop@127.0.0.1:1/orders")
app = App(settings, plans=[Plan("shop", [only])])
"""


OWN_NAMES = """
from beatless import App, Plan, Settings, step


@step
def only(ctx): ...


app = App(Settings.from_env(schema="orders", prefix="shop"), plans=[Plan("checkout", [only])])
"""


@pytest.mark.long
def test_dev_takes_the_names_that_an_app_has_chosen(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(OWN_NAMES)

    stack = dev("--ephemeral", "--no-flower", "--env-file", "dev.env", app="shop:app")

    assert "names schema orders (tables), prefix shop (queues, channels, keys)" in stack.lines
    assert "plans checkout" in stack.lines
    settings = (tmp_path / "dev.env").read_text().splitlines()
    assert {"BEATLESS_SCHEMA=orders", "BEATLESS_PREFIX=shop"} <= set(settings)
    assert call(tmp_path, "start", "checkout", "--follow").returncode == 0


@pytest.mark.long
def test_dev_of_an_app_that_cannot_be_imported_starts_no_process(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(CIRCULAR)
    (tmp_path / "shop_admin.py").write_text("import shop\n")

    done = call(tmp_path, "--app", "shop:app", "dev", "--port", "0", "--no-flower")

    assert done.returncode == 1
    assert "shop cannot be imported: ImportError: cannot import name 'nothing'" in done.stderr
    assert list((tmp_path / ".beatless").glob("*.log")) == []


@pytest.mark.long
def test_dev_says_that_an_app_names_a_database_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(ELSEWHERE)

    done = call(tmp_path, "--app", "shop:app", "dev", "--port", "0", "--no-flower")

    assert done.returncode == 1
    assert "shop:app names a Postgres of its own, 127.0.0.1:1/orders" in done.stderr
    assert "did not become ready" in done.stderr


@pytest.mark.long(minutes=1)
def test_a_killed_dev_takes_everything_with_it_and_the_next_one_goes_on(
    dev: Callable[..., Dev], tmp_path: Path
) -> None:
    first = dev("--data-dir", "here")
    run_id = call(tmp_path, "start", "agents.run", "--follow").stdout.split()[0]
    assert (tmp_path / "here" / ".gitignore").read_text() == "*\n"
    everything = first.processes()
    assert len(everything) >= 6

    first.process.kill()
    gone(everything)
    assert "beatless dev" in call(tmp_path, "runs").stderr

    dev("--data-dir", "here")
    assert call(tmp_path, "show", run_id, "--json").returncode == 0
    assert call(tmp_path, "start", "agents.run", "--follow").returncode == 0


@pytest.mark.long
def test_the_demo_proves_what_it_says(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for functions in (200, 1_000, 5_000):  # more for a machine that is late with its kill
        for number in range(80):
            text = "def f(x):\n    return x if x else 0\n" * functions
            (tree / f"module_{number}.py").write_text(text)
        done = call(tmp_path, "demo", "--root", "tree", "--out", "report", "--runs", "5", "--json")
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert len(said["proved"]) == 4
        if "too few" not in said["proved"][1]:
            break

    assert "survived kill -9 of its worker: of 40 chunks" in said["proved"][1]
    assert "80 files" in Path(said["report"]).read_text()
    assert Path(said["chart"]).read_text().startswith("<svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "tree"]
