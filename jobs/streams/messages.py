"""Reads messages of a run's Redis channel, on which anyone who can reach Redis may publish."""

import logging

from beatless.orchestrator.events import EventText

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
