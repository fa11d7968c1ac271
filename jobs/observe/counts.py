"""Stores counts: in a process's own memory, or in memory that a worker's children share.

Shared memory survives a child, however it ends: no files, no thread, nothing that a killed child
could leave locked.
"""

import mmap
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from beatless.observe.families import MAX_QUEUE_SERIES, THREADS_FAILING, Family, Labels

Series = tuple[str, Labels]

MAX_PROCESSES = 1024
"""Children of one worker that can count at the same time."""

QUEUE_NAME_BYTES = 64
"""Of a queue's name, in memory that a worker's children share: as long as one may be."""


class Counts(Protocol):
    """A store of counts."""

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        """Add to a counter or a gauge."""

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Put a value in seconds into a histogram."""

    def read(self) -> Mapping[Series, Sequence[float]]:
        """All series: one number of a counter or gauge; of a histogram the buckets and the sum."""


class LocalCounts:
    """The counts of one process, for all of its threads. A series begins when it is first used."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._series: dict[Series, list[float]] = {}

    def declare(self, family: Family, labels: Labels = ()) -> None:
        """Begin a series at 0, so that its first increase is seen as one."""
        with self._mutex:
            self._series.setdefault((family.name, labels), [0.0] * family.width)

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        with self._mutex:
            self._series.setdefault((family.name, labels), [0.0] * family.width)[0] += amount

    def set(self, family: Family, value: float, labels: Labels = ()) -> None:
        """Set a gauge."""
        with self._mutex:
            self._series[family.name, labels] = [value]

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        with self._mutex:
            numbers = self._series.setdefault((family.name, labels), [0.0] * family.width)
            numbers[bisect_left(family.buckets_s or (), value)] += 1
            numbers[-1] += value

    def read(self) -> Mapping[Series, Sequence[float]]:
        with self._mutex:
            return {series: list(numbers) for series, numbers in self._series.items()}


class SharedCounts:
    """The counts of a worker and all of its children, in memory shared across fork.

    Every child writes in a place of its own, so none waits for another; the place of a dead child
    is taken over, with its numbers, by the child that replaces it. All series exist from the start:
    children cannot announce new ones to each other. The exception is one family, whose only label
    is a queue: any run may name another one, so each place has names of queues beside its numbers.
    """

    def __init__(self, series: Iterable[tuple[Family, Labels]], of_queues: Family) -> None:
        self._offsets: dict[Series, int] = {}
        self._of_queues = of_queues
        self._widths: dict[Series, int] = {}
        width = 0
        for family, labels in series:
            self._offsets[family.name, labels] = width
            self._widths[family.name, labels] = family.width
            width += family.width
        self._queues = width
        width += MAX_QUEUE_SERIES * of_queues.width
        self._width = width
        memory = memoryview(mmap.mmap(-1, MAX_PROCESSES + MAX_PROCESSES * width * 8))
        self._used = memory[:MAX_PROCESSES]
        self._numbers = memory[MAX_PROCESSES:].cast("d")
        self._names = memoryview(mmap.mmap(-1, MAX_PROCESSES * MAX_QUEUE_SERIES * QUEUE_NAME_BYTES))
        # The place of the main process, which its children leave alone.
        self.take(MAX_PROCESSES - 1)

    def take(self, place: int) -> None:
        """Count in this place from now on. Called after a fork, in the child."""
        self._mutex = threading.Lock()  # the parent's may have been held by a thread of its own
        self._place = place % MAX_PROCESSES
        self._start = self._place * self._width
        self._slots = {name: slot for slot, name in enumerate(self._queue_names(self._place))}
        self._used[self._place] = 1
        for (name, _), offset in self._offsets.items():
            if name == THREADS_FAILING.name:  # the threads went with the child before
                self._numbers[self._start + offset] = 0.0

    def _queue_names(self, place: int) -> list[str]:
        """Queues that were counted in this place, in the order of their numbers."""
        start = place * MAX_QUEUE_SERIES * QUEUE_NAME_BYTES
        block = bytes(self._names[start : start + MAX_QUEUE_SERIES * QUEUE_NAME_BYTES])
        cells = [block[at : at + QUEUE_NAME_BYTES] for at in range(0, len(block), QUEUE_NAME_BYTES)]
        return [cell.rstrip(b"\0").decode(errors="replace") for cell in cells if cell[0]]

    def _slot(self, queue: str) -> int:
        """The index of a queue's histogram; the last one, `other`, is for all beyond it."""
        if queue not in self._slots:
            name = queue if len(self._slots) < MAX_QUEUE_SERIES - 1 else "other"
            if name not in self._slots:
                at = (self._place * MAX_QUEUE_SERIES + len(self._slots)) * QUEUE_NAME_BYTES
                written = name.encode()[:QUEUE_NAME_BYTES]
                # The first byte marks a written name: a process killed before it leaves none.
                self._names[at + 1 : at + len(written)] = written[1:]
                self._names[at : at + 1] = written[:1] or b"\0"
                self._slots[name] = len(self._slots)
            return self._slots[name]
        return self._slots[queue]

    def add(self, family: Family, labels: Labels = (), amount: float = 1.0) -> None:
        offset = self._offsets.get((family.name, labels))
        if offset is not None:  # else of a plan that this app does not have
            with self._mutex:
                self._numbers[self._start + offset] += amount

    def observe(self, family: Family, value: float, labels: Labels = ()) -> None:
        offset = self._offsets.get((family.name, labels))
        if offset is None or family.buckets_s is None:
            return
        start = self._start + offset
        with self._mutex:
            self._numbers[start + bisect_left(family.buckets_s, value)] += 1
            self._numbers[start + len(family.buckets_s) + 1] += value

    def observe_queue(self, value: float, queue: str) -> None:
        """Put a value in seconds into the histogram of a queue."""
        bounds = self._of_queues.buckets_s or ()
        with self._mutex:
            start = self._start + self._queues + self._slot(queue) * self._of_queues.width
            self._numbers[start + bisect_left(bounds, value)] += 1
            self._numbers[start + len(bounds) + 1] += value

    def _read_queues(self, used: Iterable[int]) -> Mapping[Series, Sequence[float]]:
        width = self._of_queues.width
        found: dict[Series, list[float]] = {}
        for place in used:
            for slot, name in enumerate(self._queue_names(place)):
                start = place * self._width + self._queues + slot * width
                numbers = self._numbers[start : start + width].tolist()
                sums = found.setdefault((self._of_queues.name, (name,)), [0.0] * width)
                sums[:] = map(sum, zip(sums, numbers, strict=True))
        return found

    def read(self) -> Mapping[Series, Sequence[float]]:
        used = [place for place in range(MAX_PROCESSES) if self._used[place]]
        rows = [
            self._numbers[place * self._width : (place + 1) * self._width].tolist()
            for place in used
        ]
        sums = [sum(column) for column in zip(*rows, strict=True)] or [0.0] * self._width
        fixed = {
            series: sums[offset : offset + self._widths[series]]
            for series, offset in self._offsets.items()
        }
        return {**fixed, **self._read_queues(used)}
