"""Reads messages of a run's Redis channel, on which anyone who can reach Redis may publish."""

import logging

from redis.exceptions import AuthenticationError, ResponseError

from beatless.orchestrator.events import EventText

REFUSALS = (ResponseError, AuthenticationError)
"""Errors by which a Redis that is there refuses us: of its rights, and of the password."""

logger = logging.getLogger("beatless.stream")


def parse(body: bytes, run_id: str | None = None) -> list[EventText]:
    """The events of one Redis message; none of one that is not ours, for it may hide nothing.

    Nor of one with events of another run than this, if it is given.
    """
    try:
        return [EventText.read(line, run_id) for line in body.split(b"\n") if line]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        logger.warning(
            "a message on a run's channel is not ours",
            extra={"action": "strange_message", "reason": str(error)},
        )
        return []


def why_without_redis(error: Exception) -> str:
    """Why there is no subscription, as the start of a sentence."""
    if isinstance(error, REFUSALS):
        return "Redis refuses this user the subscription"
    return "Redis is unreachable"
