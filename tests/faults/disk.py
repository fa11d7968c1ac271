"""A small file system for Postgres, so that one can be full."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNS, MS_REC, MS_PRIVATE, MNT_DETACH = 0x20000, 0x4000, 0x40000, 2
DISK_BYTES = 2**30


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system there if this process may, unseen by all but its children.

    It is gone with them, however they end.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={DISK_BYTES},mode=755".encode()
    if os.getuid() == 0 and libc.unshare(CLONE_NEWNS) == 0:
        folder.mkdir()
        if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0:
            libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options)
    try:
        yield
    finally:
        libc.umount2(str(folder).encode(), MNT_DETACH)
