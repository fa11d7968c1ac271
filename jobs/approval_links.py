"""Links by which one person decides one approval: tokens that are hashed at rest, and good once."""

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from beatless.outbox.queries import Caller, execute
from beatless.outbox.statements import statements

PATH = "approve"
"""The part of the path before the token."""


class LinkState(StrEnum):
    """Whether a link may decide its approval, and if not, why."""

    OPEN = "open"
    EARLY = "early"
    """The run has not come to the approval yet."""
    USED = "used"
    DECIDED = "decided"
    """Somebody else was first."""
    ENDED = "ended"
    """The run has ended, or does not wait for this approval any more."""
    EXPIRED = "expired"
    REVOKED = "revoked"
    """Also with the token that made it, when that is revoked or expires."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalLink:
    """A link by which a person decides one approval of one run.

    Whoever has it may decide in the name of that person: send it to nobody else.

    >>> run = beatless.start_run("complaint")
    >>> executed = beatless.work_until_idle()
    >>> link = beatless.client.approval_link(run.run_id, "Refund", by="ann@example.com")
    >>> link.occurrence, link.url("https://beatless.example/").rpartition("/")[0]
    ('Refund', 'https://beatless.example/approve')
    """

    id: str
    """By which it is revoked."""
    run_id: str
    occurrence: str
    """The wait that it decides."""
    by: str
    expires_at: datetime
    token: str = field(repr=False)
    """Its secret, which is not stored."""

    @property
    def path(self) -> str:
        """Its path below the address of the API."""
        return f"{PATH}/{self.token}"

    def url(self, base_url: str) -> str:
        """Its address, at the API of this address."""
        return f"{base_url.rstrip('/')}/{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLink:
    """A stored link, and whether it may decide."""

    id: str
    run_id: str
    namespace: str
    plan: str
    occurrence: str
    by: str
    expires_at: datetime
    state: LinkState
    """OPEN if nothing is against it but the wait itself, which may have ended."""
    decided_by: str | None
    decided_at: datetime | None


class ApprovalLinks:
    """The links of one schema."""

    def __init__(self, schema: str) -> None:
        self._sql = statements(__file__, schema)

    def create(
        self,
        connection: Caller,
        run_id: str,
        occurrence: str,
        *,
        by: str,
        seconds: float,
        maker: str | None,
    ) -> ApprovalLink:
        """Store a link that is good for so long, and no longer than the token that makes it."""
        link_id, token = secrets.token_hex(16), f"ba_{secrets.token_urlsafe(32)}"
        row = {
            "id": link_id,
            "hash": _hash(token),
            "run_id": run_id,
            "occurrence": occurrence,
            "by": by,
            "maker": maker,
            "seconds": seconds,
        }
        ((expires_at,),) = execute(connection, self._sql["create"], row)
        return ApprovalLink(
            id=link_id,
            run_id=run_id,
            occurrence=occurrence,
            by=by,
            expires_at=expires_at,
            token=token,
        )

    def find(self, connection: Caller, token: str) -> FoundLink | None:
        """The link of this token, with its state; None if there is none."""
        rows = execute(connection, self._sql["find"], {"hash": _hash(token)})
        if not rows:
            return None
        *link, revoked, expired, ended, decided_by, decided_at, used, begun = rows[0]
        link_id, run_id, namespace, plan, occurrence, by, expires_at = link
        reasons = {
            LinkState.USED: used,
            LinkState.REVOKED: revoked,
            LinkState.DECIDED: decided_by is not None,
            LinkState.EXPIRED: expired,
            LinkState.ENDED: ended,
            LinkState.EARLY: not begun,
        }
        return FoundLink(
            id=link_id,
            run_id=run_id,
            namespace=namespace,
            plan=plan,
            occurrence=occurrence,
            by=by,
            expires_at=expires_at,
            state=next((state for state, true in reasons.items() if true), LinkState.OPEN),
            decided_by=decided_by,
            decided_at=decided_at,
        )

    def revoke(self, connection: Caller, link_id: str, *, namespace: str) -> bool:
        """Whether there is such a link; it decides nothing any more."""
        row = {"id": link_id, "namespace": namespace}
        return bool(execute(connection, self._sql["revoke"], row))


def _hash(token: str) -> bytes:
    # The token has 256 random bits: a fast hash is as good as a slow one.
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()
