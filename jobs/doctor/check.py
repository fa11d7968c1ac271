"""The decorator that makes a function a check."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from beatless.doctor.finding import Verdict
from beatless.doctor.probe import Need, Probe

Examine = Callable[[Probe], Verdict | Iterable[Verdict]]
"""Returns the one verdict, or yields several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A function over a probe, with its name and its needs."""

    name: str
    needs: frozenset[Need]
    """Without one of them the check is not made."""
    uses: frozenset[Need]
    """Connected if they can be; the check is made without them as well."""
    examine: Examine

    def verdicts(self, probe: Probe) -> Iterable[Verdict]:
        """Raises the servers' errors, also between verdicts."""
        found = self.examine(probe)
        return [found] if isinstance(found, Verdict) else found


def check(
    name: str, *, needs: Collection[Need] = (), uses: Collection[Need] = ()
) -> Callable[[Examine], Check]:
    """Make a function the check that `beatless doctor --check NAME` runs.

    @check("eviction", needs={Need.REDIS})
    def eviction(probe: Probe) -> Verdict:
        if …:
            return problem("what is wrong", "what to do about it")
        return ok("how it is")
    """

    def made(examine: Examine) -> Check:
        return Check(name=name, needs=frozenset(needs), uses=frozenset(uses), examine=examine)

    return made
