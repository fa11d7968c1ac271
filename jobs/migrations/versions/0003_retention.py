"""Retention: the pruned part of a run, and an index of the runs that are due."""

from beatless.migrations import apply

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
