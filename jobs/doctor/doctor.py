"""Runs checks in their order, each only if its needs are met.

Changes nothing but for its canary runs, which are in a namespace of their own and are removed. A
server that refuses an answer (CONFIG of a managed Redis, say) is skipped, with a line that says so.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack

import redis

from beatless.app import App
from beatless.doctor import (
    backlog,
    broker,
    canary,
    configuration,
    exposure,
    fleet,
    limits,
    postgres,
    schedules,
)
from beatless.doctor import redis as redis_checks
from beatless.doctor.check import Check
from beatless.doctor.finding import Finding, Hop, Status, Verdict, problem, reason_of, skipped
from beatless.doctor.probe import SERVER_ERRORS, Need, Probe
from beatless.errors import BadRequest

MODULES = (
    postgres,
    redis_checks,
    broker,
    configuration,
    fleet,
    backlog,
    schedules,
    limits,
    exposure,
    canary,
)
"""Where checks are: they run in this order, and in the order of their definitions."""

CHECKS = tuple(
    found for module in MODULES for found in vars(module).values() if isinstance(found, Check)
)

REPORTED = (Need.PRIMARY, Need.SCHEMA)
"""Needs whose own check is made too, and reports if it finds a problem, whichever is asked for."""


class Doctor:
    """Examines the stack of one app."""

    def __init__(
        self,
        app: App,
        *,
        api_url: str = "",
        flower_url: str = "",
        patience: float = 10.0,
        old_transaction: float = 60.0,
    ) -> None:
        """`patience` is how many seconds a canary may take; `old_transaction` is seconds, too."""
        self._probe = Probe(
            app,
            api_url=api_url,
            flower_url=flower_url,
            patience_s=patience,
            old_transaction_s=old_transaction,
        )

    @property
    def hops(self) -> list[Hop]:
        """The legs of the canary's way; empty if it did not come back, or was not sent."""
        return self._probe.hops

    def examine(self, only: Collection[str] = ()) -> Iterator[Finding]:
        """Every check, or only the named ones. Closes its connections.

        A check alone gives the same verdict as among all. One that cannot be made has the reason,
        and so does the server that it needs. Raises BadRequest for a name that no check has.
        """
        names = [check.name for check in CHECKS]
        if unknown := sorted(set(only) - set(names)):
            raise BadRequest("--check", f"{unknown[0]!r} is none of these: {', '.join(names)}")
        return self._examine(set(only))

    def _examine(self, only: Collection[str]) -> Iterator[Finding]:
        chosen = [check for check in CHECKS if not only or check.name in only]
        needs = {need for check in chosen for need in check.needs}
        reported = {need.value for need in REPORTED if need in needs}
        told = set()
        with ExitStack() as stack:
            used = {need for check in chosen for need in check.uses}
            for need, verdict in self._probe.open(stack, needs | used):
                yield verdict.of(need.value)
                told.add(need.value)
            for check in CHECKS:
                if check not in chosen and check.name not in reported:
                    continue
                if missing := self._probe.missing(check.needs):
                    if (check.name in only and check.name not in told) or check is canary.canary:
                        yield skipped(f"not looked at: {missing}").of(check.name)
                    continue
                for verdict in self._verdicts(check):
                    if check in chosen or verdict.status is Status.PROBLEM:
                        yield verdict.of(check.name)

    def _verdicts(self, check: Check) -> Iterator[Verdict]:
        """Those of one check, and one more if a server has ended it with an error."""
        try:
            yield from check.verdicts(self._probe)
        except redis.exceptions.NoPermissionError as error:
            # The users of `deploy/redis` have no more rights than they need.
            yield skipped(f"this server does not let its user look: {reason_of(error)}")
        except SERVER_ERRORS as error:
            yield problem(
                f"could not be checked: {reason_of(error)}",
                "see whether the user of the URL has the rights for it",
            )
