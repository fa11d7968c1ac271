"""The ticks of a cron expression in a time zone, or of an interval. Pure."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from beatless.outbox.times import is_number

LONGEST_EVERY_S = 366 * 86_400
"""Seconds of the longest interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticks:
    """The moments at which a schedule starts a run: by `cron` in the zone `tz`, or every `every_s`.

    Cron expressions are those of Debian's cron(8), by CronSim, which follows it where clocks are
    put forward or back as well: a fixed time that does not exist comes at the next one that does,
    one that comes twice comes once, and wildcard or stepped hours and minutes follow elapsed time.
    Intervals are counted from the epoch, as Temporal does: a deploy moves none of them.

    >>> from datetime import UTC, datetime
    >>> from beatless.orchestrator.ticks import Ticks
    >>> nightly = Ticks(cron="0 2 * * *", every_s=None, tz="Europe/Brussels")
    >>> nightly.after(datetime(2026, 11, 28, 12, tzinfo=UTC)).isoformat()
    '2026-11-29T01:00:00+00:00'
    """

    cron: str | None
    every_s: int | None
    tz: str

    def after(self, moment: datetime) -> datetime | None:
        """The first tick later than a moment, in UTC; None if none comes within 50 years."""
        return next(self._from(moment), None)

    def between(self, start: datetime, end: datetime) -> Iterator[datetime]:
        """The ticks from `start` on that are earlier than `end`, in order."""
        for tick in self._from(start - timedelta(microseconds=1)):
            if tick >= end:
                return
            yield tick

    def last(self, until: datetime, *, since: datetime) -> datetime:
        """The last tick not later than `until`; `since` is one of them.

        Looked for in the last hour, then in twice as much, and so on: a year of minutes is not
        counted through, and no reverse iteration has to agree with the other direction.
        """
        window = timedelta(hours=1)
        while (start := until - window) > since:
            found = None
            for tick in self._from(start):
                if tick > until:
                    break
                found = tick
            if found is not None:
                return found
            window *= 2
        found = since
        for tick in self._from(since):
            if tick > until:
                break
            found = tick
        return found

    def _from(self, moment: datetime) -> Iterator[datetime]:
        if self.every_s is not None:
            number = int(moment.timestamp() // self.every_s)
            while True:
                number += 1
                yield datetime.fromtimestamp(number * self.every_s, UTC)
        assert self.cron is not None  # noqa: S101 - one of the two is given
        for local in CronSim(self.cron, moment.astimezone(ZoneInfo(self.tz))):
            tick = local.astimezone(UTC)
            if tick > moment:  # in an hour that comes twice, CronSim also gives those of the first
                yield tick


def problem_with_cron(given: object) -> str:
    """The problem with a cron expression, to follow its name; empty if it has none."""
    example = 'such as "0 2 * * *": minute, hour, day of month, month, day of week'
    if not isinstance(given, str) or len(given.split()) != 5 or len(given) > 200:
        return f"is {given!r:.200}, which is no cron expression of five fields, {example}"
    try:
        first = next(CronSim(given, datetime(2000, 1, 1, tzinfo=UTC)), None)
    except CronSimError as error:
        return f"is {given!r}, which cron does not understand ({error}); give one {example}"
    return "" if first else f"is {given!r}, which never comes"


def problem_with_every(given: Any) -> str:
    """The problem with the seconds of an interval."""
    if is_number(given) and 1 <= given <= LONGEST_EVERY_S and given == int(given):
        return ""
    return f"is {given!r:.200}, which is not a whole number of seconds, 1 to {LONGEST_EVERY_S}"


def problem_with_zone(given: object) -> str:
    """The problem with the name of a time zone."""
    if isinstance(given, str) and len(given) <= 100:
        try:
            ZoneInfo(given)
        except (OSError, ValueError, LookupError):
            pass  # an unknown name, a directory, a path
        else:
            return ""
    return f'is {given!r:.200}, which is no time zone, such as "UTC" or "Europe/Brussels"'


def jitter_s(name: str, tick: datetime, most_s: float) -> float:
    """The seconds by which a tick is put off: 0 to `most_s`, the same whoever computes them."""
    if not most_s:
        return 0.0
    digest = hashlib.sha256(f"{name}/{tick.isoformat()}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 * most_s


def tick_key(name: str, tick: datetime) -> str:
    """The key of the run of a tick: without the seconds where there are none.

    >>> from datetime import UTC, datetime
    >>> from beatless.orchestrator.ticks import tick_key
    >>> tick_key("nightly", datetime(2026, 11, 28, 2, tzinfo=UTC))
    'schedule/nightly/2026-11-28T02:00Z'
    """
    form = "%Y-%m-%dT%H:%M:%SZ" if tick.second else "%Y-%m-%dT%H:%MZ"
    return f"schedule/{name}/{tick.astimezone(UTC).strftime(form)}"
