"""A viewer that believes what the API sends, as a browser's EventSource does.

The Python client sees a hole or an event twice by itself, asks again, and so covers for the API.
"""

from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from beatless import Event

STALL_S = 20.0
"""The API sends something more often."""


class Frame(NamedTuple):
    """An event as it came, or a reset: what was shown is forgotten, and all comes again."""

    epoch: str | None
    """Of the history that it is of; None if it was not told."""
    event: Event | None


def frames_of(url: str, token: str, run_id: str, cursor: str) -> Iterator[Frame]:
    """The frames that come on one connection, until it ends. Raises OSError if it is lost.

    The cursor is the id of the last frame, or a seq.
    """
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=STALL_S)) as connection:
        try:
            path = f"/v1/runs/{quote(run_id)}/stream"
            headers = {"Authorization": f"Bearer {token}", "Last-Event-ID": cursor}
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            if answer.status not in (200, 204):
                raise OSError(f"the API answered {answer.status}")
            frame: dict[str, str] = {}
            while line := answer.readline().decode(errors="replace"):  # cut within a character
                name, _, value = line.rstrip("\n").partition(": ")
                if name:
                    frame[name] = value
                    continue
                epoch = frame.get("id", "").rpartition(".")[0] or None
                if frame.get("event") == "reset":
                    yield Frame(epoch, None)
                elif "data" in frame:
                    yield Frame(epoch, Event.from_json(frame["data"]))
                frame = {}
        except HTTPException as error:
            raise OSError(str(error)) from error
