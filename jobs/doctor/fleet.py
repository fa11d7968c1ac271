"""Checks of relays and workers: whether they are there, and do their work."""

from collections.abc import Iterator

from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, counted, ok, problem, skipped, warn
from beatless.doctor.probe import Need, Probe
from beatless.orchestrator.queues import PRESENCE_EXPIRES_S
from beatless.outbox.message import SHARDS

LOST_AFTER_S = 2.0
"""From a run's last event on, until a body that is in it counts as one that has lost it."""


@check("relays", needs={Need.SCHEMA})
def relays(probe: Probe) -> Verdict:
    """Whether each shard has a relay that leads it."""
    leads = probe.leads()
    members = {session for shard, session in leads if shard >= SHARDS}
    led = {shard for shard, _ in leads if shard < SHARDS}
    if not members:
        return problem(
            "no relay runs: nothing is dispatched, and no event is live",
            "start `beatless relay`, two of them on different machines",
        )
    if len(led) < SHARDS:
        missing = ", ".join(str(shard) for shard in range(SHARDS) if shard not in led)
        return problem(
            f"{counted(len(members), 'relay')}, but nobody leads shard {missing}",
            "ask again in some seconds; if it stays so, restart the relays",
        )
    if len(members) == 1:
        return ok("one relay leads all shards; a second one would take over at once if it died")
    return ok(f"{len(members)} relays share {SHARDS} shards")


@check("workers", needs={Need.BROKER})
def workers(probe: Probe) -> Iterator[Verdict]:
    """Whether each queue has a worker, which knows the plans whose messages it takes."""
    consumed = probe.consumed_queues
    if not consumed:
        yield problem(
            "no worker answers: runs wait for one",
            "start `beatless worker`; if some run, see whether they have the same "
            "BEATLESS_BROKER_URL and BEATLESS_PREFIX",
        )
        return
    plans = probe.app.plans.values()
    all_know = True
    for worker, names in sorted(probe.fleet.tasks.items()):
        queues = consumed.get(worker, ())
        unknown = sorted(
            plan.name for plan in plans if plan.queue in queues and plan.name not in names
        )
        if unknown:
            all_know = False
            yield problem(
                f"{worker} does not know {', '.join(unknown)} and takes its messages",
                "deploy the version with these plans to it, or give them a queue of their own; a "
                "worker of another fleet needs another BEATLESS_PREFIX",
            )
    all_queues = set().union(*consumed.values())
    lost = sorted({plan.queue for plan in plans} - all_queues)
    if lost:
        yield problem(
            f"nobody consumes queue {', '.join(lost)}",
            f"start `beatless worker --queues {','.join(lost)}`",
        )
    elif all_know:
        yield ok(f"{counted(len(consumed), 'worker')} for {', '.join(sorted(all_queues))}")


@check("takeover", needs={Need.SCHEMA})
def takeover(probe: Probe) -> Verdict:
    """How the runs of dead workers go on: at once, or through a pooler partly by their leases."""
    seconds = probe.settings.lease_seconds
    if probe.settings.pooled:
        return ok(
            "through the pooler, runs of a process that dies go on at once, but those of a whole "
            f"container, whose keeper dies too, when their leases have run out ({seconds:g} s)"
        )
    return ok(
        "runs of a worker that dies go on at once; those of a host that is cut off after "
        f"{seconds:g} s"
    )


@check("places", needs={Need.SCHEMA})
def places(probe: Probe) -> Iterator[Verdict]:
    """Places that a body keeps whose run it has no more: its end was forced, and it goes on."""
    if probe.broker_error is not None:
        yield skipped("not looked at: the broker cannot be reached")
        return
    sql = probe.sql(__file__)
    all_there = True
    for worker, requests in sorted(probe.fleet.active.items()):
        ours = [
            (str(request["args"][0]), f"%:{request['worker_pid']}:%")
            for request in requests
            if request["name"] in probe.app.plans and request.get("args")
        ]
        ((lost,),) = probe.rows(
            sql["lost_bodies"],
            {
                "run_ids": [run_id for run_id, _ in ours],
                "workers": [pattern for _, pattern in ours],
                "lost_after_s": LOST_AFTER_S,
            },
        )
        if not lost:
            continue
        all_there = False
        total = probe.fleet.stats.get(worker, {}).get("pool", {}).get("max-concurrency", lost)
        verdict = problem if lost >= total else warn
        yield verdict(
            f"{worker} has lost {lost} of {total} places: bodies whose end was forced "
            "go on in them",
            "restart it; give steps that hang a timeout in the prefork pool, which ends them",
        )
    if all_there:
        yield ok("no worker has lost a place")


@check("threads", needs={Need.SCHEMA})
def threads(probe: Probe) -> Iterator[Verdict]:
    """Threads that have failed and not worked since, as workers and relays report them."""
    sql = probe.sql(__file__)
    failing_workers = probe.rows(sql["failing_workers"], {"expires_s": PRESENCE_EXPIRES_S})
    for worker, names in failing_workers:
        yield problem(
            f"in {worker} these fail, and have not worked since: {', '.join(names)}",
            "its log says why (thread_failed, heartbeat_failed, watchdog_failed, "
            "keeping_failed); if Postgres can be reached from there, restart it",
        )
    failing_relays = probe.rows(sql["failing_relays"])
    for session, address, names in failing_relays:
        yield problem(
            f"in the relay at {address} (session {session}) these fail, and have not worked "
            f"since: {names}",
            "its log says why (thread_failed, chore_failed); if Postgres and the broker can be "
            "reached from there, restart it",
        )
    if not failing_workers and not failing_relays:
        yield ok("those of all workers and relays work")
