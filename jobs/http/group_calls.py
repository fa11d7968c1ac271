"""The calls of the API over groups and the ageing of runs, each as an exchange.

An exchange is a generator of requests without I/O.
"""

from datetime import timedelta
from typing import Any

from beatless.http.wire import Call, Exchange, ask, json_of, path_of, record_of
from beatless.orchestrator.groups import GroupState


def groups(*, queue: str | None = None) -> Exchange[list[GroupState]]:
    """The groups with unfinished runs or a weight, one for each queue; 1,000 at most.

    >>> run = client.start_run("checkout", {"order": 1}, group="tenant-7")
    >>> [(each.group, each.running, each.waiting) for each in client.groups(queue="default")]
    [('tenant-7', 0, 1)]
    """
    return ask(Call(method="GET", path=path_of("groups"), query={"queue": queue}, read=_states))


def set_group_weight(group: str, weight: int) -> Exchange[None]:
    """Give a group so many turns for one of a group with the weight 1, in all queues.

    From the next turn on, until it gets another; each has 1 at first. Raises BadRequest.

    >>> client.set_group_weight("tenant-7", 3)
    """
    body = {"group": group, "weight": weight}
    return ask(Call(method="PUT", path=path_of("groups"), body=body, read=_nothing))


def set_age_after(queue: str, age_after: float | timedelta | None) -> Exchange[None]:
    """Let runs that wait for longer than this come before those of a higher priority.

    Seconds, or a timedelta; None: priority alone orders them, as at first. Those that wait the
    longest come first; in a queue with groups, in their groups. From the next look of the
    relays on, and a deploy keeps it. Raises BadRequest.

    >>> client.set_age_after("mail", 600)
    >>> [queue.age_after for queue in client.queues() if queue.name == "mail"]
    [600.0]
    >>> client.set_age_after("mail", None)
    """
    body = {"age_after": json_of(age_after)}
    return ask(Call(method="PUT", path=path_of("queues", queue), body=body, read=_nothing))


def _states(answer: Any) -> list[GroupState]:
    return [record_of(GroupState, members) for members in answer["groups"]]


def _nothing(answer: Any) -> None:
    del answer
