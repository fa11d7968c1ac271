"""The check that sends runs through every hop of the stack, and measures each."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from beatless.doctor.check import check
from beatless.doctor.configuration import MAX_CLOCK_SKEW_S
from beatless.doctor.finding import Hop, Verdict, ok, problem, skipped, warn
from beatless.doctor.flight import CanaryLost, Flight, fly
from beatless.doctor.probe import Need, Probe
from beatless.orchestrator.events import EventType

RUNS = 3
"""Through the first queue; each hop's latency is their median. One through each other queue."""


@check("canary", needs={Need.PRIMARY, Need.SCHEMA, Need.REDIS, Need.BROKER})
def canary(probe: Probe) -> Iterator[Verdict]:
    """Runs through each queue of the plans that is not paused and that a worker consumes."""
    sql = probe.sql(__file__)
    paused = {name for (name,) in probe.rows(sql["paused_queues"])}
    queues = sorted({plan.queue for plan in probe.app.plans.values()} or {"default"})
    flights: list[Flight] = []
    flown = []
    for queue in queues:
        if queue in paused or probe.is_unconsumed(queue):
            continue  # reported by other checks
        try:
            flights.extend(fly(probe, queue) for _ in range(1 if flights else RUNS))
        except CanaryLost as lost:
            yield problem(
                f"a run through queue {queue} did not come back; {lost}",
                lost.advice,
            )
            if not flights:
                return
        else:
            flown.append(queue)
    if not flights:
        yield skipped("no queue to send a run through")
        return
    probe.hops = hops_of(flights[:RUNS], probe.clock_offset_s)
    total_s = sum(hop.seconds or 0.0 for hop in probe.hops)
    if flown:
        yield ok(f"a run went through queue {', '.join(flown)} and back in {total_s * 1000:.1f} ms")
    worker = flights[0].answer
    skew = worker.get("clock", 0.0) - flights[0].written[EventType.STEP_STARTED]
    if abs(skew) > MAX_CLOCK_SKEW_S + probe.patience_s:
        yield warn(
            f"worker {worker.get('host')} is {skew:+.1f} s off Postgres' clock",
            "let NTP or chrony run there",
        )


def hops_of(flights: Sequence[Flight], clock_offset_s: float) -> list[Hop]:
    """The latency of each hop: the median of the flights in which it was seen."""

    def typical(measure: Callable[[Flight], float | None]) -> float | None:
        seen = [value for value in map(measure, flights) if value is not None]
        return max(0.0, median(seen)) if seen else None

    def written(flight: Flight, type: str) -> float:
        """By this machine's clock."""
        return flight.written[type] - clock_offset_s

    def heard(flight: Flight) -> float:
        return flight.heard.get(EventType.RUN_STARTED, flight.committed)

    def rang(flight: Flight) -> float:
        return max(flight.committed, flight.rang or 0.0)

    return [
        Hop(
            name="commit",
            seconds=typical(lambda f: f.committed - f.began),
            text="start_run, one transaction",
        ),
        Hop(
            name="doorbell",
            seconds=typical(lambda f: None if f.rang is None else f.rang - f.committed),
            text="NOTIFY to the relay"
            if any(f.rang for f in flights)
            else "not rung: the relay was awake",
        ),
        Hop(
            name="relay",
            seconds=typical(lambda f: heard(f) - rang(f)),
            text="picks it up and publishes to Redis",
        ),
        Hop(
            name="broker",
            seconds=typical(lambda f: written(f, EventType.STEP_STARTED) - heard(f)),
            text="relay, broker, worker, to the claim",
        ),
        Hop(
            name="step",
            seconds=typical(
                lambda f: written(f, EventType.RUN_FINISHED) - written(f, EventType.STEP_STARTED)
            ),
            text=f"executed by {flights[0].answer.get('host', 'a worker')}",
        ),
        Hop(
            name="event",
            seconds=typical(
                lambda f: f.heard[EventType.RUN_FINISHED] - written(f, EventType.RUN_FINISHED)
            ),
            text="RunFinished at a subscriber",
        ),
    ]
