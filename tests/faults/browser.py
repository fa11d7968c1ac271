"""A viewer that believes what the API sends, as a browser's EventSource does.

The Python client sees a hole or an event twice by itself, asks again, and so covers for the API.
"""

from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote, urlsplit

from beatless import Event

STALL_S = 20.0
"""The API sends something more often."""


def events_of(url: str, token: str, run_id: str, from_seq: int) -> Iterator[Event]:
    """The events that come on one connection, until it ends. Raises OSError if it is lost."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=STALL_S)) as connection:
        try:
            path = f"/v1/runs/{quote(run_id)}/stream?from_seq={from_seq}"
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
            answer = connection.getresponse()
            if answer.status not in (200, 204):
                raise OSError(f"the API answered {answer.status}")
            frame: dict[str, str] = {}
            while line := answer.readline().decode(errors="replace"):  # cut within a character
                name, _, value = line.rstrip("\n").partition(": ")
                if name:
                    frame[name] = value
                    continue
                if "data" in frame and frame.get("event") != "reset":
                    yield Event.from_json(frame["data"])
                frame = {}
        except HTTPException as error:
            raise OSError(str(error)) from error
