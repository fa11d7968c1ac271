"""Slots that runs keep until their end, and lend to their children."""

from beatless.migrations import apply

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
