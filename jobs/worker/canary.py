"""The plan that every app has beside its own: one step, which returns its executor."""

import os
import socket
import time
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from beatless.namespaces import id_prefix
from beatless.orchestrator.context import StepContext
from beatless.orchestrator.plan import Plan, step

NAME = "beatless.canary"

NAMESPACE = "beatless-doctor"
"""The namespace of its runs: in no list of the users' runs."""


def is_one(run_id: str) -> bool:
    """Whether the run is one of doctor's."""
    return run_id.startswith(id_prefix(NAMESPACE))


def canary(plans: Sequence[Plan]) -> Plan:
    """A plan for `beatless doctor`, in every worker. It is in no list of plans."""
    known = {plan.name: plan.version for plan in plans}

    @step(timeout=10)
    def answer(_ctx: StepContext) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "clock": time.time(),
            "version": metadata.version("beatless"),
            "plans": known,
        }

    return Plan(NAME, [answer])
