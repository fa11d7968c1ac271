"""Rules of limits: never more leases at once than a plan lets have one, and no slot without one."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from tests.faults.history import History, Record, Violation

OF_A_LEASE = ("StepFinished", "StepFailed", "RunFinished")
"""The events with which the lease of a run of one step may end."""

OF_AN_END = ("beatless.given_back", "beatless.connection_lost", "beatless.snoozed")
"""The traces with which an attempt ends."""


def leases_are_within_limits(history: History) -> Iterator[Violation]:
    """A claim is logged when it has its slot, and an end before the slot is free.

    A slot that is kept is that of the run from its first claim until its end.
    """
    changes: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for run_id, run, events in history.each_run():
        if "at_once" not in history.plan(run):
            continue
        claims = [each["claim"]["at"] for each in history.log[run_id] if each["claim"]]
        if history.plan(run).get("kept"):
            ends = [event["ts"] for event in events if event["type"] == "RunFinished"]
            changes[run["plan"]] += [(at, 1, run_id) for at in claims[:1]]
            changes[run["plan"]] += [(at, -1, run_id) for at in ends if claims]
            continue
        for event in events:
            before = [at for at in claims if at < event["ts"]]
            if event["type"] in OF_A_LEASE and event["source"] == "worker" and before:
                changes[run["plan"]] += [(before[-1], 1, run_id), (event["ts"], -1, run_id)]
                claims = [at for at in claims if at > event["ts"]]
    for plan, found in changes.items():
        held, most = 0, history.plans[plan]["at_once"]
        for at, change, run_id in sorted(found):
            held += change
            if held > most:
                yield Violation("I14", run_id, f"{held} slots of {plan} at {at:.3f}, not {most}")


def leases_have_slots(history: History) -> Iterator[Violation]:
    """A lease begins with a slot, whoever claims; one that is taken over has it already."""
    for run_id, run, _ in history.each_run():
        if "at_once" in history.plan(run):
            for record in history.log[run_id]:
                if record["claim"] and not record["claim"]["slots"]:
                    yield Violation("I14", run_id, "was claimed without a slot")


def slots_are_of_leases(history: History) -> Iterator[Violation]:
    """The commit that ends a lease frees its slots."""
    for slot in history.slots:
        run = history.runs.get(slot["run_id"], {"state": "gone", "plan": None})
        kept = run["state"] == "queued" and history.plan(run).get("kept")
        if run["state"] != "running" and not kept:
            told = f"is {run['state']}, and holds a slot of {slot['limit_id']}"
            yield Violation("I14", slot["run_id"], told)


def attempts_are_within_limits(history: History) -> Iterator[Violation]:
    """The start of a step with a limit has its slot, which is free after the event of its end."""
    changes: dict[tuple[str, str], list[tuple[float, int, str]]] = defaultdict(list)
    for run_id, run, events in history.each_run():
        limited = history.plan(run).get("step_at_once", {})
        begun: dict[str, float] = {}
        for event in events if limited else ():
            step = (event["step"] or "").partition("#")[0]
            ends = [step] if step in begun and _ends_attempt(event) else []
            for each in [*begun] if event["type"] == "RunFinished" else ends:
                at = begun.pop(each)
                changes[run["plan"], each] += [(at, 1, run_id), (event["ts"], -1, run_id)]
            if event["type"] == "StepStarted" and step in limited:
                begun[step] = event["ts"]
    for (plan, step), found in changes.items():
        held, most = 0, history.plans[plan]["step_at_once"][step]
        for at, change, run_id in sorted(found):
            held += change
            if held > most:
                yield Violation("I14", run_id, f"{held} slots of {step} at {at:.3f}, not {most}")


def _ends_attempt(event: Record) -> bool:
    if event["type"] == "DebugTrace":
        return (event["data"] or {}).get("name") in OF_AN_END
    return event["type"] in ("StepStarted", "StepFinished", "StepFailed")


RULES: tuple[Callable[[History], Iterator[Violation]], ...] = (
    leases_are_within_limits,
    leases_have_slots,
    slots_are_of_leases,
    attempts_are_within_limits,
)
