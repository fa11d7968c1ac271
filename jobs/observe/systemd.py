"""Notifies systemd that this process is ready and makes progress: `Type=notify` and `WatchdogSec=`.

The protocol is sd_notify(3): lines to a datagram socket that the environment names. Without the
socket nothing happens, so that the same process also runs anywhere else.
"""

import os
import socket

from beatless.outbox.clock import monotonic


class ServiceManager:
    """The supervisor of this process, which started it and watches it."""

    def __init__(self) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the abstract namespace of Linux.
        self._path = "\0" + path[1:] if path.startswith("@") else path
        watched = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 if watched else 0.0
        self.interval_s = limit / 3
        """How often `alive` shall be called; 0: never."""
        self._told = 0.0

    def ready(self) -> None:
        """The process does its work now."""
        self._send(b"READY=1")

    def stopping(self) -> None:
        """It ends, and that may take a while."""
        self._send(b"STOPPING=1")

    def alive(self) -> None:
        """Its loop moves. May be called as often as you like: few of the calls send anything."""
        if self.interval_s and monotonic() - self._told >= min(1.0, self.interval_s):
            self._told = monotonic()
            self._send(b"WATCHDOG=1")

    def _send(self, line: bytes) -> None:
        if not self._path:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as door:
            try:
                door.sendto(line, self._path)
            except OSError:
                return  # it is gone, or does not read: its own affair
