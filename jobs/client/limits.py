"""Calls about limits, for the whole fleet."""

from beatless.client.base import BaseClient
from beatless.errors import BadRequest
from beatless.namespaces import id_prefix
from beatless.orchestrator.limit import LIMIT_NAME, problem_with_at_once, problem_with_rate
from beatless.orchestrator.limits import LimitState, LimitStatements

MAX_LISTED = 1000
"""Keys of limits that one call lists."""


class LimitCalls(BaseClient):
    """The limits of a namespace, and their change while runs wait for them."""

    def limits(self) -> list[LimitState]:
        """The limits that are in use, waited for or set, one for each key; 1,000 at most.

        >>> client.set_limit("stripe", 5)
        >>> [(each.name, each.at_once, each.running) for each in client.limits()]
        [('stripe', 5, 0)]
        """
        statements = LimitStatements(self._journal.schema)
        prefix = id_prefix(self._namespace)
        return self._in_transaction(
            None, lambda caller: statements.list(caller, prefix=prefix, limit=MAX_LISTED)
        )

    def set_limit(self, name: str, at_once: int | None = None, *, rate: str | None = None) -> None:
        """Let so many runs with the same key run at once, or begin, whatever plans say.

        Until `release_limit`. Runs that wait start at once if there is room; those that run go on.
        Raises BadRequest.

        >>> client.set_limit("openai", rate="500/min")
        """
        if (at_once is None) == (rate is None):
            raise BadRequest("at_once", "or rate is needed, and not both")
        if at_once is not None and (problem := problem_with_at_once(at_once)):
            raise BadRequest("at_once", problem)
        if rate is not None and (problem := problem_with_rate(rate)):
            raise BadRequest("rate", problem)
        statements, stored = LimitStatements(self._journal.schema), self._stored_name(name)
        self._in_transaction(
            None, lambda caller: statements.set(caller, stored, at_once=at_once, rate=rate)
        )

    def release_limit(self, name: str) -> bool:
        """Let each run bring the number of its plan again; False if none was set.

        >>> client.set_limit("geocoder", 20)
        >>> client.release_limit("geocoder"), client.release_limit("geocoder")
        (True, False)
        """
        statements, stored = LimitStatements(self._journal.schema), self._stored_name(name)
        return self._in_transaction(None, lambda caller: statements.forget(caller, stored))

    def _stored_name(self, name: str) -> str:
        """The name with the prefix of the namespace. Raises BadRequest."""
        if not isinstance(name, str) or not LIMIT_NAME.fullmatch(name):
            raise BadRequest(
                "name", f"is {name!r:.200}, which does not match ^{LIMIT_NAME.pattern}$"
            )
        return id_prefix(self._namespace) + name
