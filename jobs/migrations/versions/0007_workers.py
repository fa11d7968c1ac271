"""Workers tell which queues they consume."""

from beatless.migrations import apply

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
