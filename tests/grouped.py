"""The app of `tests.plans`, whose workers execute runs in groups however slow the machine is."""

from beatless.orchestrator import group, pace
from tests.plans import app

__all__ = ["app"]

pace.SHORT_S = pace.CAP_S = group.GROUP_S = group.BUSY_S = group.ROUND_S = group.LULL_S = 600.0
