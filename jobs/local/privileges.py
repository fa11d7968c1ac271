"""The user of an embedded Postgres: it refuses root, and initdb refuses a user without a name.

Files stay where they are, with any rights of the folders above them: the server reaches its own
binaries and its data even below a home of mode 0700.
"""

import contextlib
import ctypes
import os
import pwd
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_KEEPCAPS, _PR_SET_SECUREBITS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 28, 47, 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAP_DAC_OVERRIDE, _CAP_SETGID, _CAP_SETUID = 1, 6, 7
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_NEWUSER = 0x10000000

_CHANGES_USER = 1 << _CAP_SETGID | 1 << _CAP_SETUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerUser:
    """The user that the server runs as, and how a child becomes it."""

    uid: int
    gid: int
    owner: tuple[int, int] | None
    """Whose the cluster must be, if not ours."""
    become: Callable[[], None]
    """Between fork and exec. Raises OSError where the kernel or a container forbids it."""
    hint: str
    """The advice where it is forbidden."""


def server_user() -> ServerUser:
    """The user for a server that this process starts.

    1. an ordinary user with a name: itself
    2. root that may change its user: an unprivileged one, which keeps the right to reach files
    3. another user: itself under an unprivileged user's number, in a user namespace
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0 and _has_name(uid):
        return ServerUser(uid=uid, gid=gid, owner=None, become=_stay, hint="")
    other = _unprivileged()
    if uid == 0 and _effective_capabilities() & _CHANGES_USER == _CHANGES_USER:
        return ServerUser(
            uid=other.pw_uid,
            gid=other.pw_gid,
            owner=(other.pw_uid, other.pw_gid),
            become=lambda: _keep_only_files(other.pw_uid, other.pw_gid),
            hint="start it as an ordinary user",
        )
    return ServerUser(
        uid=other.pw_uid,
        gid=other.pw_gid,
        owner=None,
        become=lambda: _enter_namespace(other.pw_uid, other.pw_gid, uid, gid),
        hint=(
            "start it as an ordinary user"
            if uid == 0
            else f"give the user id {uid} a line in /etc/passwd"
        ),
    )


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _unprivileged() -> pwd.struct_passwd:
    """A user with a name that is not root: nobody, or the first that there is."""
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        # None at all, in an image from scratch: initdb says that the user does not exist.
        nobody = pwd.struct_passwd(("nobody", "x", 65534, 65534, "", "/", "/bin/false"))
        return next((user for user in pwd.getpwall() if user.pw_uid != 0), nobody)


def _effective_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _stay() -> None:
    """Nothing to become."""


def _keep_only_files(uid: int, gid: int) -> None:
    # Where a container withholds one of these, the server starts if its paths are open to all.
    with contextlib.suppress(OSError):
        # Without this bit the kernel takes the capability away in access(2), by which Postgres
        # looks for its own programs, since the real user is no longer root.
        _call("prctl", _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
    _call("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    kept = 1 << _CAP_DAC_OVERRIDE
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    with contextlib.suppress(OSError):
        _call("capset", header, struct.pack("IIIIII", kept, kept, kept, 0, 0, 0))
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def _enter_namespace(uid: int, gid: int, outer_uid: int, outer_gid: int) -> None:
    _call("unshare", _CLONE_NEWUSER)
    for name, text in (
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("setgroups", "deny"),  # the kernel's condition for the next
        ("gid_map", f"{gid} {outer_gid} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    # The new namespace gave all capabilities in it; an exec as a user other than root drops them.


def _call(function: str, *arguments: int | bytes) -> None:
    if getattr(_LIBC, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
