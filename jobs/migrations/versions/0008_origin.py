"""What tells this schema's history from every other, and from a copy of it."""

from beatless.migrations import apply

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
