"""Tenants: each has runs, keys and tokens of its own, and never learns of another's."""

import re
from typing import TYPE_CHECKING

from beatless.errors import BadRequest

if TYPE_CHECKING:
    from beatless.outbox.queries import Caller

NAMESPACE = re.compile(r"[a-z0-9_][a-z0-9_-]{0,30}")
DEFAULT_NAMESPACE = "default"


def check_namespace(name: str) -> str:
    """The name, if it can be one. Raises BadRequest."""
    if not isinstance(name, str) or not NAMESPACE.fullmatch(name):
        problem = f"is {name!r:.200}, which does not match ^{NAMESPACE.pattern}$"
        raise BadRequest("namespace", problem)
    return name


def id_prefix(namespace: str) -> str:
    """The prefix of its run ids; no id that a caller chooses can hold a `~`."""
    return "" if namespace == DEFAULT_NAMESPACE else f"{namespace}~"


def stored_id(namespace: str, run_id: str) -> str:
    """The id of a run as it is stored, given with or without the prefix of its namespace."""
    prefix = id_prefix(namespace)
    return run_id if run_id.startswith(prefix) else prefix + run_id


def namespace_of(run_id: str) -> str:
    """The namespace that an id belongs to, as `id_prefix` has marked it."""
    name, mark, _ = run_id.partition("~")
    return name if mark else DEFAULT_NAMESPACE


def namespaces_beside(caller: "Caller", schema: str, namespace: str) -> list[str]:
    """Namespaces that have runs, at most two, of those that are not this one."""
    from beatless.outbox.queries import execute
    from beatless.outbox.statements import statements

    sql = statements(__file__, schema)
    return [name for (name,) in execute(caller, sql["beside"], {"namespace": namespace})]
