"""Indexes for queries over millions of ended runs."""

from beatless.migrations import apply

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
