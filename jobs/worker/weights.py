"""The weights of a worker's queues: a strategy of kombu's Redis transport."""

from collections.abc import Iterable, Mapping


class WeightedCycle:
    """In which order a worker asks for its queues: each gets its share of what the worker takes.

    Stride scheduling (Waldspurger and Weihl, 1995): a queue moves on by 1 / weight when a run of it
    was taken, and who is least far on is asked first. One that had nothing does not save up.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights = weights
        self._reached = dict.fromkeys(weights, 0.0)
        self._active: list[str] = []

    def update(self, queues: Iterable[str]) -> None:
        """The queues that are consumed from now."""
        self._active = list(queues)

    def consume(self, count: int) -> list[str]:
        """All queues, the one to look at first at the front."""
        return sorted(self._active, key=lambda queue: self._reached.get(queue, 0.0))[:count]

    def rotate(self, last_used: str) -> str:
        """A message of this queue was taken: those before it in the order had none."""
        reached = self._reached.get(last_used, 0.0)
        for queue, other in self._reached.items():
            self._reached[queue] = max(other, reached)
        self._reached[last_used] = reached + 1 / self._weights.get(last_used, 1)
        return last_used


class QueueOrder(dict[str, int]):
    """Weights by queue, as the transport's `queue_order_strategy`, which makes a cycle of them.

    It is JSON: `inspect` of a worker returns the options of its transport.
    """

    def __call__(self) -> WeightedCycle:
        return WeightedCycle(self)
