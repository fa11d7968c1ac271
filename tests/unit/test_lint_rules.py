"""What the linter keeps out of the suite; that each rule bites."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ruff(source: str, path: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", path, "-"],
        input=source,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout


@pytest.mark.parametrize(
    "source",
    [
        "import time\n\ntime.sleep(1)\n",
        "from unittest.mock import Mock\n\nMock()\n",
        "from celery import current_app\n\ncurrent_app.send_task\n",
        "from celery.contrib.testing.worker import start_worker\n\nstart_worker(app)\n",
        "from kombu.transport.memory import Transport\n\nTransport()\n",
        "import fakeredis\n\nfakeredis.FakeRedis()\n",
    ],
)
@pytest.mark.parametrize("path", ["tests/integration/test_x.py", "jobs/x.py"])
def test_sleeps_mocks_doubles_and_the_global_app_are_banned(source: str, path: str) -> None:
    assert "TID251" in ruff(source, path)
    assert "TID251" not in ruff("import time\n\ntime.monotonic()\n", path)
