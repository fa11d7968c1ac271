"""The check of limits: what is set without effect, slots without leases, and long waits."""

from collections.abc import Iterator, Mapping

from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, counted, ok, problem, warn
from beatless.doctor.probe import Need, Probe
from beatless.orchestrator.limit import Limit

MAX_WAIT_S = 600.0
"""A limit whose runs have waited for longer lets in fewer than are started."""

MAX_NAMES = 5
"""Reported at once."""


@check("limits", needs={Need.SCHEMA})
def limits(probe: Probe) -> Iterator[Verdict]:
    """Limits that are set without effect, slots that nothing frees, runs that wait for long."""
    sql = probe.sql(__file__, names=MAX_NAMES)
    declared = {each.name: each for plan in probe.app.plans.values() for each in plan.all_limits}
    useless = [
        f"{name} ({why})"
        for name, is_rate in probe.rows(sql["set"])
        if (why := _without_effect(name, is_rate, declared))
    ]
    if useless:
        yield warn(
            f"limits are set, and no plan of this app uses that: {', '.join(useless[:MAX_NAMES])}",
            "if no other app does, `beatless limits release NAME`; what is set must be of the same "
            "kind as what plans have, --at-once or --rate",
        )
    left = probe.rows(sql["left"])
    if left:
        named = ", ".join(f"{run_id} ({limit_id})" for run_id, limit_id in left)
        yield problem(
            f"slots are held by runs that no worker has, and nothing will free them: {named}",
            "beatless did not write that: delete these rows of limit_slots, by their run_id",
        )
    late = probe.rows(sql["late"], {"max_wait_s": MAX_WAIT_S})
    for limit_id, runs, oldest_s in late:
        name, _, key = limit_id.partition(":")
        limit = f"{name} (key {key})" if key else name
        wait = "run waits" if runs == 1 else "runs wait"
        yield warn(
            f"{runs:,} {wait} for the limit {limit}, the oldest for {oldest_s:.0f} s",
            "`beatless limits` shows what it lets in and `beatless explain RUN` who has its slots: "
            "raise it with `beatless limits set`, or start fewer runs",
        )
    if not useless and not left and not late:
        yield ok(f"{counted(len(declared), 'limit')} of this app, none keeps runs waiting for long")


def _without_effect(name: str, is_rate: bool, declared: Mapping[str, Limit]) -> str:
    """Why what is set for a limit changes nothing; "" if it does."""
    limit = declared.get(name)
    if limit is None:
        return "no plan has it"
    if is_rate == (limit.rate is not None):
        return ""
    return "plans have it with at_once" if is_rate else "plans have it with a rate"
