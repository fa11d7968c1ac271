"""The calls of the API over limits, each as an exchange: a generator of requests without I/O."""

from typing import Any

from beatless.http.wire import Call, Exchange, ask, path_of, record_of
from beatless.orchestrator.limits import LimitState


def limits() -> Exchange[list[LimitState]]:
    """The limits that are in use, waited for or set, one for each key; 1,000 at most.

    >>> client.set_limit("stripe", 5, force=True)
    >>> [(each.name, each.at_once, each.running) for each in client.limits()]
    [('stripe', 5, 0)]
    """
    return ask(Call(method="GET", path=path_of("limits"), read=_states))


def set_limit(
    name: str, at_once: int | None = None, *, rate: str | None = None, force: bool = False
) -> Exchange[None]:
    """Let so many runs with the same key run at once, or begin, whatever plans say.

    Until `release_limit`. Runs that wait start at once if there is room; those that run go on.
    Raises BadRequest, also without `force` for a name that no plan of the server's app has, no run
    that runs or waits, and that is not set.

    >>> client.set_limit("openai", rate="500/min", force=True)
    """
    path, body = path_of("limits", name), {"at_once": at_once, "rate": rate}
    query = {"force": str(force).lower()}
    return ask(Call(method="PUT", path=path, body=body, query=query, read=_nothing))


def release_limit(name: str) -> Exchange[bool]:
    """Let each run bring the number of its plan again; False if none was set.

    >>> client.set_limit("geocoder", 20, force=True)
    >>> client.release_limit("geocoder"), client.release_limit("geocoder")
    (True, False)
    """
    return ask(Call(method="DELETE", path=path_of("limits", name), read=_was_set, repeatable=False))


def _states(answer: Any) -> list[LimitState]:
    return [record_of(LimitState, members) for members in answer["limits"]]


def _nothing(answer: Any) -> None:
    del answer


def _was_set(answer: Any) -> bool:
    return bool(answer["was_set"])
