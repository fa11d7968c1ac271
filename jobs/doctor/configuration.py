"""Checks of clocks, packages and Celery's settings, here and in workers."""

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import metadata

import redis

from beatless.doctor import versions
from beatless.doctor.check import check
from beatless.doctor.finding import Verdict, ok, problem, warn
from beatless.doctor.probe import Need, Probe

MAX_CLOCK_SKEW_S = 1.0

CELERYS_VISIBILITY_TIMEOUT_S = 3600.0
"""Celery's own default."""


@check("clocks", needs={Need.POSTGRES}, uses={Need.REDIS})
def clocks(probe: Probe) -> Verdict:
    """The clocks of this machine and of Redis, against Postgres'."""
    skews = {"this machine": -probe.clock_offset_s}
    if not probe.missing({Need.REDIS}):
        with suppress(redis.RedisError):
            seconds, micros = probe.redis.time()
            skews["Redis"] = seconds + micros / 1e6 - (time.time() + probe.clock_offset_s)
    name, skew = max(skews.items(), key=lambda item: abs(item[1]))
    if abs(skew) > MAX_CLOCK_SKEW_S:
        return warn(
            f"{name} is {skew:+.1f} s off Postgres' clock",
            "let NTP or chrony run there. Leases use Postgres' clock alone, but the "
            "times you give and read are off",
        )
    text = ", ".join(f"{who} {by * 1000:+.0f} ms" for who, by in skews.items())
    return ok(f"against Postgres: {text}")


@check("packages")
def packages(_probe: Probe) -> Iterator[Verdict]:
    """Versions that work, with a known weakness."""
    found = {each.package: metadata.version(each.package) for each in versions.PACKAGES}
    weak = [each for each in versions.PACKAGES if each.is_in(found[each.package])]
    for package, fixed, text in weak:
        newer = ".".join(map(str, fixed))
        yield warn(
            f"{package} {found[package]}: {text}",
            f"pip install '{package}>={newer}' when your project can",
        )
    if not weak:
        yield ok(", ".join(f"{package} {version}" for package, version in found.items()))


@check("celery")
def celery(probe: Probe) -> Iterator[Verdict]:
    """Settings that let messages run code, or keep them from being sent."""
    conf = probe.app.celery.conf
    accepted = {"this app": conf.accept_content} | {
        worker: theirs.get("accept_content") or ()
        for worker, theirs in sorted(probe.fleet.conf.items())
    }
    dangerous = {who: found for who, names in accepted.items() if (found := executable(names))}
    for who, found in dangerous.items():
        yield problem(
            f"{who} accepts {', '.join(found)}: who can write to the broker can run any code "
            "on the workers",
            "accept_content = ['json'], as beatless sets it; old tasks that need it belong on "
            "an app and a broker user of their own",
        )
    if conf.task_always_eager:
        yield problem(
            "task_always_eager is on: relays would execute runs themselves",
            "turn it off; the test kit executes runs in the test's process",
        )
    if not dangerous and not conf.task_always_eager:
        yield ok("messages are JSON, and ids only")


def executable(accepted: Iterable[str]) -> list[str]:
    """Of kinds of content, those that run code where they are read."""
    return sorted({name for name in accepted if re.search("pickle|yaml|x-python", str(name))})


@check("visibility timeout")
def visibility_timeout(probe: Probe) -> Verdict:
    """Whether Redis delivers messages again of runs that are executed."""
    options = probe.app.celery.conf.broker_transport_options or {}
    if not probe.is_broker_redis or options.get("ack_emulation") is False:
        return ok("no message is delivered again while its run is executed")
    timeout_s = float(options.get("visibility_timeout", CELERYS_VISIBILITY_TIMEOUT_S))
    longest = {
        f"{plan.name}.{step.name}": step.timeout or float("inf")
        for plan in probe.app.plans.values()
        for step in plan.steps
    }
    name, seconds = max(longest.items(), key=lambda item: item[1])
    if seconds < timeout_s:
        return ok(f"{timeout_s:g} s, above the longest step")
    allowed = "without end" if seconds == float("inf") else f"for {seconds:g} s"
    return warn(
        f"Redis delivers a message again after {timeout_s:g} s, and step {name} may run "
        f"{allowed}: workers are sent what others execute, and drop it",
        "leave broker_transport_options['ack_emulation'] at False, as beatless sets "
        "it, or raise visibility_timeout above the longest step",
    )
