"""Functions that start runs from SQL, of plans that a deploy has registered, and send signals."""

from beatless.migrations import apply

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
