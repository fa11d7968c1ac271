"""The options of a plan that is a list, as they are kept: checked for their types."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from beatless.orchestrator.outcomes import PlanError


def checked_routes(
    plan: str, routes: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """The routes as they are kept. Raises PlanError for another type."""
    form = 'routes={"verify": ["perceive", "stop"]}'
    if routes is not None and not isinstance(routes, Mapping):
        raise PlanError(f"plan {plan}: routes are {routes!r:.200}; map names of steps: {form}")
    for label, targets in (routes or {}).items():
        names = targets if isinstance(targets, list | tuple | set | frozenset) else [None]
        if not all(isinstance(each, str) for each in (label, *names)):
            raise PlanError(
                f"plan {plan}: routes of {label!r:.200} are {targets!r:.200}; give a list of names "
                f"of steps: {form}"
            )
    return {label: tuple(targets) for label, targets in (routes or {}).items()}


def checked_moved(plan: str, moved: Iterable[str], names: Collection[str]) -> frozenset[str]:
    """The steps that a plan says have changed their places. Raises PlanError for other names."""
    given = [moved] if isinstance(moved, str) or not isinstance(moved, Iterable) else [*moved]
    if isinstance(moved, str) or not all(isinstance(name, str) and name in names for name in given):
        raise PlanError(
            f"plan {plan}: moved is {moved!r:.200}; give a list of names of its steps and waits: "
            'moved=["pack"]'
        )
    return frozenset(given)
