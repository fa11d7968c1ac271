"""Signals of runs, and the runs that the relay is to wake for them."""

from beatless.migrations import apply

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
