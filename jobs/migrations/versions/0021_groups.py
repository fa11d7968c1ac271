"""Groups of runs, which take turns in their queues."""

from beatless.migrations import apply

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
