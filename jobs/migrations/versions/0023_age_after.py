"""Runs that have waited for long come before those of a higher priority."""

from beatless.migrations import apply

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
