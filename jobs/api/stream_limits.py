"""Limits of open streams: in all, for a token, and for a namespace."""

import threading
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Self

from beatless.api.problems import Problem
from beatless.auth import Grant

MAX_STREAMS = 10_000
MAX_STREAMS_PER_TOKEN = 1000
"""Those of the stream tokens that a token has made are its own."""
MAX_STREAMS_PER_NAMESPACE = 4000
MAX_TAILS = 100
"""Streams of all runs of a namespace: each has its own connection to Redis."""
MAX_TAILS_PER_NAMESPACE = 40


class Reservation:
    """Room for one stream. As a context manager it is given back at the end of the block."""

    def __init__(
        self, grant: Grant, release: Callable[["Reservation"], None], *, of_all_runs: bool
    ) -> None:
        self.grant = grant
        self.of_all_runs = of_all_runs
        self._release = release

    def release(self) -> None:
        """Give the room back; a second call does nothing."""
        self._release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class StreamLimits:
    """Counts the streams of one API. Threads may share it.

    A stream is reserved before anything is read for it: a burst of requests passes no limit.
    """

    def __init__(self) -> None:
        self._reserved: set[Reservation] = set()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._tails = 0
        self._mutex = threading.Lock()

    def reserve(self, grant: Grant, *, of_all_runs: bool = False) -> Reservation:
        """Raises Problem (503) when a limit is reached."""
        reservation = Reservation(grant, self._release, of_all_runs=of_all_runs)
        with self._mutex:
            if (
                len(self._reserved) >= MAX_STREAMS
                or (of_all_runs and self._tails >= MAX_TAILS)
                or (
                    grant.token_id
                    and any(
                        self._counts[key] >= most
                        for key, most in _limits(grant, of_all_runs).items()
                    )
                )
            ):
                raise Problem(
                    HTTPStatus.SERVICE_UNAVAILABLE, "too many streams are open: come again later"
                ).with_headers(Retry_After="5")
            self._reserved.add(reservation)
            self._counts.update(_limits(grant, of_all_runs).keys())
            self._tails += of_all_runs
        return reservation

    def _release(self, reservation: Reservation) -> None:
        with self._mutex:
            if reservation not in self._reserved:
                return
            self._reserved.remove(reservation)
            self._tails -= reservation.of_all_runs
            for key in _limits(reservation.grant, reservation.of_all_runs):
                self._counts[key] -= 1
                if not self._counts[key]:
                    del self._counts[key]


def _limits(grant: Grant, of_all_runs: bool) -> dict[tuple[str, str], int]:
    found = {
        ("token", grant.maker or grant.token_id or ""): MAX_STREAMS_PER_TOKEN,
        ("namespace", grant.namespace): MAX_STREAMS_PER_NAMESPACE,
    }
    if of_all_runs:
        found["tails", grant.namespace] = MAX_TAILS_PER_NAMESPACE
    return found
