"""Tokens of the HTTP API."""

from beatless.migrations import apply

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
