"""Bearer tokens of the HTTP API: hashed at rest, scoped, bound to a namespace."""

import hashlib
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy
from sqlalchemy import Column, DateTime, Index, LargeBinary, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY

from beatless.errors import BadRequest
from beatless.namespaces import DEFAULT_NAMESPACE, check_namespace
from beatless.orchestrator.tables import runs
from beatless.outbox.queries import execute
from beatless.outbox.statements import statements
from beatless.outbox.tables import Id
from beatless.outbox.times import problem_with_seconds

api_tokens = Table(
    "api_tokens",
    runs.metadata,
    Column("id", Id, primary_key=True),
    Column("hash", LargeBinary, nullable=False, unique=True),
    Column("namespace", Id, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("run_id", Id),
    Column("note", Text),
    Column(
        "created_at",
        DateTime(timezone=True),
        nullable=False,
        server_default=text("clock_timestamp()"),
    ),
    Column("expires_at", DateTime(timezone=True)),
    Column("maker", Id),
    Index("api_tokens_expiry", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    Index("api_tokens_kept", "created_at", postgresql_where=text("run_id IS NULL")),
)

SWEEP = 100
"""Expired tokens that a new one takes away: more than come, and little to wait for."""

STREAM_TOKEN_S = 300
"""How long the token of one stream is good."""

NO_TOKEN = ""
"""The id of the grant while there is no token, and the maker of its tokens."""


class Scope(StrEnum):
    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    QUEUES = "queues"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The scopes and namespace of a caller. `run_id` narrows them to following one run."""

    scopes: Collection[str]
    namespace: str = DEFAULT_NAMESPACE
    run_id: str | None = None
    token_id: str | None = None
    """None where the caller has no token of ours."""
    maker: str | None = None
    """The token that made this one."""

    def __post_init__(self) -> None:
        """Raises TypeError and ValueError that say how it must be."""
        if isinstance(self.scopes, str) or not isinstance(self.scopes, Collection):
            raise TypeError(
                f"the scopes of a Grant are {self.scopes!r:.200}; give a list, as in "
                f'scopes=["{Scope.RUNS_READ}"]'
            )
        if unknown := [each for each in self.scopes if each not in list(Scope)]:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"a Grant has unknown scopes: {names}; choose from {', '.join(Scope)}")
        try:
            check_namespace(self.namespace)
        except BadRequest as error:
            raise ValueError(f"a Grant has a bad namespace: {error}") from error

    def allows(self, scope: Scope) -> bool:
        """Admin includes everything within its namespace; writing includes reading.

        Queues are the whole fleet's, and so belong to the namespace `default` only.
        """
        if scope is Scope.QUEUES and self.namespace != DEFAULT_NAMESPACE:
            return False
        if Scope.ADMIN in self.scopes or scope in self.scopes:
            return True
        return scope is Scope.RUNS_READ and Scope.RUNS_WRITE in self.scopes


EVERYTHING = Grant(scopes=frozenset(Scope), token_id=NO_TOKEN)
"""The grant of a server without any token to its own machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A stored token, without its secret."""

    id: str
    namespace: str
    scopes: tuple[str, ...]
    note: str | None
    created_at: datetime
    expires_at: datetime | None


class Tokens:
    """The tokens of one schema."""

    def __init__(self, engine: sqlalchemy.Engine, schema: str) -> None:
        self._engine = engine
        self._sql = statements(__file__, schema, sweep=SWEEP)

    def create(
        self,
        scopes: Sequence[str],
        *,
        namespace: str = DEFAULT_NAMESPACE,
        seconds: float | None = None,
        note: str | None = None,
        run_id: str | None = None,
        maker: str | None = None,
    ) -> tuple[str, str]:
        """(id, secret): the secret is shown once and never stored. Raises BadRequest.

        A token with a `maker`, the id of another token, is valid no longer than that one.
        """
        unknown = sorted(set(scopes) - set(Scope))
        if unknown or not scopes:
            raise BadRequest(
                "scope", f"{', '.join(unknown) or 'is missing'}; choose from {', '.join(Scope)}"
            )
        check_namespace(namespace)
        if Scope.QUEUES in scopes and namespace != DEFAULT_NAMESPACE:
            raise BadRequest(
                "scope",
                f"queues is the whole fleet's: it belongs to namespace {DEFAULT_NAMESPACE}; "
                f"the limits and groups of {namespace} are for its tokens with the scope admin",
            )
        if seconds is not None and (problem := problem_with_seconds(seconds)):
            raise BadRequest("expires", problem)
        token_id, secret = secrets.token_hex(16), f"bl_{secrets.token_urlsafe(32)}"
        with self._engine.begin() as connection:
            execute(
                connection,
                self._sql["create"],
                {
                    "id": token_id,
                    "hash": _hash(secret),
                    "namespace": namespace,
                    "scopes": list(scopes),
                    "run_id": run_id,
                    "note": note,
                    "maker": maker,
                    "seconds": seconds,
                },
            )
        return token_id, secret

    def create_for_stream(self, run_id: str, *, namespace: str, maker: str | None) -> str:
        """The secret of a token that may follow this run for `STREAM_TOKEN_S`."""
        _, secret = self.create(
            [Scope.RUNS_READ],
            namespace=namespace,
            seconds=STREAM_TOKEN_S,
            run_id=run_id,
            note="stream",
            maker=maker,
        )
        return secret

    def find(self, secret: str) -> Grant | None:
        """The grant of this token now; None if it is unknown, expired or revoked."""
        with self._engine.begin() as connection:
            rows = execute(
                connection,
                self._sql["find"],
                {"hash": _hash(secret)},
            )
        if not rows:
            return None
        namespace, scopes, run_id, token_id, maker = rows[0]
        known = set(Scope)
        try:
            return Grant(
                namespace=namespace,
                # An array of Postgres may hold arrays and nulls, and scopes of a newer version.
                scopes=frozenset(
                    each for each in scopes if isinstance(each, str) and each in known
                ),
                run_id=run_id,
                token_id=token_id,
                maker=maker,
            )
        except ValueError:  # its namespace is one that nobody can have
            return None

    def good(self, token_ids: Collection[str]) -> frozenset[str]:
        """Those of these tokens that still grant something; `NO_TOKEN` while there is none."""
        with self._engine.begin() as connection:
            rows = execute(
                connection,
                self._sql["good"],
                {"ids": list(token_ids)},
            )
        return frozenset(token_id for (token_id,) in rows)

    def any(self) -> bool:
        """Whether there is any token, so that every caller needs one."""
        with self._engine.begin() as connection:
            return bool(execute(connection, self._sql["any"], {})[0][0])

    def list(self) -> list[Token]:
        """The tokens that are not for a single stream, oldest first."""
        with self._engine.begin() as connection:
            rows = execute(
                connection,
                self._sql["list"],
                {},
            )
        return [
            Token(
                id=row[0],
                namespace=row[1],
                scopes=tuple(row[2]),
                note=row[3],
                created_at=row[4],
                expires_at=row[5],
            )
            for row in rows
        ]

    def revoke(self, token_id: str) -> None:
        """Raises BadRequest if there is no such token."""
        with self._engine.begin() as connection:
            rows = execute(
                connection,
                self._sql["revoke"],
                {"id": token_id},
            )
        if not rows:
            raise BadRequest("token", f"{token_id} does not exist; see `beatless token ls`")


def _hash(secret: str) -> bytes:
    # The secret has 256 random bits: a fast hash is as good as a slow one.
    return hashlib.sha256(secret.encode()).digest()
