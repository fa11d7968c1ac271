"""The processes of a worker that hold leases, as its keeper knows them: each sends a pidfd.

A pid says nothing about a process that has gone: another may have it. A pidfd is one process for
good, and is readable once this one has ended (pidfd_open(2), Linux 5.3).
"""

import os
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

_LIFE = struct.Struct("=q")

END = b"end"
"""The message of a worker that has stopped in order."""


class Roster:
    """Both ends of the socket between a worker's processes and their keeper."""

    def __init__(self) -> None:
        self._ends: tuple[socket.socket, socket.socket] | None = None
        self.worker = ""
        """Ends the name of each process of this worker, and of its sessions; empty if it has no
        keeper."""

    def prepare(self) -> None:
        """Before the fork of the keeper, which is before that of any other process."""
        if self._ends is None:
            self._ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.worker = secrets.token_hex(4)
            for end in self._ends:
                end.setblocking(False)

    # In the processes of the worker

    def announce(self) -> int:
        """Make this process known to the keeper; the number that tells it from any other.

        0 if there is no keeper, or the system has no pidfds: its leases end by their time alone.
        """
        if self._ends is None:
            return 0
        life = secrets.randbits(62) + 1
        try:
            own = os.pidfd_open(os.getpid())
        except (AttributeError, OSError):
            return 0
        try:
            socket.send_fds(self._ends[1], [_LIFE.pack(life)], [own])
        except OSError:  # the keeper is gone or stands still
            return 0
        finally:
            os.close(own)
        return life

    def end(self) -> None:
        """Tell the keeper that this worker has stopped."""
        if self._ends is not None:
            with suppress(OSError):
                self._ends[1].send(END)
            for end in self._ends:
                end.close()
            self._ends = None

    # In the keeper

    def fileno(self) -> int:
        """Readable when a process has announced itself, or the worker has stopped."""
        if self._ends is None:
            raise RuntimeError("the roster was not prepared")
        return self._ends[0].fileno()

    def announced(self) -> Iterator[tuple[int, int] | None]:
        """The processes that have announced themselves since: life and pidfd. None: the end."""
        while self._ends is not None:
            try:
                message, descriptors, *_ = socket.recv_fds(self._ends[0], 64, 1)
            except BlockingIOError:
                return
            if message == END:
                yield None
                return
            if len(message) == _LIFE.size and len(descriptors) == 1:
                yield _LIFE.unpack(message)[0], descriptors[0]
            else:
                for descriptor in descriptors:
                    os.close(descriptor)
                if not message:  # nobody is left who could send
                    return
