"""Schedules with a tick in each hour, none of which comes by itself while a test runs."""

from datetime import UTC, datetime, timedelta


def each_hour() -> str:
    """A cron expression whose next tick is forty minutes away."""
    return f"{(datetime.now(UTC) + timedelta(minutes=40)).minute} * * * *"
