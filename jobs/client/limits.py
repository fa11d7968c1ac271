"""Calls about limits, for the whole fleet."""

from beatless.client.base import BaseClient
from beatless.errors import BadRequest
from beatless.namespaces import id_prefix
from beatless.orchestrator.limit import LIMIT_NAME, problem_with_at_once, problem_with_rate
from beatless.orchestrator.limits import LimitState, LimitStatements
from beatless.outbox.queries import Caller

MAX_LISTED = 1000
"""Keys of limits that one call lists."""


class LimitCalls(BaseClient):
    """The limits of a namespace, and their change while runs wait for them."""

    def limits(self) -> list[LimitState]:
        """The limits that are in use, waited for or set, one for each key; 1,000 at most.

        >>> client.set_limit("stripe", 5, force=True)
        >>> [(each.name, each.at_once, each.running) for each in client.limits()]
        [('stripe', 5, 0)]
        """
        statements = LimitStatements(self._journal.schema)
        prefix = id_prefix(self._namespace)
        return self._in_transaction(
            None, lambda caller: statements.list(caller, prefix=prefix, limit=MAX_LISTED)
        )

    def set_limit(
        self,
        name: str,
        at_once: int | None = None,
        *,
        rate: str | None = None,
        force: bool = False,
    ) -> None:
        """Let so many runs with the same key run at once, or begin, whatever plans say.

        Until `release_limit`. Runs that wait start at once if there is room; those that run go on.
        Raises BadRequest, also for a rate of a limit with `at_once`, and the other way round: that
        would change nothing; and without `force` for a name that no plan of this app has, no run
        that runs or waits, and that is not set: it may be mistyped, or of plans to come.

        >>> client.set_limit("openai", rate="500/min", force=True)
        """
        if (at_once is None) == (rate is None):
            raise BadRequest("at_once", "or rate is needed, and not both")
        if at_once is not None and (problem := problem_with_at_once(at_once)):
            raise BadRequest("at_once", problem)
        if rate is not None and (problem := problem_with_rate(rate)):
            raise BadRequest("rate", problem)
        statements, stored = LimitStatements(self._journal.schema), self._stored_name(name)

        def act(caller: Caller) -> None:
            found = [
                each.rate
                for plan in self._plans.values()
                for each in plan.all_limits
                if each.name == name
            ]
            kinds = {each is not None for each in found} | statements.kinds(caller, stored)
            if not (kinds or force):
                self._check_known(caller, name)
            if kinds == {rate is None}:
                raise BadRequest(
                    "rate" if rate else "at_once", _changes_nothing(name, rate is None)
                )
            statements.set(caller, stored, at_once=at_once, rate=rate)

        self._in_transaction(None, act)

    def release_limit(self, name: str) -> bool:
        """Let each run bring the number of its plan again; False if none was set.

        >>> client.set_limit("geocoder", 20, force=True)
        >>> client.release_limit("geocoder"), client.release_limit("geocoder")
        (True, False)
        """
        statements, stored = LimitStatements(self._journal.schema), self._stored_name(name)
        return self._in_transaction(None, lambda caller: statements.forget(caller, stored))

    def _check_known(self, caller: Caller, name: str) -> None:
        """Raises BadRequest for a limit that no plan has, and that is neither used nor set."""
        prefix = id_prefix(self._namespace)
        stored = LimitStatements(self._journal.schema).list(caller, prefix=prefix, limit=MAX_LISTED)
        known = {each.name for each in stored}
        known.update(limit.name for plan in self._plans.values() for limit in plan.all_limits)
        if name not in known:
            raise BadRequest(
                "name",
                f"is {name!r}, a limit that no plan of this app has, and no run of namespace "
                f"{self._namespace} that runs or waits; known are "
                f"{', '.join(sorted(known)) or 'none'}. For plans to come give force, as in "
                f"`beatless limits set {name} --force …`",
            )

    def _stored_name(self, name: str) -> str:
        """The name with the prefix of the namespace. Raises BadRequest."""
        if not isinstance(name, str) or not LIMIT_NAME.fullmatch(name):
            raise BadRequest(
                "name", f"is {name!r:.200}, which does not match ^{LIMIT_NAME.pattern}$"
            )
        return id_prefix(self._namespace) + name


def _changes_nothing(name: str, is_rate: bool) -> str:
    """Why a limit that is a rate, or is none, cannot be set as if it were the other."""
    kind, option = (
        ("how many runs begin in a time", "--rate 100/min")
        if is_rate
        else ("how many runs run at once", "--at-once 5")
    )
    member = "rate" if is_rate else "at_once"
    return (
        f"changes nothing: {name} is a limit of {kind}. Give {member}, as in "
        f"`beatless limits set {name} {option}`; for both, give the plan two limits"
    )
