"""A keyed start is compared by what its caller named."""

from beatless.migrations import apply

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    apply(__file__)
