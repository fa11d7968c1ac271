"""The leases that a worker's processes hold, in memory that they share with their keeper.

One mapping, made before any fork, with a slot for each run that a process executes. A slot has one
writer, and nothing is locked, for a writer may be killed at any point: a number is odd while its
slot is being written, and who reads a slot that changes meanwhile skips it.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

CHILDREN = 1024
"""Processes of a pool that have a slot each."""

FURTHER_SLOTS = 63
"""Slots that the first of them have besides, for runs that they execute in groups."""

SLOTS = 5312
SLOT_BYTES = 256

_NUMBER = struct.Struct("=Q")
_HEAD = struct.Struct("=qqdqq??H")
"""pid (0: the slot is free), life, beat, two tokens (-1: none), whether the run has its turn yet
to come, whether it has one beside others, bytes of the run id behind it."""

_PID_AT = 1
"""The place of the pid in a slot, by numbers of 8 bytes."""

_FLAGS = struct.Struct("=??")
_FLAGS_AT = _NUMBER.size + struct.calcsize("=qqdqq")


def slots_of(place: int) -> Sequence[int]:
    """The slots of the process at this place in a pool; the first is for the only run of one."""
    further = CHILDREN + place * FURTHER_SLOTS
    has_further = further + FURTHER_SLOTS <= SLOTS
    return [place % CHILDREN, *(range(further, further + FURTHER_SLOTS) if has_further else ())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """One lease as its process has noted it."""

    pid: int
    life: int = 0
    """Tells this process from any other that has had its pid; 0 if its keeper does not know it."""
    beat: float
    """When its process has last made sure of it, by the machine's monotonic clock."""
    run_id: str
    tokens: Sequence[int]
    uncalled: bool = False
    """The body of the attempt that has begun was not called, or runs beside others."""
    beside: bool = False
    """It runs beside others."""


class Board:
    """The slots."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, SLOTS * SLOT_BYTES)

    def write(self, slot: int, noted: Noted) -> None:
        """By the one process that uses this slot. Excess leases are left out."""
        run_id = noted.run_id.encode()
        if _NUMBER.size + _HEAD.size + len(run_id) > SLOT_BYTES:
            return
        first, second, *_ = (*noted.tokens, -1)
        flags = noted.uncalled, noted.beside
        head = _HEAD.pack(noted.pid, noted.life, noted.beat, first, second, *flags, len(run_id))
        self._put(slot, head + run_id)

    def mark(self, slot: int, *, uncalled: bool, beside: bool) -> None:
        """Change these two of the lease that was written in this slot; as `write`."""
        place = slot * SLOT_BYTES
        (number,) = _NUMBER.unpack_from(self._memory, place)
        _NUMBER.pack_into(self._memory, place, number | 1)
        _FLAGS.pack_into(self._memory, place + _FLAGS_AT, uncalled, beside)
        _NUMBER.pack_into(self._memory, place, (number | 1) + 1)

    def clear(self, slot: int) -> None:
        """Its lease is held no longer."""
        self._put(slot, _HEAD.pack(0, 0, 0.0, -1, -1, False, False, 0))

    def read(self) -> Iterator[Noted]:
        """Every lease that is held now."""
        with memoryview(self._memory) as memory, memory.cast("q") as numbers:
            pids = numbers[_PID_AT :: SLOT_BYTES // numbers.itemsize].tolist()
        for slot, pid in enumerate(pids):
            found = self._read(slot) if pid else None
            if found is not None:
                yield found

    def _put(self, slot: int, content: bytes) -> None:
        place = slot * SLOT_BYTES
        (number,) = _NUMBER.unpack_from(self._memory, place)
        # One that was killed while it wrote has left an odd number.
        _NUMBER.pack_into(self._memory, place, number | 1)
        start = place + _NUMBER.size
        self._memory[start : start + len(content)] = content
        _NUMBER.pack_into(self._memory, place, (number | 1) + 1)

    def _read(self, slot: int) -> Noted | None:
        place = slot * SLOT_BYTES
        content = self._memory[place : place + SLOT_BYTES]
        (number,) = _NUMBER.unpack_from(content)
        pid, life, beat, first, second, uncalled, beside, length = _HEAD.unpack_from(
            content, _NUMBER.size
        )
        if pid == 0 or number % 2 or _NUMBER.unpack_from(self._memory, place) != (number,):
            return None
        start = _NUMBER.size + _HEAD.size
        return Noted(
            pid=pid,
            life=life,
            beat=beat,
            run_id=content[start : start + length].decode(),
            tokens=[token for token in (first, second) if token != -1],
            uncalled=uncalled,
            beside=beside,
        )
