"""Options of the calls and elements that start child runs: their checks, and what they come to."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from beatless.orchestrator.options import problem_with_key, problem_with_tags
from beatless.orchestrator.outcomes import PlanError
from beatless.orchestrator.waits import seconds_of_wait

FAILURES = ("fail", "collect")
"""The policies of a map: the first failure fails it, or is a member of its results."""


def options_of_call(
    where: str,
    parent_tags: Mapping[str, str],
    *,
    group: str | None,
    tags: Mapping[str, str] | None,
    deadline: float | timedelta | None = None,
) -> dict[str, Any]:
    """The options of a ChildCall. Raises PlanError, naming the call, for one that is bad."""
    check_group(where, group)
    return {
        "deadline_s": None if deadline is None else seconds_of_wait(f"{where}: deadline", deadline),
        "group": group,
        "tags": child_tags(where, parent_tags, tags),
    }


def check_group(where: str, group: Any) -> None:
    """Raises PlanError, naming the call, for a group that a run cannot have."""
    if group is not None and (problem := problem_with_key(group)):
        raise PlanError(f"{where}: group {problem}; without group= a child has that of its parent")


def child_tags(
    where: str, parent: Mapping[str, str], tags: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """The tags of children whose call gives these; None: it gives none, they have the parent's.

    Raises PlanError, naming the call, for tags that a run cannot have.
    """
    if tags is None:
        return None
    if problem := problem_with_tags(tags):
        raise PlanError(f"{where}: tags {problem}")
    found = {**parent, **tags}
    if problem := problem_with_tags(found):
        raise PlanError(f"{where}: tags, with those of the parent, {problem}")
    return found


def check_map(where: str, at_once: Any, failure: Any) -> None:
    """Raises PlanError, naming the call, for options that a map does not have."""
    if at_once is not None and (type(at_once) is not int or at_once < 1):
        raise PlanError(f"{where}: at_once is {at_once!r}; give it a number from 1 on")
    if failure not in FAILURES:
        raise PlanError(f"{where}: failure is {failure!r}; choose {' or '.join(FAILURES)}")
