"""How long the bodies of steps take in this process: a moving average for each step."""

from beatless.orchestrator.plan import Plan, Step

SHORT_S = 0.01
"""Seconds below which a body is short."""

CAP_S = 2 * SHORT_S
"""Seconds that a longer body counts as: one that was held up makes its step no long one."""

WEIGHT = 1 / 4
"""The share of the newest body in the average."""


class Pace:
    """The durations of one process. Any thread may use it: a lost update does no harm."""

    def __init__(self) -> None:
        self._averages: dict[str, dict[str, float]] = {}

    def note(self, plan: Plan, step: Step, seconds: float) -> None:
        """A body has taken so long."""
        averages = self._averages.setdefault(plan.name, {})
        newest = min(seconds, CAP_S)
        before = averages.get(step.name, newest)
        averages[step.name] = before + (newest - before) * WEIGHT

    def is_short(self, plan: Plan, step: Step) -> bool:
        """Whether the bodies of this step are short, as far as this process has seen them."""
        return self._averages.get(plan.name, {}).get(step.name, SHORT_S) < SHORT_S

    def is_known(self, plan: Plan, step: Step) -> bool:
        """Whether this process has seen a body of this step."""
        return step.name in self._averages.get(plan.name, {})

    def longest_s(self, plan: Plan) -> float:
        """Seconds that the bodies of the longest step of a plan take, of those that were seen."""
        return max(list(self._averages.get(plan.name, {}).values()), default=SHORT_S)

    def suits_groups(self, plan: Plan) -> bool:
        """Whether runs of this plan are begun beside others.

        They begin with a step, which is a short one, no step that was seen is a long one, and none
        ends the run at its first crash: a crash of the process counts for all of its runs.
        """
        return (
            isinstance(plan.first, Step)
            and self.is_short(plan, plan.first)
            and self.longest_s(plan) < SHORT_S
            and all(step.retry.max_crashes > 1 for step in plan.steps)
        )
