"""Versions of servers and packages: from which on known holes and weaknesses are closed."""

import re
from collections.abc import Mapping
from typing import NamedTuple


class Fix(NamedTuple):
    """The release of a branch that closes all known holes."""

    patch: int
    """The last part of its number."""
    hole: str
    """One of those that it closes."""


class Weakness(NamedTuple):
    """A weakness of a package before a version."""

    package: str
    fixed: tuple[int, int]
    text: str

    def is_in(self, version: str) -> bool:
        """Whether this version of the package has it."""
        return tuple(map(int, re.findall(r"\d+", version)[:2])) < self.fixed


PACKAGES = (
    Weakness(
        "celery", (5, 6), "a prefork worker takes one more message for each place than it executes"
    ),
    Weakness(
        "kombu",
        (5, 7),
        "a relay makes a round trip to the broker for each message, not each batch",
    ),
)

POSTGRES = {
    # https://www.postgresql.org/support/security/ , release of 2026-08-13 (28 CVEs)
    18: Fix(6, "CVE-2026-6471"),
    17: Fix(11, "CVE-2026-6471"),
    16: Fix(15, "CVE-2026-6471"),
    15: Fix(19, "CVE-2026-6471"),
}
"""By supported major version."""

REDIS = {
    # https://github.com/redis/docs/pull/3292 (2026-05), docker-library/official-images#20011
    (8, 6): Fix(3, "CVE-2026-23479"),
    (8, 4): Fix(3, "CVE-2026-23479"),
    (8, 2): Fix(6, "CVE-2026-23479"),
    (8, 0): Fix(4, "CVE-2025-49844"),
    (7, 4): Fix(9, "CVE-2026-23479"),
    (7, 2): Fix(11, "CVE-2025-49844"),
    (6, 2): Fix(20, "CVE-2025-49844"),
}
VALKEY = {
    # https://github.com/valkey-io/valkey/releases , 2026-05 and 2026-07
    (9, 1): Fix(1, "CVE-2026-56684"),
    (9, 0): Fix(5, "CVE-2026-56684"),
    (8, 1): Fix(7, "CVE-2026-23479"),
    (8, 0): Fix(8, "CVE-2026-23479"),
    (7, 2): Fix(13, "CVE-2026-23479"),
}

BACKPORTS = (
    "unless the package is one of a distribution that has mended it under the old number: its "
    "changelog says so"
)
"""A server only gives its number."""


def older_than(table: Mapping[tuple[int, int], Fix], version: str) -> tuple[str, str] | None:
    """The version that closes the known holes of this one, and one of them; None if it has none."""
    major, minor, patch = ([int(part) for part in re.findall(r"\d+", version)] + [0, 0, 0])[:3]
    branch = (major, minor)
    if branch > max(table):
        return None
    if branch not in table:
        branch = max(table)  # no longer mended: another branch is the way
    fix = table[branch]
    if branch == (major, minor) and patch >= fix.patch:
        return None
    return f"{branch[0]}.{branch[1]}.{fix.patch}", fix.hole
