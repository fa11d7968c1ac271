"""The calls of the API over groups, each as an exchange: a generator of requests without I/O."""

from typing import Any

from beatless.http.wire import Call, Exchange, ask, path_of, record_of
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


def _states(answer: Any) -> list[GroupState]:
    return [record_of(GroupState, members) for members in answer["groups"]]


def _nothing(answer: Any) -> None:
    del answer
