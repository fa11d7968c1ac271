"""The wheel, installed as a stranger does: an empty environment, away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"
SOURCES = {"jobs": "beatless", "orchestrator": "beatless/orchestrator", "outbox": "beatless/outbox"}


def run(*command: str | Path, cwd: Path) -> str:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=bare, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = DIST.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A folder with an environment in which nothing but the wheel was asked for."""
    found = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", ".venv", cwd=found)
    pip = [found / ".venv/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    run(*pip, f"{wheel}[dev,test]", cwd=found)
    return found


def test_wheel_and_source_distribution_hold_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        held = set(opened.namelist())
    wanted = {"pytest_beatless.py"}
    for folder, package in SOURCES.items():
        wanted |= {
            f"{package}/{path.relative_to(ROOT / folder)}"
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc" and not path.is_symlink()
        }
    assert wanted <= held
    assert len(list(DIST.glob("*.tar.gz"))) == 1  # of which the wheel was built


def test_the_command_works(place: Path) -> None:
    beatless = place / ".venv/bin/beatless"
    assert "durable" in run(beatless, "--help", cwd=place).lower()
    assert run(beatless, "--version", cwd=place).startswith("beatless, version ")


def test_a_new_project_passes_its_tests(place: Path) -> None:
    run(place / ".venv/bin/beatless", "init", "shop", cwd=place)
    said = run(place / ".venv/bin/python", "-m", "pytest", "-n", "2", "-q", cwd=place / "shop")
    assert "8 passed" in said
    assert run("grep", "-c", "beatless", "requirements.txt", cwd=place / "shop") == "1\n"
