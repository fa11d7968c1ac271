"""The app whose processes `benchmarks.takeover` kills: one step that waits to be killed."""

import json
import os
import time
from pathlib import Path

from beatless import App, Plan, Settings, StepContext, retry, step


@step(retry=retry(max_crashes=10_000))
def wait(ctx: StepContext) -> None:
    """Notes when it begins and in which process, then waits at a FIFO."""
    line = {"at": time.monotonic(), "pid": os.getpid(), "parent": os.getppid()}
    with Path(ctx.input["lines"]).open("a") as lines:
        lines.write(json.dumps(line) + "\n")
    Path(ctx.input["fifo"]).read_text()


app = App(Settings.from_env(), [Plan("wait", [wait])])
