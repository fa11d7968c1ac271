"""Workers tell which of their threads fail."""

from beatless.migrations import apply

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
