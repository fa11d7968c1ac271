"""Runs, their journal, the outbox and the dispatches."""

from beatless.migrations import apply

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
