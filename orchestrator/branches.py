"""The branches of a plan's function: what it does at the same time, and their numbers. Pure.

The occurrences of a step are counted within a branch: which of two branches is the first to ask for
one hangs on the order in which steps end, and the key of a step must not.
"""

from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field

from beatless.orchestrator.plan import occurrence


@dataclass(slots=True, eq=False)
class Branch:
    """A part of the function that goes on beside others. The function itself is the first."""

    path: str = ""
    """Its number, after those of the branches that it is in: `2:1`. Of the function itself none."""
    visits: Counter[str] = field(default_factory=Counter)
    """How often it has called each name."""
    _branches: int = 0

    def fork(self) -> "Branch":
        """The next branch of this one."""
        self._branches += 1
        return Branch(f"{self.path}:{self._branches}" if self.path else str(self._branches))

    def occurrence(self, name: str, generation: int) -> str:
        """The name of the next call of a step, or wait, in this branch.

        `name#2` is the second of the function itself, `name#3:2` the second of its third branch.
        """
        self.visits[name] += 1
        visit = self.visits[name]
        if not self.path:
            return occurrence(name, visit)
        again = "" if generation == 1 else f"#{generation}"
        return f"{name}#{self.path}:{visit}{again}"


BRANCH: ContextVar[Branch] = ContextVar("beatless_branch")
"""The branch in which the function of a plan is."""
