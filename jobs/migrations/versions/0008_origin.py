"""An identity of this schema's history, which a copy of it does not share."""

from beatless.migrations import apply

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
