"""Runs that other runs have started, and the notes that tell these of their ends."""

from beatless.migrations import apply

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
